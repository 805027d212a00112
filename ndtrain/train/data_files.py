"""Find the files of `data.path`: local ones, or a split of a repository of data sets, a directory's or the hub's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ndtrain.data.files import find_files
from ndtrain.data.formats import name_kind, reading
from ndtrain.data.repository import is_repository, is_saved, names_below, saved_files, split_files
from ndtrain.data.rows import find_shape
from ndtrain.data.shapes import Shape
from ndtrain.data.tokens import find_token_files
from ndtrain.errors import RecipeError
from ndtrain.hf import hub
from ndtrain.recipe import Recipe
from ndtrain.recipe.rules import of_format
from ndtrain.recipe.schema import DataSection
from ndtrain.runs.messages import of_rank0
from ndtrain.storage.paths import to_path
from ndtrain.train.source import OnNodes, recorded_commit

_KEY = "data.path"
# Unlike a model's, the name of a repository of data sets has an owner: a directory's would often do as one.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def on_hub(data: DataSection) -> bool:
    """Return whether `data.path` is to be looked for on the hub; False for what exists here, and for another path."""
    return _NAME.fullmatch(data.path) is not None and not Path(data.path).exists()


def with_data_commit(
    recipe: Recipe, on_nodes: OnNodes, section: Literal["data", "eval"] = "data"
) -> tuple[Recipe, list[str]]:
    """Return the recipe with the commit of a repository on the hub in its section's `revision`, and notes. Collective.

    Its cards are then in the cache of every node. A run that will resume keeps the commit that its recipe.toml records.
    Raises `RecipeError` if there is no such repository.
    """
    data, key = recipe.data if section == "data" else recipe.held_out().data, f"{section}.path"

    def resolve() -> list[object] | None:
        if not on_hub(data):
            return None
        recorded = recorded_commit(recipe, section, "path")
        return [recorded, *hub.resolve(data.path, recorded or data.revision, key=key, kind="dataset")]

    answer = of_rank0(resolve)
    if answer is None:
        return recipe, []
    recorded, found = answer[0], hub.Snapshot(*answer[1:])

    def fetch() -> None:
        hub.remember_files(data.path, found)
        hub.fetch(data.path, found.commit, found.beside, key=key, kind="dataset")

    on_nodes(fetch)
    notes = [found.note] if found.note else []
    if data.revision != found.commit:
        what = "recorded by the run" if recorded else f'revision "{data.revision}"'
        notes.append(f"{key}: {data.path} at commit {found.commit} ({what})")
    own = getattr(recipe, section).model_copy(update={"revision": found.commit})
    return recipe.model_copy(update={section: own}), notes


def fetch_data(recipe: Recipe, on_nodes: OnNodes) -> None:
    """Download the files of a split on the hub, once to each node, of the commit in `data.revision`. Collective."""
    data = recipe.data

    def fetch() -> None:
        if on_hub(data):
            hub.fetch(data.path, data.revision, _of_hub(data), key=_KEY, kind="dataset")

    on_nodes(fetch)


def data_files(recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Return the files of the recipe's data, which are on this node after `fetch_data`.

    `note` gets a line about files that are left out, or that are one split of several. Raises `RecipeError` if there
    are none, and for keys of repositories where `data.path` is none.
    """
    data, path = recipe.data, recipe.data.path
    if on_hub(data):
        names = _of_hub(data)
        _note_texts(path, names, note)
        return [hub.snapshot_directory(path, data.revision, "dataset") / name for name in names]
    root = to_path(path) if "://" in path else Path(path).expanduser()
    given = [f'data.{key} = "{value}"' for key, value in (("subset", data.subset), ("split", data.split)) if value]
    if data.revision != hub.MAIN:
        raise RecipeError(f'data.revision = "{data.revision}" is for repositories of the hub; leave it out')
    with reading(root):
        is_directory = root.is_dir()
    if not is_directory:
        if given:
            raise RecipeError(f'{" and ".join(given)}: data.path = "{path}" is no repository of data sets')
        return find_files(path, note)
    if is_saved(root):
        if data.subset is not None:
            raise RecipeError(f'{given[0]}: data.path = "{path}" is a saved data set, which has no subsets')
        return saved_files(path, root, data.split)
    if not given and not is_repository(root):
        return find_files(path, note)
    names, split = names_below(root), data.split or "train"
    files = split_files(path, names, root, subset=data.subset, split=data.split, memo_dir=_memo_dir())
    others = len(names) - len(files)
    note(f'data.path = "{path}" is a repository: files read, of split "{split}": {len(files):,}; left out: {others:,}')
    _note_texts(path, files, note)
    return [root / name for name in files]


def token_files(recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Return the files of prepared tokens, as `data_files` does. Raises `RecipeError` for those of an object store."""
    data = recipe.data
    if "://" in data.path:
        raise RecipeError(f'data.path = "{data.path}": prepared tokens are used where they lie; copy them to a disk')
    if on_hub(data) or data.subset is not None or data.split is not None:
        return data_files(recipe, note)
    return find_token_files(data.path, note)


def with_format(recipe: Recipe, *, inherits: DataSection | None = None) -> Recipe:
    """Return the recipe with the format that its data has, and the defaults that depend on it. Collective.

    Reads the first row where the recipe names no format. Raises `RecipeError` for keys that contradict the format, and
    without rows, `DamagedError` for a row of none.
    """
    data = recipe.data

    def found() -> Shape:
        if data.format != "auto":
            return data.format
        if (shape := find_shape(data_files(recipe), columns=data.columns)) is None:
            raise RecipeError(f'data.path = "{data.path}" has no rows')
        return shape

    known = data.of_format(of_rank0(found))
    broken = [(key, sentence) for (_, key), sentence in of_format(known)]
    if data.format == "auto":
        broken = [
            (key, f"{sentence} (data.format is that of the first row, unless it is set)") for key, sentence in broken
        ]
    # What [eval] has from [data] may be for another format, and does nothing.
    if problems := [text for key, text in broken if inherits is None or getattr(data, key) != getattr(inherits, key)]:
        raise RecipeError("\n".join(problems))
    return recipe.model_copy(update={"data": known})


def cache_root() -> Path:
    """Return the directory of the token caches: $NDTRAIN_CACHE, or `ndtrain` in the user's cache directory."""
    if given := os.environ.get("NDTRAIN_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndtrain"


def _of_hub(data: DataSection) -> list[str]:
    return split_files(
        data.path,
        hub.files_of(data.path, data.revision),
        hub.snapshot_directory(data.path, data.revision, "dataset"),
        subset=data.subset,
        split=data.split,
        memo_dir=_memo_dir(),
    )


def _note_texts(path: str, names: list[str], note: Callable[[str], None]) -> None:
    if texts := [name for name in names if name_kind(Path(name)) == "text"]:
        note(
            f'data.path = "{path}": each text file is one document, such as {texts[0]}; for datasets, each line is one'
        )


def _memo_dir() -> Path:
    return cache_root() / "splits"
