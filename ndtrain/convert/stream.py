"""Streams tensors from source files to target files, many at a time in bounded memory."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ndtrain.convert.shards import ShardWriter
from ndtrain.convert.weights import Group, Rows
from ndtrain.errors import DamagedError
from ndtrain.storage.headers import Target
from ndtrain.storage.paths import flushing, is_local
from ndtrain.storage.pieces import BLOCK_BYTES, pieces_in
from ndtrain.storage.stored import Buffers, Stored, checkpoint_tensors, read_all, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (what is being done, bytes done, total bytes)
Progress = Callable[[str, int, int], None]
# (key, index of its first element, elements)
Sink = Callable[[str, int, Tensor], None]
# (key, offset in its bytes, file, offset in the file, number of bytes)
Copy = Callable[[str, int, Path, int, int], None]
COPY_BYTES = 64 * 2**20
SPARE_BYTES = 128 * 2**20
RUN_BYTES = 2**16  # shortest mean run of rows that is moved by itself


@dataclass
class Stream:
    """Passes the tensors of `source` through `groups` to the tensors that `targets` describes.

    A tensor that is only renamed, or made of long runs of rows of others, passes in blocks of rows. Any other group
    takes twice its bytes in memory; together such groups take at most what the largest alone takes, plus
    `SPARE_BYTES`.
    """

    source: Mapping[str, Stored]
    groups: list[Group]
    targets: Mapping[str, Target]
    model: PreTrainedModel
    ready: Mapping[str, Tensor]  # small tensors that are in memory already
    progress: Progress | None = None
    _buffers: Buffers = field(default_factory=Buffers)
    _rows_moved: dict[str, dict[str, list[Rows]] | None] = field(default_factory=dict)  # by name of the group

    def write(self, writer: ShardWriter) -> None:
        """Write every target with `writer`."""
        with flushing(writer.unfinished):
            for key, tensor in self.ready.items():
                writer.write(key, 0, tensor.contiguous())
            self._run("writing", writer.write, writer.copy if hasattr(os, "copy_file_range") else None)

    def verify(self, directory: Path, names: list[str]) -> None:
        """Read the files back and compare every bit. Raises `DamagedError` naming the first tensor that differs."""
        written: dict[str, Stored] = {}
        for name in names:
            _forget(directory / name)
            written |= checkpoint_tensors({k: [p] for k, p in pieces_in(directory / name).items()}, directory)
        if wrong := sorted(written.keys() ^ self.targets.keys()):
            raise DamagedError(
                f"verification failed: {wrong[0]} is "
                + ("missing from the written files" if wrong[0] in self.targets else "in the written files by mistake")
            )
        for key, target in self.targets.items():
            found = written[key]
            if (found.shape, found.dtype) != (target.shape or (1,), target.dtype):
                raise DamagedError(
                    f"verification failed: {key} was written as {found.dtype} of shape {found.shape}, not as "
                    f"{target.dtype} of shape {target.shape}"
                )
        flat = {key: _flat(found) for key, found in written.items()}

        def compare(key: str, start: int, values: Tensor) -> None:
            own = values.reshape(-1)
            step = BLOCK_BYTES // own.dtype.itemsize
            for low in range(0, own.numel(), step):
                high = min(low + step, own.numel())
                block = self._buffers.take("verify", (high - low,), own.dtype)
                read_rows(flat[key], start + low, start + high, into=block, buffers=self._buffers)
                if not _same_bits(own[low:high], block):
                    raise DamagedError(
                        f"verification failed: the values of {key} read back differ from its source; check the disk "
                        "and convert again"
                    )

        for key, tensor in self.ready.items():
            compare(key, 0, tensor.contiguous())
        self._run("verifying", compare)

    # ---- one group

    def _dtype_in_memory(self, group: Group) -> torch.dtype:
        """Return the smaller dtype: conversions move values without changing them, so they need no more."""
        target = next(self.targets[key].dtype for key in group.outputs if key in self.targets)
        kinds = {self.source[key].dtype for key in group.sources}
        kind = min(kinds, key=lambda dtype: dtype.itemsize)
        return kind if len(kinds) == 1 and kind.itemsize < target.itemsize else target

    def _bytes(self, group: Group) -> int:
        width = self._dtype_in_memory(group).itemsize
        return sum(math.prod(self.source[key].shape) for key in group.sources) * width

    def _moved(self, group: Group) -> dict[str, list[Rows]] | None:
        """Return the runs of rows that make up each output of a group; None where it must be converted in memory."""
        if group.name not in self._rows_moved:
            moved = None
            if group.transform is not None and all(_whole_rows(self.source[key]) for key in group.sources):
                moved = group.moved({key: self.source[key].shape for key in group.sources}, self.model)
                if moved is not None and self._bytes(group) < RUN_BYTES * sum(map(len, moved.values())):
                    moved = None
            self._rows_moved[group.name] = moved
        return self._rows_moved[group.name]

    def _pass(self, group: Group, sink: Sink, copy: Copy | None, stop: threading.Event) -> Iterator[int]:
        """Write one group; yield the number of bytes after each write."""
        if group.transform is None:
            source = self.source[group.sources[0]]
            yield from self._rows(source, 0, source.shape[0], group.outputs[0], 0, sink, copy, stop)
            return
        if (moved := self._moved(group)) is not None:
            rows = {key: _as_rows(self.source[key]) for key in group.sources}
            for key, runs in moved.items():
                first = 0
                for name, low, high in runs if key in self.targets else ():
                    yield from self._rows(rows[name], low, high, key, first, sink, copy, stop)
                    first += (high - low) * rows[name].shape[1]
            return
        dtype = self._dtype_in_memory(group)
        values = {}
        for key in group.sources:
            _check(stop)
            values[key] = read_all(self.source[key], dtype, buffers=self._buffers)
        made = group.run(values, self.model)
        while made:
            key = next(iter(made))
            value = made.pop(key)
            if key in self.targets:
                yield from self._emit(key, value, sink, stop)

    def _emit(self, key: str, value: Tensor, sink: Sink, stop: threading.Event) -> Iterator[int]:
        target = self.targets[key]
        value = value.reshape(-1) if value.is_contiguous() else value.contiguous().reshape(-1)
        step = BLOCK_BYTES // target.dtype.itemsize
        for start in range(0, value.numel(), step):
            _check(stop)
            part = value[start : start + step]
            if part.dtype != target.dtype:
                part = self._buffers.take("cast", part.shape, target.dtype).copy_(part)
            sink(key, start, part)
            yield part.numel() * part.element_size()

    def _rows(
        self,
        source: Stored,
        low: int,
        high: int,
        key: str,
        start: int,
        sink: Sink,
        copy: Copy | None,
        stop: threading.Event,
    ) -> Iterator[int]:
        """Write rows low..high of `source` as the elements of `key` from `start` on."""
        local = all(is_local(piece.file) for piece in source.pieces)
        if copy is not None and local and _whole_rows(source) and source.dtype == self.targets[key].dtype:
            yield from self._copies(source, low, high, key, start, copy, stop)
        else:
            yield from self._blocks(source, low, high, key, start, sink, stop)

    def _copies(
        self, source: Stored, low: int, high: int, key: str, start: int, copy: Copy, stop: threading.Event
    ) -> Iterator[int]:
        """Copy unchanged bytes from file to file, which need not pass through this process."""
        row, to = math.prod(source.shape[1:]) * source.dtype.itemsize, start * source.dtype.itemsize
        for piece in source.pieces:
            first = piece.offsets[0]
            begin, end = max(low, first) * row, min(high, first + piece.sizes[0]) * row
            for byte in range(begin, end, COPY_BYTES):
                _check(stop)
                count = min(COPY_BYTES, end - byte)
                copy(key, to + byte - low * row, piece.file, piece.start + byte - first * row, count)
                yield count

    def _blocks(
        self, source: Stored, low: int, high: int, key: str, start: int, sink: Sink, stop: threading.Event
    ) -> Iterator[int]:
        target = self.targets[key]
        row = math.prod(source.shape[1:])
        step = source.rows_of(BLOCK_BYTES * source.dtype.itemsize // max(source.dtype.itemsize, target.dtype.itemsize))
        for first in range(low, high if source.nbytes else low, step):
            _check(stop)
            last = min(first + step, high)
            block = self._buffers.take("block", (last - first, *source.shape[1:]), target.dtype)
            read_rows(source, first, last, into=block, buffers=self._buffers)
            sink(key, start + (first - low) * row, block)
            yield block.numel() * block.element_size()

    # ---- all groups

    def _run(self, what: str, sink: Sink, copy: Copy | None = None) -> None:
        heavy = {id(g): 2 * self._bytes(g) for g in self.groups if g.transform is not None}
        budget = _Budget(max(heavy.values(), default=0) + SPARE_BYTES)
        total, stop = sum(target.nbytes for target in self.targets.values()), threading.Event()
        done = [sum(tensor.nbytes for tensor in self.ready.values())]
        lock = threading.Lock()

        def one(group: Group) -> None:
            cost = heavy.get(id(group), 0) if self._moved(group) is None else 0
            if not stop.is_set() and budget.take(cost, stop):
                try:
                    for count in self._pass(group, sink, copy, stop):
                        with lock:
                            done[0] += count
                except _Cancelled:
                    pass  # the group that failed raises the reason
                except BaseException:
                    stop.set()
                    raise
                finally:
                    budget.give(cost)

        pool = ThreadPoolExecutor(max_workers=min(4, max(2, os.cpu_count() or 2)))
        try:
            # The heaviest start first: one that started last would run alone at the end.
            waiting = {pool.submit(one, group) for group in sorted(self.groups, key=lambda g: -heavy.get(id(g), 0))}
            reported = 0.0
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if self.progress is not None and (time.monotonic() - reported > 0.1 or not waiting):
                    reported = time.monotonic()
                    self.progress(what, done[0], total)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _whole_rows(tensor: Stored) -> bool:
    """Return whether every piece has whole rows, which then lie one after another in its file."""
    return all(piece.sizes[1:] == tensor.shape[1:] for piece in tensor.pieces)


def _as_rows(tensor: Stored) -> Stored:
    """View a tensor of whole rows as `[rows, last dim]`."""
    inner, last = math.prod(tensor.shape[1:-1]), tensor.shape[-1]
    pieces = (p._replace(offsets=(p.offsets[0] * inner, 0), sizes=(p.sizes[0] * inner, last)) for p in tensor.pieces)
    return Stored((tensor.shape[0] * inner, last), tensor.dtype, tuple(pieces))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two contiguous tensors of one dtype have the same bits, including NaNs."""
    aligned = all(t.storage_offset() * t.dtype.itemsize % 8 == 0 and t.nbytes % 8 == 0 for t in (a, b))
    kind = torch.int64 if aligned else torch.uint8
    return torch.equal(a.view(kind), b.view(kind))


def _flat(tensor: Stored) -> Stored:
    """View a tensor of one piece as one row of elements."""
    count = math.prod(tensor.shape)
    return Stored((count,), tensor.dtype, tuple(p._replace(offsets=(0,), sizes=(count,)) for p in tensor.pieces))


def _forget(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class _Cancelled(Exception):
    """Raised where another group failed or the user interrupted."""


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise _Cancelled


class _Budget:
    """Limits the bytes in memory at once."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._changed = threading.Condition()

    def take(self, count: int, stop: threading.Event) -> bool:
        """Wait for `count` bytes; return False if `stop` is set."""
        with self._changed:
            while count > self._free and not stop.is_set():
                self._changed.wait(0.2)
            if stop.is_set():
                return False
            self._free -= count
            return True

    def give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()
