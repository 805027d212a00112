"""Find the token files of `data.path`."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from ndtrain.data.files import Note, find_files
from ndtrain.data.formats import reading
from ndtrain.data.tokens.layouts import RAW_SUFFIXES, SUFFIXES, is_text
from ndtrain.data.tokens.megatron import index_of
from ndtrain.errors import DamagedError, RecipeError

_TRAINING = {"train", "training"}
_HELD_OUT = {"val", "valid", "validation", "dev", "test", "eval"}


def find_token_files(path: str, note: Note = lambda line: None) -> list[Path]:
    """Return the token files of `data.path`, in the order of their names, or the order that their data set gives.

    `path` is what `find_files` takes, or the prefix of a Megatron pair X.bin and X.idx, of which X.bin is returned. Of
    a directory that `datasets` saved, the files that its state.json lists are taken. Raises `RecipeError` if there are
    none, or if a directory holds a training and a held-out split; `DamagedError` for a pair or a data set that lacks a
    file.
    """
    root = Path(path).expanduser()
    if not root.exists() and Path(f"{root}.idx").exists():
        path = f"{root}.bin"
    found = find_files(
        path,
        note,
        kind_of=lambda file: "tokens" if file.suffix.lower() in (*SUFFIXES, ".idx") else None,
        what="token files (.npy, .bin, .arrow, .parquet)",
    )
    pairs = [file.with_suffix(".bin") if file.suffix.lower() == ".idx" else file for file in found]
    for file in pairs:
        if not file.exists():
            raise DamagedError(f"{index_of(file)} is the index of {file.name}, which is not beside it")
    files = list(dict.fromkeys(pairs))
    if Path(path).expanduser().is_file():
        return files
    files = _as_listed(files, note)
    if not files:
        raise RecipeError(f'data.path = "{path}" matches only files that the state.json beside them does not list')
    if root.is_dir():
        _refuse_splits(root, files)
    return files


def holds_tokens(path: str) -> bool:
    """Return whether `data.path` is of files that are tokens and have no rows with fields: .npy, .bin, Megatron's pair.

    A directory or glob is, if it has no file of rows.
    """
    if "://" in path:
        return False
    for find in (find_files, find_token_files):
        with suppress(RecipeError):
            return all(file.suffix.lower() in RAW_SUFFIXES and not is_text(file) for file in find(path))
    return False


def _as_listed(files: list[Path], note: Note) -> list[Path]:
    """Return the files in the order of the data sets that they belong to, without those of others."""
    kept: list[Path] = []
    for folder in dict.fromkeys(file.parent for file in files):
        own = [file for file in files if file.parent == folder]
        arrows = [file for file in own if file.suffix == ".arrow"]
        if not arrows or not (folder / "state.json").is_file():
            kept += own
            continue
        with reading(folder / "state.json"):
            try:
                state = json.loads((folder / "state.json").read_text())
                listed = [folder / str(entry["filename"]) for entry in state["_data_files"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedError(
                    f"{folder / 'state.json'} does not list the files of a data set ({error})"
                ) from error
        if state.get("_indices_data_files"):
            raise RecipeError(
                f"{folder} is a selection of rows that an old version of datasets saved; load it and save it again "
                "with flatten_indices()"
            )
        for file in listed:
            if not file.is_file():
                raise DamagedError(f"{folder / 'state.json'} lists {file.name}, which is not there")
        others = [file for file in own if file not in listed]
        if others:
            note(f"{folder}: files that state.json does not list are left out: {len(others):,}, first {others[0].name}")
        kept += [file for file in listed if file in own]
    return kept


def _refuse_splits(root: Path, files: list[Path]) -> None:
    """Raise `RecipeError` if the names say that some files are for training and some are held out."""
    split: dict[bool, Path] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", file.relative_to(root).as_posix().lower()))
        for held_out, known in ((False, _TRAINING), (True, _HELD_OUT)):
            if words & known:
                split.setdefault(held_out, file)
    if len({*split.values()}) > 1:
        first, second = (file.relative_to(root) for file in split.values())
        raise RecipeError(
            f'data.path = "{root}" holds {first} and {second}, a training and a held-out split; name one of them, with '
            "a glob if it has several files (a glob may also take both)"
        )
    for listing in {file.parent.parent / "dataset_dict.json" for file in files}:
        if len({file.parent for file in files if file.parent.parent == listing.parent}) > 1 and listing.is_file():
            raise RecipeError(f"{listing.parent} holds several splits (dataset_dict.json); name the directory of one")
