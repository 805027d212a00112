"""The bound of what `inspect --suggest` finds beside that of layouts that others publish, Llama-3-70B at 8k.

OMP_NUM_THREADS=1 python tests/benchmarks/suggest_vs_published.py

Each published layout gets the settings (micro batch, recomputation, resharding) that are best for it.
"""

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ndtrain.accelerators import find_device
from ndtrain.errors import NdtrainError
from ndtrain.estimate import estimate_step, suggest
from ndtrain.estimate.search import changed
from ndtrain.recipe import Recipe, load_recipe
from ndtrain.train import sizes_for
from tests.benchmarks.inspect_speed import SHAPES
from tests.tiny import recipe_text

DEVICE, ON_NODE = "h100", 8
# ranks -> {whose layout: mesh}
PUBLISHED = {
    64: {
        "NeMo AutoModel: cp 2 x dp_shard 32": {"cp": 2, "dp_shard": 32},
        "dp_shard 8 x tp 8": {"dp_shard": 8, "tp": 8},
    },
    256: {"torchtitan: dp_shard 32 x tp 8": {"dp_shard": 32, "tp": 8}},
}


def recipe_of(folder: Path, ranks: int) -> Recipe:
    kind, config = SHAPES["Llama-3-70B"]
    path = folder / "recipe.toml"
    path.write_text(
        recipe_text(
            model={"type": kind, "config": config},
            data={"path": "text", "seq_len": 8192, "packing": False, "tokenizer": "bytes"},
            optim={"lr": 1e-4},
            train={"steps": 10, "global_batch_size": ranks, "micro_batch_size": 1},
            run={"dir": "run"},
        )
    )
    return load_recipe(path)


def best_of(recipe: Recipe, ranks: int, mesh: dict[str, int]) -> tuple[float, float, float, dict[str, object]] | None:
    """(tokens/s, MFU, bytes, settings) of the fastest settings that fit."""
    device = find_device(DEVICE)
    found = []
    for micro, recompute, reshard in product((1, 2, 4), ("none", "full"), (True, False)):
        settings: dict[str, object] = {
            "train.micro_batch_size": micro,
            "train.activation_checkpointing": recompute,
            "fsdp.reshard_after_forward": reshard,
        }
        other = changed(recipe, {**{f"mesh.{axis}": size for axis, size in mesh.items()}, **settings})
        try:
            step = estimate_step(other, sizes_for(other, ranks), on_cuda=True)
        except NdtrainError as error:
            print(f"  {mesh} {settings}: {error}", file=sys.stderr)
            continue
        if step.room(device) >= 0:
            seconds = step.times(device, ON_NODE).step
            found.append((step.tokens_per_second(seconds), step.mfu(seconds, device), step.peak_bytes, settings))
    return max(found, key=lambda one: one[0], default=None)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(
        "| layout | settings | tokens/s, at most | MFU, at most | GiB | suggested over it |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for ranks, layouts in PUBLISHED.items():
            recipe = recipe_of(Path(folder), ranks)
            first = suggest(recipe, ranks, find_device(DEVICE), ON_NODE).found[0]
            mfu = first.step.mfu(first.times.step, find_device(DEVICE))
            mesh = " x ".join(f"{k[5:]} {v}" for k, v in first.change.items() if k.startswith("mesh.") and v != 1)
            settings = {k: v for k, v in first.change.items() if not k.startswith("mesh.")}
            rate = first.tokens_per_second
            rows = [(f"suggested for {ranks} x {DEVICE}: {mesh}", rate, mfu, first.step.peak_bytes, settings)]
            for name, layout in layouts.items():
                one = best_of(recipe, ranks, layout)
                rows += [(name, *one)] if one is not None else [(f"{name}: does not fit", 0.0, 0.0, 0.0, {})]
            for name, tokens, used, size, chosen in rows:
                said = ", ".join(f"{key.partition('.')[2]} = {json.dumps(value)}" for key, value in chosen.items())
                over = f"{rate / tokens:.2f}" if tokens else ""
                print(f"| {name} | {said} | {tokens:,.0f} | {used:.1%} | {size / 2**30:.1f} | {over} |", flush=True)


if __name__ == "__main__":
    main()
