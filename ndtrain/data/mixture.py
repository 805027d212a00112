"""Interleave the samples of several sources by their shares, as a pure function of the cursor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ndtrain.data.row import IntArray

# Samples after which the pattern of sources repeats. Shares are rounded to multiples of 1 / PERIOD.
PERIOD = 1 << 16


class Mixture:
    """Which source each sample of the endless stream comes from, and its place in that source's own stream.

    Among any first k samples the number of a source's differs from its share by at most one (and k / 2 PERIOD by
    rounding): the next sample is the source's that must have one soonest (Tijdeman, "The chairman assignment problem",
    1980).
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = _quotas(weights)

    @cached_property
    def _pattern(self) -> IntArray:
        """The sources `[PERIOD]` of one period."""
        shares, taken = self.counts / PERIOD, np.zeros(len(self.counts), np.int64)
        slack = 1 / max(2 * len(shares) - 2, 1)
        pattern = np.empty(PERIOD, np.int64)
        for k in range(1, PERIOD + 1):
            # Sources that may have one more, and of them the one whose deadline comes first.
            due = np.where(shares * k - taken >= slack - 1e-9, (taken + 1 - slack) / np.maximum(shares, 1e-12), np.inf)
            pattern[k - 1] = source = int(np.argmin(due))
            taken[source] += 1
        return pattern

    @cached_property
    def _before(self) -> IntArray:
        """How many samples of each source come before each of a period `[PERIOD, n]`."""
        one_hot = self._pattern[:, None] == np.arange(len(self.counts))
        return np.cumsum(one_hot, axis=0) - one_hot

    def sources(self, cursor: int, count: int) -> tuple[IntArray, IntArray]:
        """Return the source `[count]` of each sample from `cursor` on, and its place `[count]` in the source's own."""
        periods, within = np.divmod(np.arange(cursor, cursor + count, dtype=np.int64), PERIOD)
        source = self._pattern[within]
        return source, periods * self.counts[source] + self._before[within, source]

    def place(self, cursor: int) -> IntArray:
        """Return how many samples `[n]` of each source come before `cursor`."""
        periods, within = divmod(cursor, PERIOD)
        return periods * self.counts + self._before[within]


def _quotas(weights: Sequence[float]) -> IntArray:
    """Return the samples `[n]` of each source in a period: largest remainders, and at least one each."""
    exact = np.asarray(weights, np.float64) / sum(weights) * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := PERIOD - int(counts.sum())) != 0:
        source = int(np.argmax(exact - counts)) if missing > 0 else int(np.argmax(counts))
        counts[source] += np.sign(missing)
    return counts
