"""Save on each of eight meshes, load on each of eight: weights, moments, the next step and the order of samples.

    OMP_NUM_THREADS=1 python -m tests.resume_matrix --out DIR [--table tests/RESUME.md]

Dense models, tied and packed ones, and a mixture of experts. A cell is right where every parameter and both of AdamW's
moments are bit-equal to what was saved, the loss of the next step is that of the run that went on (relative 1e-6),
and the samples are those that it read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.matrix.worker import whole
from tests.ranks import RankPool, RanksFailed

DENSE = {
    "1": {},
    "dp_shard2": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "tp3": {"tp": 3},
    "cp2": {"cp": 2},
    "dp_shard4": {"dp_shard": 4},
    "dp_shard2-tp2": {"dp_shard": 2, "tp": 2},
    "dp_replicate2-dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
}
EXPERTS = {
    "1": {},
    "ep2": {"dp_shard": 2, "ep": 2},
    "dp_shard2-tp2": {"dp_shard": 2, "tp": 2},
    "cp2-tp2": {"cp": 2, "tp": 2},
    "ep4": {"dp_shard": 4, "ep": 4},
    "dp_shard2-tp2-ep4": {"dp_shard": 2, "tp": 2, "ep": 4},
    "dp_shard2-cp2-ep4": {"dp_shard": 2, "cp": 2, "ep": 4},
    "dp_replicate2-ep2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
}
# Six heads divide by 2 and by 3; the 261 rows of the vocabulary do not divide by 2: shards are uneven, without padding.
SIX = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 102}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, int]]]] = {
    "dense": ("llama", SIX, DENSE),
    "tied": ("gemma3_text", SIX, DENSE),
    "packed": ("phi3", SIX, DENSE),
    "experts": ("qwen3_moe", {}, EXPERTS),
}
SAVED_STEP = 2


def cell(path: str, saved: str, *, loads: bool) -> dict[str, Any]:
    """Train to `SAVED_STEP` and save, or load what was saved; then one more step. What is wrong, or None."""
    from ndtrain.errors import NdtrainError
    from ndtrain.hf.weight_names import model_tensors
    from tests.trainers import trainer_of

    rank = dist.get_rank()
    try:
        trainer = trainer_of(path)
        trainer.prepare()
        if loads and trainer.step != SAVED_STEP:
            return {"wrong": f"starts at step {trainer.step}"}
        while trainer.step < SAVED_STEP:
            trainer.train_step()
        state: dict[str, Tensor] = {}
        for part, group in (
            ("model", model_tensors(trainer.engine.model)),
            ("optim", trainer.engine.optimizer_tensors()),
        ):
            for key, tensor in group.items():
                state[f"{part}.{key}"], spread = whole(tensor.detach())
                if spread:
                    return {"wrong": f"replicas of {key} differ by {spread}"}
        ids = trainer.batches.sample_ids(trainer.cursor).tolist()
        if not loads:
            trainer.save()
            trainer.saving.store.settle()
        loss = trainer.train_step().loss
    except NdtrainError as error:
        return {"wrong": f"{type(error).__name__}: {error}"}
    if not loads:
        if rank == 0:
            save_file({k: v.contiguous() for k, v in state.items()}, f"{saved}.safetensors")
            Path(f"{saved}.json").write_text(json.dumps({"loss": loss, "ids": ids}))
        return {"wrong": None}
    wanted, told = load_file(f"{saved}.safetensors"), json.loads(Path(f"{saved}.json").read_text())
    if odd := wanted.keys() ^ state.keys():
        return {"wrong": f"other tensors: {sorted(odd)[:3]}"}
    for key, tensor in state.items():
        if not torch.equal(tensor, wanted[key]):
            return {"wrong": f"{key} differs"}
    if ids != told["ids"]:
        return {"wrong": "other samples"}
    apart = abs(loss - told["loss"]) / abs(told["loss"])
    return {"wrong": None if apart < 1e-6 else f"the next loss differs by {apart:.1e}", "apart": apart}


def run(folder: Path, model: str, first: str, second: str | None, pools: dict[int, RankPool]) -> dict[str, Any]:
    """Save on mesh `first`, or load on mesh `second` what was saved there."""
    kind, config, meshes = MODELS[model]
    sizes = meshes[second or first]
    name = f"{model}-{first}"
    recipe = tiny.recipe_file(
        folder / f"{name}-to-{second}.toml",
        model={"type": tiny.VARIANTS.get(kind, kind), "init": "random", "config": {**tiny.CONFIGS[kind], **config}},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "runs" / name if second is None else folder / "runs" / f"{name}-to-{second}",
        mesh=sizes,
        steps=10,
        batch_ranks=sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        checkpoint={
            "every": 0,
            "resume": "never" if second is None else str(folder / f"runs/{name}/checkpoints/step-{SAVED_STEP:08d}"),
        },
        tp={"sequence_parallel": True},
    )
    ranks = math.prod(size for axis, size in sizes.items() if axis != "ep")
    if ranks not in pools:
        pools[ranks] = RankPool(ranks, cases=30)
    try:
        answers = pools[ranks].run(_cell, str(recipe), str(folder / name), second is not None, timeout=120)
    except RanksFailed as error:
        return {"wrong": str(error).strip().splitlines()[-1][:200]}
    return max(answers, key=lambda a: (a["wrong"] is not None, a.get("apart", 0.0)))


def _cell(path: str, saved: str, loads: bool) -> dict[str, Any]:
    return cell(path, saved, loads=loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    pools: dict[int, RankPool] = {}
    started, wrong, lines = time.monotonic(), 0, []
    for model in options.models:
        meshes = MODELS[model][2]
        lines += ["", f"### {model}: {MODELS[model][0]}", "", "| saved on \\ loaded on | " + " | ".join(meshes) + " |"]
        lines.append("|---" * (len(meshes) + 1) + "|")
        for first in meshes:
            saved = run(options.out, model, first, None, pools)
            cells = []
            for second in meshes:
                found = saved if saved["wrong"] else run(options.out, model, first, second, pools)
                wrong += found["wrong"] is not None
                cells.append(found["wrong"] or f"{found['apart']:.0e}")
                print(f"{model}: {first} to {second}: {cells[-1]}", flush=True)
            lines.append(f"| {first} | " + " | ".join(cells) + " |")
    for pool in pools.values():
        pool.close()
    head = [
        f"`OMP_NUM_THREADS=1 python -m tests.resume_matrix --out DIR`: torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}, gloo, {(time.monotonic() - started) / 60:.0f} min.",
        "",
        "Every parameter and both of AdamW's moments bit-equal, the samples the same; a cell says how far the loss of "
        f"the next step is from that of the run that went on. {wrong} cells are wrong.",
    ]
    print(head[-1])
    if options.table:
        options.table.write_text("\n".join([*head, *lines, ""]))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
