"""A run whose ranks are killed at random moments, each time resumed, until it ends."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ndtrain.checkpoint import CheckpointStore
from tests import tiny
from tests.ranks import RankPool, RanksFailed
from tests.test_train import trained

STEPS, EVERY, KEEP = 24, 2, 2
MESHES = {2: {"dp_shard": 2}, 4: {"dp_shard": 2, "tp": 2}}


@dataclass(frozen=True)
class Kill:
    """One life of the ranks that was cut short."""

    after_s: float
    ranks: tuple[int, ...]
    writing: bool  # whether a checkpoint was being written
    resumed_from: int | None  # the newest whole checkpoint after it


def recipe(folder: Path, name: str, ranks: int) -> Path:
    """A recipe of the run directory `folder`/`name`; model and text are the same for all of `folder`."""
    model, corpus = folder / "llama", folder / "corpus"
    if not model.exists():
        tiny.save_model("llama", folder)
        tiny.write_corpus(corpus)
    return tiny.recipe_file(
        folder / f"{name}.toml",
        model={"name": str(model)},
        corpus=corpus,
        run_dir=folder / name,
        mesh=MESHES[ranks],
        steps=STEPS,
        batch_ranks=2,
        checkpoint={"every": EVERY, "keep": KEEP, "resume": "auto"},
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; of a step that was trained again, the last. A line may be cut off where its writer was killed."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        found[metrics["step"]] = metrics["loss"]
    return found


def undisturbed(folder: Path, ranks: int) -> tuple[dict[int, float], float]:
    """The losses of a run that nobody kills, and how long it takes in seconds."""
    pool, path = RankPool(ranks), recipe(folder, "undisturbed", ranks)
    pool.run(trained, str(path), [], timeout=300)
    pool.close()
    started = time.monotonic()
    pool.run(trained, str(recipe(folder, "timed", ranks)), [], timeout=300)
    pool.close()
    return losses(folder / "undisturbed"), time.monotonic() - started


class _Killer(threading.Thread):
    """Kills some ranks of `pool` at a moment: any, or one while a checkpoint is being written."""

    def __init__(self, pool: RankPool, root: Path, moment: random.Random, *, whole_s: float) -> None:
        super().__init__(daemon=True)
        self.pool, self.root, self.over = pool, root, threading.Event()
        self.in_write = moment.random() < 0.6
        self.delay_s = moment.uniform(0, 0.05) if self.in_write else moment.uniform(0, whole_s)
        # A machine that fails, or one process.
        everyone = tuple(range(pool.size))
        self.ranks = everyone if moment.random() < 0.5 else (moment.choice(everyone),)
        self.skip = moment.randrange(3)
        self.kill: tuple[float, bool] | None = None

    def _writing(self) -> bool:
        return any(self.root.glob(".tmp-step-*"))

    def run(self) -> None:
        started = time.monotonic()
        for _ in range(1 + self.skip if self.in_write else 0):  # the first checkpoint after a start, or a later one
            while self._writing() and not self.over.wait(0.001):
                pass
            while not self._writing() and not self.over.wait(0.001):
                pass
        if not self.over.wait(self.delay_s):
            self.kill = (time.monotonic() - started, self._writing())
            self.pool.kill(self.ranks)


def disturbed(folder: Path, name: str, ranks: int, moments: random.Random, *, whole_s: float) -> Iterator[Kill]:
    """Run `folder`/`name` to its end, with a kill in every life but the last; yields each.

    Raises AssertionError where a kill costs a checkpoint that was whole.
    """
    path, store = recipe(folder, name, ranks), CheckpointStore(folder / name, keep=KEEP)
    before = -1
    while True:
        pool = RankPool(ranks)
        pool.run(len, (), timeout=120)  # the ranks are there
        killer = _Killer(pool, store.root, moments, whole_s=whole_s)
        killer.start()
        try:
            pool.run(trained, str(path), [], timeout=300)
        except RanksFailed as error:
            if killer.kill is None:
                raise AssertionError(f"failed without a kill: {error}") from error
        finally:
            killer.over.set()
            killer.join()
            pool.close()
        newest, refused = store.newest_valid()
        assert not refused, f"a damaged checkpoint was published: {refused}"
        step = int(newest.name.removeprefix("step-")) if newest is not None else -1
        assert step >= before, f"step {before} was whole, now it is {step}"
        before = step
        if killer.kill is None:
            return
        yield Kill(killer.kill[0], killer.ranks, killer.kill[1], step if step >= 0 else None)


def check_end(folder: Path, name: str, expected: dict[int, float]) -> None:
    """Raises AssertionError unless the run ended as the undisturbed one did, with nothing left of what was killed."""
    got = losses(folder / name)
    assert got == expected, {s: (got.get(s), loss) for s, loss in expected.items() if got.get(s) != loss}
    left = sorted(p.name for p in (folder / name / "checkpoints").iterdir())
    wanted = [f"step-{s:08d}" for s in range(STEPS - (KEEP - 1) * EVERY, STEPS + 1, EVERY)]
    assert left == wanted, left
