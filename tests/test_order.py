"""The order of samples is a permutation for each seed and epoch that no one holds in memory."""

from __future__ import annotations

import hashlib
import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from ndtrain.data.order import Order, permuted
from ndtrain.errors import RecipeError

# Where a count is drawn at random, its chi-square is further from its mean than this once in some 30,000 times.
SIGMAS = 5
FIXED_ORDER = [6, 3, 7, 2, 0, 5, 4, 1]


def permutation(n: int, *, key: str) -> list[int]:
    found: list[int] = permuted(np.arange(n, dtype=np.uint64), n, key=key).tolist()
    return found


def sigmas(counts: np.ndarray, *, free: int) -> float:
    """How far the chi-square of counts that should be equal is from its mean, in standard deviations."""
    mean = counts.mean()
    return float((((counts - mean) ** 2 / mean).sum() - free) / math.sqrt(2 * free))


def test_every_sample_comes_once_per_epoch_across_its_border() -> None:
    order = Order(7, seed=3, shuffle=True)
    stream = np.concatenate([order.sample_ids(cursor, 4) for cursor in range(0, 28, 4)])
    np.testing.assert_array_equal(stream, order.sample_ids(0, 28))
    epochs = stream.reshape(4, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert order.sample_ids(5, 0).shape == (0,)
    np.testing.assert_array_equal(order.sample_ids(14, 7), epochs[2])  # going back gives the same


def test_the_order_of_a_seed_never_changes() -> None:
    assert Order(8, seed=0, shuffle=True).sample_ids(0, 8).tolist() == FIXED_ORDER
    assert Order(8, seed=1, shuffle=True).sample_ids(0, 8).tolist() != FIXED_ORDER
    assert Order(10**12, seed=5, shuffle=True).sample_ids(10**12 - 1, 3).tolist() == [
        315785797626,
        391923721535,
        632338232004,
    ]
    assert Order(3, seed=0, shuffle=False).sample_ids(2, 5).tolist() == [2, 0, 1, 2, 0]
    with pytest.raises(RecipeError):
        Order(3, seed=-1, shuffle=True)


@pytest.mark.parametrize("n", [1, 2, 6, 1000, 2**32 + 1, 2**62, 2**63 - 1])
def test_the_cipher_is_the_same_in_plain_integers(n: int) -> None:
    """uint64 wraps on every machine as integers without a limit do modulo a power of two."""
    drawn = hashlib.shake_256(b"7 3").digest(160)
    words = [int.from_bytes(drawn[i : i + 8], "little") for i in range(0, 160, 8)]
    bits = max(1, (n - 1).bit_length())

    def plain(x: int) -> int:
        for factor, term in zip(words[:10], words[10:], strict=True):
            x = (x * (factor | 1) + term) % 2**bits
            x ^= x >> (bits + 1) // 2
        return x if x < n else plain(x)

    places = [place for place in (0, 1, 2, n // 3, n - 1) if place < n]
    assert permuted(np.array(places, np.uint64), n, key="7 3").tolist() == [plain(place) for place in places]


def test_it_is_a_permutation_for_every_number_of_samples() -> None:
    for n in [*range(1, 301), 4095, 4096, 4097, 100_003]:
        assert sorted(permutation(n, key=f"{n} 0")) == list(range(n)), n


def test_all_permutations_of_few_samples_are_equally_likely() -> None:
    for n in (2, 3, 4, 5):
        counts = Counter(tuple(permutation(n, key=f"{seed} 0")) for seed in range(40 * math.factorial(n)))
        seen = np.array([counts[one] for one in itertools.permutations(range(n))])
        assert sigmas(seen, free=len(seen) - 1) < SIGMAS, n


@pytest.mark.parametrize("n", [7, 16, 64, 100])  # powers of two need no cycle walking
def test_positions_and_neighbours_are_uniform_over_seeds(n: int) -> None:
    seeds = 2000
    orders = np.array([permutation(n, key=f"{seed} 1") for seed in range(seeds)])
    at = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    assert sigmas(at, free=(n - 1) ** 2) < SIGMAS
    for gap in (1, 2, n // 4):
        steps = (orders[:, gap:] - orders[:, :-gap]) % n
        # Pairs that share a sample depend on each other, so every other one is left out.
        apart = np.bincount(steps[:, :: gap + 1].ravel(), minlength=n)[1:]
        assert sigmas(apart, free=n - 2) < SIGMAS, gap


def test_neighbours_of_a_large_order_have_nothing_in_common() -> None:
    ids = Order(10**9, seed=1, shuffle=True).sample_ids(10**8, 200_000)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.01
    assert sigmas(np.bincount(ids * 100 // 10**9, minlength=100), free=99) < SIGMAS
    assert sigmas(np.bincount(ids % 8, minlength=8), free=7) < SIGMAS


def test_epochs_and_seeds_share_no_more_places_than_chance_has_it() -> None:
    n = 10_000
    streams = [Order(n, seed=seed, shuffle=True).sample_ids(0, 3 * n).reshape(3, n) for seed in (0, 1, 2)]
    for one, other in itertools.combinations(np.concatenate(streams), 2):
        assert (one == other).sum() < 10  # of chance, 1 on average


def test_a_thousand_million_samples_take_no_memory() -> None:
    tracemalloc.start()
    order = Order(10**9, seed=0, shuffle=True)
    first = order.sample_ids(0, 64)
    later = order.sample_ids(5 * 10**9 - 32, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert len({*first.tolist()}) == 64 and later.max() < 10**9
