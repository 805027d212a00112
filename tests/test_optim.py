"""Learning-rate schedules, step by step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ndtrain.engine.schedule import learning_rate
from ndtrain.recipe import load_recipe
from tests import tiny


def rates(tmp_path: Path, steps: int, **schedule: Any) -> list[float]:
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama"},
        corpus=tmp_path,
        run_dir=tmp_path,
        steps=steps,
        optim={"lr": 1.0},
        schedule={"min_lr_ratio": 0.0, "warmup_steps": 0, **schedule},
    )
    return [learning_rate(load_recipe(recipe), step) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1]),
        ({"kind": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"kind": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"kind": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"kind": "linear", "warmup_steps": 2}, [0.5, 1, 1, 0.5]),
        ({"kind": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"kind": "cosine", "min_lr_ratio": 0.5}, [1, 0.926777, 0.75, 0.573223]),
        ({"kind": "wsd", "decay_steps": 2}, [1, 1, 1, 0.5]),
        ({"kind": "wsd", "decay_steps": 4, "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4]),
    ],
)
def test_a_schedule_gives_these_rates(tmp_path: Path, schedule: dict[str, Any], want: list[float]) -> None:
    assert rates(tmp_path, 4, **schedule) == pytest.approx(want, rel=1e-5)


def test_the_decay_of_wsd_begins_after_the_warm_up(tmp_path: Path) -> None:
    assert rates(tmp_path, 20, kind="wsd", warmup_steps=19)[17:] == pytest.approx([18 / 19, 1, 1])
    for warmup in range(20):
        got = rates(tmp_path, 20, kind="wsd", warmup_steps=warmup)
        assert max(abs(a - b) for a, b in itertools.pairwise(got)) <= max(0.5, 1 / max(1, warmup)) + 1e-9
