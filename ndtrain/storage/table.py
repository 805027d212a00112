"""The pieces of a tensor, boxes of it that are stored in files, as the rows of one table.

A checkpoint of 1,000 ranks has a million pieces, so what is computed of a tensor's is computed for all rows at once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from ndtrain.errors import DamagedError
from ndtrain.layout import Ints
from ndtrain.storage.boxes import Flaw, Ints64, first_flaw

LARGEST = 1 << 62  # number in a table, so that the sum of two is an int64 too


class Piece(NamedTuple):
    """A box of a tensor as stored in a file: row-major bytes from the offset `start` of `file`."""

    file: Path
    offsets: Ints
    sizes: Ints
    dtype: str
    start: int


class Pieces(Sequence[Piece]):
    """The stored pieces of one tensor, all of the same dtype and number of dims.

    `table` is `[pieces, 2 + 2 dims]`: a row has the number of its file in `files`, the offset of its values there, and
    the offsets and the sizes of its box.
    """

    def __init__(self, dtype: str, files: Sequence[Path], table: Ints64) -> None:
        self.dtype, self.files, self.table = dtype, files, table

    @classmethod
    def of(cls, key: str, pieces: Iterable[Piece], where: object) -> Pieces:
        """Return `pieces` of the tensor `key` as a table. Raises `DamagedError` naming `where` if they make none."""
        if isinstance(pieces, Pieces):
            return pieces
        files: dict[Path, int] = {}
        rows = Rows()
        for piece in pieces:
            try:
                rows.add(files.setdefault(piece.file, len(files)), piece)
            except ValueError as error:
                raise DamagedError(f"{where}: {key} {error}") from error
        return rows.pieces(list(files))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, i: int) -> Piece: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Piece]: ...
    def __getitem__(self, i: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(i, slice):
            return Pieces(self.dtype, self.files, self.table[i])
        return self._piece(self.table[i].tolist())

    def __iter__(self) -> Iterator[Piece]:
        return map(self._piece, self.table.tolist())

    def _piece(self, row: list[int]) -> Piece:
        middle = 2 + self.dims
        return Piece(self.files[row[0]], tuple(row[2:middle]), tuple(row[middle:]), self.dtype, row[1])

    @property
    def dims(self) -> int:
        return self.table.shape[1] // 2 - 1

    @property
    def low(self) -> Ints64:
        """The offsets of the boxes, `[pieces, dims]`."""
        return self.table[:, 2 : 2 + self.dims]

    @property
    def high(self) -> Ints64:
        """The ends of the boxes, `[pieces, dims]`."""
        return self.low + self.table[:, 2 + self.dims :]

    @property
    def shape(self) -> Ints:
        """The smallest shape that holds all boxes."""
        return tuple(self.high.max(0, initial=0).tolist())

    @property
    def numel(self) -> int:
        """The number of values in all pieces together."""
        return sum(map(math.prod, self.table[:, 2 + self.dims :].tolist()))

    def fits(self, shape: Ints) -> bool:
        """Return whether a tensor of `shape` holds all boxes."""
        return self.dims == len(shape) and all(a <= b for a, b in zip(self.shape, shape, strict=True))

    def flaw(self, shape: Ints) -> Flaw | None:
        """Return the first box of a tensor of `shape`, which holds all boxes, that is not in exactly one piece."""
        return first_flaw(self.low, self.high, (0,) * len(shape), shape)


class Rows:
    """Collects the rows of a table of `Pieces`."""

    def __init__(self) -> None:
        self._dtype, self._dims, self._values = "", -1, array("q")

    def add(self, file: int, piece: Piece) -> None:
        """Append a piece in the file of this number. Raises `ValueError` if it does not fit those before."""
        if self._dims < 0:
            self._dtype, self._dims = piece.dtype, len(piece.sizes)
        row = (file, piece.start, *piece.offsets, *piece.sizes)
        if piece.dtype != self._dtype or len(row) != 2 + 2 * self._dims or len(piece.sizes) != self._dims:
            raise ValueError("has pieces that differ in dtype or number of dims")
        if min(row) < 0 or max(row) >= LARGEST:
            raise ValueError(f"has a piece of shape {piece.sizes} at offsets {piece.offsets}, outside every tensor")
        self._values.extend(row)

    def pieces(self, files: Sequence[Path]) -> Pieces:
        width = 2 + 2 * max(self._dims, 0)
        return Pieces(self._dtype, files, np.frombuffer(self._values, np.int64).reshape(-1, width))


def misfit(pieces: Pieces, shape: Ints) -> str:
    """Return why `pieces` cannot be those of a tensor of `shape`: one is outside, or none reaches its end; or "".

    Gaps and overlaps inside are left to `Pieces.flaw`.
    """
    if pieces.fits(shape) and (pieces.shape == shape or not (flaw := pieces.flaw(shape))):
        return ""
    return f"does not have the shape {shape}, but {pieces.shape}" + (f": {flaw}" if pieces.fits(shape) else "")
