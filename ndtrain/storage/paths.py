"""Read and write the files of a run: at a local path, or in an object store that fsspec supports (`s3://bucket/run`).

A URL becomes a path of universal_pathlib, which has the methods of `pathlib.Path` that are used here. Object stores
have no rename and no half-written objects, and are read fastest in byte ranges, many at a time.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EINTR, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, cast

from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.storage.urls import expanded, secret_in, without_secrets

_FLUSH_S = 0.05


def to_path(text: str) -> Path:
    """Return the path of `text`, a local path or a URL. Raises `RecipeError` for a URL that cannot be used here."""
    try:
        text = expanded(text)
    except KeyError as error:
        raise RecipeError(f"{text} needs the environment variable {error.args[0]}, which is not set") from None
    if reason := secret_in(text):
        raise RecipeError(f"{without_secrets(text)} {reason}")
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    try:
        from upath import UPath

        # Other processes write there too, so a cached listing may be out of date.
        path = UPath(text, use_listings_cache=False)
        path.fs  # noqa: B018  imports the package of its protocol
    except ImportError as error:
        raise RecipeError(
            f"{text} needs packages that are not installed ({error}): pip install 'ndtrain[remote]'"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{text} cannot be used: {error}") from error
    return cast(Path, path)


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Return bytes start..stop of a file, fewer if it ends earlier. Raises `OSError`."""
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)
    return read_ranges(path, [(start, stop)])[0]


def read_into(descriptor: int, start: int, into: memoryview) -> None:
    """Fill `into` with the bytes of an open local file from `start` on. Raises `OSError`, also if it ends earlier."""
    while into:
        count = os.preadv(descriptor, [into], start)
        if not count:
            raise OSError("the file ends before its tensors do")
        start, into = start + count, into[count:]


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
    """Return several byte ranges of a remote file, requested at once. Raises `OSError`."""
    remote, ranges = cast(Any, path), list(ranges)
    wanted = [pair for pair in ranges if pair[1] > pair[0]]  # an empty range would read the whole file
    starts, stops = [start for start, _ in wanted], [stop for _, stop in wanted]
    with os_errors(path):
        found = iter(remote.fs.cat_ranges([remote.path] * len(wanted), starts, stops, on_error="raise"))
    return [next(found) if stop > start else b"" for start, stop in ranges]


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise an object store's errors, which are those of its library, as `OSError`."""
    try:
        yield
    except (OSError, NdtrainError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def sizes_of(directory: Path) -> dict[str, int]:
    """Return {path relative to `directory`: bytes} of all files below it, without symbolic links."""
    if is_local(directory):
        files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    remote = cast(Any, directory)
    try:
        found = remote.fs.find(remote.path, detail=True)
    except FileNotFoundError:
        return {}
    prefix = len(remote.path.rstrip("/")) + 1
    return {name[prefix:]: entry["size"] for name, entry in found.items() if entry["type"] == "file"}


def sync(path: Path) -> None:
    """Flush a local file or directory to its disk; an object store needs no flush."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Set an open local file to `size` bytes, and reserve disk space for them if its file system can.

    Raises `OSError` if there is not enough. Calls libc, because os.posix_fallocate writes zeros where the file system
    cannot reserve.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size:
        failed = fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size))
        if failed and (number := ctypes.get_errno()) not in (EOPNOTSUPP, ENOSYS, EINTR):
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)


@contextmanager
def flushing(paths: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Flush the local files `paths()` to the disk again and again while the body writes to them.

    Unflushed data would pile up in memory, make the kernel block the writer, and be waited for at the end. Raises the
    disk's `OSError`, which the kernel reports only once.
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
    """Remove as much of a directory as possible, and its file `first` before all others."""
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
    """Make a directory if it is missing. Raises `OSError` if it cannot be written to."""
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(EACCES, "no permission to write")
    else:
        probe = directory / ".probe"
        probe.write_bytes(b"")
        probe.unlink()


def read_object(file: Path) -> dict[str, Any]:
    """Return the content of a file that holds a JSON object. Raises `DamagedError` if it cannot be read."""
    try:
        with os_errors(file):
            found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{file} is not a JSON object")
    return found


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text in one step: a reader sees either the old or the new one."""
    if not is_local(path):
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def local_copy_to(path: Path) -> Iterator[Path]:
    """Yield a local directory whose files are copied to `path` at the end; `path` itself if it is local."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for name in sizes_of(Path(folder)):
            (path / name).write_bytes((Path(folder) / name).read_bytes())


@contextmanager
def local_copy_of(path: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield a local directory with copies of these files of `path`; `path` itself if it is local."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes((path / name).read_bytes())
        yield Path(folder)
