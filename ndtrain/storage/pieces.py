"""Find tensors' pieces in safetensors files, and read the parts of them that a rank holds.

A file holds tensors whole, or one piece of each; the piece's offsets are then in the header under `DCP_SHARDING_INFO`,
as torch's `HuggingFaceStorageWriter` writes them (torch 2.13). Values are read from their offset in the file straight
into the target tensor, which is faster than a mapped file: its pages would be loaded one by one before each copy.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import Box, Ints, held_boxes, local_part
from ndtrain.storage.boxes import Ints64, first_flaw
from ndtrain.storage.headers import DTYPES, are_sizes, read_header
from ndtrain.storage.paths import is_local, read_into, read_range, read_ranges
from ndtrain.storage.table import Piece, Pieces, Rows, misfit

_SHARDING = "DCP_SHARDING_INFO"
BLOCK_BYTES = 4 * 2**20  # read, cast and checked for NaN while they are in a processor's cache
_THREAD_BYTES = 1 << 26  # that one thread reads at a time
_REQUEST_BYTES = 1 << 25  # of one request to an object store
_READ_BYTES = 1 << 28  # of all requests at once


class _Part(NamedTuple):
    """A box `source` of the row-major array of `sizes` stored at offset `start` of a file, and its `target` memory."""

    key: str
    target: Tensor
    file: Path
    start: int
    dtype: torch.dtype
    sizes: Ints
    source: tuple[slice, ...]

    def blocks(self, limit: int) -> Iterator[_Part]:
        """Yield this part cut into parts that read whole rows of the array and at most `limit` bytes each."""
        first, last, row = self.source[0].start, self.source[0].stop, math.prod(self.sizes[1:]) * self.dtype.itemsize
        if row > limit and len(self.sizes) > 1:
            for i in range(first, last):
                start = self.start + i * row
                inner = self._replace(
                    target=self.target[i - first], start=start, sizes=self.sizes[1:], source=self.source[1:]
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
        """Whether the array's bytes can be read straight into the target."""
        whole = all(part == slice(0, size) for part, size in zip(self.source, self.sizes, strict=True))
        target = self.target
        return whole and target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()


class _Held(NamedTuple):
    """A box that this rank holds of a tensor, and its parts `low` to `high` in the pieces numbered `rows`."""

    key: str
    local: Tensor
    box: Box
    pieces: Pieces
    rows: list[int]
    low: Ints64
    high: Ints64

    def part(self, i: int) -> _Part:
        piece, low = self.pieces[self.rows[i]], self.low[i].tolist()
        sizes = tuple((self.high[i] - self.low[i]).tolist())
        inner = tuple(a - o + lo for a, o, lo in zip(low, self.box.offsets, self.box.local_offsets, strict=True))
        target = self.local[Box((), sizes, inner).local]
        source = tuple(slice(a - o, a - o + n) for a, o, n in zip(low, piece.offsets, sizes, strict=True))
        if not source:  # a scalar, as one row
            target, source = target.view(1), (slice(0, 1),)
        return _Part(self.key, target, piece.file, piece.start, DTYPES[piece.dtype], piece.sizes or (1,), source)


# File -> (box that this rank holds, number of one of its parts, which is in the file)
Plan = Mapping[Path, list[tuple[_Held, int]]]


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, sharing memory."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def metadata_of(offsets: Mapping[str, Ints]) -> dict[str, str]:
    """Return the metadata of the header of a file that holds one piece, at these offsets, of each key."""
    sharding = {key: {"saved_offsets": list(start)} for key, start in offsets.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(sharding)}


