"""Tensors in safetensors files: where their pieces lie, and how a rank reads what it holds of them.

A file holds tensors whole, or one piece of each and where it begins, which is in the header under `DCP_SHARDING_INFO`
as torch's `HuggingFaceStorageWriter` has it (torch 2.13). Values are read by their offset in the file straight to where
they belong: the pages of a mapped file would have to be met one by one before they are copied.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import Box, Ints, held_boxes, local_part
from ndtrain.storage.headers import DTYPES, read_header
from ndtrain.storage.paths import is_local, read_into, read_range, read_ranges

BLOCK_BYTES = 4 * 2**20  # read, cast and looked at while they are in a processor's cache
_RUN_BYTES = 1 << 26  # that one thread reads
_REQUEST_BYTES = 1 << 25  # of one request to an object store
_READ_BYTES = 1 << 28  # of all requests at once


class Piece(NamedTuple):
    """A contiguous box of a tensor: row-major bytes from `start` in `file`."""

    file: Path
    offsets: Ints
    sizes: Ints
    dtype: str
    start: int


class _Part(NamedTuple):
    """A box `source` of the row-major array of `sizes` at `start` of a file, and the memory that it goes to."""

    key: str
    target: Tensor
    file: Path
    start: int
    dtype: torch.dtype
    sizes: Ints
    source: tuple[slice, ...]

    def blocks(self, limit: int) -> Iterator[_Part]:
        """This part in parts that are some whole rows of an array each, of at most `limit` bytes."""
        first, last, row = self.source[0].start, self.source[0].stop, math.prod(self.sizes[1:]) * self.dtype.itemsize
        if row > limit and len(self.sizes) > 1:
            for i in range(first, last):
                at = self.start + i * row
                inner = self._replace(
                    target=self.target[i - first], start=at, sizes=self.sizes[1:], source=self.source[1:]
                )
                yield from inner.blocks(limit)
            return
        step = limit // row
        for low in range(first, last, step):
            rows = min(step, last - low)
            yield self._replace(
                target=self.target[low - first : low - first + rows],
                start=self.start + low * row,
                sizes=(rows, *self.sizes[1:]),
                source=(slice(0, rows), *self.source[1:]),
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def is_direct(self) -> bool:
        """Whether the array's bytes are those of the target."""
        whole = all(part == slice(0, size) for part, size in zip(self.source, self.sizes, strict=True))
        target = self.target
        return whole and target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, sharing memory."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def pieces_in(file: Path, name: str = "") -> dict[str, Piece]:
    """Return the piece of each key in a safetensors file, whoever wrote it; its header is checked.

    Raises `DamagedError`, which calls the file `name`.
    """
    try:
        begin, entries, info = read_header(file)
        sharding = json.loads(info["DCP_SHARDING_INFO"]) if "DCP_SHARDING_INFO" in info else None
        found = {}
        for key, entry in entries.items():
            offsets = tuple(sharding[key]["saved_offsets"]) if sharding is not None else (0,) * len(entry.shape)
            if len(offsets) != len(entry.shape) or any(type(n) is not int or n < 0 for n in offsets):
                raise ValueError(f"{key} has shape {entry.shape} at {offsets}")
            found[key] = Piece(file, offsets, entry.shape, entry.dtype, begin + entry.start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedError(f"{name or file.name}: damaged tensor file ({type(error).__name__}: {error})") from error
    return found


def read_piece(piece: Piece) -> Tensor:
    """Return the values of a piece. Raises `DamagedError` where they are not there."""
    dtype = DTYPES[piece.dtype]
    stop = piece.start + math.prod(piece.sizes) * dtype.itemsize
    try:
        data = bytearray(read_range(piece.file, piece.start, stop))
    except OSError as error:
        raise DamagedError(f"{piece.file}: damaged tensor file ({error})") from error
    return torch.frombuffer(data, dtype=dtype).reshape(piece.sizes) if data else torch.empty(piece.sizes, dtype=dtype)


def held(key: str, tensor: Tensor) -> tuple[Tensor, list[Box]]:
    """The local tensor (sharing memory) and its boxes. Raises `NdtrainError` where the two disagree."""
    local, boxes = local_part(tensor), held_boxes(tensor)
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return local, boxes
    if sum(math.prod(box.sizes) for box in boxes) != local.numel() or any(
        start + size > limit
        for box in boxes
        for start, size, limit in zip(box.local_offsets, box.sizes, local.shape, strict=True)
    ):
        raise NdtrainError(
            f"{key}: local shape {tuple(local.shape)} does not fit {tensor.placements} on {tensor.device_mesh}"
        )
    return local, boxes


def converts(dtype: str, to: torch.dtype) -> bool:
    """Whether weights saved as `dtype` may be read as `to`: one float as another, but for those of 8 bits."""
    found = DTYPES.get(dtype)
    if found is None or found == to:
        return found is not None
    return found.is_floating_point and found.itemsize > 1 and to.is_floating_point


@torch.no_grad()
def read_held(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Iterable[Piece]], where: object, *, as_weights: bool = False
) -> None:
    """Fill this rank's part of the tensors from the pieces of their keys; the rank needs no other.

    With `as_weights` floats are cast to those of the tensors, and NaN is refused.

    Raises `DamagedError` naming `where` and the key: it is missing, its shape or dtype differs, pieces do not cover
    what is wanted or overlap, or a file is unreadable. Tensors may be partly filled then.
    """
    by_file: dict[Path, list[_Part]] = defaultdict(list)
    for key, tensor in tensors.items():
        for part in _parts(key, tensor, list(stored.get(key, ())), where, cast=as_weights):
            by_file[part.file].append(part)
    for file, parts in sorted(by_file.items(), key=lambda item: str(item[0])):
        try:
            (_read if is_local(file) else _read_from_afar)(file, parts, where, refuse_nan=as_weights)
        except OSError as error:
            raise DamagedError(f"{file}: damaged tensor file ({error})") from error


