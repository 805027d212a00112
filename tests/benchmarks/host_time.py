"""Main-thread time of a step in which arithmetic is nothing, over that of plain transformers in the same process.

    OMP_NUM_THREADS=1 python tests/benchmarks/host_time.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/host_time.py [--cases "tp 2" …]

On one rank it measures one rank, on two and four the meshes of so many. A rank's micro batch is 2 rows of 64 tokens, on
16 layers of width 64. Time is that of the thread which runs Python and autograd (`time.thread_time`), so that neither
waiting for a collective nor other processes count. Steps of all contestants alternate; a number is a median. A step is
everything: batch, forward, loss, backward, clipping, AdamW, metrics.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.hf.model import meta_model  # noqa: E402
from ndtrain.plan import make_plan  # noqa: E402
from ndtrain.recipe import load_recipe  # noqa: E402
from ndtrain.runs.process import Runtime, start  # noqa: E402
from ndtrain.train import Silent, Trainer, sizes_for  # noqa: E402
from tests.tiny import recipe_text  # noqa: E402

ROWS, LENGTH = 2, 64
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


class Case(NamedTuple):
    """A mesh, what the recipe adds, and the sizes of transformers' own `DistributedConfig`, None where it has none."""

    mesh: dict[str, int]
    more: dict[str, Any]
    own: dict[str, int] | None
    kind: str = "qwen3"

    @property
    def batch_ranks(self) -> int:
        return self.mesh.get("dp_shard", 1)

    @property
    def ranks(self) -> int:
        return self.batch_ranks * self.mesh.get("tp", 1)


CASES = {
    "1 rank": Case({}, {}, None),
    "dp_shard 2": Case({"dp_shard": 2}, {}, {"fsdp_size": 2}),
    "tp 2": Case({"dp_shard": 1, "tp": 2}, {}, {"tp_size": 2}),
    "tp 2, whole sequences": Case({"dp_shard": 1, "tp": 2}, {"tp": {"sequence_parallel": False}}, {"tp_size": 2}),
    "dp_shard 2 x tp 2": Case({"dp_shard": 2, "tp": 2}, {}, {"fsdp_size": 2, "tp_size": 2}),
    "dp_shard 2 x ep 2": Case({"dp_shard": 2, "ep": 2}, {}, {"fsdp_size": 2, "ep_size": 2}, "qwen3_moe"),
}


def save_models(folder: Path) -> None:
    for kind, more in (("qwen3", {}), ("qwen3_moe", EXPERTS)):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SHAPE, **more)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)


def ndtrain_step(folder: Path, name: str, case: Case, runtime: Runtime) -> Callable[[], Any]:
    """Return ndtrain's step on the case's mesh, with documents that are not packed, as transformers has them here."""
    own = f"{list(CASES).index(name)}-{runtime.rank}"
    text = recipe_text(
        model={"name": str(folder / case.kind)},
        mesh=case.mesh,
        fsdp={"param_dtype": "float32"},
        data={"path": str(folder / "corpus"), "seq_len": LENGTH, "tokenizer": "bytes", "packing": False},
        optim={"lr": 1e-4, "weight_decay": 0.1, "max_grad_norm": 1.0},
        schedule={"kind": "constant"},
        train={"steps": 10**6, "global_batch_size": ROWS * case.batch_ranks, "micro_batch_size": ROWS},
        checkpoint={"every": 0, "resume": "never"},
        run={"dir": str(folder / f"run-{list(CASES).index(name)}")},
        **case.more,
    )
    (folder / f"{own}.toml").write_text(text)
    recipe = load_recipe(folder / f"{own}.toml", [])
    model = meta_model(recipe)
    plan = make_plan(model, sizes_for(recipe, runtime.world_size), recipe)
    trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=Silent())
    trainer.prepare()
    return trainer.advance


def transformers_step(folder: Path, case: Case, *, sizes: dict[str, int] | None) -> Callable[[], Any]:
    """Return the step of a plain loop on the model in one process, or cut by transformers itself to `sizes`."""
    more: dict[str, Any] = {}
    if sizes is not None:
        from transformers.distributed import DistributedConfig

        more["distributed_config"] = DistributedConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / case.kind, dtype=torch.float32, **more)
    model.train()
    groups: dict[Any, list[Any]] = {}  # no fused kernel or norm takes tensors of two meshes
    for param in model.parameters():
        groups.setdefault(getattr(param, "device_mesh", None), []).append(param)
    optimizer = torch.optim.AdamW([{"params": params} for params in groups.values()], lr=1e-4, fused=True)
    ids = torch.randint(0, 256, (ROWS, LENGTH))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for params in groups.values():
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def measure(steps: dict[str, Callable[[], Any]], *, rounds: int, warm: int) -> dict[str, float]:
    """Return the median main-thread seconds of each, largest over the ranks."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm + rounds):
        for name, step in steps.items():
            dist.barrier()
            before = time.thread_time()
            step()
            if number >= warm:
                times[name].append(time.thread_time() - before)
    medians = torch.tensor([statistics.median(found) for found in times.values()], dtype=torch.float64)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return dict(zip(steps, medians.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with start() as runtime, tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        os.environ["NDTRAIN_CACHE"] = str(folder / "cache")
        if runtime.is_main:
            save_models(folder)
            (folder / "corpus").mkdir()
            for number in range(64):
                (folder / "corpus" / f"{number}.txt").write_text("All work and no play. " * 8)
        dist.barrier()
        if runtime.is_main:
            print("| mesh | plain, ms | ndtrain / plain | transformers' own / plain |\n|---|---|---|---|", flush=True)
        for name in options.cases:
            case = CASES[name]
            if case.ranks != runtime.world_size:
                continue
            steps = {
                "plain": transformers_step(folder, case, sizes=None),
                "ndtrain": ndtrain_step(folder, name, case, runtime),
            }
            if case.own is not None:
                try:
                    steps["own"] = transformers_step(folder, case, sizes=case.own)
                    steps["own"]()
                except Exception as error:
                    print(f"transformers does not run {name}: {str(error).splitlines()[0]}", file=sys.stderr)
                    steps.pop("own", None)
            found = measure(steps, rounds=options.rounds, warm=options.warm)
            if runtime.is_main:
                own_ratio = f"{found['own'] / found['plain']:.2f}" if "own" in found else "-"
                ratio = found["ndtrain"] / found["plain"]
                print(f"| {name} | {found['plain'] * 1e3:.1f} | {ratio:.2f} | {own_ratio} |", flush=True)
        dist.barrier()


if __name__ == "__main__":
    main()
