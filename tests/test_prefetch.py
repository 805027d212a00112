"""The next batch is loaded while a step runs, and nothing of that is seen but the time."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from threading import Event

import pytest
import torch

from ndtrain.data.prefetch import Batches, Prefetch
from ndtrain.errors import DamagedError, NdtrainError
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.trainers import trainer_of

CPU = torch.device("cpu")


def batches_at(cursor: int) -> Batches:
    return [{"input_ids": torch.tensor([[cursor]])}]


def number(batches: Batches) -> int:
    return int(batches[0]["input_ids"])


def test_the_next_batch_is_loaded_while_the_step_runs() -> None:
    loading, done = Event(), Event()

    def load(cursor: int) -> Batches:
        if cursor == 8:
            loading.set()
            assert done.wait(20)
        return batches_at(cursor)

    prefetch = Prefetch(load, device=CPU)
    assert number(prefetch.take(0, then=8)) == 0
    assert loading.wait(20), "the step has its batch, and the next one is being loaded"
    done.set()
    assert number(prefetch.take(8, then=None)) == 8


def test_a_batch_is_the_one_asked_for_wherever_the_cursor_goes() -> None:
    asked: list[int] = []
    prefetch = Prefetch(lambda cursor: (asked.append(cursor), batches_at(cursor))[1], device=CPU)
    assert [number(prefetch.take(at, then=at + 8)) for at in (0, 8, 16, 100, 8)] == [0, 8, 16, 100, 8]
    assert {0, 8, 16, 24, 100, 108} <= set(asked)


def test_an_error_is_that_of_the_step_whose_batch_it_is() -> None:
    def load(cursor: int) -> Batches:
        if cursor == 8:
            raise DamagedError("cannot read tokens.bin")
        return batches_at(cursor)

    prefetch = Prefetch(load, device=CPU)
    assert number(prefetch.take(0, then=8)) == 0
    with pytest.raises(DamagedError, match=r"cannot read tokens\.bin"):
        prefetch.take(8, then=16)
    assert number(prefetch.take(16, then=None)) == 16


def test_no_thread_is_left_after_the_last_step() -> None:
    prefetch = Prefetch(batches_at, device=CPU)
    for step in range(5):
        prefetch.take(step * 8, then=None if step == 4 else step * 8 + 8)
    for thread in [thread for thread in threading.enumerate() if thread.name == "prefetch"]:
        thread.join(20)  # of a batch that was just taken
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def ended(recipe: str, stop_at: int, error_at: int) -> tuple[str, int, list[str]]:
    """How a run of 8 samples a step ends that is asked to stop in a step, or whose data cannot be read for one.

    Either way every step that it made is in metrics.jsonl.
    """
    trainer = trainer_of(recipe)
    with proofs.remembered():
        trainer.prepare()
    load = trainer.batches.load

    def limited(cursor: int) -> Batches:
        if cursor == 8 * (error_at - 1):
            raise DamagedError("cannot read tokens.bin")
        if cursor == 8 * (stop_at - 1):
            (trainer.run_dir / "stop").touch()
        return load(cursor)

    trainer.batches.load = limited  # type: ignore[method-assign]
    try:
        trainer.train()
        how = "done"
    except NdtrainError as error:
        how = f"{type(error).__name__}: {error}"
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(20)  # which is loading a batch that is not needed any more
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, trainer.step + 1))
    return how, trainer.step, [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(
    ("stop_at", "error_at", "how", "steps"),
    [(0, 0, "done", 4), (0, 3, "DamagedError: cannot read tokens.bin", 2), (1, 0, "Stopped: stopped by", 2)],
)
def test_a_run_ends_as_without_a_thread(tmp_path: Path, stop_at: int, error_at: int, how: str, steps: int) -> None:
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        steps=4,
    )
    ((found, trained, left),) = get_pool(1).run(ended, str(recipe), stop_at, error_at, timeout=100)
    assert found.startswith(how) and (trained, left) == (steps, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_for_cuda_are_pinned_and_come_to_it_whole() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    prefetch = Prefetch(batches_at, device=device)
    for step in range(100):
        (batch,) = prefetch.take(step, then=step + 1 if step < 99 else None)
        assert batch["input_ids"].is_pinned()
        assert int(batch["input_ids"].to(device, non_blocking=True)) == step
