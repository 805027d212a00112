"""Tensors stored in pieces in files: where their pieces are, and reading some rows of one at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ndtrain.errors import DamagedError
from ndtrain.layout import Ints
from ndtrain.storage.headers import DTYPES
from ndtrain.storage.paths import is_local, read_into, read_range
from ndtrain.storage.pieces import BLOCK_BYTES, raw
from ndtrain.storage.table import Piece, Pieces, misfit


class Stored(NamedTuple):
    """Describes a tensor stored in files. A scalar has the shape (1,) here."""

    shape: Ints
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows_of(self, nbytes: int) -> int:
        """Return how many rows fit in `nbytes`; at least one."""
        return max(1, nbytes * self.shape[0] // max(1, self.nbytes))


def stored(key: str, shape: Iterable[int], dtype: torch.dtype, pieces: Iterable[Piece], where: Path) -> Stored:
    """Return the tensor `key` of `shape`. Raises `DamagedError` unless each of its values is in exactly one piece."""
    shape, table = tuple(shape), Pieces.of(key, pieces, where)
    if table and (reason := misfit(table, shape)):
        raise DamagedError(f"{where}: {key} {reason}")
    if flaw := table.flaw(shape):
        raise DamagedError(f"{where}: {key}{flaw}")
    full = (piece for piece in table if math.prod(piece.sizes))
    return Stored(shape or (1,), dtype, tuple(p if shape else p._replace(offsets=(0,), sizes=(1,)) for p in full))


def of_piece(piece: Piece) -> Stored:
    """Return the tensor that is stored whole in one piece."""
    if not piece.sizes:
        piece = piece._replace(offsets=(0,), sizes=(1,))
    return Stored(piece.sizes, DTYPES[piece.dtype], (piece,))


def checkpoint_tensors(pieces: Mapping[str, Iterable[Piece]], where: Path) -> dict[str, Stored]:
    """Return the tensors of a directory of safetensors files, from their headers. Raises `DamagedError`."""
    found = {}
    for key, parts in pieces.items():
        table = Pieces.of(key, parts, where)
        if table.dtype not in DTYPES:
            raise DamagedError(f"{where}: {key} has dtype {table.dtype}, which ndtrain does not convert")
        found[key] = stored(key, table.shape, DTYPES[table.dtype], table, where)
    return found


class Buffers(threading.local):
    """Keeps memory that each thread reuses, because touching new pages costs as much as copying into them."""

    def __init__(self) -> None:
        self._held: dict[str, bytearray] = {}

    def take(self, use: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, valid until the next call for the same `use`."""
        shape = tuple(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > BLOCK_BYTES or not nbytes:
            return torch.empty(shape, dtype=dtype)
        if use not in self._held:
            self._held[use] = bytearray(BLOCK_BYTES)
        return torch.frombuffer(self._held[use], dtype=dtype, count=math.prod(shape)).view(shape)


def read_rows(source: Stored, low: int, high: int, *, into: Tensor, buffers: Buffers) -> None:
    """Read rows low..high of `source` into `into` `[high - low, ...]`, cast to its dtype. Raises `DamagedError`."""
    for piece in source.pieces:
        first, last = max(low, piece.offsets[0]), min(high, piece.offsets[0] + piece.sizes[0])
        if first >= last:
            continue
        inner = tuple(slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
        target = into[(slice(first - low, last - low), *inner)]
        direct = target.dtype == source.dtype and target.is_contiguous()
        shape = (last - first, *piece.sizes[1:])
        buffer = target if direct else buffers.take("piece", shape, source.dtype)
        row = math.prod(piece.sizes[1:]) * source.dtype.itemsize
        _read(piece.file, piece.start + (first - piece.offsets[0]) * row, raw(buffer))
        if not direct:
            target.copy_(buffer)


def read_all(source: Stored, dtype: torch.dtype, *, buffers: Buffers) -> Tensor:
    """Return the whole tensor in `dtype`."""
    whole = torch.empty(source.shape, dtype=dtype)
    step = source.rows_of(BLOCK_BYTES if dtype != source.dtype or len(source.pieces) > 1 else source.nbytes)
    for low in range(0, source.shape[0] if source.nbytes else 0, step):
        high = min(low + step, source.shape[0])
        read_rows(source, low, high, into=whole[low:high], buffers=buffers)
    return whole


def same_values(one: Stored, other: Stored, *, part: int = 0, parts: int = 1) -> bool:
    """Return whether two tensors have one shape, and in float32 the same values in a part of their rows.

    The rows are cut into `parts`, so that each rank can compare one.
    """
    if one.shape != other.shape:
        return False
    both_float = one.dtype.is_floating_point and other.dtype.is_floating_point
    if one.dtype != other.dtype and not both_float:
        return False
    dtype, rows, buffers = torch.float32 if both_float else one.dtype, one.shape[0], Buffers()
    step = max(1, BLOCK_BYTES * rows // max(1, math.prod(one.shape) * dtype.itemsize))
    low, end = rows * part // parts, rows * (part + 1) // parts
    while low < end:
        shape = (min(step, end - low), *one.shape[1:])
        blocks = [torch.empty(shape, dtype=dtype) for _ in range(2)]
        for source, block in zip((one, other), blocks, strict=True):
            read_rows(source, low, low + shape[0], into=block, buffers=buffers)
        if not torch.equal(*blocks):
            return False
        low += shape[0]
    return True


def _read(path: Path, start: int, into: memoryview) -> None:
    try:
        if not is_local(path):
            data = read_range(path, start, start + len(into))
            if len(data) < len(into):
                raise DamagedError(f"{path} is truncated: it ends before its tensors do")
            into[:] = data
            return
        with path.open("rb", buffering=0) as file:
            read_into(file.fileno(), start, into)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
