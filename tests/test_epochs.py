"""`train.epochs` in place of `train.steps`: a run ends where the data has been read so often."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli

from ndtrain.data.order import Order
from ndtrain.errors import RecipeError
from ndtrain.recipe import load_recipe
from ndtrain.train.length import with_steps
from tests import tiny
from tests.ranks import get_pool
from tests.test_resume import resumed
from tests.test_train import trained

SAMPLES, BATCH = 71, 8  # of rows of 128 tokens: 9 steps an epoch, the last of which has a sample of the next


def recipe_file(folder: Path, train: dict[str, Any], **more: Any) -> Path:
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "run",
        data={"seq_len": 128},
        checkpoint={"every": 9, "resume": "auto"},
        **more,
    )
    sections = tomli.loads(path.read_text())
    del sections["train"]["steps"], sections["schedule"]["warmup_steps"]
    sections["train"] |= train
    path.write_text(tiny.recipe_text(**sections))
    return path


def run(recipe: Path, *overrides: str, stop: int | None = None) -> dict[str, Any]:
    return get_pool(1).run(trained, str(recipe), list(overrides), stop, timeout=200)[0]


def order(seed: int = 3) -> Order:
    return Order(SAMPLES, seed=seed, shuffle=True)


def test_an_epoch_is_the_steps_that_it_takes_and_more_epochs_go_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    steps, epochs = run(recipe_file(tmp_path / "steps", {"steps": 18})), recipe_file(tmp_path, {"epochs": 2})
    first = run(epochs, stop=9)  # killed at the last step of the first epoch, which has a checkpoint
    rest = run(epochs)
    np.testing.assert_array_equal(np.ravel([first["ids"], rest["ids"]]), order().sample_ids(0, 18 * BATCH))
    assert set(np.ravel(first["ids"])) == set(range(SAMPLES))
    keys = ("loss", "grad_norm", "lr", "epoch")
    lines = [[line[key] for key in keys] for line in rest["metrics"]]
    assert lines == [[line[key] for key in keys] for line in steps["metrics"]], "the same schedule and samples"
    assert [line[-1] for line in lines] == [step * BATCH / SAMPLES for step in range(1, 19)]
    written = tomli.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]
    assert written["epochs"] == 2 and "steps" not in written

    again = get_pool(1).run(resumed, str(epochs), [], timeout=100)[0]
    assert "nothing to do: step 18 of 18 is already trained; raise train.epochs to train further" in again["said"]
    assert not again["error"] and "71 samples; 2 epochs: 18 steps" in again["said"]
    third = get_pool(1).run(resumed, str(epochs), ["train.epochs=3"], timeout=100)[0]
    assert not third["error"] and "steps 19 to 27" in third["said"] and "train.epochs  2" in third["said"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 27 * BATCH / SAMPLES


@pytest.mark.parametrize(
    ("batch", "step", "cursor", "steps"),
    [
        (8, 0, 0, 18),
        (8, 9, 72, 18),
        (8, 18, 144, 18),
        (8, 30, 240, 30),  # of more epochs
        (71, 0, 0, 2),
        (71, 1, 71, 2),  # at the very end of an epoch
        (1000, 0, 0, 1),
        (16, 9, 72, 14),  # a larger batch from here on: 70 samples are left
    ],
)
def test_epochs_end_where_the_samples_do(tmp_path: Path, batch: int, step: int, cursor: int, steps: int) -> None:
    recipe = load_recipe(recipe_file(tmp_path, {"epochs": 2}), [f"train.global_batch_size={batch}"])
    found = with_steps(recipe, order(), step=step, cursor=cursor)
    assert found.train.steps == steps and found.train.epochs == 2
    assert found.schedule.warmup_steps == (2 * steps + 50) // 100


def test_inspect_says_that_the_steps_follow_from_the_data(tmp_path: Path) -> None:
    """In a process of its own, since a dry step needs one without a process group."""
    recipe = recipe_file(tmp_path, {"epochs": 2})
    command = [sys.executable, "-m", "ndtrain", "inspect", str(recipe), "--dry-run", "--world-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert "train.epochs = 2: how many steps that is, and with it the schedule, follows from" in done.stdout
    assert "peak memory" in done.stdout


def test_a_schedule_that_does_not_fit_is_refused_once_the_steps_are_known(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, {"epochs": 2}), ["schedule.warmup_steps=18"])
    with pytest.raises(RecipeError, match=r"with train\.epochs = 2: schedule\.warmup_steps = 18 .* train\.steps = 18"):
        with_steps(recipe, order(), step=0, cursor=0)
    assert with_steps(recipe, order(), step=18, cursor=144).train.steps == 18  # nothing is left to train
    more = Order(SAMPLES + 8, seed=3, shuffle=True)
    assert with_steps(recipe, more, step=0, cursor=0).train.steps == 20
