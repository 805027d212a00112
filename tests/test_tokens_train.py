"""A run on prepared tokens is the run on their text, resumed and refused alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.ranks import RanksFailed, get_pool
from tests.test_resume import resume
from tests.test_source import notes_of_start
from tests.test_tokens import EOS, table_of, write_arrow, write_megatron, write_nanogpt
from tests.test_train import trained

STEPS = 3
MODEL = {"type": "llama", "config": tiny.CONFIGS["llama"]}


def rows_of(corpus: Path) -> list[list[int]]:
    """The ids of each text: its bytes between the marks of the tokenizer "bytes"."""
    return [[256, *file.read_bytes(), EOS] for file in sorted(corpus.iterdir())]


def recipe_of(tmp_path: Path, path: Path, *, name: str = "recipe", **more: dict[str, Any]) -> Path:
    more["data"] = {"path": str(path), "format": "tokens", **more.get("data", {})}
    where = {"corpus": path, "run_dir": tmp_path / f"{name}-run", "steps": STEPS}
    return tiny.recipe_file(tmp_path / f"{name}.toml", **{"model": MODEL, **where, **more})


def losses(recipe: Path, *overrides: str) -> list[float]:
    return [m["loss"] for m in get_pool(1).run(trained, str(recipe), list(overrides), timeout=100)[0]["metrics"]]


def test_training_from_tokens_is_training_from_their_text(tmp_path: Path) -> None:
    corpus, data = tiny.write_corpus(tmp_path / "corpus"), tmp_path / "data"
    data.mkdir()
    rows = rows_of(corpus)
    write_nanogpt(data / "a.bin", rows[:5])
    write_megatron(data / "b.bin", rows[5:])
    text = recipe_of(tmp_path, corpus, name="text", data={"format": "text"})
    tokens = recipe_of(tmp_path, data, name="tokens")
    assert losses(tokens) == losses(text) != []
    apart = ["data.packing=false", f"run.dir={tmp_path}/apart"]
    assert losses(tokens, *apart) == losses(text, *apart, f"run.dir={tmp_path}/apart-text")


def test_a_masked_loss_is_the_mean_over_the_tokens_that_carry_it(tmp_path: Path) -> None:
    rows = [row[:30] for row in rows_of(tiny.write_corpus(tmp_path / "corpus")) if len(row) >= 30][:8]
    labels = [[id if index % 3 else -100 for index, id in enumerate(row)] for row in rows]
    assert len(rows) == 8
    write_arrow(tmp_path / "a.arrow", table_of(rows, labels=labels))
    model = tiny.save_model("llama", tmp_path)
    settings: dict[str, Any] = {"data": {"packing": False}, "train": {"steps": 1}, "schedule": {"warmup_steps": 0}}
    recipe = recipe_of(tmp_path, tmp_path / "a.arrow", model={"name": str(model)}, **settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss.item()
    assert losses(recipe) == [pytest.approx(expected, rel=1e-5)]


def test_an_id_that_the_model_lacks_ends_the_run_before_its_weights_are_made(tmp_path: Path) -> None:
    file = write_nanogpt(tmp_path / "a.bin", [[1, 2, 3, EOS], 40 * [7], [5, 400, EOS]])
    with pytest.raises(RanksFailed, match=r"a\.bin: token 45, in document 1, is 400 .*embeds tokens 0 to 260"):
        get_pool(1).run(notes_of_start, str(recipe_of(tmp_path, file)), [])


def test_a_resume_compares_the_tokens(tmp_path: Path) -> None:
    rows = rows_of(tiny.write_corpus(tmp_path / "corpus"))
    data = tmp_path / "data"
    data.mkdir()
    file = write_megatron(data / "a.bin", rows)
    recipe = recipe_of(tmp_path, data, checkpoint={"resume": "auto"})
    assert len(losses(recipe)) == STEPS
    run = {"recipe": recipe}
    assert not resume(run)["error"] and "differs" not in resume(run)["said"]
    data.rename(tmp_path / "moved")
    found = resume(run, f"data.path={tmp_path}/moved")
    assert not found["error"] and "the same content" in found["said"]
    (tmp_path / "moved").rename(data)
    read = resume(run, "data.documents=eos")["error"]
    assert "data.documents" in read and "each sample would be another" in read and "\n" not in read
    write_megatron(file, [[*rows[0][:-2], 9, EOS], *rows[1:]])
    assert "the files of data.path changed: 0 added, 0 removed, 1 changed" in resume(run)["error"]
