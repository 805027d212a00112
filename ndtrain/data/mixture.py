"""Interleave the samples of several sources by their shares, as a pure function of the cursor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from ndtrain.data.cache import key_of
from ndtrain.data.order import Order
from ndtrain.data.row import IntArray
from ndtrain.data.samples import Sample, Samples

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

    def after(self, source: int, count: int) -> int:
        """Return the cursor at which `count` samples of a source, at least one, have come."""
        periods, last = divmod(count - 1, int(self.counts[source]))
        return periods * PERIOD + int(np.flatnonzero(self._pattern == source)[last]) + 1


class Mixed:
    """The samples of several sources, by label, one source after the other."""

    def __init__(self, sources: Mapping[str, Samples], weights: Sequence[float]) -> None:
        self.sources, self.mixture = dict(sources), Mixture(weights)
        self.firsts = np.cumsum([0, *map(len, self.sources.values())], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(self.sources_of(np.asarray(index)))
        return self._list[number][index - int(self.firsts[number])]

    def sources_of(self, ids: IntArray) -> IntArray:
        """Return the number of the source of each of these samples `[...]`."""
        return np.searchsorted(self.firsts, ids, side="right") - 1

    @cached_property
    def _list(self) -> list[Samples]:
        return list(self.sources.values())

    @property
    def seq_len(self) -> int:
        return self._list[0].seq_len

    @property
    def pad_id(self) -> int:
        return self._list[0].pad_id

    @property
    def digest(self) -> str | None:
        """The identity of the tokens alone, whatever gave them; None where a source's is not known."""
        found = [samples.digest for samples in self._list]
        return None if None in found else key_of(found)

    @property
    def fingerprint(self) -> str:
        """Text that identifies the samples and their shares."""
        key = mixed_key([samples.corpus.key for samples in self._list])
        own = (
            f"({count} of {PERIOD}: {samples.fingerprint})"
            for count, samples in zip(self.mixture.counts, self._list, strict=True)
        )
        return " ".join([key, *own])

    def describe(self) -> str:
        """Return which share of the stream each source has, and how often it is read while all are read once."""
        once = max(self.mixture.after(number, len(samples)) for number, samples in enumerate(self._list))
        shares = (
            f"{label} {count / PERIOD:.1%} ({passes:.3g} x)"
            for label, count, passes in zip(
                self.sources, self.mixture.counts, self.mixture.place(once) / np.diff(self.firsts), strict=True
            )
        )
        return f"sources by share of sequences (and how often each is read before all are): {', '.join(shares)}"


class MixedOrder:
    """The endless stream of ids of `Mixed` samples: each source's own order, at the places that the mixture gives it.

    `stop` says what an epoch is: until the first source is read, or all are ("never" likewise).
    """

    def __init__(self, samples: Mixed, *, seed: int, shuffle: bool, stop: Literal["first", "all", "never"]) -> None:
        self.mixture, self.firsts, self.stop = samples.mixture, samples.firsts, stop
        self.orders = [Order(len(own), seed=seed, shuffle=shuffle) for own in samples.sources.values()]
        self.n_samples = len(samples)

    @property
    def fingerprint(self) -> str:
        """Text that identifies the order of a number of samples."""
        return self.orders[0].fingerprint

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """Return the ids `[count]` of the stream from `cursor` to cursor + count - 1."""
        source, place = self.mixture.sources(cursor, count)
        ids = np.empty(count, np.int64)
        for number, order in enumerate(self.orders):
            own = np.flatnonzero(source == number)
            if len(own):
                ids[own] = self.firsts[number] + order.sample_ids(int(place[own[0]]), len(own))
        return ids

    def end(self, epochs: int) -> int:
        """Return the cursor at which so many epochs end."""
        ends = [self.mixture.after(number, epochs * order.n_samples) for number, order in enumerate(self.orders)]
        return min(ends) if self.stop == "first" else max(ends)

    def epoch(self, cursor: int) -> float:
        """Return how many epochs have passed at the cursor: 1.5 is the middle of the second."""
        passes = self.mixture.place(cursor) / np.diff(self.firsts)
        return float(passes.max() if self.stop == "first" else passes.min())


def mixed_key(keys: Sequence[str]) -> str:
    """Return the identity of the data of several sources, from those of each."""
    return key_of(list(keys))


def _quotas(weights: Sequence[float]) -> IntArray:
    """Return the samples `[n]` of each source in a period: largest remainders, and at least one each."""
    exact = np.asarray(weights, np.float64) / sum(weights) * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := PERIOD - int(counts.sum())) != 0:
        source = int(np.argmax(exact - counts)) if missing > 0 else int(np.argmax(counts))
        counts[source] += np.sign(missing)
    return counts
