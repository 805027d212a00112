"""transformers' own parallelism on the matrix's models, against the same references.

    OMP_NUM_THREADS=1 python -m tests.matrix.peer --out DIR [--types llama qwen3]

Models are loaded with `from_pretrained(distributed_config=DistributedConfig(…))` and trained by the plain loop that its
documentation shows, with two micro batches a step. FSDP averages gradients over its ranks, as documented, so the loss
is scaled by their number. Results are kept in DIR/peer.json and not computed again; `--again wrong crash` does those
again. What transformers raises counts as refused, before the weights are read or later.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from ndtrain.engine.loss import IGNORE
from tests.matrix import worker
from tests.matrix.results import Results, build_all, outcome, parser
from tests.matrix.worker import OPTIM, ROWS, STEPS
from tests.ranks import RankPool

# Column -> keyword arguments of DistributedConfig.
WAYS: dict[str, dict[str, Any]] = {
    "transformers fsdp2": {"fsdp_size": 2},
    "transformers tp2": {"tp_size": 2},
    "transformers ep2": {"fsdp_size": 2, "ep_size": 2},
}
RANKS = 2


def cell(model: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    """Train as transformers would and compare: {"status": agrees | refused | wrong, "worst", "what"}."""
    from transformers.distributed import DistributedConfig

    path = Path(model["path"])
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=model["attn"],
            distributed_config=DistributedConfig(**way),
        )
    except Exception as error:
        return {"status": "refused", "what": f"{type(error).__name__}: {_sentence(error)}"}
    loaded.train()
    batch_ranks = way.get("fsdp_size", 1)
    micro = ROWS // (2 * batch_ranks)
    batches = worker.Batches(model["vocab"], micro=micro, rank=dist.get_rank() % batch_ranks, ranks=batch_ranks)
    # foreach cannot take parameters of several meshes at once.
    optimizer = worker.plain_optimizer(loaded, foreach=False)
    first: dict[str, torch.Tensor] = {}
    steps = []
    for step in range(STEPS):
        tokens = int((worker.rows(model["vocab"], step)["labels"] != IGNORE).sum())
        mean = torch.zeros(())
        for batch in batches.load(step * ROWS):
            logits = loaded(input_ids=batch["input_ids"], use_cache=False).logits
            summed = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum"
            )
            loss = summed / tokens
            (loss * batch_ranks).backward()
            mean += loss.detach()
        if batch_ranks > 1:
            dist.all_reduce(mean)
        for param in loaded.parameters():
            if isinstance(param.grad, DTensor) and any(p.is_partial() for p in param.grad.placements):
                param.grad = param.grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        grads = {n: p.grad for n, p in loaded.named_parameters() if p.grad is not None}
        norm = sum(float(worker.whole(g)[0].norm()) ** 2 for g in grads.values()) ** 0.5
        if step == 0:
            first = {n: g.clone() for n, g in grads.items()}
        for grad in grads.values():
            grad.mul_(min(1.0, OPTIM["max_grad_norm"] / (norm + 1e-6)))  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        steps.append(SimpleNamespace(loss=float(mean), grad_norm=norm))
    return worker.compare(path, loaded, steps, first)


def _sentence(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def run(
    built: dict[str, Any], results: Results, *, kinds: list[str], ways: list[str], again: list[str], timeout: float
) -> None:
    """Compute the cells of `kinds` x `ways` that are due."""
    from tests.matrix import peer  # ranks find functions by their module's name, also where this one is the program

    # Every cell makes process groups, which leave threads behind.
    pool = RankPool(RANKS, cases=30)
    for way in ways:
        for kind in kinds:
            if "error" in built[kind] or not results.due(kind, way, again):
                continue
            found = outcome(pool, peer.cell, built[kind], WAYS[way], timeout=timeout)
            if found["status"] == "crash" and "process died" not in found["what"]:
                found = {"status": "refused", "what": f"in training: {found['what']}"}
            results.put(kind, way, found)
            print(f"{way} {kind}: {found['status']} {found.get('worst', '')} {found.get('what', '')}", flush=True)
    pool.close()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "peer.json")
    built = build_all(options.types, options.out, Results(options.out / "results.json"), results)
    run(built, results, kinds=options.types, ways=options.ways, again=options.again, timeout=options.timeout)


if __name__ == "__main__":
    main()
