"""Find the files of `data.path`: local ones, or a split of a repository of data sets, a directory's or the hub's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ndtrain.data.files import find_files
from ndtrain.data.formats import name_kind, reading
from ndtrain.data.repository import is_repository, is_saved, names_below, saved_files, split_files
from ndtrain.data.rows import find_shape
from ndtrain.data.shapes import Shape
from ndtrain.data.tokens import find_token_files, holds_tokens
from ndtrain.errors import NdtrainError, RecipeError
from ndtrain.hf import hub
from ndtrain.recipe import Recipe, of_source
from ndtrain.recipe.data import DataSection
from ndtrain.recipe.problems import Key
from ndtrain.recipe.rules import of_format, of_sources
from ndtrain.runs.messages import of_rank0
from ndtrain.storage.paths import is_local, to_path
from ndtrain.train.source import OnNodes, recorded_commit

_KEY = "data.path"
# Unlike a model's, the name of a repository of data sets has an owner: a directory's would often do as one.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def path_of(data: DataSection) -> str:
    """Return `data.path`, which a [data] without sources has."""
    assert data.path is not None
    return data.path


def on_hub(data: DataSection) -> bool:
    """Return whether `data.path` is to be looked for on the hub; False for what exists here, and for another path."""
    return _NAME.fullmatch(path_of(data)) is not None and not Path(path_of(data)).exists()


def with_data_commit(
    recipe: Recipe, on_nodes: OnNodes, section: Literal["data", "eval"] = "data"
) -> tuple[Recipe, list[str]]:
    """Return the recipe with the commits of repositories on the hub in its section, and notes. Collective.

    Their cards are then in the cache of every node. A run that will resume keeps the commits that its recipe.toml
    records. Raises `RecipeError` if there is no such repository.
    """
    whole = recipe if section == "data" else recipe.held_out()
    parts, notes = whole.parts(), []
    for number, part in enumerate(parts):
        source = number if whole.data.sources else None
        commit, found = _commit(recipe, part.data, on_nodes, section=section, source=source)
        parts[number] = part.model_copy(update={"data": part.data.model_copy(update={"revision": commit})})
        notes += found
    data = whole.with_parts(parts).data
    own = getattr(recipe, section)
    return recipe.model_copy(
        update={section: own.model_copy(update={"revision": data.revision, "sources": data.sources})}
    ), notes


def _commit(
    recipe: Recipe, data: DataSection, on_nodes: OnNodes, *, section: Literal["data", "eval"], source: int | None
) -> tuple[str, list[str]]:
    """Return `data.revision`, or the commit that it is if the data is on the hub, and notes. Collective.

    `data` has the keys of `section`, or of the source of that number in it.
    """
    path, key = path_of(data), f"{section}.path" if source is None else f"{section}.sources[{source}].path"

    def resolve() -> list[object] | None:
        if not on_hub(data):
            return None
        recorded = recorded_commit(recipe, section, "path", source=source)
        return [recorded, *hub.resolve(path, recorded or data.revision, key=key, kind="dataset")]

    answer = of_rank0(resolve)
    if answer is None:
        return data.revision, []
    recorded, found = answer[0], hub.Snapshot(*answer[1:])

    def fetch() -> None:
        hub.remember_files(path, found)
        hub.fetch(path, found.commit, found.beside, key=key, kind="dataset")

    on_nodes(fetch)
    notes = [found.note] if found.note else []
    if data.revision != found.commit:
        what = "recorded by the run" if recorded else f'revision "{data.revision}"'
        notes.append(f"{key}: {path} at commit {found.commit} ({what})")
    return found.commit, notes


def fetch_data(recipe: Recipe, on_nodes: OnNodes) -> None:
    """Download the files of splits on the hub, once to each node, of the commits in `data.revision`. Collective."""

    def fetch() -> None:
        for number, part in enumerate(recipe.parts()):
            data = part.data
            if on_hub(data):
                with naming(recipe, number):
                    hub.fetch(path_of(data), data.revision, _of_hub(data), key=_KEY, kind="dataset")

    on_nodes(fetch)


@contextmanager
def naming(recipe: Recipe, number: int) -> Iterator[None]:
    """Let errors name the keys of source `number` as such, if [data] has sources."""
    try:
        yield
    except NdtrainError as error:
        if recipe.data.sources:
            error.args = (of_source(str(error), number),)
        raise


def data_files(recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Return the files of the recipe's data, which are on this node after `fetch_data`.

    `note` gets a line about files that are left out, or that are one split of several. Raises `RecipeError` if there
    are none, and for keys of repositories where `data.path` is none.
    """
    data, path = recipe.data, path_of(recipe.data)
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
    data, path = recipe.data, path_of(recipe.data)
    if "://" in path:
        raise RecipeError(f'data.path = "{path}": prepared tokens are used where they lie; copy them to a disk')
    if on_hub(data) or data.subset is not None or data.split is not None:
        return data_files(recipe, note)
    return find_token_files(path, note)


def with_format(recipe: Recipe, *, inherits: DataSection | None = None) -> Recipe:
    """Return the recipe with the formats that its data has, and the defaults that depend on them. Collective.

    Reads the first row where the recipe names no format. Raises `RecipeError` for keys that contradict the format, and
    without rows, `DamagedError` for a row of none. What [data] has from `inherits` may be for another format, and does
    nothing.
    """
    parts, found = recipe.parts(), []
    for number, part in enumerate(parts):
        with naming(recipe, number):
            data, problems = _with_format(part)
        parts[number] = part.model_copy(update={"data": data})
        found.append(problems)
    problems = dict(of_sources(recipe, found)) if recipe.data.sources else found[0]
    lines = [
        sentence
        for (_, *key), sentence in problems.items()
        if len(key) > 1 or inherits is None or getattr(recipe.data, key[0]) != getattr(inherits, key[0])
    ]
    if lines:
        raise RecipeError("\n".join(lines))
    return recipe.with_parts(parts)


def _with_format(recipe: Recipe) -> tuple[DataSection, dict[Key, str]]:
    """Return the [data] of one source with the format that its data has, and which of its keys contradict it."""
    data = recipe.data

    def found() -> Shape:
        if data.format != "auto":
            return data.format
        if holds_tokens(path_of(data)):
            return "tokens"
        if (shape := find_shape(data_files(recipe), columns=data.columns)) is None:
            raise RecipeError(f'data.path = "{data.path}" has no rows')
        return shape

    known = data.of_format(of_rank0(found))
    why = " (data.format is that of the first row, unless it is set)" if data.format == "auto" else ""
    return known, {at: f"{sentence}{why}" for at, sentence in of_format(known)}


def names_of(path: str, files: Sequence[Path]) -> list[str]:
    """Return the names of the files below `path`, or below the directory that all of them are in."""
    places = [os.path.abspath(file) if is_local(file) else str(file) for file in files]
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        root = os.path.commonpath([os.path.dirname(place) for place in places])
    return [os.path.relpath(place, root) for place in places]


def cache_root() -> Path:
    """Return the directory of the token caches: $NDTRAIN_CACHE, or `ndtrain` in the user's cache directory."""
    if given := os.environ.get("NDTRAIN_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndtrain"


def _of_hub(data: DataSection) -> list[str]:
    path = path_of(data)
    return split_files(
        path,
        hub.files_of(path, data.revision),
        hub.snapshot_directory(path, data.revision, "dataset"),
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
