"""Finds the work of each step of the ring: which keys of another rank's part each query of this rank sees.

A sequence is split into 2 cp segments, of which rank r holds r and 2 cp - 1 - r, so that under causal attention all
ranks have the same work. Where documents begin is known on the host, so that no device has to be asked what is visible:
each document is one call without a mask, or a few with the band of a window. Masks of another kind are made for one
pair of segments at a time, from positions in whole sequences, and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# (first query, first key, length) -> bool [B, 1 or H, length, length], True where the query sees the key
PairMask = Callable[[int, int, int], Tensor]
_CHUNK = 1024  # queries of a window at a time, or as many as it has, so that no mask is much larger than what it shows


class Documents(NamedTuple):
    """Causal attention within documents, which begin at `bounds` in each row, or in all if there is one list.

    With a `window` a query sees the last so many keys of its document, its own included.
    """

    bounds: list[list[int]]
    window: int | None = None


CAUSAL = Documents([[0]])


def segments(rank: int, cp: int) -> tuple[int, int]:
    """Return the two segments of 2 cp that `rank` holds."""
    return rank, 2 * cp - 1 - rank


class Span(NamedTuple):
    """One call of an attention kernel: some local queries, some keys of a block, and which of those they see.

    With `first` it is the first call of its queries in the ring.
    """

    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None
    rows: slice = slice(None)
    first: bool = False


class _Part(NamedTuple):
    """Positions `[begin, end)` of a sequence that lie together on a rank, from its `local` position on."""

    local: int
    begin: int
    end: int

    def slice(self, begin: int, end: int) -> slice:
        """Return where the positions `[begin, end)` are on the rank."""
        return slice(self.local + begin - self.begin, self.local + end - self.begin)


class Visible:
    """Finds and keeps the spans of every step of the ring.

    `mask` is `Documents`, "full", or a function that makes the mask of a pair of segments; `length` is the tokens of a
    segment.
    """

    def __init__(
        self,
        mask: Documents | PairMask | Literal["full"],
        *,
        length: int,
        rank: int,
        cp: int,
        device: torch.device | str = "cpu",
    ):
        self.mask, self.length, self.rank, self.cp, self.device = mask, length, rank, cp, device
        self._spans: dict[int, tuple[Span, ...]] = {}

    def spans(self, source: int) -> tuple[Span, ...]:
        """Return what to compute with the keys of rank `source`, without the blocks that no query sees."""
        # Every layer asks for the same spans.
        if source not in self._spans:
            self._spans[source] = self.find(source)
        return self._spans[source]

    def find(self, source: int) -> tuple[Span, ...]:
        """Return what `spans` keeps."""
        if self.mask == "full":
            return (Span(slice(None), slice(None)),)
        return tuple(self._of_documents(self.mask, source) if isinstance(self.mask, Documents) else self._read(source))

    def _of_documents(self, documents: Documents, source: int) -> Iterator[Span]:
        bounds, whole = documents.bounds, 2 * self.cp * self.length
        alike = all(row == bounds[0] for row in bounds)
        for number, row in enumerate(bounds[:1] if alike else bounds):
            rows = slice(None) if alike else slice(number, number + 1)
            for begin, end in zip(row, [*row[1:], whole], strict=True):
                yield from self._of_document(begin, end, source, documents.window, rows)

    def _of_document(self, begin: int, end: int, source: int, window: int | None, rows: slice) -> Iterator[Span]:
        # Segments of lower ranks come before this rank's in the first half, and after them in the mirrored second.
        queries = self._parts(self.rank, (1,) if source > self.rank else (0, 1), begin, end)
        keys = self._parts(source, (0,) if source < self.rank else (0, 1), begin, end)
        if queries and keys and (window is None or end - begin <= window):
            own = source == self.rank  # where the ring begins
            yield Span(_joined(queries), _joined(keys), causal=own, rows=rows, first=own)
        elif window is not None:
            for query in queries:
                for key in keys:
                    yield from self._in_window(query, key, window, rows)

    def _parts(self, rank: int, halves: tuple[int, ...], begin: int, end: int) -> list[_Part]:
        """Return what `rank` holds of the positions `[begin, end)` in these of its two segments."""
        found = []
        for half in halves:
            start = segments(rank, self.cp)[half] * self.length
            low, high = max(begin, start), min(end, start + self.length)
            if low < high:
                found.append(_Part(half * self.length + low - start, low, high))
        return found

    def _in_window(self, query: _Part, key: _Part, window: int, rows: slice) -> Iterator[Span]:
        step = max(window, _CHUNK)
        for first in range(query.begin, query.end, step):
            low, high = max(key.begin, first - window + 1), min(key.end, first + step, query.end)
            last = min(first + step, query.end, high - 1 + window)
            if low >= high or first >= last:
                continue
            where = query.slice(first, last), key.slice(low, high)
            if last - 1 - low >= window or (first < high - 1 and (first, last) != (low, high)):
                distance = self._places(first, last)[:, None] - self._places(low, high)
                yield Span(*where, mask=((distance >= 0) & (distance < window))[None, None], rows=rows)
            else:
                yield Span(*where, causal=(first, last) == (low, high), rows=rows)

    def _places(self, begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=self.device)

    def _read(self, source: int) -> Iterator[Span]:
        """Yield the spans of a mask that only its values tell."""
        assert callable(self.mask)
        for rows, query in zip(self._halves(), segments(self.rank, self.cp), strict=True):
            for columns, key in zip(self._halves(), segments(source, self.cp), strict=True):
                mask = self.mask(query * self.length, key * self.length, self.length)
                if mask.all():
                    yield Span(rows, columns)
                elif query == key and (mask == mask.new_ones(mask.shape[-2:]).tril()).all():
                    yield Span(rows, columns, causal=True)
                elif mask.any():
                    yield Span(rows, columns, mask=mask)

    def _halves(self) -> tuple[slice, slice]:
        return slice(0, self.length), slice(self.length, None)


def _joined(parts: list[_Part]) -> slice:
    """Return where positions are on a rank that lie together there, also where they are not neighbours."""
    return slice(parts[0].local, parts[-1].local + parts[-1].end - parts[-1].begin)
