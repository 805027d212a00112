"""Identify the base weights that a recipe names by what they are, so that a moved directory is the same base."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndtrain.checkpoint.manifest import HASH, MANIFEST, read_manifest
from ndtrain.errors import NdtrainError
from ndtrain.hf.files import ModelFiles
from ndtrain.hf.hub import is_commit
from ndtrain.load.files import files_to_load
from ndtrain.recipe import Recipe
from ndtrain.storage.headers import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Files of up to so many bytes together are read whole. Of larger ones each tensor is read at its first, its last and
# evenly spaced blocks: training changes values everywhere, and a start must not read a large model twice.
WHOLE_BYTES = 1 << 28
_BLOCK_BYTES = 4096
_SPACING_BYTES = 1 << 26


def base_identity(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """Return a text that is equal for equal base weights, whatever their directory; None if they cannot be read.

    It is the hashes in the manifest of an ndtrain checkpoint, the commit of a hub repository, and for a directory a
    digest of its tensors, with that of the code that comes with them where the recipe trusts it. Weights that are drawn
    have none of their own: train.seed and the config tell them apart.
    """
    if recipe.model.init == "random":
        return "drawn from train.seed"
    name = str(recipe.model.name)
    directory = Path(name)
    try:
        code = _code(directory) if recipe.model.trust_remote_code else ""
        if (directory / MANIFEST).is_file():
            files = read_manifest(directory)["files"]
            stored = {key: entry[HASH] for key, entry in files.items() if key.startswith("model/")}
            digest = hashlib.blake2b(json.dumps(stored, sort_keys=True).encode(), digest_size=8)
            return f"checkpoint {digest.hexdigest()}{code}"
        if not directory.is_dir():
            return f"commit {recipe.model.revision}" if is_commit(recipe.model.revision) else None
        return f"tensors {_digest(files_to_load(model, recipe)).hexdigest()}{code}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NdtrainError):
        return None  # whoever reads the weights reports it


def _code(directory: Path) -> str:
    files = sorted(directory.glob("*.py"))
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        found.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return f", code {found.hexdigest()}" if files else ""


def _digest(files: ModelFiles) -> Any:
    """Return the digest of a directory's tensors, which does not depend on the files that hold them."""
    if files.kind == "safetensors":
        parts = sorted(_tensors(files.files.values()))
    else:
        parts = [(name, "", file, 0, file.stat().st_size) for name, file in sorted(files.files.items())]
    found = hashlib.blake2b(digest_size=8)
    whole = sum(stop - start for *_, start, stop in parts) <= WHOLE_BYTES
    opened: dict[Path, int] = {}
    try:
        for key, what, file, start, stop in parts:
            found.update(f"{key} {what} {stop - start}\n".encode())
            if file not in opened:
                opened[file] = os.open(file, os.O_RDONLY)
            for at, size in _blocks(start, stop, whole=whole):
                found.update(os.pread(opened[file], size, at))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return found


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, str, Path, int, int]]:
    """Yield (key, dtype and shape, file, first and last byte) of each tensor in safetensors files."""
    for file in files:
        begin, entries, _ = read_header(file)
        for key, entry in entries.items():
            yield key, f"{entry.dtype} {list(entry.shape)}", file, begin + entry.start, begin + entry.stop


def _blocks(start: int, stop: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what is read of the bytes from `start` to `stop`."""
    if whole or stop - start <= 3 * _BLOCK_BYTES:
        for at in range(start, stop, _SPACING_BYTES):
            yield at, min(_SPACING_BYTES, stop - at)
        return
    count = 3 + (stop - start) // _SPACING_BYTES
    for i in range(count):
        yield start + (stop - start - _BLOCK_BYTES) * i // (count - 1), _BLOCK_BYTES
