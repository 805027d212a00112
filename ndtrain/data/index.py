"""Decide which documents, or parts of documents, each row of fixed length holds: arrays of (document bounds, length).

A *piece* is a document, or a part of one that is longer than a row. All of it is integer arithmetic on the documents'
lengths, so the same on every machine, and works through the documents in blocks, so that memory grows with the rows
alone. The arrays are computed once and stored beside the token cache, from where all ranks map them.
"""

import json
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.data.preparation import work_directory, write_json
from ndtrain.data.row import IntArray
from ndtrain.errors import DamagedError

# Yields the bounds `[d + 1]` of some documents at a time, which together are all of them.
Bounds = Callable[[], Iterable[IntArray]]
# Returns which of the tokens from the first to before the second position carry loss.
Carries = Callable[[int, int], npt.NDArray[np.bool_]]
# Returns a new array of int64 of that name and length.
New = Callable[[str, int], IntArray]

VERSION = 2
_MOST = 1 << 24


class RowIndex(NamedTuple):
    """Pieces in rows. `starts` `[n_pieces]`: the first token of each, row by row; `rows` `[n_rows + 1]`: the first
    piece of each row, None where each row holds one. `tokens` counts those in the rows, `too_long` the documents longer
    than a row, of which `first_too_long` (-1: none) is the first; with `drop` they are left out. `empty` counts the
    pieces that are left out since none of their tokens is a target.
    """

    starts: IntArray
    rows: IntArray | None
    tokens: int
    too_long: int
    first_too_long: int
    drop: bool
    empty: int = 0
    folder: Path | None = None  # that it is mapped from

    def __len__(self) -> int:
        return len(self.starts) if self.rows is None else len(self.rows) - 1

    def pieces(self, row: int) -> IntArray:
        """Return the first token of each piece of `row`."""
        low, high = (row, row + 1) if self.rows is None else map(int, self.rows[row : row + 2])
        return self.starts[low:high]

    def damaged(self, why: str) -> DamagedError:
        """Return the error that says so."""
        return _damaged(self.folder, why)


def _damaged(folder: Path | None, why: str) -> DamagedError:
    return DamagedError(f"{folder}: {why}; delete the directory, and the next run builds it again")


class _Block(NamedTuple):
    """Some pieces in the order of the data, their tokens in a row, and the numbers of documents longer than a row."""

    starts: IntArray
    sizes: IntArray
    too_long: IntArray
    empty: int


def build_index(
    bounds: Bounds,
    seq_len: int,
    *,
    best_fit: bool,
    drop: bool = False,
    carries: Carries | None = None,
    new: New = lambda name, length: np.empty(length, np.int64),
    advance: Callable[[], object] = lambda: None,
) -> RowIndex:
    """Return the rows of `seq_len` tokens for the documents that `bounds()` yields each time it is called.

    With `best_fit`, pieces share rows: by falling length, each goes to the fullest row that has room (best-fit
    decreasing). The rows come in the order of their first tokens. Otherwise each piece is a row, in the order of the
    data. A document longer than `seq_len` is cut into pieces of `seq_len`, or left out (`drop`). The last token of a
    document is no piece of its own, since it has no target; nor is, where a mask says which tokens carry loss
    (`carries`), a piece without a target. `advance` is called after each block of documents.
    """

    def blocks() -> Iterator[_Block]:
        first = 0
        for some in bounds():
            yield _pieces(some, seq_len, first=first, drop=drop, carries=carries)
            first += len(some) - 1
            advance()

    counts = np.zeros(seq_len + 1, np.int64)  # of pieces, by their size
    too_long, first_too_long, empty = 0, -1, 0
    for block in blocks():
        counts += np.bincount(block.sizes, minlength=seq_len + 1)
        empty += block.empty
        if len(block.too_long):
            first_too_long = int(block.too_long[0]) if not too_long else first_too_long
            too_long += len(block.too_long)
    starts = new("starts", int(counts.sum()))
    rows: IntArray | None = None
    if best_fit:
        placed = _Placement.of(counts)
        begins = np.full(placed.rows, np.iinfo(np.int64).max, np.int64)
        for found in placed.place(blocks()):
            np.minimum.at(begins, found.rows, found.starts)
        order = np.argsort(begins, kind="stable")
        number = np.empty_like(order)
        number[order] = np.arange(placed.rows)
        rows = new("rows", placed.rows + 1)
        rows[0] = 0
        np.cumsum(placed.pieces_in_rows()[order], out=rows[1:])
        for found in placed.place(blocks()):
            starts[rows[number[found.rows]] + found.slots] = found.starts
    else:
        done = 0
        for block in blocks():
            starts[done : done + len(block.starts)] = block.starts
            done += len(block.starts)
    tokens = int((counts * np.arange(seq_len + 1)).sum())
    return RowIndex(starts, rows, tokens, too_long, first_too_long, drop, empty)


