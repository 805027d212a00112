"""What `inspect` prints of placements, local shapes and bytes beside what the ranks of a real gloo run hold.

OMP_NUM_THREADS=1 python -m tests.plan_truth [--table FILE] [CASE]...
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ndtrain.console.inspect import inspect_text
from ndtrain.recipe import load_recipe
from tests import tiny
from tests.ranks import RankPool

# name -> model, its config, mesh
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama, dp_shard 4": ("llama", {}, {"dp_shard": 4}),
    "llama, uneven, dp_shard 3": ("llama", {"intermediate_size": 100, "vocab_size": 263}, {"dp_shard": 3}),
    "llama, dp_shard 2 x tp 2": ("llama", {}, {"dp_shard": 2, "tp": 2}),
    "qwen3, tp 4": ("qwen3", {}, {"tp": 4}),
    "gemma3_text (tied), dp_replicate 2 x tp 2": ("gemma3_text", {}, {"dp_replicate": 2, "tp": 2}),
    "phi3 (packed), dp_shard 2 x tp 2": ("phi3", {}, {"dp_shard": 2, "tp": 2}),
    "gpt2 (Conv1D, derived plan), dp_shard 2 x tp 2": ("gpt2", {}, {"dp_shard": 2, "tp": 2}),
    "qwen3, dp_shard 2 x cp 2": ("qwen3", {}, {"dp_shard": 2, "cp": 2}),
    "qwen3_moe, dp_shard 4": ("qwen3_moe", {}, {"dp_shard": 4}),
    "qwen3_moe, dp_shard 4, ep 2": ("qwen3_moe", {}, {"dp_shard": 4, "ep": 2}),
    "qwen3_moe, dp_replicate 2 x dp_shard 2, ep 2": ("qwen3_moe", {}, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
    "gpt_oss (biased experts), dp_shard 2 x tp 2, ep 4": ("gpt_oss", {}, {"dp_shard": 2, "tp": 2, "ep": 4}),
    "deepseek_v3 (latent attention), dp_shard 2 x tp 2, ep 2": ("deepseek_v3", {}, {"dp_shard": 2, "tp": 2, "ep": 2}),
}


def held(path: str) -> dict[str, Any]:
    """After a step: each parameter's axes, placements, local shape and bytes on this rank, and all bytes by kind."""
    from torch.distributed.tensor import DTensor

    from ndtrain.layout import local_part
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    trainer.prepare()
    trainer.train_step()
    params: dict[str, Any] = {}
    total = {"parameters": 0, "optimizer": 0}
    for fqn, param in trainer.engine.model.named_parameters():
        assert isinstance(param, DTensor)
        local = local_part(param)
        params[fqn] = {
            "shape": list(param.shape),
            "axes": list(param.device_mesh.mesh_dim_names or ()),
            "placements": [str(placement) for placement in param.placements],
            "local_shape": list(local.shape),
            "local_bytes": local.numel() * local.element_size(),
        }
        total["parameters"] += params[fqn]["local_bytes"]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = local_part(trainer.engine.optimizer.state[param][name])
            total["optimizer"] += moment.numel() * moment.element_size()
    return {"params": params, "total": total}


def compared(case: str, folder: Path, pool: RankPool) -> tuple[int, int, list[str]]:
    """(ranks, parameters, what is printed otherwise than it is held)."""
    kind, config, mesh = CASES[case]
    batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    attn = "eager" if kind == "gpt_oss" else "sdpa"
    known = tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": kind, "init": "random", "attn": attn, "config": {**known, **config}},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "run",
        mesh=mesh,
        batch_ranks=batch_ranks,
        steps=3,
        data={"packing": False},
    )
    odd: list[str] = []
    names: set[str] = set()
    for rank, real in enumerate(pool.run(held, str(path), timeout=200)):
        report = json.loads(inspect_text(load_recipe(path), world_size=pool.size, rank=rank, as_json=True))
        printed = {param["fqn"]: param for param in report["params"]}
        names |= printed.keys()
        if missing := printed.keys() ^ real["params"].keys():
            odd.append(f"rank {rank}: {sorted(missing)}")
        for fqn, found in real["params"].items():
            told = {key: printed.get(fqn, {}).get(key) for key in found}
            if told != found:
                odd.append(f"rank {rank}: {fqn}: printed {told}, held {found}")
        total = {kind: report["bytes"]["rank"][kind] for kind in real["total"]}
        if total != real["total"]:
            odd.append(f"rank {rank}: printed {total}, held {real['total']}")
    return pool.size, len(names), odd


def ranks_of(case: str) -> int:
    return math.prod(size for axis, size in CASES[case][2].items() if axis != "ep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        "`OMP_NUM_THREADS=1 python -m tests.plan_truth --table FILE`. Of every parameter on every rank: shape, "
        "mesh axes, placements, local shape, bytes; of every rank the bytes of parameters and of AdamW's moments "
        "after a step.",
        "",
        "| model, mesh | ranks | parameters | printed otherwise than held |",
        "|---|---|---|---|",
    ]
    for case in options.cases or CASES:
        pool = RankPool(ranks_of(case))
        with tempfile.TemporaryDirectory() as folder:
            try:
                ranks, params, odd = compared(case, Path(folder), pool)
            finally:
                pool.close()
        lines.append(f"| {case} | {ranks} | {params} | {len(odd) or 'none'} |")
        print(lines[-1], *odd, sep="\n  ", flush=True)
    if options.table:
        options.table.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
