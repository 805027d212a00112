"""Find out whether boxes make up a tensor: every element in one of them, and none in two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints64 = npt.NDArray[np.int64]


class Flaw(NamedTuple):
    """The first box, from `low` to `high`, that is in none of the given boxes, or, if `twice`, in several."""

    low: Sequence[int]
    high: Sequence[int]
    twice: bool

    def __str__(self) -> str:
        box = ", ".join(f"{a}:{b}" for a, b in zip(self.low, self.high, strict=True))
        return f"[{box}] is stored more than once" if self.twice else f"[{box}] is in no file"


def first_flaw(low: Ints64, high: Ints64, start: Sequence[int], stop: Sequence[int]) -> Flaw | None:
    """Return the first flaw of boxes `low` to `high` `[n, dims]` as a partition of `start` to `stop`; None without one.

    Empty boxes do not count; all others must lie inside. Takes n log n for boxes that cuts along one dim after the
    other make, as every mesh does; others are cut at their edges first, which makes more of them.
    """
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return None
    full = (low < high).all(1)
    if not full.all():
        low, high = low[full], high[full]
    return _flaw(low, high, np.array(start, np.int64), np.array(stop, np.int64))


def _flaw(low: Ints64, high: Ints64, start: Ints64, stop: Ints64) -> Flaw | None:
    if not len(low):
        return _as_flaw(start, stop, twice=False)
    if (low == start).all() and (high == stop).all():
        return _as_flaw(start, stop, twice=True) if len(low) > 1 else None
    for dim in range(len(start)):
        order = low[:, dim].argsort(kind="stable")
        begins, ends = low[order, dim], np.maximum.accumulate(high[order, dim])
        # The boxes of a slab overlap along this dim, those of two slabs do not.
        first = np.flatnonzero(np.concatenate(([True], begins[1:] >= ends[:-1])))
        slabs = np.stack((begins[first], ends[np.append(first[1:], len(low)) - 1]))
        if len(first) > 1 or slabs[0, 0] > start[dim] or slabs[1, 0] < stop[dim]:
            others = np.arange(len(start)) != dim
            spans = ((low == start) & (high == stop))[:, others].all(1)
            edges = np.concatenate((start[[dim]], slabs[1])), np.append(slabs[0], stop[dim])
            if len(first) == len(low) and spans.all() and np.array_equal(*edges):
                return None  # one cut after the other, the common case
            members = np.split(order, first[1:])
            return _flaw_of_slabs(low, high, start, stop, dim=dim, slabs=slabs, members=members, spans=spans)
    return _flaw_of_halves(low, high, start, stop)


def _flaw_of_slabs(
    low: Ints64, high: Ints64, start: Ints64, stop: Ints64, *, dim: int, slabs: Ints64, members: list[Any], spans: Any
) -> Flaw | None:
    """Return the first flaw between or in slabs across `dim`.

    `members` are the numbers of each slab's boxes, and `spans` says of each box whether it fills all other dims.
    """
    at = int(start[dim])
    for begin, end, own in zip(*slabs.tolist(), members, strict=True):
        slab_start, slab_stop = start.copy(), stop.copy()
        if begin > at:
            slab_start[dim], slab_stop[dim] = at, begin
            return _as_flaw(slab_start, slab_stop, twice=False)
        at = end
        if len(own) == 1 and spans[own[0]]:
            continue
        slab_start[dim], slab_stop[dim] = begin, end
        if flaw := _flaw(low[own], high[own], slab_start, slab_stop):
            return flaw
    if at < stop[dim]:
        rest = start.copy()
        rest[dim] = at
        return _as_flaw(rest, stop, twice=False)
    return None


def _flaw_of_halves(low: Ints64, high: Ints64, start: Ints64, stop: Ints64) -> Flaw | None:
    """Cut all boxes at an edge near the middle of them, and return the first flaw of the two halves."""
    edges = [np.unique(np.concatenate((low[:, d], high[:, d]))) for d in range(len(start))]
    inner = [e[(e > a) & (e < b)] for e, a, b in zip(edges, start, stop, strict=True)]
    dim = max(range(len(inner)), key=lambda d: len(inner[d]))
    at = inner[dim][len(inner[dim]) // 2]
    middle_stop, middle_start = stop.copy(), start.copy()
    middle_stop[dim] = middle_start[dim] = at
    for half_start, half_stop in ((start, middle_stop), (middle_start, stop)):
        a, b = np.maximum(low, half_start), np.minimum(high, half_stop)
        inside = (a < b).all(1)
        if flaw := _flaw(a[inside], b[inside], half_start, half_stop):
            return flaw
    return None


def _as_flaw(low: Ints64, high: Ints64, *, twice: bool) -> Flaw:
    return Flaw(low.tolist(), high.tolist(), twice)
