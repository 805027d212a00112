"""A repository of data sets on the hub is one commit, asked for once; a node downloads the files of its split alone."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf import hub
from ndtrain.recipe import Recipe, load_recipe
from ndtrain.train.data_files import data_files, fetch_data, token_files, with_data_commit, with_format
from tests import test_hub, test_repository, tiny
from tests.fake_hub import FakeHub, fake_hub
from tests.test_hub import asks, ran
from tests.test_repository import LAYOUTS, texts_of, write

NAME = "org/texts"
served = test_hub.served
needs_datasets = test_repository.pytestmark


def opened(recipe: Recipe) -> tuple[Recipe, list[Path], list[str]]:
    recipe, notes = with_data_commit(recipe, lambda work: work())
    fetch_data(recipe, lambda work: work())
    return recipe, data_files(recipe), notes


def recipe_of(tmp_path: Path, *overrides: str, path: str = NAME, **data: str) -> Recipe:
    file = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=Path(path),
        run_dir=tmp_path / "run",
        steps=4,
        checkpoint={"resume": "auto"},
    )
    return load_recipe(file, [*(f"data.{key}={value}" for key, value in data.items()), *overrides])


@needs_datasets
def test_a_split_of_a_commit_is_downloaded_and_nothing_else(
    served: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NDTRAIN_CACHE", str(tmp_path / "cache"))
    commit = served.publish(f"datasets/{NAME}", write(tmp_path / "card", LAYOUTS["card"]), "v1", "main")
    recipe, files, notes = opened(recipe_of(tmp_path, subset="main", revision="v1"))
    assert recipe.data.revision == commit and notes == [f'data.path: {NAME} at commit {commit} (revision "v1")']
    assert texts_of(files) == [f"data/a{n}.jsonl row {i}" for n in (1, 2) for i in range(3)]
    fetched = sorted(line.rpartition(f"{commit}/")[2] for line in served.asked if line.startswith("GET /datasets/"))
    assert fetched == ["README.md", "data/a1.jsonl", "data/a2.jsonl"]
    served.asked.clear()
    assert data_files(recipe) == files and served.asked == [], "other ranks ask nothing"

    # The hub moves on: the commit stays, and without a connection its cache answers.
    write(tmp_path / "card", ["data/a3.jsonl"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _, again, notes = opened(recipe)
    assert again == files and "HF_HUB_OFFLINE is set" in notes[0]
    asks(
        lambda: opened(recipe_of(tmp_path, revision=commit, subset="main", split="test")),
        "cannot be downloaded",
        kind=NdtrainError,
    )
    (hub.snapshot_directory(NAME, commit, "dataset").parent.parent / ".ndtrain" / f"{commit}.json").write_text("[")
    asks(lambda: opened(recipe), "cannot be read", "start again with a connection", kind=DamagedError)


def test_what_the_hub_does_not_have_is_said_with_both_places(
    served: FakeHub,
    tmp_path: Path,
) -> None:
    served.publish(f"datasets/{NAME}", write(tmp_path / "card", LAYOUTS["card"]))
    asks(
        lambda: opened(recipe_of(tmp_path, path="org/txets")),
        'data.path = "org/txets": there is no such directory (looked from ',
        f"nor is there a data set of that name on the hub ({served.endpoint}; ",
    )
    asks(
        lambda: opened(recipe_of(tmp_path, revision="v9")),
        'data.revision = "v9": ',
        "has no such branch, tag or commit",
    )
    served.gated.add(f"datasets/{NAME}")
    asks(lambda: opened(recipe_of(tmp_path)), f"is gated: accept its terms on {served.endpoint}/datasets/{NAME}, ")
    served.asked.clear()
    for path in ("org", "./org/texts", "/org/texts", "org/texts/", "org/*.txt", "a/b/c", "../texts"):
        asks(lambda path=path: opened(recipe_of(tmp_path, f"data.path={path}")), "matches no file")
    assert served.asked == []


@needs_datasets
def test_two_ranks_train_on_one_download_and_a_resume_keeps_its_commit(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe_of(tmp_path)
    text = recipe.read_text().replace(f'path = "{NAME}"', f'path = "{NAME}"\nsubset = "main"')
    recipe.write_text(text.replace("seq_len = ", "seq_len = 8 #").replace("[mesh]", "[mesh]\ndp_shard = 2"))
    with fake_hub() as server:
        card = write(tmp_path / "card", LAYOUTS["card"])
        commit = server.publish(f"datasets/{NAME}", card)
        result = ran(recipe, server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert f'data.path: {NAME} at commit {commit} (revision "main")' in result.stdout
        fetched = [line for line in server.asked if line.startswith("GET /datasets/")]
        assert len(fetched) == len(set(fetched)) == 3, fetched
        recorded = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["data"]
        assert (recorded["path"], recorded["revision"]) == (NAME, commit)
        write(card, ["data/a3.jsonl"])
        assert server.publish(f"datasets/{NAME}", card) != commit
        again = ran(recipe, server, tmp_path, "--set", "train.steps=5")
        assert again.returncode == 0, again.stderr
        assert f"data.path: {NAME} at commit {commit} (recorded by the run)" in again.stdout
        state = tmp_path / "run" / "checkpoints" / "step-00000005" / "train_state.json"
        assert sorted(json.loads(state.read_text())["origin"]["files"]) == ["a1.jsonl", "a2.jsonl"]
        asks(
            lambda: with_data_commit(load_recipe(recipe, [f"data.revision={'0' * 40}"]), lambda work: work()),
            f"uses commit {commit} of {NAME}; leave data.revision out",
            kind=RecipeError,
        )


@needs_datasets
def test_held_out_data_of_the_hub_has_a_commit_and_a_split_of_its_own(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n')
    commit = served.publish(f"datasets/{NAME}", folder, "main")
    recipe = recipe_of(tmp_path, f"eval.path={NAME}", "eval.split=validation")
    recipe, notes = with_data_commit(recipe, lambda work: work(), "eval")
    assert notes == [f'eval.path: {NAME} at commit {commit} (revision "main")']
    assert recipe.eval is not None and recipe.eval.revision == commit and recipe.data.revision == "main"
    fetch_data(recipe.held_out(), lambda work: work())
    assert texts_of(data_files(recipe.held_out())) == ["validation"]


def test_files_without_rows_are_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "a.npy", np.arange(64, dtype=np.uint16))
    np.arange(64, dtype=np.uint16).tofile(folder / "b.bin")  # also UTF-8, with zero bytes
    (folder / "c.bin").write_text("Text whose name says nothing of it. " * 4)
    for path, found in (("a.npy", "tokens"), ("b.bin", "tokens"), ("c.bin", "text"), ("*.npy", "tokens")):
        assert with_format(recipe_of(tmp_path, path=f"{folder}/{path}")).data.format == found, path
    (folder / "c.bin").unlink()
    assert with_format(recipe_of(tmp_path, path=str(folder))).data.format == "tokens"
    tokens = recipe_of(tmp_path, path=str(folder))
    named = tokens.model_copy(update={"data": tokens.data.model_copy(update={"columns": {"text": "a"}})})
    asks(lambda: with_format(named), 'data.columns = {"text": "a"} is for text and chat, and the data\'s format is')
    (folder / "d.txt").write_text("a row")
    assert with_format(recipe_of(tmp_path, path=str(folder))).data.format == "text"


def test_the_first_row_says_what_the_data_is(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    file = tmp_path / "data.parquet"
    for row, found in (({"text": "a", "id": 1}, "text"), ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens")):
        pq.write_table(pa.Table.from_pylist([row]), file)
        recipe = recipe_of(tmp_path, path=str(file))
        assert with_format(recipe).data.format == found
        assert with_format(recipe_of(tmp_path, path=str(file), format="text")).data.format == "text"
    assert token_files(recipe) == [file]
    parse = recipe.model_copy(update={"data": recipe.data.model_copy(update={"special_tokens": "parse"})})
    asks(lambda: with_format(parse), 'data.special_tokens = "parse" is for text, and the data\'s format is "tokens"')
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": "a"}]}]), file)
    chat = with_format(recipe).data
    assert (chat.format, chat.packing, chat.too_long) == ("chat", "best_fit", "error")
    first = "(data.format is that of the first row, unless it is set)"
    asks(lambda: with_format(recipe_of(tmp_path, path=str(file), packing="concat")), first)
    (tmp_path / "empty.jsonl").touch()
    asks(lambda: with_format(recipe_of(tmp_path, path=f"{tmp_path}/empty.jsonl")), 'empty.jsonl" has no rows')
    asks(lambda: token_files(recipe_of(tmp_path, "data.path=memory://a")), "copy them to a disk")
