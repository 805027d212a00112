"""`inspect --data` shows the rows that a run trains on, and counts what is in its data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ndtrain.cli import app
from ndtrain.data import build_cache
from ndtrain.errors import RecipeError
from ndtrain.recipe import load_recipe
from ndtrain.train.encoding import encoder_of
from ndtrain.train.preview import open_preview
from tests import tiny
from tests.test_sft import TEMPLATE, conversations, recipe_of


def shown(recipe: Path, *arguments: str) -> str:
    result = CliRunner().invoke(
        app, ["inspect", str(recipe), *arguments], catch_exceptions=False, standalone_mode=False
    )
    return result.stdout


def text_recipe(tmp_path: Path, **data: Any) -> Path:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    where: dict[str, Any] = {"corpus": corpus, "run_dir": tmp_path / "run"}
    model = {"type": "llama", "config": tiny.CONFIGS["llama"]}
    return tiny.recipe_file(tmp_path / "text.toml", model=model, **where, data=data)


@pytest.mark.parametrize("packing", ["best_fit", "false"])
def test_rows_are_those_that_the_run_trains_on(tmp_path: Path, packing: str) -> None:
    recipe = recipe_of(tmp_path, conversations())
    found = json.loads(shown(recipe, "--data", "3", "--json", "--set", f"data.packing={packing}"))
    preview = open_preview(load_recipe(recipe, [f"data.packing={packing}"]))
    (batch,) = preview.batches.load(0)
    assert len(found["rows"]) == 3
    for number, row in enumerate(found["rows"]):
        assert row["input_ids"] == batch["input_ids"][number].tolist()
        assert row["labels"] == batch["labels"][number].tolist()
        starts = [at for at, position in enumerate(batch["position_ids"][number].tolist()) if position == 0]
        assert row["documents"] == [at for at in starts if any(label != -100 for label in row["labels"][at:])]
        assert row["source"] == load_recipe(recipe).data.path
    counts = found["counts"]
    assert (counts["documents"], counts["skipped"], counts["format"]) == (24, 0, "chat")
    assert sum(counts["lengths"].values()) == 24
    samples = preview.batches.samples
    labels = [label for index in range(len(samples)) for label in samples[index]["labels"].tolist()]
    assert counts["targets"] == sum(label != -100 for label in labels)
    own = next(one for one in counts["fills"] if one["seq_len"] == 256)
    assert (own["rows"], own["fill"]) == (counts["rows"], counts["fill"]) == (len(samples), samples.fill)


def test_what_carries_loss_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, conversations(1))
    text = shown(recipe, "--data", "1")
    assert "1 document" in text and "carry loss" in text
    assert "assistant\n⟦Answer 0.0<|im_end|>⟧\n" in text, "the turn's end is trained, its head is not"
    assert "⟦What" not in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32mAnswer 0.0<|im_end|>\x1b[0m" in shown(recipe, "--data", "1")


def test_borders_and_marks_of_text_are_visible(tmp_path: Path) -> None:
    text = shown(text_recipe(tmp_path, shuffle=False, seq_len=64), "--data", "1")
    assert "--- document 2, position 42" in text and "<|bos|>" in text and "<|eos|>" in text


def test_without_a_number_the_data_is_counted(tmp_path: Path) -> None:
    text = shown(text_recipe(tmp_path), "--data")
    assert "11 " in text and "lengths" in text and "seq_len" in text and "row 0" not in text


def test_other_questions_are_not_asked_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--data shows the data alone"):
        shown(text_recipe(tmp_path), "--data", "--rank", "1")


def test_the_recipe_says_how_many_processes_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def build(*args: Any, workers: int, **kwargs: Any) -> Any:
        seen.append(workers)
        return build_cache(*args, **kwargs)

    monkeypatch.setattr("ndtrain.train.inputs.build_cache", build)
    recipe = text_recipe(tmp_path)
    for workers in (3, 0):
        open_preview(load_recipe(recipe, [f"data.workers={workers}"]))
    assert seen == [3, len(os.sched_getaffinity(0))]


def test_the_keys_of_chat_reach_its_encoder(tmp_path: Path) -> None:
    recipe, template = recipe_of(tmp_path, conversations(4)), tmp_path / "plain.jinja"
    template.write_text(TEMPLATE)
    keys = ['train_on=["user"]', f"chat_template={template}", "on_control_text=allow", "on_bad_row=skip"]
    preview = open_preview(load_recipe(recipe, [f"data.{key}" for key in keys]))
    encoder: Any = encoder_of(preview.recipe, preview.tokenizer)
    assert (encoder.train_on, encoder.on_control_text, encoder.skips) == ({"user"}, "allow", True)
    assert encoder.template.sources == {"default": TEMPLATE}
    labels = [label for row in preview.rows(99) for label in row["labels"] if label != -100]
    trained = preview.tokenizer.decode(labels)
    assert "What is it?" in trained and "Answer" not in trained