def _parts(key: str, tensor: Tensor, pieces: list[Piece], where: object, *, cast: bool) -> Iterator[_Part]:
    """What of the pieces is of this rank's part of `tensor`. Raises `DamagedError`."""
    local, boxes = held(key, tensor)
    if tensor.numel() and not pieces:
        raise DamagedError(f"{where}: {key} is missing")
    ends = [tuple(o + n for o, n in zip(p.offsets, p.sizes, strict=True)) for p in pieces]
    if pieces and ({len(e) for e in ends} != {tensor.ndim} or tuple(map(max, *ends, ends[0])) != tuple(tensor.shape)):
        raise DamagedError(f"{where}: {key} does not have the shape {tuple(tensor.shape)}")
    for piece in pieces:
        if DTYPES.get(piece.dtype) != tensor.dtype and not (cast and converts(piece.dtype, tensor.dtype)):
            raise DamagedError(f"{where}: {key} is {piece.dtype} in {piece.file.name}, not {tensor.dtype}")
    for box in boxes:
        covered = 0
        for piece in pieces:
            low = [max(a, b) for a, b in zip(box.offsets, piece.offsets, strict=True)]
            high = [
                min(a + s, b + t) for a, s, b, t in zip(box.offsets, box.sizes, piece.offsets, piece.sizes, strict=True)
            ]
            sizes = tuple(h - at for at, h in zip(low, high, strict=True))
            if any(s <= 0 for s in sizes):
                continue
            covered += math.prod(sizes)
            inner = tuple(at - o + lo for at, o, lo in zip(low, box.offsets, box.local_offsets, strict=True))
            target = local[Box((), sizes, inner).local]
            source = tuple(slice(at - o, at - o + s) for at, o, s in zip(low, piece.offsets, sizes, strict=True))
            if not source:  # a scalar, as one row
                target, source = target.view(1), (slice(0, 1),)
            yield _Part(key, target, piece.file, piece.start, DTYPES[piece.dtype], piece.sizes or (1,), source)
        wanted = math.prod(box.sizes)
        if covered != wanted:
            raise DamagedError(f"{where}: {key} has {covered:,} of {wanted:,} values at {box.offsets}")


def _read(file: Path, parts: Iterable[_Part], where: object, *, refuse_nan: bool) -> None:
    """Several reads at once: one alone leaves most of a fast or a far disk idle."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rooms = threading.local()

    def read(run: _Part) -> None:
        if not hasattr(rooms, "own"):
            rooms.own = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=run.target.is_cuda)
        for block in run.blocks(BLOCK_BYTES):
            values = block.target if block.is_direct else rooms.own[: block.nbytes]
            read_into(opened.fileno(), block.start, raw(values))
            _put(block, values, where, refuse_nan=refuse_nan)

    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(min(4, max(2, cores)), "read") as pool:
        try:
            for _ in pool.map(read, (run for part in parts for run in part.blocks(_RUN_BYTES))):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _read_from_afar(file: Path, parts: Iterable[_Part], where: object, *, refuse_nan: bool) -> None:
    """Several requests at once, of at most `_READ_BYTES` together."""
    batch: list[_Part] = []

    def fetch() -> None:
        found = read_ranges(file, [(block.start, block.start + block.nbytes) for block in batch])
        for block, data in zip(batch, found, strict=True):
            if len(data) != block.nbytes:
                raise OSError(f"{len(data):,} of {block.nbytes:,} bytes")
            _put(block, torch.frombuffer(bytearray(data), dtype=torch.uint8), where, refuse_nan=refuse_nan)
        batch.clear()

    asked = 0
    for part in parts:
        for block in part.blocks(_REQUEST_BYTES):
            if asked + block.nbytes > _READ_BYTES:
                fetch()
                asked = 0
            asked += block.nbytes
            batch.append(block)
    fetch()


def _put(block: _Part, values: Tensor, where: object, *, refuse_nan: bool) -> None:
    """Give a block's target its values: the bytes of the file, or the target itself where these were read into it."""
    if values is not block.target:
        values = values.view(block.dtype).view(block.sizes)[block.source]
        block.target.copy_(values)
    if refuse_nan and has_nan(values if block.target.device.type != "cpu" else block.target):
        raise DamagedError(f"{where}: {block.key} has NaN")


def has_nan(tensor: Tensor) -> bool:
    # A sum is NaN if any part is (or if infinities meet), and takes a third of the time of looking at each.
    can_have = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # nothing is summed in 8 bits
    return can_have and bool(tensor.sum().isnan()) and bool(tensor.isnan().any())