def _pieces(bounds: IntArray, seq_len: int, *, first: int, drop: bool, carries: Carries | None) -> _Block:
    """Return the pieces of the documents with these bounds, the first of which has the number `first`."""
    lengths = np.diff(bounds)
    long = np.flatnonzero(lengths > seq_len)
    count = (lengths + seq_len - 2) // seq_len
    if drop:
        count[long] = 0
    begins = np.cumsum(count) - count
    nth = np.arange(int(count.sum())) - np.repeat(begins, count)
    starts, ends = np.repeat(bounds[:-1], count) + nth * seq_len, np.repeat(bounds[1:], count)
    found = len(starts)
    if carries is not None:
        kept = _with_target(starts + 1, np.minimum(starts + seq_len + 1, ends), carries)
        starts, ends = starts[kept], ends[kept]
    return _Block(starts, np.minimum(ends - starts, seq_len), long + first, found - len(starts))


def _with_target(firsts: IntArray, stops: IntArray, carries: Carries) -> npt.NDArray[np.bool_]:
    """Return in which of these ranges of tokens, in rising order and none of them empty, a token carries loss."""
    found, at = np.empty(len(firsts), np.bool_), 0
    while at < len(firsts):
        # Some millions of tokens at a time, at least one range.
        until = max(at + 1, int(np.searchsorted(stops, firsts[at] + _MOST, side="right")))
        loss = np.append(carries(int(firsts[at]), int(stops[until - 1])), False)
        edges = np.stack([firsts[at:until], stops[at:until]], axis=1).ravel() - firsts[at]
        found[at:until] = np.logical_or.reduceat(loss, edges)[::2]
        at = until
    return found


class _Placed(NamedTuple):
    """Where the pieces of a block go: their first tokens, rows, and places in these rows."""

    starts: IntArray
    rows: IntArray
    slots: IntArray


class _Step(NamedTuple):
    """Pieces of one size, from number `piece` on, that fill rows from `row` on: `each` in a row, from its `slot` on."""

    piece: int
    row: int
    each: int
    slot: int


