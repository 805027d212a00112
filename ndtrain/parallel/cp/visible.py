"""Finds the work of each step of the ring: which keys of another rank's part each query of this rank sees.

A sequence is split into 2 cp segments, of which rank r holds r and 2 cp - 1 - r, so that under causal attention all
ranks have the same work. Masks are made for one pair of segments at a time, from positions in whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# (first query, first key, length) -> bool [B, 1 or H, length, length], True where the query sees the key
PairMask = Callable[[int, int, int], Tensor]


def segments(rank: int, cp: int) -> tuple[int, int]:
    """Return the two segments of 2 cp that `rank` holds."""
    return rank, 2 * cp - 1 - rank


@dataclass(frozen=True)
class Span:
    """One call of an attention kernel: some local queries, some keys of a block, and which of those they see."""

    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None


class Visible:
    """Finds and keeps the spans of every step of the ring.

    `mask` is "causal", "full", or a function that makes the mask of a pair of segments; `length` is the tokens of a
    segment.
    """

    def __init__(self, mask: PairMask | Literal["causal", "full"], *, length: int, rank: int, cp: int):
        self.mask, self.length, self.rank, self.cp = mask, length, rank, cp
        self._spans: dict[int, tuple[Span, ...]] = {}

    def spans(self, source: int) -> tuple[Span, ...]:
        """Return what to compute with the keys of rank `source`, without the blocks that no query sees."""
        # Every layer asks for the same spans.
        if source not in self._spans:
            self._spans[source] = self.find(source)
        return self._spans[source]

    def find(self, source: int) -> tuple[Span, ...]:
        """Return what `spans` keeps."""
        whole, first, second = slice(None), slice(0, self.length), slice(self.length, None)
        if self.mask == "full":
            return (Span(whole, whole),)
        if self.mask == "causal":
            if source == self.rank:
                return (Span(whole, whole, causal=True),)
            # Segments of lower ranks come before this rank's in the first half, and after them in the mirrored second.
            return (Span(whole, first) if source < self.rank else Span(second, whole),)
        found = []
        for rows, query in zip((first, second), segments(self.rank, self.cp), strict=True):
            for columns, key in zip((first, second), segments(source, self.cp), strict=True):
                mask = self.mask(query * self.length, key * self.length, self.length)
                if mask.all():
                    found.append(Span(rows, columns))
                elif query == key and (mask == mask.new_ones(mask.shape[-2:]).tril()).all():
                    found.append(Span(rows, columns, causal=True))
                elif mask.any():
                    found.append(Span(rows, columns, mask=mask))
        return tuple(found)