def pieces_in(file: Path, name: str = "") -> dict[str, Piece]:
    """Return {key: piece} of a safetensors file, its header checked against the file's length.

    Raises `DamagedError`, whose message calls the file `name`.
    """
    try:
        begin, entries, info = read_header(file)
        sharding = json.loads(info[_SHARDING]) if _SHARDING in info else None
        found = {}
        for key, entry in entries.items():
            offsets = tuple(sharding[key]["saved_offsets"]) if sharding is not None else (0,) * len(entry.shape)
            if len(offsets) != len(entry.shape) or not are_sizes(offsets):
                raise ValueError(f"{key} has shape {entry.shape} at offsets {offsets}")
            found[key] = Piece(file, offsets, entry.shape, entry.dtype, begin + entry.start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedError(f"{name or file.name}: damaged tensor file ({type(error).__name__}: {error})") from error
    return found


def pieces_of_files(files: Sequence[Path], numbers: Iterable[int], where: str) -> dict[str, Pieces]:
    """Return {key: pieces} of those `files` that have these numbers, from their headers.

    Raises `DamagedError` for a damaged header; its message begins with `where`.
    """
    found: dict[str, Rows] = defaultdict(Rows)
    for number in numbers:
        for key, piece in pieces_in(files[number], f"{where}/{files[number].name}").items():
            try:
                found[key].add(number, piece)
            except ValueError as error:
                raise DamagedError(f"{where}/{files[number].name}: {key} {error}") from error
    return {key: rows.pieces(files) for key, rows in found.items()}


def same_bytes(a: Piece, b: Piece) -> bool:
    """Return whether two pieces of one shape hold the same bytes. Raises `DamagedError` if they cannot be read."""
    dtype = DTYPES.get(a.dtype)
    if dtype is None or a.dtype != b.dtype:
        return False
    nbytes = math.prod(a.sizes) * dtype.itemsize
    try:
        for low in range(0, nbytes, BLOCK_BYTES):
            high = min(low + BLOCK_BYTES, nbytes)
            if len({read_range(p.file, p.start + low, p.start + high) for p in (a, b)}) > 1:
                return False
    except OSError as error:
        raise DamagedError(f"{a.file} or {b.file.name}: damaged tensor file ({error})") from error
    return True


def local_and_boxes(key: str, tensor: Tensor) -> tuple[Tensor, list[Box]]:
    """Return the local tensor (sharing memory) and its boxes. Raises `NdtrainError` if the two disagree."""
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
    """Return whether weights saved as `dtype` may be read as `to`: the same dtype, or floats of 16 bits and more."""
    found = DTYPES.get(dtype)
    if found is None or found == to:
        return found is not None
    return found.is_floating_point and found.itemsize > 1 and to.is_floating_point


@torch.no_grad()
def read_held(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Iterable[Piece]],
    where: object,
    *,
    as_weights: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fill this rank's part of each tensor from the pieces of its key, reading nothing else.

    With `as_weights` floats are cast to the dtype of the tensor, and NaN is refused. `progress` is called, by several
    threads, after each block.

    Raises `DamagedError` naming `where` and the key: it is missing, its shape or dtype differs, its pieces overlap or
    do not cover this rank's part, or a file cannot be read. Some tensors may be partly filled then.
    """
    plan = plan_held(tensors, stored, where, as_weights=as_weights)
    read_planned(plan, where, as_weights=as_weights, progress=progress)


def plan_held(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Iterable[Piece]], where: object, *, as_weights: bool = False
) -> Plan:
    """Return what `read_held` reads of each file. Every element that this rank holds is read exactly once.

    Raises `DamagedError` as `read_held` does, before anything is read.
    """
    plan: dict[Path, list[tuple[_Held, int]]] = defaultdict(list)
    for key, tensor in tensors.items():
        pieces = Pieces.of(key, stored.get(key, ()), where)
        for held in _held(key, tensor, pieces, where, cast=as_weights):
            for i, file in enumerate(pieces.table[held.rows, 0].tolist()):
                plan[pieces.files[file]].append((held, i))
    return plan


@torch.no_grad()
def read_planned(
    plan: Plan, where: object, *, as_weights: bool = False, progress: Callable[[], None] = lambda: None
) -> None:
    """Read what `plan_held` planned, with the same arguments. Raises `DamagedError`."""
    for file, planned in sorted(plan.items(), key=lambda item: str(item[0])):
        parts = (held.part(i) for held, i in planned)
        try:
            read = _read_local if is_local(file) else _read_remote
            read(file, parts, where, refuse_nan=as_weights, progress=progress)
        except OSError as error:
            raise DamagedError(f"{file}: damaged tensor file ({error})") from error


def _held(key: str, tensor: Tensor, pieces: Pieces, where: object, *, cast: bool) -> Iterator[_Held]:
    """Yield the boxes that this rank holds of `tensor` with their parts. Raises `DamagedError`."""
    local, boxes = local_and_boxes(key, tensor)
    if not pieces:
        if tensor.numel():
            raise DamagedError(f"{where}: {key} is missing")
        return
    if reason := misfit(pieces, tuple(tensor.shape)):
        raise DamagedError(f"{where}: {key} {reason}")
    if DTYPES.get(pieces.dtype) != tensor.dtype and not (cast and converts(pieces.dtype, tensor.dtype)):
        raise DamagedError(f"{where}: {key} is {pieces.dtype} in {pieces[0].file.name}, not {tensor.dtype}")
    for box in boxes:
        stop = tuple(o + n for o, n in zip(box.offsets, box.sizes, strict=True))
        low, high = np.maximum(pieces.low, box.offsets), np.minimum(pieces.high, stop)
        rows = np.flatnonzero((low < high).all(1))
        low, high = low[rows], high[rows]
        if flaw := first_flaw(low, high, box.offsets, stop):
            raise DamagedError(f"{where}: {key}{flaw}")
        yield _Held(key, local, box, pieces, rows.tolist(), low, high)


def _read_local(
    file: Path, parts: Iterable[_Part], where: object, *, refuse_nan: bool, progress: Callable[[], None]
) -> None:
    """Read in several threads: a single one leaves a fast disk or a network file system mostly idle."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    buffers = threading.local()

    def read(part: _Part) -> None:
        if not hasattr(buffers, "own"):
            buffers.own = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=part.target.is_cuda)
        for block in part.blocks(BLOCK_BYTES):
            values = block.target if block.is_direct else buffers.own[: block.nbytes]
            read_into(opened.fileno(), block.start, raw(values))
            _fill(block, values, where, refuse_nan=refuse_nan)
            progress()

    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(min(4, max(2, cores)), "read") as pool:
        try:
            for _ in pool.map(read, (block for part in parts for block in part.blocks(_THREAD_BYTES))):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _read_remote(
    file: Path, parts: Iterable[_Part], where: object, *, refuse_nan: bool, progress: Callable[[], None]
) -> None:
    """Read with several requests at once, of at most `_READ_BYTES` together."""
    batch: list[_Part] = []

    def fetch() -> None:
        found = read_ranges(file, [(block.start, block.start + block.nbytes) for block in batch])
        for block, data in zip(batch, found, strict=True):
            if len(data) != block.nbytes:
                raise OSError(f"read {len(data):,} of {block.nbytes:,} bytes")
            _fill(block, torch.frombuffer(bytearray(data), dtype=torch.uint8), where, refuse_nan=refuse_nan)
        batch.clear()
        progress()

    requested = 0
    for part in parts:
        for block in part.blocks(_REQUEST_BYTES):
            if requested + block.nbytes > _READ_BYTES:
                fetch()
                requested = 0
            requested += block.nbytes
            batch.append(block)
    fetch()


def _fill(block: _Part, values: Tensor, where: object, *, refuse_nan: bool) -> None:
    """Copy `values`, the file's bytes, to the block's target unless they were read into it. Raises `DamagedError`."""
    if values is not block.target:
        # Moved first: a copy between devices and dtypes would be cast on the host.
        values = values.view(block.dtype).view(block.sizes)[block.source].to(block.target.device)
        block.target.copy_(values)
    if refuse_nan and has_nan(values if block.target.device.type != "cpu" else block.target):
        raise DamagedError(f"{where}: {block.key} has NaN")


def has_nan(tensor: Tensor) -> bool:
    """Return whether a float tensor of 16 bits or more contains NaN; False for other dtypes."""
    # A sum is NaN if any value is (or if infinities of both signs meet), and takes a third of the time of `isnan`.
    summable = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # torch has no sum in 8 bits
    return summable and bool(tensor.sum().isnan()) and bool(tensor.isnan().any())