class _Placement:
    """The rows of pieces, by the pieces' number when they are sorted by falling size (and then as in the data)."""

    def __init__(self, steps: list[_Step], first: IntArray, *, pieces: int, rows: int) -> None:
        self.piece, self.row, self.each, self.slot = np.array(steps, np.int64).reshape(-1, 4).T.copy()
        self.first = first  # the number of the first piece of each size
        self.pieces, self.rows = pieces, rows

    @classmethod
    def of(cls, counts: IntArray) -> "_Placement":
        """Place `counts[n]` pieces of n tokens, without touching each: in O(S log S) steps for rows of S tokens.

        Rows with the same room are alike. Pieces of one size go into the rows with the least room that is enough, as
        many as fit into one row before the next: what is left in the row is less, so it remains the best fit.
        """
        seq_len = len(counts) - 1
        first = np.cumsum(counts[::-1])[::-1] - counts
        steps: list[_Step] = []
        rooms: list[int] = []  # in rows that are not full, in rising order
        alike: dict[int, list[tuple[int, int, int]]] = {}  # room -> (first row, number of rows, pieces in each)
        rows = 0

        def put_back(room: int, group: tuple[int, int, int]) -> None:
            if room and room not in alike:
                insort(rooms, room)
                alike[room] = []
            if room:
                alike[room].append(group)

        for size in np.flatnonzero(counts)[::-1].tolist():
            piece, left = int(first[size]), int(counts[size])
            while left:
                at = bisect_left(rooms, size)
                if at < len(rooms):
                    room = rooms.pop(at)
                    groups = alike.pop(room)
                else:
                    room, number = seq_len, -(-left // (seq_len // size))
                    groups = [(rows, number, 0)]
                    rows += number
                for row, number, slot in groups:
                    fit = room // size
                    full = min(number, left // fit)
                    # Rows that take as many as fit, then at most one that takes fewer, then those that take none.
                    for take, each in ((full, fit), (int(full < number and left > full * fit), left - full * fit)):
                        if take:
                            steps.append(_Step(piece, row, each, slot))
                            put_back(room - each * size, (row, take, slot + each))
                            piece, left = piece + take * each, left - take * each
                            row, number = row + take, number - take
                    if number:
                        put_back(room, (row, number, slot))
        return cls(steps, first, pieces=int(counts.sum()), rows=rows)

    def pieces_in_rows(self) -> IntArray:
        """Return the number of pieces in each row `[rows]`."""
        number = np.diff(self.piece, append=self.pieces) // self.each
        change = np.zeros(self.rows + 1, np.int64)
        np.add.at(change, self.row, self.each)
        np.add.at(change, self.row + number, -self.each)
        return np.cumsum(change[:-1])

    def place(self, blocks: Iterable[_Block]) -> Iterator[_Placed]:
        """Yield where the pieces of each block go; the blocks are all of the data."""
        following = self.first.copy()
        for block in blocks:
            # numpy sorts 16 bits by radix.
            order = np.argsort(block.sizes.astype(np.min_scalar_type(len(self.first))), kind="stable")
            counts = np.bincount(block.sizes, minlength=len(following))
            pieces = np.repeat(following - (np.cumsum(counts) - counts), counts) + np.arange(len(order))
            following += counts
            step = np.searchsorted(self.piece, pieces, side="right") - 1
            row, slot = np.divmod(pieces - self.piece[step], self.each[step])
            yield _Placed(block.starts[order], self.row[step] + row, self.slot[step] + slot)


def open_index(
    bounds: Bounds,
    seq_len: int,
    *,
    best_fit: bool,
    drop: bool,
    carries: Carries | None = None,
    folder: Path,
    advance: Callable[[], object],
) -> RowIndex:
    """Return the rows that `build_index` computes, mapped from `folder`, where they are written if it does not exist.

    Ranks and runs may race: each writes its own directory and the first rename wins. Raises `OSError` if it cannot be
    written, `DamagedError` if what is there is not whole.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with work_directory(folder.parent, folder.name) as work:
            how: dict[str, Any] = {"best_fit": best_fit, "drop": drop, "carries": carries}
            _write(work, build_index(bounds, seq_len, **how, new=_new_in(work), advance=advance))
            try:
                os.rename(work, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first, with the same content
                    raise
    return _read(folder)


def _new_in(folder: Path) -> New:
    def new(name: str, length: int) -> IntArray:
        if not length:  # an empty file cannot be mapped
            return np.empty(0, np.int64)
        with (folder / f"{name}.bin").open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and kills the process in a mapped file
                os.posix_fallocate(file.fileno(), 0, length * 8)
            else:
                file.truncate(length * 8)
        return np.memmap(folder / f"{name}.bin", np.int64, "r+")

    return new


def _write(folder: Path, index: RowIndex) -> None:
    arrays = {"starts": index.starts} | ({} if index.rows is None else {"rows": index.rows})
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    meta = {key: getattr(index, key) for key in ("tokens", "too_long", "first_too_long", "drop", "empty")}
    lengths = {name: len(array) for name, array in arrays.items()}
    write_json(folder / "meta.json", {"version": VERSION, "lengths": lengths} | meta)


def _read(folder: Path) -> RowIndex:
    def mapped(name: str, length: int) -> IntArray:
        if not length:
            return np.empty(0, np.int64)
        size, wanted = (folder / f"{name}.bin").stat().st_size, length * 8
        if size != wanted:
            raise ValueError(f"{name}.bin has {size:,} of the {wanted:,} bytes that meta.json says")
        found: IntArray = np.memmap(folder / f"{name}.bin", np.int64, "r").view(np.ndarray)
        return found

    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        if meta["version"] != VERSION:
            raise ValueError(f"its format version {meta['version']} is not supported")
        arrays = {name: mapped(name, length) for name, length in meta["lengths"].items()}
        return RowIndex(
            arrays["starts"],
            arrays.get("rows"),
            tokens=int(meta["tokens"]),
            too_long=int(meta["too_long"]),
            first_too_long=int(meta["first_too_long"]),
            drop=bool(meta["drop"]),
            empty=int(meta["empty"]),
            folder=folder,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"cannot be read ({error})") from error
