"""Find the files of `data.path`, and say which of those that lie there are left out."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from ndtrain.data.formats import can_read, name_kind, reading
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.storage.paths import is_local, to_path

# Files that a token cache has, and the index of a token file too.
CACHE_FILES = ("docs.bin", "meta.json")

Note = Callable[[str], None]
KindOf = Callable[[Path], str | None]
# What object stores say of a file that changes when it is written again.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "created")
# Kinds of files left out that a note names.
_NAMED = 12


def find_files(
    path: str, note: Note = lambda line: None, *, kind_of: KindOf = name_kind, what: str = "text files"
) -> list[Path]:
    """Return the files of `data.path`, sorted by path relative to it. Raises `RecipeError` if there are none.

    `path` is a file, a directory (searched recursively, for names that `kind_of` knows and without hidden ones) or a
    glob (`**` is recursive; every regular file that matches is taken); local, or the URL of one in an object store. A
    file that is reached twice, through links, is taken once. `note` gets one line that counts what was left out.
    """
    if "://" in path:
        return _find_remote(path, note, kind_of, what)
    root = Path(path).expanduser()
    left: Counter[str] = Counter()
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = list(_walk(root, left, kind_of))
    else:
        found = list(_matches(root, left))
    found.sort(key=lambda file: (file.relative_to(root) if root.is_dir() else file).as_posix())
    found = list(_once(found, left))
    if found:
        _note(note, path, found, left)
        return found
    hint = f"give a file, a glob or a directory of {what} (relative paths start at {Path.cwd()})"
    if root.is_symlink() and not root.exists():
        hint = f"it is a link to {os.readlink(root)}, which cannot be followed"
    elif root.exists() and not root.is_dir():
        hint = "it is a pipe or a device; write its content to a file first"
    elif root.is_dir() and not left:
        hint = "it is an empty directory" if not any(root.iterdir()) else "it has only empty directories"
    elif left:
        hint = f"left out: {_counts(left)}; {hint}"
    raise RecipeError(f'data.path = "{path}" matches no file; {hint}')


def _find_remote(path: str, note: Note, kind_of: KindOf, what: str) -> list[Path]:
    root, left = to_path(path), Counter[str]()
    with reading(root):
        if is_local(root):  # file://
            return find_files(str(root), note, kind_of=kind_of, what=what)
        store, place = cast(Any, root).fs, cast(Any, root).path
        named = glob.has_magic(path) or store.isfile(place)
        entries = store.glob(place, detail=True) if named else store.find(place, detail=True)
        names = sorted(name for name, entry in entries.items() if entry["type"] == "file")
        found = [to_path(store.unstrip_protocol(name)) for name in names]
    if not named:
        below = {file: file.relative_to(root).parts for file in found}
        found = [file for file in found if not any(part.startswith(".") for part in below[file])]
        if len(below) > len(found):
            left["hidden"] = len(below) - len(found)
        found = [file for file in found if _is_wanted(file, left, kind_of)]
    if not found:
        raise RecipeError(
            f'data.path = "{path}" matches no file; {f"left out: {_counts(left)}; " if left else ""}give '
            f"the URL of a file, a glob or a directory of {what}"
        )
    _note(note, path, found, left)
    return found


def _note(note: Note, path: str, found: list[Path], left: Counter[str]) -> None:
    if left:
        note(f'data.path = "{path}": files read: {len(found):,}; left out: {_counts(left)}')


def _is_wanted(file: Path, left: Counter[str], kind_of: KindOf) -> bool:
    """Return whether a file of a directory is training data, by its name."""
    if kind_of(file) is None:
        left[file.suffix or "without a suffix"] += 1
    elif reason := can_read(file):
        left[f"{file.suffix} ({reason})"] += 1
    else:
        return True
    return False


def _walk(root: Path, left: Counter[str], kind_of: KindOf) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise DamagedError(f"cannot read the directory {error.filename}: {error.strerror}")

    # Links to directories are followed, each directory once: a link may lead back up.
    seen = {_identity(root)}
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        if all(name in names for name in CACHE_FILES):  # a token cache stored beside the data is not data
            folders[:], names = [], []
            left["token cache"] += 1
        keep = []
        for name in sorted(folders):
            identity = _identity(Path(folder, name))
            if name.startswith("."):
                left["hidden directory"] += 1
            elif identity in seen:
                left["directory reached before"] += 1
            else:
                seen.add(identity)
                keep.append(name)
        folders[:] = keep
        for file in (Path(folder, name) for name in names):
            if file.name.startswith("."):
                left["hidden"] += 1
            elif not file.is_file():
                left["broken link" if file.is_symlink() else "pipe or device"] += 1
            elif _is_wanted(file, left, kind_of):
                yield file


def _matches(pattern: Path, left: Counter[str]) -> Iterator[Path]:
    for file in map(Path, set(glob.glob(str(pattern), recursive=True))):
        if file.is_file():
            yield file
        elif not file.is_dir():
            left["broken link" if file.is_symlink() else "pipe or device"] += 1
        elif pattern.name != "**" and "**" not in pattern.parts:  # `**` reaches into directories itself
            left["directory"] += 1


def _once(files: list[Path], left: Counter[str]) -> Iterator[Path]:
    """Yield each file under the first of its names; a link is another name."""
    seen = set()
    for file in files:
        identity = _identity(file)
        if identity in seen:
            left["reached before through a link"] += 1
        else:
            seen.add(identity)
            yield file


def _identity(path: Path) -> tuple[int, int]:
    with reading(path):
        stat = path.stat()
    return stat.st_dev, stat.st_ino


def _counts(left: Counter[str]) -> str:
    named = sorted(left.most_common(_NAMED), key=lambda item: (-item[1], item[0]))
    rest = left.total() - sum(count for _, count in named)
    return ", ".join(f"{count:,} {what}" for what, count in (*named, *([("others", rest)] if rest else [])))


def stamp_of(file: Path) -> list[int]:
    """Return [size in bytes, mtime in ns] of a file; in an object store, for the latter a number of its version.

    Raises `DamagedError` if it cannot be read.
    """
    with reading(file):
        if is_local(file):
            stat = file.stat()
            return [stat.st_size, stat.st_mtime_ns]
        info = cast(Any, file).fs.info(cast(Any, file).path)
    version = [str(info[name]) for name in _VERSIONS if name in info]
    digest = hashlib.blake2b(json.dumps(version).encode(), digest_size=6).digest()
    return [int(info["size"]), int.from_bytes(digest, "big")]
