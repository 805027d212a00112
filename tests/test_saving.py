"""A run goes on or ends, as its recipe says, if a checkpoint cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from ndtrain.checkpoint import check
from tests import proofs, tiny
from tests.chaos.run import losses
from tests.ranks import get_pool


def run_failing(path: str, failing: list[int], free: int | None = None) -> tuple[list[str], int, str]:
    """Return the lines that a run reports, its last step and its error; its rank 1 cannot write at steps `failing`.

    `free`, if given, is the free disk space in bytes that the run sees.
    """
    import torch.distributed as dist

    import ndtrain.checkpoint.tensors as module
    from ndtrain.errors import NdtrainError
    from tests.trainers import Said, trainer_of

    rank, said, real = dist.get_rank(), Said(), module._write_file
    trainer = trainer_of(path, said=said)

    def full(file: Path, entries: Any) -> Any:
        if rank == 1 and int(file.parent.parent.name.removeprefix(".tmp-step-")) in failing:
            raise OSError(28, "No space left on device", str(file))
        return real(file, entries)

    error = ""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, "_write_file", full))
        if free is not None:
            patches.enter_context(mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=free)))
        with proofs.remembered():
            trainer.prepare()
        try:
            trainer.train()
        except NdtrainError as raised:
            error = str(raised)
    return said.said, trainer.step, error


def buffers_of_a_run(path: str) -> list[tuple[int, int]]:
    """Return address and bytes of the buffer for saves: before the first step, and after a run with saves."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    found = [trainer.saving.store.staging.buffer]
    trainer.train()
    return [(buffer.data_ptr(), buffer.nbytes) for buffer in (*found, trainer.saving.store.staging.buffer)]


def six_steps(folder: Path, checkpoint: dict[str, Any], *, model: dict[str, Any] | None = None) -> Path:
    """Return a recipe of six steps for two ranks, to run in `folder`."""
    return tiny.recipe_file(
        folder / "recipe.toml",
        model=model or {"name": str(tiny.save_model("llama", folder))},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "run",
        steps=6,
        batch_ranks=2,
        checkpoint=checkpoint,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for one checkpoint of 4 MB, and not for two."""
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    path = tmp_path / "run" / "checkpoints"
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_memory_for_saves_is_taken_before_the_first_step(tmp_path: Path) -> None:
    recipe = six_steps(tmp_path, {"every": 2})
    for before, after in get_pool(2).run(buffers_of_a_run, str(recipe)):
        assert before == after and before[1] > 0


@pytest.mark.parametrize(("free", "reason"), [(None, " are free"), (10**9, "No space left on device")])
def test_a_full_disk_keeps_the_existing_checkpoint(
    tmp_path: Path, small_disk: Path, free: int | None, reason: str
) -> None:
    large = {"type": "llama", "init": "random", "config": {**tiny.CONFIGS["llama"], "num_hidden_layers": 8}}
    recipe = six_steps(tmp_path, {"every": 2, "keep": 1}, model=large)
    for said, step, error in get_pool(2).run(run_failing, str(recipe), [], free, timeout=200):
        assert step == 6 and "step 6 (the last) was trained but not saved" in error
        assert sum(reason in line for line in said) == 2
    (left,) = small_disk.iterdir()
    assert left.name == "step-00000002" and check(left)


def test_a_finished_run_started_again_removes_checkpoints_beyond_keep(tmp_path: Path) -> None:
    recipe, run = six_steps(tmp_path, {"every": 2, "keep": 2, "resume": "auto"}), tmp_path / "run" / "checkpoints"
    get_pool(2).run(run_failing, str(recipe), [], timeout=200)
    shutil.copytree(run / "step-00000004", run / "step-00000002")  # as if it had been killed before it was removed
    for said, *_ in get_pool(2).run(run_failing, str(recipe), [], timeout=200):
        assert any(line.startswith("nothing to do") for line in said)
    assert sorted(path.name for path in run.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    recipe = six_steps(tmp_path, {"every": 2, "keep": 3, "resume": "auto", "verify": True})
    get_pool(2).run(run_failing, str(recipe), [], timeout=200)
    whole = losses(tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000006/optim/00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for said, step, error in get_pool(2).run(run_failing, str(recipe), [], timeout=200):
        assert step == 6 and not error
        (refused,) = [line for line in said if "was altered" in line]
        assert "rank 1: " in refused and str(file.relative_to(file.parents[1])) in refused
        assert f"resuming from {file.parents[2] / 'step-00000004'} instead" in refused
        assert any("(step 4, sample 32)" in line for line in said)
    assert losses(tmp_path / "run") == whole and file.read_bytes() == content


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("on_error", "failing", "reached", "left", "error"),
    [
        ("warn", [4], 6, [2, 6], ""),
        ("stop", [4], 4, [2], "step-00000004 was not written, older checkpoints are kept: rank 1: OSError"),
        ("warn", [6], 6, [2, 4], "step 6 (the last) was trained but not saved"),
    ],
)
def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, background: bool, on_error: str, failing: list[int], reached: int, left: list[int], error: str
) -> None:
    recipe = six_steps(tmp_path, {"every": 2, "keep": 2, "async": background, "on_error": on_error})
    for said, step, raised in get_pool(2).run(run_failing, str(recipe), failing, timeout=200):
        # In the background it is known at one of the next step boundaries.
        assert step == reached if not (background and on_error == "stop") else 4 <= step <= 6
        assert error in raised if error else not raised
        warnings = [line for line in said if line.startswith("warning: ")]
        assert len(warnings) == (on_error == "warn")
        assert all(f"step-{failing[0]:08d} was not written" in w and "No space left" in w for w in warnings)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in left]
