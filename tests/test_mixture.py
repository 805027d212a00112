"""Sources are interleaved by their shares, in one order that depends on the cursor alone."""

import numpy as np
import pytest

from ndtrain.data.mixture import PERIOD, Mixture

WEIGHTS = [[1.0], [3, 1], [0.7, 0.2, 0.1], [1] * 10, [0.99, 0.005, 0.005], [5, 3, 1, 0.5, 0.3, 0.2]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_within_one_sample_at_every_moment(weights: list[float]) -> None:
    source, place = Mixture(weights).sources(0, 10_000)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 10_001)[:, None] * np.asarray(weights) / sum(weights)
    assert np.abs(counts - wanted).max() <= 1 + 10_000 / (2 * PERIOD)
    for index in range(len(weights)):
        np.testing.assert_array_equal(place[source == index], np.arange(counts[-1, index]))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_order_is_a_function_of_the_cursor(weights: list[float]) -> None:
    mixture, total = Mixture(weights), PERIOD + 1000
    source, place = mixture.sources(PERIOD - 1000, 2000)
    for cursor in (PERIOD - 1000, PERIOD - 1, PERIOD, PERIOD + 7, total - 1):
        start = cursor - PERIOD + 1000
        again, at = Mixture(weights).sources(cursor, total - cursor)
        np.testing.assert_array_equal(again, source[start:])
        np.testing.assert_array_equal(at, place[start:])
        assert mixture.place(cursor)[again[0]] == at[0]
        assert mixture.place(cursor).sum() == cursor


def test_a_rare_source_has_its_turn() -> None:
    source, _ = Mixture([1.0, 1e-9]).sources(0, PERIOD)
    assert (source == 1).sum() == 1
