"""Which keys of another rank's part each query of this rank sees: the work of one step of the ring.

A sequence is cut into 2 cp pieces, of which rank r holds r and 2 cp - 1 - r, so that under causal attention all ranks
have the same work. Masks are made for one pair of pieces at a time, from places in whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# (first query, first key, length) -> bool [B, 1 or H, length, length], True where the query sees the key
PairMask = Callable[[int, int, int], Tensor]


def pieces(rank: int, cp: int) -> tuple[int, int]:
    """The two pieces of 2 cp that `rank` holds."""
    return rank, 2 * cp - 1 - rank


@dataclass(frozen=True)
class Span:
    """One call of an attention kernel: some local queries, some keys of a block, and which of those they see."""

    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None


class Visible:
    """The spans of every step of the ring.

    `mask` is "causal", "full", or makes the mask of a pair of pieces; `length` is that of a piece.
    """

    def __init__(self, mask: PairMask | Literal["causal", "full"], *, length: int, rank: int, cp: int):
        self.mask, self.length, self.rank, self.cp = mask, length, rank, cp
        self._spans: dict[int, tuple[Span, ...]] = {}

    def spans(self, source: int) -> tuple[Span, ...]:
        """What is to be computed with the keys of rank `source`; what nobody sees is left out."""
        # Every layer asks for the same.
        if source not in self._spans:
            self._spans[source] = self._find(source)
        return self._spans[source]

    def _find(self, source: int) -> tuple[Span, ...]:
        whole, first, second = slice(None), slice(0, self.length), slice(self.length, None)
        if self.mask == "full":
            return (Span(whole, whole),)
        if self.mask == "causal":
            if source == self.rank:
                return (Span(whole, whole, causal=True),)
            # Pieces of lower ranks come first and, mirrored, last.
            return (Span(whole, first) if source < self.rank else Span(second, whole),)
        found = []
        for rows, query in zip((first, second), pieces(self.rank, self.cp), strict=True):
            for columns, key in zip((first, second), pieces(source, self.cp), strict=True):
                mask = self.mask(query * self.length, key * self.length, self.length)
                if mask.all():
                    found.append(Span(rows, columns))
                elif query == key and (mask == mask.new_ones(mask.shape[-2:]).tril()).all():
                    found.append(Span(rows, columns, causal=True))
                elif mask.any():
                    found.append(Span(rows, columns, mask=mask))
        return tuple(found)
