"""A repository of data sets gives the rows that `datasets` gives, of one split of one subset; nothing of it is run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ndtrain.data.repository import is_repository, is_saved, names_below, split_files
from ndtrain.data.rows import find_shape, rows_of
from ndtrain.data.shapes import fields_of, text_of
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.recipe import Recipe
from ndtrain.train.data_files import data_files

pytestmark = pytest.mark.skipif(find_spec("datasets") is None, reason="needs datasets")

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: data/a*.jsonl
  - split: test
    path: data/test.jsonl
- config_name: other
  default: true
  data_files: other/*.jsonl
---
# A card
"""
# Layout -> its files, with the rows of each counted on.
LAYOUTS: dict[str, list[str]] = {
    "card": ["README.md", "data/a1.jsonl", "data/a2.jsonl", "data/test.jsonl", "other/x.jsonl", "other/y.jsonl"],
    "shards": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ],
    "names": ["train.jsonl", "test.jsonl", "notes.md"],
    "folders": ["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"],
    "dates": ["data/2020/x.csv", "data/2021/x.csv"],
    "packed": ["train/a.jsonl.gz"],
}


def write(root: Path, names: list[str], card: str = CARD) -> Path:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} row {i}", "id": 10 * number + i} for i in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if name == "README.md":
            file.write_text(card)
        elif file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif file.suffix == ".csv":
            file.write_text("text,id\n" + "".join(f"{row['text']},{row['id']}\n" for row in rows))
        elif file.suffix == ".gz":
            file.write_bytes(gzip.compress(lines.encode()))
        else:
            file.write_text(lines)
    return root


def recipe_of(path: Path | str, **data: str) -> Recipe:
    tables: dict[str, Any] = {"model": {"type": "llama"}, "data": {"path": str(path), "seq_len": 8, **data}}
    return Recipe.model_validate({**tables, "optim": {"lr": 1.0}, "train": {"steps": 1}, "run": {"dir": "run"}})


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDTRAIN_CACHE", str(tmp_path / "cache"))


def texts_of(files: list[Path]) -> list[str]:
    find_shape(files)
    return [text_of(fields_of(row.fields, "text", {})) for file in files for row in rows_of(file)]


@pytest.mark.parametrize(
    ("layout", "subset", "split"),
    [
        ("card", "main", None),
        ("card", "main", "test"),
        ("card", None, None),
        ("shards", None, None),
        ("shards", None, "test"),
        ("names", None, "train"),
        ("folders", None, "train"),
        ("dates", None, "train"),
        ("packed", None, "train"),
    ],
)
def test_a_split_has_the_rows_that_datasets_gives(
    tmp_path: Path, layout: str, subset: str | None, split: str | None
) -> None:
    import datasets

    root = write(tmp_path / "repository", LAYOUTS[layout])
    expected = datasets.load_dataset(str(root), subset, split=split or "train", cache_dir=str(tmp_path / "hf"))["text"]
    notes: list[str] = []
    asked = {key: value for key, value in (("subset", subset), ("split", split)) if value}
    assert texts_of(data_files(recipe_of(root, **asked), notes.append)) == list(expected)
    assert f'is a repository: files read, of split "{split or "train"}": ' in notes[0]


def test_a_directory_is_a_repository_by_its_card_or_its_splits(tmp_path: Path) -> None:
    for layout, found in {"card": True, "shards": True, "names": True, "folders": True, "dates": False}.items():
        assert is_repository(write(tmp_path / layout, LAYOUTS[layout])) == found, layout
    shards = ["x/train-00000-of-00002.jsonl", "y/train-00001-of-00002.jsonl"]
    plain = write(tmp_path / "plain", ["README.md", "code/test/test.py", *shards], "# hi")
    assert not is_repository(plain)
    assert len(data_files(recipe_of(plain))) == 4, "without a sign of a repository all files are read"


NO_DEFAULT = CARD.replace("  default: true\n", "")
SEPARATOR = '---\nconfigs:\n- config_name: other\n  data_files: other/*.csv\n  sep: ";"\n---\n'
OUTSIDE = CARD.replace("data/a*.jsonl", "../x.jsonl")
REFUSED: list[tuple[list[str], str, dict[str, str], str]] = [
    (LAYOUTS["card"], NO_DEFAULT, {}, 'no subset "default"; set data.subset to one of main, other'),
    (LAYOUTS["card"], CARD, {"subset": "nope"}, 'no subset "nope"; set data.subset to one of main, other'),
    (LAYOUTS["card"], CARD, {"split": "dev"}, 'no split "dev"; set data.split to one of train'),
    (LAYOUTS["card"], OUTSIDE, {"subset": "main"}, "datasets finds no data in it"),
    (["README.md", "other/x.csv"], SEPARATOR, {}, "its README.md says to read the files with sep"),
    (["card.py"], "", {"split": "train"}, "its rows are made by a script, which is never run"),
    (["a.png", "b.png"], "", {"split": "train"}, 'for the builder "imagefolder"'),
]


