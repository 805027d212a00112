"""Writes safetensors files whose tensors arrive a part at a time, from any thread."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from errno import EINVAL, ENOSYS, EOPNOTSUPP, EXDEV
from pathlib import Path

from torch import Tensor

from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.storage.headers import Target, header_of
from ndtrain.storage.paths import allocate
from ndtrain.storage.pieces import raw

_UNITS = {
    "": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "0.5gb", "512MiB" or "1000". Raises `RecipeError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*((?:[KMGT]I?B)?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise RecipeError(f'--max-shard-size "{text}" is not a size; write one like 5GB or 500MiB')
    return size


class ShardWriter:
    """Writes files of a fixed layout in `directory`: first the headers, then each tensor's bytes in any order.

    A file is synced as soon as its last byte is written. Raises `NdtrainError` if the disk has too little free space.
    """

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, list[str]],
        tensors: Mapping[str, Target],
        metadata: Callable[[list[str]], dict[str, str]],
    ) -> None:
        self.directory = directory
        self._targets: dict[str, tuple[str, int, Target]] = {}
        self._left: dict[str, int] = {}
        self._begun: set[str] = set()
        self._lock = threading.Lock()
        headers = {}
        for name, keys in files.items():
            header, starts = header_of({key: tensors[key] for key in keys}, metadata(keys))
            headers[name] = header
            self._left[name] = sum(tensors[key].nbytes for key in keys)
            self._targets |= {key: (name, len(header) + start, tensors[key]) for key, start in starts.items()}
        needed = sum(self._left.values()) + sum(map(len, headers.values()))
        if (free := shutil.disk_usage(directory).free) < needed:
            raise NdtrainError(
                f"{directory.parent}: writing needs {needed:,} bytes of disk space and only {free:,} are free; free "
                "some or choose another directory"
            )
        for name, header in headers.items():
            with (directory / name).open("xb") as file:
                allocate(file.fileno(), len(header) + self._left[name])
                file.write(header)
                if not self._left[name]:
                    file.flush()
                    os.fsync(file.fileno())

    def unfinished(self) -> list[Path]:
        """Return the files that are begun and not yet synced."""
        with self._lock:
            return [self.directory / name for name in self._begun if self._left[name]]

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Write `values` (contiguous, in the dtype of `key`) to `key`, from its element `start` on."""
        name, begin, target = self._targets[key]
        assert values.dtype == target.dtype
        with self._open(name, values.numel() * values.dtype.itemsize) as descriptor:
            _write(descriptor, raw(values), begin + start * values.dtype.itemsize)

    def copy(self, key: str, start: int, file: Path, offset: int, count: int) -> None:
        """Copy `count` bytes at `offset` of `file` to `key`, from its byte `start` on."""
        name, begin, _ = self._targets[key]
        with self._open(name, count) as descriptor, file.open("rb", buffering=0) as source:
            done = 0
            while done < count:
                try:
                    copied = os.copy_file_range(
                        source.fileno(), descriptor, count - done, offset + done, begin + start + done
                    )
                except OSError as error:
                    # The file system does not support it, or not from one file system to another.
                    if error.errno not in (EXDEV, EINVAL, ENOSYS, EOPNOTSUPP):
                        raise
                    data = os.pread(source.fileno(), min(count - done, 1 << 23), offset + done)
                    _write(descriptor, memoryview(data), begin + start + done)
                    copied = len(data)
                if not copied:
                    raise DamagedError(f"{file} is truncated: it ends before its tensors do")
                done += copied

    @contextmanager
    def _open(self, name: str, count: int) -> Iterator[int]:
        """Open a descriptor to write `count` bytes with; sync the file after its last ones."""
        descriptor = os.open(self.directory / name, os.O_WRONLY)
        try:
            yield descriptor
            with self._lock:
                self._left[name] -= count
                self._begun.add(name)
                complete = not self._left[name]
            if complete:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count
