"""Sources are interleaved by their shares, in one order that depends on the cursor alone."""

from functools import cache

import numpy as np
import pytest

from ndtrain.data.mixture import PERIOD, Mixture
from ndtrain.recipe.rules import LEAST_SHARE

WEIGHTS = [(1.0,), (0.7, 0.2, 0.1), (1.0,) * 10, (0.99, 0.005, 0.005)]


@cache
def mixture_of(weights: tuple[float, ...]) -> Mixture:
    return Mixture(weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_within_one_sample_at_every_moment(weights: tuple[float, ...]) -> None:
    source, place = mixture_of(weights).sources(0, 10_000)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 10_001)[:, None] * np.asarray(weights) / sum(weights)
    assert np.abs(counts - wanted).max() <= 1 + 10_000 / (2 * PERIOD)
    for index in range(len(weights)):
        np.testing.assert_array_equal(place[source == index], np.arange(counts[-1, index]))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_order_is_a_function_of_the_cursor(weights: tuple[float, ...]) -> None:
    mixture, total = mixture_of(weights), PERIOD + 1000
    source, place = mixture.sources(PERIOD - 1000, 2000)
    for cursor in (PERIOD - 1000, PERIOD - 1, PERIOD, PERIOD + 7, total - 1):
        start = cursor - PERIOD + 1000
        again, at = mixture.sources(cursor, total - cursor)
        np.testing.assert_array_equal(again, source[start:])
        np.testing.assert_array_equal(at, place[start:])
        assert mixture.place(cursor)[again[0]] == at[0]
        assert mixture.place(cursor).sum() == cursor


def test_a_rare_source_has_its_turn() -> None:
    source, _ = Mixture([1.0, 1e-9]).sources(0, PERIOD)
    assert (source == 1).sum() == 1


def test_the_least_share_that_a_recipe_may_ask_for_is_kept() -> None:
    counts = Mixture([1 - 1.001 * LEAST_SHARE, 1.001 * LEAST_SHARE]).counts
    assert counts.tolist() == [PERIOD - 1, 1] and 2 * PERIOD * LEAST_SHARE == 1
