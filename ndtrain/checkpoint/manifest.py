"""manifest.json: every file of a checkpoint with its size and hash, and the shape and dtype of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ndtrain.errors import DamagedError, NdtrainError

FORMAT_VERSION = 1
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def write_manifest(directory: Path, tensors: dict[str, Any]) -> None:
    """Sync what rank 0 wrote and write manifest.json last; `tensors` is each part's listing of keys."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            continue
        if not _FILE.fullmatch(name):
            raise NdtrainError(f"{directory}: no checkpoint file can have the name {name!r}")
        files[name] = {"size": path.stat().st_size}
        if path.suffix != ".safetensors":
            files[name]["blake2b"] = _digest(path)
            sync(path)
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({"version": FORMAT_VERSION, "files": files, "tensors": tensors}, indent=1))
    sync(manifest)
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        sync(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its file names checked never to leave the directory. DamagedError."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
        if manifest["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {manifest['version']}, this ndtrain reads {FORMAT_VERSION}")
        for name, entry in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"file name {name!r}")
            if type(entry["size"]) is not int or not isinstance(entry.get("blake2b", ""), str):
                raise ValueError(f"entry of {name}")
    except FileNotFoundError as error:
        raise DamagedError(f"{directory}: manifest.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory}: manifest.json is damaged ({type(error).__name__}: {error})") from error
    return manifest


def check(directory: Path) -> None:
    """Raises DamagedError, naming the file, unless every file of the manifest is there and whole.

    Tensor files by size (and by header when read), all others by hash.
    """
    files = read_manifest(directory)["files"]
    for name in {"train_state.json": None, **files}:
        path = directory / name
        if name not in files or not path.is_file() or path.is_symlink():
            raise DamagedError(f"{directory}: {name} is missing")
        size, wanted = path.stat().st_size, files[name]["size"]
        if size != wanted:
            raise DamagedError(f"{directory}: {name} has {size:,} of {wanted:,} bytes")
        if "blake2b" in files[name] and _digest(path) != files[name]["blake2b"]:
            raise DamagedError(f"{directory}: {name} was altered")
