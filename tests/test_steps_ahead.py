"""A run reads the numbers of a step only once the next is enqueued, and is the same as one that reads each at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ndtrain.data import IGNORE
from tests import proofs
from tests.ranks import get_pool
from tests.test_train import model_dir, numbers, recipe_for, reference, world  # noqa: F401


def run(path: str, bad: list[int], empty: list[int], ahead: bool) -> dict[str, Any]:
    """Train to the end, where the gradient of the steps `bad` is not a number on one rank, and `empty` have no target.

    Returns the metrics, what was said, how it ended, and before which steps the host has read the last one's numbers.
    """
    import torch.distributed as dist

    from ndtrain.engine.loss import LossModel
    from ndtrain.errors import NdtrainError
    from ndtrain.train import Trainer
    from tests.trainers import Said, trainer_of

    said, ended, read_before = Said(), "", []
    trainer = trainer_of(path, said=said)
    with proofs.remembered():
        trainer.prepare()
    backward, optimize, load = LossModel.backward, Trainer.optimize, trainer.batches.load

    def poisonous(self: LossModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = backward(self, *args, **kwargs)
        if dist.get_rank() == 1 and trainer.step + 1 in bad:
            next(p for p in self.model.parameters() if p.grad is not None).grad.to_local().fill_(math.nan)
        return result

    def watched(self: Trainer) -> Any:
        made = optimize(self)
        if (self.last.step if self.last else 0) == made.step - 1:
            read_before.append(made.step)
        return made

    def emptied(cursor: int) -> Any:
        batches = load(cursor)
        if cursor // trainer.recipe.train.global_batch_size + 1 in empty:
            for batch in batches:
                batch["labels"].fill_(IGNORE)
        return batches

    trainer.batches.load = emptied  # type: ignore[method-assign]
    with mock.patch.object(LossModel, "backward", poisonous), mock.patch.object(Trainer, "optimize", watched):
        try:
            while not ahead and trainer.step < trainer.steps:
                trainer.train_step()
            trainer.train()
        except NdtrainError as error:
            ended = str(error)
    lines = (Path(trainer.recipe.run.dir) / "metrics.jsonl").read_text().splitlines() if dist.get_rank() == 0 else []
    return {"metrics": list(map(json.loads, lines)), "said": said.said, "ended": ended, "read_before": read_before}


def files(folder: Path) -> dict[str, bytes]:
    """The tensors of all checkpoints."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("checkpoints/*/*/*.safetensors"))}


def test_a_run_that_reads_late_is_the_same_as_one_that_reads_each_step_at_once(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    found = {}
    for ahead in (False, True):
        folder = tmp_path / str(ahead)
        folder.mkdir()
        recipe = recipe_for(world, folder, "llama", "dp_shard2", steps=7, checkpoint={"every": 4, "keep": 9})
        found[ahead] = get_pool(2).run(run, str(recipe), [2, 4], [6], ahead, timeout=200)[0]
    assert numbers(found[True]["metrics"]) == numbers(found[False]["metrics"])
    assert [m["step"] for m in found[True]["metrics"]] == list(range(1, 8))
    assert found[True]["read_before"] == [1, 5, 6]  # the save that is due at 4 waits for 5, which is good
    assert files(tmp_path / "True" / "run") == files(tmp_path / "False" / "run")
    saved = sorted(path.name for path in (tmp_path / "True" / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000005", "step-00000007"]
    want = reference(model_dir(world, "llama"), recipe, without=(2, 4, 6))
    for metrics, (loss, norm) in zip(found[True]["metrics"], want, strict=True):
        if metrics["step"] not in (2, 4, 6):
            assert (metrics["loss"], metrics["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)
    skipped = [line.split(":")[0] for line in found[True]["said"] if " skipped: " in line]
    assert skipped == ["step 2 skipped", "step 4 skipped", "step 6 skipped"]
    assert any(
        line.startswith("step 6 skipped: no token of its global batch is a target") for line in found[True]["said"]
    )
    assert found[True]["metrics"][5]["tokens"] == 0


def test_a_run_that_reads_late_ends_at_the_step_that_max_bad_steps_says(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    train = {"max_bad_steps": 2}
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", steps=9, train=train, checkpoint={"every": 0})
    found = get_pool(2).run(run, str(recipe), [4, 5], [], True, timeout=200)
    assert all("steps 4 to 5 skipped, the limit of train.max_bad_steps" in one["ended"] for one in found)
    assert [m["step"] for m in found[0]["metrics"]] == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_step_whose_numbers_are_awaited_is_where_a_request_stops(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "1", steps=6, checkpoint={"every": 3})
    assert get_pool(1).run(foretold, str(recipe), timeout=200) == [[(0, 2), (1, 3), (2, 3), (3, 5), (4, 6), (5, 6)]]


def foretold(path: str) -> list[tuple[int, int]]:
    """After how many steps a stop that is asked for in each forward pass would come, as a person is told."""
    from ndtrain.engine import Engine
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    told, gradients = [], Engine.gradients

    def asking(*args: Any, **kwargs: Any) -> Any:
        progress = trainer.stop_signals._progress
        assert progress is not None
        told.append((progress().complete, progress().stop_after))
        return gradients(*args, **kwargs)

    with mock.patch.object(Engine, "gradients", asking):
        trainer.train()
    return told
