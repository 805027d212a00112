"""Decide which files hold a model's weights, for every reader, with the precedence of transformers' `from_pretrained`.

The precedence is that of `_get_resolved_checkpoint_files` (transformers 5.23): `transformers_weights` of config.json,
then model.safetensors, its index, pytorch_model.bin, its index. Other files beside them (consolidated.safetensors, a
variant like model.fp16.safetensors) are not the model's. Where a directory says two things, it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ndtrain.errors import DamagedError, RecipeError, first_line
from ndtrain.storage.paths import is_local
from ndtrain.storage.pieces import pieces_in
from ndtrain.storage.pointers import pointer_at
from ndtrain.storage.table import Piece

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_SUFFIX = ".index.json"
# In order of precedence.
STANDARD = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# A file of the directory itself.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ModelFiles(NamedTuple):
    """The files that hold the weights of the directory `where`."""

    where: Path
    kind: Literal["checkpoint", "safetensors", "torch"]  # of ndtrain, of safetensors files, of torch.save
    main: str  # name of the manifest, the one file or the index
    files: Mapping[str, Path]  # by name, in the order in which transformers reads them; none of a checkpoint
    weight_map: Mapping[str, str] | None  # the index: {key: name of its file}

    def pieces(self) -> dict[str, Piece]:
        """Return {key: where it is stored} of safetensors files.

        Of several files with a key the last counts, as in transformers. Raises `DamagedError` for a damaged file, and
        for an index that says another thing than the files.
        """
        pieces: dict[str, Piece] = {}
        for name, path in self.files.items():
            pieces |= pieces_in(path, f"the weights of {self.where} cannot be read: {name}")
        for key, name in (self.weight_map or {}).items():
            if key not in pieces:
                raise DamagedError(f"{self.where}: {key} is not in {name}, where {self.main} says it is")
            if pieces[key].file != self.files[name]:
                raise DamagedError(
                    f"{self.where}: {key} is in {pieces[key].file.name}, but {self.main} says it is in {name}; remove "
                    "the stale file, or write the index anew"
                )
        if self.weight_map is not None and (unlisted := sorted(pieces.keys() - self.weight_map.keys())):
            raise DamagedError(
                f"{self.where}: {unlisted[0]} is in {pieces[unlisted[0]].file.name}, but not in {self.main}; write the "
                "index anew"
            )
        return pieces


def model_files(where: Path, *, named: str | None = None) -> ModelFiles | None:
    """Return the files of the weights of a directory, or None if it has none.

    `named` is the file that config.json names as `transformers_weights`. Raises `RecipeError` for a directory that
    holds an adapter or two models, and `DamagedError` for links and indexes to files that are missing.
    """
    found = next((name for name in STANDARD if _find(where, name) is not None), None)
    checkpoint = _find(where, "manifest.json") is not None
    if checkpoint and found:
        raise RecipeError(
            f"{where} holds both an ndtrain checkpoint (manifest.json) and the weights {found}; move one of them to "
            "another directory"
        )
    if checkpoint:
        return ModelFiles(where, "checkpoint", "manifest.json", {}, None)
    if (found or named) and _find(where, "adapter_config.json") is not None:
        raise RecipeError(
            f"{where} holds an adapter (adapter_config.json) beside the model, and transformers would apply it if peft "
            "is installed; merge it into the weights, or move it to another directory"
        )
    if named is None:
        return _listed(where, found) if found else None
    if not named.endswith((".safetensors", ".safetensors" + _INDEX_SUFFIX)) or not _NAME.fullmatch(named):
        raise DamagedError(
            f"{where}: config.json names the weights {named!r} (transformers_weights), which is not a safetensors file "
            "or index of the directory"
        )
    if _find(where, named) is None:
        raise DamagedError(f"{where}: {named} is missing, which config.json names as transformers_weights")
    return _listed(where, named)


def named_weights(directory: Path) -> str | None:
    """Return the file that config.json names as `transformers_weights`; None if it names none or cannot be read."""
    try:
        found: str | None = json.loads((directory / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    return found


def weight_map_of(index: Path, where: object) -> dict[str, str]:
    """Return {key: name of its file} of an index. Raises `DamagedError` naming `where`."""
    suffix = Path(index.name.removesuffix(_INDEX_SUFFIX)).suffix
    try:
        content = json.loads(index.read_text("utf-8"))
        weight_map = dict(content["weight_map"])
        if not isinstance(content["metadata"], dict) or not weight_map:
            raise ValueError("metadata is not a table, or weight_map is empty")
        for key, name in weight_map.items():
            if not _NAME.fullmatch(name) or not name.endswith(suffix):
                raise ValueError(f"{key} is in {name!r}, which is not a {suffix} file of the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{where}: {index.name} is damaged ({first_line(error)})") from error
    return weight_map


def _find(where: Path, name: str) -> Path | None:
    """Return the path of a file of `where`, or None. Raises `DamagedError` for a link to nothing and a pointer."""
    path = where / name
    if path.is_file():
        if is_local(path) and (what := pointer_at(path)):
            raise DamagedError(f"{path} {what}")
        return path
    if is_local(path) and path.is_symlink():
        raise DamagedError(f"{path} is a link to {path.readlink()}, where there is no file")
    return None


def _listed(where: Path, main: str) -> ModelFiles:
    """Return the files that `main`, a file or an index, stands for."""
    path = _find(where, main)
    assert path is not None
    kind: Literal["safetensors", "torch"] = "safetensors" if ".safetensors" in main else "torch"
    if not main.endswith(_INDEX_SUFFIX):
        return ModelFiles(where, kind, main, {main: path}, None)
    weight_map = weight_map_of(path, where)
    names = sorted(set(weight_map.values()))
    if lost := [name for name in names if _find(where, name) is None]:
        raise DamagedError(f"{where}: {lost[0]} is missing, which {main} names")
    return ModelFiles(where, kind, main, {name: where / name for name in names}, weight_map)
