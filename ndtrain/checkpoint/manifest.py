"""Write and check manifest.json: size and hash of every file of a checkpoint, shape and dtype of every tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.storage.paths import is_local, sizes_of, sync
from ndtrain.storage.table import LARGEST

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
HASH = "xxh3_128"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_CHUNK_BYTES = 1 << 24
# The manifest holds its own hash, computed with this text in its place.
_NO_HASH = "0" * 32


def hasher() -> Any:
    """Return a new hash object for a file: fast, and meant for accidental damage, not for attacks."""
    return xxhash.xxh3_128()


def hash_of(content: bytes) -> str:
    """Return the hash of a file with this content."""
    return str(xxhash.xxh3_128_hexdigest(content))


def _digest(path: Path) -> str:
    found, buffer = hasher(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return str(found.hexdigest())


def write_manifest(directory: Path, tensors: dict[str, Any], written: Mapping[str, Any]) -> None:
    """Sync what rank 0 wrote and write manifest.json last.

    `tensors` is {part: `listing`}; `written` holds size and hash of every file that its writer already synced. Raises
    `NdtrainError` for a file whose size is not the written one.
    """
    files: dict[str, Any] = {}
    for name, size in sorted(sizes_of(directory).items()):
        if not _FILE.fullmatch(name):
            raise NdtrainError(f"{directory}: a checkpoint file cannot be named {name!r}")
        if name not in written:
            files[name] = {"size": size, HASH: _digest(directory / name)}
            sync(directory / name)
        elif written[name]["size"] == size:
            files[name] = written[name]
        else:
            raise NdtrainError(f"{directory / name} has {size:,} of {written[name]['size']:,} bytes")
    if missing := sorted(written.keys() - files.keys()):
        raise NdtrainError(f"{directory / missing[0]} was written, but has disappeared")
    body = {HASH: _NO_HASH, "version": FORMAT_VERSION, "files": files, "tensors": tensors}
    text = json.dumps(body, indent=1).encode()
    manifest = directory / MANIFEST
    manifest.write_bytes(text.replace(_NO_HASH.encode(), hash_of(text).encode(), 1))
    sync(manifest)
    if is_local(directory):
        for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
            sync(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest, whose file names never leave the directory. Raises `DamagedError`."""
    try:
        text = (directory / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        if manifest["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {manifest['version']}, but this ndtrain reads {FORMAT_VERSION}")
        if hash_of(text.replace(manifest[HASH].encode(), _NO_HASH.encode(), 1)) != manifest[HASH]:
            raise ValueError("its hash does not match")
        for name, entry in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"bad file name {name!r}")
            if type(entry["size"]) is not int or not isinstance(entry[HASH], str):
                raise ValueError(f"bad entry of {name}")
        for part, keys in manifest["tensors"].items():
            if not _FILE.fullmatch(part):
                raise ValueError(f"bad part {part!r}")
            for key, entry in keys.items():
                if not isinstance(entry["dtype"], str) or any(
                    type(n) is not int or not 0 <= n < LARGEST for n in entry["shape"]
                ):
                    raise ValueError(f"bad entry of {key}")
    except FileNotFoundError as error:
        raise DamagedError(f"{directory}: manifest.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{directory}: manifest.json is damaged ({type(error).__name__}: {error})") from error
    return manifest


def is_tensor_file(name: str) -> bool:
    return name.endswith(".safetensors")


def check_files(directory: Path) -> dict[str, Any]:
    """Return the manifest of `directory` after checking its files.

    Raises `DamagedError`, naming the file, if one is missing or has another size, or, for a file without tensors,
    another hash.
    """
    manifest = read_manifest(directory)
    files, sizes = manifest["files"], sizes_of(directory)
    for name in {"train_state.json": None, **files}:
        if name not in files or name not in sizes:
            raise DamagedError(f"{directory}: {name} is missing")
        if sizes[name] != files[name]["size"]:
            raise DamagedError(f"{directory}: {name} has {sizes[name]:,} of {files[name]['size']:,} bytes")
    check_hashes(directory, files, (name for name in files if not is_tensor_file(name)))
    return manifest


def check_hashes(directory: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `DamagedError` if the hash of one of these files differs from `files`, the manifest's."""
    for name in names:
        try:
            found = _digest(directory / name)
        except OSError as error:
            raise DamagedError(f"{directory}: {name} cannot be read ({error.strerror})") from error
        if found != files[name][HASH]:
            raise DamagedError(f"{directory}: {name} was altered")
