"""Find the files of `data.path`, and say which of those that lie there are left out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ndtrain.data.formats import can_read, name_kind
from ndtrain.errors import DamagedError, RecipeError

# The files of a token cache.
CACHE_FILES = ("tokens.bin", "docs.bin", "meta.json")

Note = Callable[[str], None]
# Kinds of files left out that a note names.
_NAMED = 12


def find_files(path: str, note: Note = lambda line: None) -> list[Path]:
    """Return the files of `data.path`, sorted by path relative to it. Raises `RecipeError` if there are none.

    `path` is a file, a directory (searched recursively, for the suffixes that `name_kind` knows and without hidden
    names) or a glob (`**` is recursive; every regular file that matches is taken). A file that is reached twice,
    through links, is taken once. `note` gets one line that counts what was left out.
    """
    root = Path(path).expanduser()
    left: Counter[str] = Counter()
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = list(_walk(root, left))
    else:
        found = list(_matches(root, left))
    found.sort(key=lambda file: (file.relative_to(root) if root.is_dir() else file).as_posix())
    found = list(_once(found, left))
    if left and found:
        note(f'data.path = "{path}": files read: {len(found):,}; left out: {_counts(left)}')
    if found:
        return found
    hint = f"give a file, a glob or a directory of text files (relative paths start at {Path.cwd()})"
    if root.is_symlink() and not root.exists():
        hint = f"it is a link to {os.readlink(root)}, which cannot be followed"
    elif root.exists() and not root.is_dir():
        hint = "it is a pipe or a device; write its content to a file first"
    elif left:
        hint = f"left out: {_counts(left)}; {hint}"
    raise RecipeError(f'data.path = "{path}" matches no file; {hint}')


def _walk(root: Path, left: Counter[str]) -> Iterator[Path]:
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
            elif name_kind(file) is None:
                left[file.suffix or "without a suffix"] += 1
            elif reason := can_read(file):
                left[f"{file.suffix} ({reason})"] += 1
            else:
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


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise an `OSError` of the body as a `DamagedError` that names `file`."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"cannot read {file}: {error.strerror or error}") from error


def stamp_of(file: Path) -> list[int]:
    """Return [size in bytes, mtime in ns] of a file. Raises `DamagedError` if it cannot be read."""
    with reading(file):
        stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]
