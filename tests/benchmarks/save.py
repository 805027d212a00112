"""Saving a checkpoint: ndtrain, torch's `dcp.save`, plain writes of the same bytes; and what training pays for it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/save.py [--dir DIR]

The three ways alternate inside one run; all sync their files. ndtrain hashes what it writes, checks that every value is
there and publishes by rename. Then steps of a training run with `checkpoint.async = true` are timed with a save in
flight (the copies to host memory included) beside steps without.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.checkpoint import CheckpointStore  # noqa: E402
from ndtrain.hf.model import meta_model  # noqa: E402
from ndtrain.layout import local_part  # noqa: E402
from ndtrain.plan import make_plan  # noqa: E402
from ndtrain.recipe import load_recipe  # noqa: E402
from ndtrain.runs.process import Runtime, start  # noqa: E402
from ndtrain.train import Silent, Trainer, sizes_for  # noqa: E402
from tests.benchmarks.step_vs_trainer import save_model, write_corpus  # noqa: E402
from tests.tiny import recipe_text  # noqa: E402


def timed(work: Callable[[], object]) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def tensors(megabytes: int) -> dict[str, DTensor]:
    """`megabytes` of float32 in matrices of 16 MB, cut over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = 2048 // dist.get_world_size()
    return {
        f"w{i}": DTensor.from_local(torch.randn(rows, 2048, generator=generator), mesh, [Shard(0)])
        for i in range(megabytes // 16)
    }


def plain(path: Path, groups: dict[str, dict[str, DTensor]]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with (path / f"{dist.get_rank()}").open("wb", buffering=0) as file:
        for group in groups.values():
            for tensor in group.values():
                file.write(local_part(tensor).numpy().data)
        os.fsync(file.fileno())


def saving(folder: Path, megabytes: int, rounds: int) -> None:
    whole = tensors(megabytes)
    names = sorted(whole)
    groups = {
        "model": {n: whole[n] for n in names[: len(names) // 3]},
        "optim": {n: whole[n] for n in names[len(names) // 3 :]},
    }
    seconds: dict[str, list[float]] = {"ndtrain": [], "dcp.save": [], "plain writes": []}
    for i in range(rounds):
        target = folder / f"save-{i}"
        store = CheckpointStore(target / "ndtrain", keep=1)
        ways: dict[str, Callable[[], object]] = {
            "plain writes": lambda to=target: plain(to / "plain", groups),  # type: ignore[misc]
            "ndtrain": lambda to=store: to.save(1, **groups, state={}),  # type: ignore[misc,arg-type]
            "dcp.save": lambda to=target: dcp.save(groups, checkpoint_id=to / "dcp"),  # type: ignore[misc]
        }
        order = list(ways)[i % 3 :] + list(ways)[: i % 3]
        for way in order:
            seconds[way].append(timed(ways[way]))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(target)
            dist.barrier()
    if dist.get_rank() == 0:
        base = statistics.median(seconds["plain writes"])
        print(f"\n{megabytes:,} MB on {dist.get_world_size()} ranks, {rounds} rounds\n")
        print("| | seconds (median) | least | x plain writes |\n|---|---|---|---|")
        for way, found in seconds.items():
            middle = statistics.median(found)
            print(f"| {way} | {middle:.2f} | {min(found):.2f} | {middle / base:.2f} |", flush=True)


def training(folder: Path, options: argparse.Namespace) -> None:
    if dist.get_rank() == 0:
        save_model(folder / "model", options)
        write_corpus(folder / "corpus")
    dist.barrier()
    text = recipe_text(
        model={"name": str(folder / "model")},
        fsdp={"param_dtype": "float32"},
        data={"path": str(folder / "corpus"), "seq_len": options.seq, "tokenizer": "bytes"},
        optim={"lr": 1e-4},
        train={"steps": 10_000, "global_batch_size": 2 * options.batch, "micro_batch_size": options.batch},
        checkpoint={"every": 0, "keep": 1},
        run={"dir": str(folder / "run")},
    )
    path = folder / f"recipe-{dist.get_rank()}.toml"
    path.write_text(text)
    recipe = load_recipe(path, [])
    meta = meta_model(recipe)
    runtime = Runtime(rank=dist.get_rank(), local_rank=0, world_size=dist.get_world_size(), device=torch.device("cpu"))
    plan = make_plan(meta, sizes_for(recipe, runtime.world_size), recipe)
    trainer = Trainer(recipe, plan, meta, runtime=runtime, reporter=Silent())
    trainer.prepare()
    trainer.train_step()
    trainer.save()  # the first allocates the buffer
    trainer.saving.store.settle()
    without, with_save, held, steps = [], [], [], 0
    for _ in range(options.rounds):
        without += [timed(trainer.train_step) for _ in range(options.steps)]
        first = len(with_save)
        held.append(timed(trainer.save))
        while trainer.saving.store.in_flight or len(with_save) - first < options.steps:
            with_save.append(timed(trainer.train_step))
        with_save[first] += held[-1]
        steps = len(with_save) - first
    if dist.get_rank() == 0:
        base, ours = statistics.mean(without), statistics.mean(with_save)
        size = sum(p.numel for p in plan.params) * 12 / 1e6
        print(
            f"\nstep without a save {base:.2f} s, with one of {size:,.0f} MB in flight {ours:.2f} s (its copies held "
            f"the step for {statistics.mean(held):.2f} s; the last save took {steps} steps): x {ours / base:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="Where to write; by default the temporary directory.")
    parser.add_argument("--megabytes", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="Steps of a round, at least.")
    for name, value in {"hidden": 512, "layers": 8, "vocab": 8192, "seq": 256, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with start():
        folder = [tempfile.mkdtemp(dir=options.dir) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        try:
            saving(Path(folder[0]), options.megabytes, options.rounds)
            training(Path(folder[0]), options)
        finally:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder[0])


if __name__ == "__main__":
    main()
