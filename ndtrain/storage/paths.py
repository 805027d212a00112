"""Where the files of a run lie: a local path, or a URL of an object store that fsspec knows (`s3://bucket/run`).

A URL is a path of universal_pathlib, which has the methods of `pathlib.Path` that are used here. Object stores have no
rename and no half-written objects, and what is in them is best asked for in ranges and many at a time.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EINTR, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, cast

from ndtrain.errors import NdtrainError, RecipeError

_FLUSH_S = 0.05


def to_path(text: str) -> Path:
    """The path that `text` names. Raises `RecipeError` for a URL that cannot be used here."""
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    try:
        from upath import UPath

        # Other processes write there too: what was listed once must not be believed.
        found = UPath(text, use_listings_cache=False)
        found.fs  # noqa: B018  imports what its kind needs
    except ImportError as error:
        raise RecipeError(f"{text} needs packages that are missing ({error}): pip install 'ndtrain[remote]'") from error
    except ValueError as error:
        raise RecipeError(f"{text} cannot be used: {error}") from error
    return cast(Path, found)


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes start..stop of a file; fewer where it ends before. Raises `OSError`."""
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)
    return read_ranges(path, [(start, stop)])[0]


def read_into(descriptor: int, start: int, into: memoryview) -> None:
    """Fill `into` with the bytes of an open local file from `start` on. Raises `OSError`, also where it ends before."""
    while into:
        count = os.preadv(descriptor, [into], start)
        if not count:
            raise OSError("it ends before its tensors do")
        start, into = start + count, into[count:]


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
    """Several ranges of a remote file at once. Raises `OSError`."""
    remote, ranges = cast(Any, path), list(ranges)
    asked = [pair for pair in ranges if pair[1] > pair[0]]  # an empty range would be all of the file
    starts, stops = [start for start, _ in asked], [stop for _, stop in asked]
    with os_errors(path):
        got = iter(remote.fs.cat_ranges([remote.path] * len(asked), starts, stops, on_error="raise"))
    return [next(got) if stop > start else b"" for start, stop in ranges]


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What goes wrong inside at an object store, whose libraries have errors of their own, is an `OSError`."""
    try:
        yield
    except (OSError, NdtrainError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def sizes_of(directory: Path) -> dict[str, int]:
    """The size of every file in a directory and those in it, by its name from there; no symbolic links."""
    if is_local(directory):
        files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    remote = cast(Any, directory)
    try:
        found = remote.fs.find(remote.path, detail=True)
    except FileNotFoundError:
        return {}
    at = len(remote.path.rstrip("/")) + 1
    return {name[at:]: entry["size"] for name, entry in found.items() if entry["type"] == "file"}


def sync(path: Path) -> None:
    """Have a local file or directory on its disk; an object store has what it took."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Give an open local file `size` bytes, and room for them on the disk where its file system can.

    Raises `OSError` where there is none. libc's own, because os.posix_fallocate writes zeros where the system cannot.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size:
        failed = fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size))
        if failed and (number := ctypes.get_errno()) not in (EOPNOTSUPP, ENOSYS, EINTR):
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)


@contextmanager
def flushing(paths: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Meanwhile what was written to the local files `paths()` goes to the disk.

    Left to pile up in memory it makes the kernel hold the writer, and is waited for at the end. Raises the `OSError`
    that the disk has told, which it tells only once.
    """
    done, failed = threading.Event(), []

    def flush() -> None:
        try:
            while not done.wait(_FLUSH_S):
                for path in paths():
                    sync(path)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


def remove_tree(path: Path, *, first: str | None = None) -> None:
    """Remove a directory as far as that is possible, the file `first` in it before all others."""
    if first is not None:
        with suppress(OSError):
            (path / first).unlink()
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        remote = cast(Any, path)
        with suppress(OSError):
            remote.fs.rm(remote.path, recursive=True)


def open_to_write(directory: Path) -> None:
    """Make a directory where there is none. Raises an `OSError` where nothing can be written in it."""
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(EACCES, "no permission to write")
    else:
        probe = directory / ".probe"
        probe.write_bytes(b"")
        probe.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: who reads it has the old one or the new one."""
    if not is_local(path):
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@contextmanager
def local_copy_to(path: Path) -> Iterator[Path]:
    """A local directory whose files are then in `path`: itself where that is local."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for name in sizes_of(Path(folder)):
            (path / name).write_bytes((Path(folder) / name).read_bytes())


@contextmanager
def local_copy_of(path: Path, names: Iterable[str]) -> Iterator[Path]:
    """A local directory with these files of `path`: itself where that is local."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes((path / name).read_bytes())
        yield Path(folder)
