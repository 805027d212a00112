"""A new run may start from the weights of an ndtrain checkpoint, on any mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ndtrain.errors import DamagedError
from ndtrain.recipe import load_recipe
from ndtrain.train import with_checkpoint
from tests import tiny
from tests.ranks import get_pool
from tests.test_train import model_dir, recipe_for, reference, trained, world  # noqa: F401


def test_a_new_run_starts_from_the_weights_of_a_run(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    # The learning rate is so small that the weights do not change, so plain transformers gives the expected losses.
    still = {"optim": {"lr": 1e-30, "weight_decay": 0.0}, "schedule": {"warmup_steps": 0}}
    first = recipe_for(world, tmp_path / "first", "gemma3_text", "dp_shard2", steps=2, checkpoint={"every": 1}, **still)
    get_pool(2).run(trained, str(first), [])
    run = tmp_path / "first" / "run"

    second = recipe_for(world, tmp_path / "second", "gemma3_text", "tp2", steps=3)
    given, notes = with_checkpoint(load_recipe(second, [f"model.name={run}"]))
    newest = run / "checkpoints" / "step-00000002"
    assert given.model.name == str(newest) and notes == [f"model.name: using {newest}"]
    overrides = [f"model.name={newest}", "load.mode=sharded", 'data.tokenizer="bytes"']
    result = get_pool(2).run(trained, str(second), overrides)[0]
    want = reference(model_dir(world, "gemma3_text"), second)
    assert [(m["loss"], m["grad_norm"]) for m in result["metrics"]] == [pytest.approx(w, rel=1e-4) for w in want]
    assert [m["step"] for m in result["metrics"]] == [1, 2, 3]

    from ndtrain.console.inspect import inspect_text

    report = json.loads(inspect_text(load_recipe(second, [f"model.name={run}"]), world_size=2, rank=0, as_json=True))
    assert report["model_type"] == "gemma3_text"

    # A model with fewer layers skips the weights of the others, with a note; an untied model lacks its head.
    third = [f"model.name={newest}", f"run.dir={tmp_path / 'third'}"]
    shallow = get_pool(2).run(notes_of_start, str(second), [*third, "model.config.num_hidden_layers=1"])
    assert any(
        "saved weights are not in this model and are left out; the first is model.layers.1." in n for n in shallow[0]
    )
    with pytest.raises(
        AssertionError, match=r"tie_word_embeddings = false: .* do not fit \(lm_head.weight is not among"
    ):
        get_pool(2).run(notes_of_start, str(second), [*third, "model.config.tie_word_embeddings=false"])

    file = next((newest / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    given, notes = with_checkpoint(load_recipe(second, [f"model.name={run}"]))
    assert given.model.name == str(run / "checkpoints" / "step-00000001")
    assert file.name in notes[0] and notes[0].endswith(f"using {given.model.name} instead")
    (run / "checkpoints" / "step-00000001" / "train_state.json").unlink()
    with pytest.raises(DamagedError, match="is a run directory without a valid checkpoint"):
        with_checkpoint(load_recipe(second, [f"model.name={run}"]))


def notes_of_start(path: str, overrides: list[str]) -> list[str]:
    """Return the lines that a run reports before its first step."""
    from tests.trainers import Said, trainer_of

    notes = Said()
    trainer_of(path, overrides, said=notes).prepare()
    return notes.said


def test_a_model_directory_is_used_unchanged(tmp_path: Path) -> None:
    recipe = tiny.recipe_file(
        tmp_path / "r.toml", model={"name": str(tmp_path)}, corpus=tmp_path, run_dir=tmp_path / "run"
    )
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints").mkdir()
    assert with_checkpoint(load_recipe(recipe)) == (load_recipe(recipe), [])
