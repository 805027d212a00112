"""Learning-rate schedules, step by step; which parameters carry weight decay."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.engine.optimizers import without_decay
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
    return [learning_rate(load_recipe(recipe), step, peak=load_recipe(recipe).optim.lr) for step in range(steps)]


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


# Biases of fused experts and attention sinks; norms by class alone; depthwise convolutions and A_log; norms per head.
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_oss", "mamba", "qwen3_next", "cohere", "bloom", "xglm"])
def test_weight_decay_spares_what_the_hf_trainer_spares_and_all_of_fewer_than_two_dims(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **(tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    groups = {group["weight_decay"]: group["params"] for group in tiny.decay_groups(model, 0.1)}
    spared = without_decay(model)
    names = {id(param): name for name, param in model.named_parameters()}
    assert spared == {names[id(param)] for param in groups[0.0]}
    assert names[id(model.get_input_embeddings().weight)] not in spared  # type: ignore[union-attr,arg-type]
    assert all("bias" in name for name in spared if model.get_parameter(name).dim() > 2)


def test_decay_norms_decays_every_parameter(tmp_path: Path) -> None:
    from tests.ranks import get_pool

    path = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "qwen3", "config": tiny.CONFIGS["qwen3"]},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        mesh={"dp_shard": 2},
    )
    sizes = get_pool(2).run(decayed_sizes, str(path))[0]
    assert sizes["false"] == {"0.0": 1, "0.1": 2} and sizes["true"] == {"0.1": 1}


def decayed_sizes(path: str) -> dict[str, dict[str, int]]:
    """For each value of decay_norms, {weight decay: the fewest dims of a parameter that has it} in the optimizer."""
    from ndtrain.engine.optimizers import build_optimizer
    from tests.trainers import trainer_of

    found: dict[str, dict[str, int]] = {}
    for value in ("false", "true"):
        trainer = trainer_of(path, [f"optim.decay_norms={value}"])
        trainer.engine.cut()
        for group in build_optimizer(
            trainer.engine.model, trainer.recipe, trainer.plan, trainer.engine.device
        ).param_groups:
            decay, dims = str(group["weight_decay"]), min(param.dim() for param in group["params"])
            found.setdefault(value, {}).setdefault(decay, dims)
            found[value][decay] = min(dims, found[value][decay])
    return found
