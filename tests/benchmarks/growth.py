"""How the cost of a step grows: with the length of sequences, with layers, with experts, and with ranks.

    OMP_NUM_THREADS=1 python tests/benchmarks/growth.py [--axes length layers] [--steps 5] [--plot FILE.svg]

Each point is a run of its own under torchrun. "Host" is the main thread's time of a step whose arithmetic is nothing
(as in host_time.py), "step" the time of one with arithmetic, and "per FLOP" that over the model's FLOPs (6 for each
weight that a token is multiplied by, and causal attention), relative to the first point of the axis. Along dp_shard
the work of a rank stays the same; tp and cp divide it. The plot needs matplotlib.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.engine.flops import flops_per_token  # noqa: E402
from ndtrain.runs.process import start  # noqa: E402
from tests.tiny import recipe_text  # noqa: E402
from tests.trainers import trainer_of  # noqa: E402

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, **HEADS}
LARGE = SMALL | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}


class Point(NamedTuple):
    """A run: the ranks, the mesh, what the config adds to `SMALL` or `LARGE`, rows of a rank and their length."""

    ranks: int
    mesh: dict[str, int]
    config: dict[str, Any]
    rows: int
    length: int


def points(axis: str) -> dict[int, Point]:
    """The points of an axis, by their value on it."""
    one = {"dp_shard": 1}
    match axis:
        case "length":
            return {n: Point(1, one, {}, max(1, 1024 // n), n) for n in (64, 256, 1024, 4096)}
        case "layers":
            return {n: Point(1, one, {"num_hidden_layers": n}, 4, 128) for n in (2, 4, 8, 16, 32)}
        case "experts":
            return {n: Point(1, one, {"num_experts": n, **EXPERTS}, 4, 128) for n in (2, 4, 8, 16, 32)}
        case "ranks of dp_shard":
            return {n: Point(n, {"dp_shard": n}, {}, 4, 64) for n in (1, 2, 4, 8)}
        case "ranks of tp":
            return {n: Point(n, {"dp_shard": 1, "tp": n}, {"num_key_value_heads": 4}, 4, 64) for n in (1, 2, 4)}
        case _:
            return {n: Point(n, {"dp_shard": 1, "cp": n}, {"num_key_value_heads": 4}, 1, 256 * n) for n in (1, 2, 4)}


AXES = ("length", "layers", "experts", "ranks of dp_shard", "ranks of tp", "ranks of cp")


def measure(point: Point, shape: dict[str, Any], steps: int) -> tuple[float, float, float]:
    """The seconds of a step and of its main thread, medians, the largest of the ranks; and the FLOPs of a rank."""
    kind = "qwen3_moe" if "num_experts" in point.config else "qwen3"
    with start() as runtime, tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        os.environ["NDTRAIN_CACHE"] = str(folder / "cache")
        if runtime.is_main:
            (folder / "corpus").mkdir()
            (folder / "corpus" / "a.txt").write_text("All work and no play makes a dull day. " * 20_000)
            ends = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
            config = {**shape, **point.config, **ends, "max_position_embeddings": point.length}
            text = recipe_text(
                model={"type": kind, "config": config},
                mesh=point.mesh,
                fsdp={"param_dtype": "float32"},
                data={"path": str(folder / "corpus"), "seq_len": point.length, "tokenizer": "bytes"},
                optim={"lr": 1e-4},
                schedule={"kind": "constant", "warmup_steps": 0},
                train={
                    "steps": 10**6,
                    "global_batch_size": point.rows * point.mesh["dp_shard"],
                    "micro_batch_size": point.rows,
                },
                checkpoint={"every": 0, "resume": "never"},
                run={"dir": str(folder / "run")},
            )
            (folder / "recipe.toml").write_text(text)
        dist.barrier()
        trainer = trainer_of(str(folder / "recipe.toml"))
        trainer.prepare()
        found: list[tuple[float, float]] = []
        for _ in range(steps + 2):
            dist.barrier()
            began, host = time.perf_counter(), time.thread_time()
            trainer.advance(wait=True)
            found.append((time.perf_counter() - began, time.thread_time() - host))
        medians = torch.tensor([statistics.median(each) for each in zip(*found[2:], strict=True)], dtype=torch.float64)
        dist.all_reduce(medians, op=dist.ReduceOp.MAX)
        each = flops_per_token(trainer.plan, trainer.engine.model.config, point.length)
        ranks = point.mesh.get("tp", 1) * point.mesh.get("cp", 1)
        return float(medians[0]), float(medians[1]), each * point.rows * point.length / ranks


def run(point: Point, size: str, steps: int) -> list[float]:
    """Measure a point in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}"]
    with tempfile.NamedTemporaryFile("r") as out:
        given = json.dumps([point, size, steps, out.name])
        subprocess.run([*command, __file__, "--point", given], check=True, stdout=subprocess.DEVNULL)
        found: list[float] = json.loads(out.read())
        return found


def plot(found: dict[str, dict[int, dict[str, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.2 * len(found), 6), squeeze=False)
    for column, (axis, values) in enumerate(found.items()):
        for row, (key, label) in enumerate((("host", "host, ms a step"), ("tokens", "tokens/s of a rank"))):
            at = axes[row][column]
            at.plot(list(values), [value[key] for value in values.values()], marker="o")
            at.set_xscale("log", base=2)
            at.set_yscale("log", base=2)
            at.set_xlabel(axis)
            at.set_title(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.point:
        given, size, steps, out = json.loads(options.point)
        result = measure(Point(*given), LARGE if size == "large" else SMALL, steps)
        if int(os.environ["RANK"]) == 0:
            Path(out).write_text(json.dumps(result))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    for axis in options.axes:
        print(f"\n| {axis} | host, ms | step, s | tokens/s of a rank | GFLOP | per FLOP |\n|---|---|---|---|---|---|")
        first = 0.0
        for value, point in points(axis).items():
            _, host, _ = run(point, "small", options.steps)
            step, _, work = run(point, "large", options.steps)
            first = first or step / work
            tokens = point.rows * point.length / point.mesh.get("cp", 1) / step
            found.setdefault(axis, {})[value] = {"host": host * 1e3, "tokens": tokens}
            cells = f"{host * 1e3:.1f} | {step:.3f} | {tokens:,.0f} | {work / 1e9:.2f} | {step / work / first:.2f}"
            print(f"| {value} | {cells} |", flush=True)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