@pytest.mark.parametrize(("names", "card", "keys", "said"), REFUSED)
def test_what_cannot_be_read_as_datasets_does_is_refused(
    tmp_path: Path, names: list[str], card: str, keys: dict[str, str], said: str
) -> None:
    root = write(tmp_path / "card", names, card)
    (tmp_path / "x.jsonl").write_text('{"text": "outside"}\n')
    with pytest.raises(RecipeError) as caught:
        data_files(recipe_of(root, **keys))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_script_is_never_run(tmp_path: Path) -> None:
    root = write(tmp_path / "repository", ["train.jsonl"])
    (root / "repository.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    with pytest.raises(RecipeError, match=r"never run|scripts"):
        data_files(recipe_of(root, split="train"))
    assert not (tmp_path / "ran").exists()


def test_names_cannot_lead_out_of_the_repository(tmp_path: Path) -> None:
    for name in ("../a.jsonl", "/etc/a.jsonl", "a/../../b.jsonl"):
        with pytest.raises(DamagedError, match="has a file called"):
            split_files("org/name", [name], tmp_path, subset=None, split=None, memo_dir=tmp_path)


def test_the_answer_is_kept_until_names_or_cards_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "repository", LAYOUTS["card"])
    first = data_files(recipe_of(root, subset="main"))
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "datasets", None)
        assert data_files(recipe_of(root, subset="main")) == first
        for keys in ({"subset": "other"}, {"subset": "main", "split": "test"}):
            with pytest.raises(RecipeError, match=r"pip install 'ndtrain\[hub\]'"):
                data_files(recipe_of(root, **keys))
    write(root, ["data/a3.jsonl"])
    assert [file.name for file in data_files(recipe_of(root, subset="main"))] == ["a1.jsonl", "a2.jsonl", "a3.jsonl"]


def save(folder: Path, splits: bool) -> list[str]:
    import datasets

    data = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(1000)]})
    if splits:
        other = datasets.Dataset.from_dict({"text": ["other"]})
        datasets.DatasetDict({"train": data, "test": other}).save_to_disk(folder, num_shards={"train": 3, "test": 1})
    else:
        data.select(range(0, 1000, 3)).save_to_disk(folder)
    return list((data if splits else data.select(range(0, 1000, 3)))["text"])


@pytest.mark.parametrize("splits", [True, False])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, splits: bool) -> None:
    root = tmp_path / "saved"
    texts = save(root, splits)
    assert is_saved(root) and texts_of(data_files(recipe_of(root))) == texts
    refused: list[tuple[dict[str, str], str]] = [({"subset": "a"}, "which has no subsets")]
    if splits:
        assert texts_of(data_files(recipe_of(root, split="test"))) == ["other"]
        refused.append(({"split": "dev"}, "set data.split to one of train, test"))
    else:
        refused.append(({"split": "train"}, "a saved data set without splits"))
    for keys, said in refused:
        with pytest.raises(RecipeError, match=said):
            data_files(recipe_of(root, **keys))
    next(root.rglob("*.arrow")).unlink()
    with pytest.raises(DamagedError, match="which is not there"):
        data_files(recipe_of(root, **({"split": "test"} if splits and not list(root.glob("test/*.arrow")) else {})))


@pytest.mark.parametrize("keys", [{"subset": "a"}, {"split": "train"}, {"revision": "v1"}])
def test_keys_of_repositories_are_refused_elsewhere(tmp_path: Path, keys: dict[str, str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(RecipeError, match=f"data.{next(iter(keys))} = "):
        data_files(recipe_of(tmp_path / "a.txt", **keys))


def test_links_and_hidden_folders_are_no_names(tmp_path: Path) -> None:
    write(tmp_path, ["a/b.jsonl", ".git/c.jsonl"])
    assert names_below(tmp_path) == ["a/b.jsonl"]


def test_a_note_says_that_text_files_are_whole_documents(tmp_path: Path) -> None:
    root = write(tmp_path / "repository", ["a.txt"])
    (root / "a.txt").write_text("one\ntwo\n")
    notes: list[str] = []
    files = data_files(recipe_of(root, split="train"), notes.append)
    assert texts_of(files) == ["one\ntwo\n"]
    assert "each text file is one document, such as a.txt; for datasets, each line is one" in notes[-1]
