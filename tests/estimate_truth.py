"""What `inspect --dry-run` says of a step beside what the ranks of a real gloo run allocate and send.

    OMP_NUM_THREADS=1 python -m tests.estimate_truth [--table FILE] [CASE]...

Memory is what malloc has given out after any operation of a step, the largest over the ranks; collectives are those of
torch's profiler.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ndtrain.estimate import estimate_step
from ndtrain.recipe import load_recipe
from ndtrain.train import sizes_for
from tests import tiny
from tests.measured import measured
from tests.ranks import RankPool

_SIZES = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_HEADS},
    "qwen3_moe": {**_SIZES, **_HEADS, **_EXPERTS},
    "gpt2": {"vocab_size": 2048, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512, **_NO_DROPOUT},
}
# model, mesh, more sections
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "dp_shard 2": ("llama", {"dp_shard": 2}, {}),
    "tp 2": ("llama", {"tp": 2}, {}),
    "tp 2, no sequence parallelism": ("llama", {"tp": 2}, {"tp": {"sequence_parallel": False}}),
    "dp_shard 2, tp 2": ("llama", {"dp_shard": 2, "tp": 2}, {}),
    "cp 2, ulysses": ("llama", {"cp": 2}, {"cp": {"kind": "ulysses"}}),
    "cp 2, ring": ("llama", {"cp": 2}, {"cp": {"kind": "ring"}}),
    "dp_replicate 2, dp_shard 2": ("llama", {"dp_replicate": 2, "dp_shard": 2}, {}),
    "dp_shard 2, activation checkpointing": (
        "llama",
        {"dp_shard": 2},
        {"train": {"activation_checkpointing": "full"}},
    ),
    "dp_shard 2, bfloat16": ("llama", {"dp_shard": 2}, {"fsdp": {"param_dtype": "bfloat16"}}),
    "dp_shard 2, no reshard": ("llama", {"dp_shard": 2}, {"fsdp": {"reshard_after_forward": False}}),
    "dp_shard 2, no packing": ("llama", {"dp_shard": 2}, {"data": {"packing": False}}),
    "gpt2, dp_shard 2": ("gpt2", {"dp_shard": 2}, {}),
    "experts, dp_shard 2": ("qwen3_moe", {"dp_shard": 2}, {}),
    "experts, dp_shard 2, ep 2": ("qwen3_moe", {"dp_shard": 2, "ep": 2}, {}),
    "experts, dp_shard 2, tp 2, ep 4": ("qwen3_moe", {"dp_shard": 2, "tp": 2, "ep": 4}, {}),
}
# What the loop itself exchanges, beside the step: counts of tokens, sums of the loss, requests.
OF_THE_LOOP = 3


def recipe_of(case: str, folder: Path) -> tuple[Path, int]:
    """The recipe of `case` and its number of ranks."""
    kind, mesh, more = CASES[case]
    batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": kind, "init": "random", "config": MODELS[kind]},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "run",
        mesh=mesh,
        batch_ranks=batch_ranks,
        accumulation=2,
        steps=4,
        **{**more, "data": {"seq_len": 128, **more.get("data", {})}},
    )
    return path, batch_ranks * mesh.get("cp", 1) * mesh.get("tp", 1)


def compared(case: str, folder: Path, pool: RankPool) -> tuple[int, int, dict[str, list[int]], dict[str, list[int]]]:
    """(peak bytes as estimated, as measured, {collective: [count, bytes]} as estimated, as measured)."""
    path, ranks = recipe_of(case, folder)
    recipe = load_recipe(path)
    step = estimate_step(recipe, sizes_for(recipe, ranks))
    sent: dict[str, list[int]] = {}
    for collective in step.sent(8):
        total = sent.setdefault(collective.op, [0, 0])
        total[0] += collective.count
        total[1] += collective.bytes
    real = pool.run(measured, str(path), [], timeout=200)
    theirs = real[0]["sent"]
    theirs["all_reduce"][0] -= OF_THE_LOOP
    return step.peak_bytes, max(rank["peak"] for rank in real), sent, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        "`OMP_NUM_THREADS=1 python -m tests.estimate_truth --table FILE`. Peak of the fullest rank in MB; counts of "
        "collectives; bytes of all but the all-to-all of experts, which real routers fill unevenly, are equal where "
        "the counts are.",
        "",
        "| recipe | estimated MB | measured MB | ratio | collectives estimated | measured |",
        "|---|---|---|---|---|---|",
    ]
    for case in options.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            _, ranks = recipe_of(case, Path(folder))
            pool = RankPool(ranks)
            try:
                ours, theirs, sent, real = compared(case, Path(folder), pool)
            finally:
                pool.close()
        counts = [", ".join(f"{op} {n}" for op, (n, _) in sorted(of.items())) for of in (sent, real)]
        lines.append(
            f"| {case} | {ours / 1e6:.1f} | {theirs / 1e6:.1f} | {ours / theirs:.3f} | {counts[0]} | {counts[1]} |"
        )
        print(lines[-1], flush=True)
        for op, (_, size) in sent.items():
            if op not in ("all_reduce", "all_to_all") and size != real[op][1]:
                print(f"  {op}: {size} bytes estimated, {real[op][1]} measured", flush=True)
    if options.table:
        options.table.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
