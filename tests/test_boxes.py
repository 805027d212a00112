"""Boxes are compared with a tensor exactly: the oracle counts how many boxes hold each element."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest

from ndtrain.storage import boxes
from ndtrain.storage.boxes import Flaw, first_flaw

Corners = list[tuple[tuple[int, ...], tuple[int, ...]]]


def flaw_of(corners: Corners, start: tuple[int, ...], stop: tuple[int, ...]) -> Flaw | None:
    low, high = (np.array([c[i] for c in corners], np.int64).reshape(len(corners), len(stop)) for i in (0, 1))
    return first_flaw(low, high, start, stop)


def cut_at_random(rng: random.Random, shape: tuple[int, ...], cuts: int) -> Corners:
    """Return boxes that make up `shape`."""
    found: Corners = [((0,) * len(shape), shape)]
    for _ in range(cuts):
        i = rng.randrange(len(found))
        low, high = found[i]
        if dims := [d for d, (a, b) in enumerate(zip(low, high, strict=True)) if b - a > 1]:
            dim = rng.choice(dims)
            at = rng.randrange(low[dim] + 1, high[dim])
            found[i] = (low, (*high[:dim], at, *high[dim + 1 :]))
            found.append(((*low[:dim], at, *low[dim + 1 :]), high))
    return found


def any_box(rng: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a box inside `shape`, which may be empty."""
    low = tuple(rng.randrange(n) for n in shape)
    return low, tuple(rng.randrange(a, n + 1) for a, n in zip(low, shape, strict=True))


def test_a_flaw_is_found_if_and_only_if_an_element_is_not_held_once() -> None:
    rng, seen = random.Random(0), Counter[str]()
    for case in range(6000):
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(4)))
        corners = cut_at_random(rng, shape, rng.randrange(10))
        if case % 5 == 1:
            corners.pop(rng.randrange(len(corners)))
        elif case % 5 == 2:
            corners.append(rng.choice(corners))
        elif case % 5 == 3:
            corners[rng.randrange(len(corners))] = any_box(rng, shape)
        elif case % 5 == 4:
            corners = [any_box(rng, shape) for _ in range(rng.randrange(6))]
        rng.shuffle(corners)
        held = np.zeros(shape, int)
        for low, high in corners:
            held[tuple(map(slice, low, high))] += 1
        flaw = flaw_of(corners, (0,) * len(shape), shape)
        seen[str(flaw and flaw.twice)] += 1
        if flaw is None:
            assert (held == 1).all(), (shape, corners)
        else:
            there = held[tuple(map(slice, flaw.low, flaw.high))]
            assert there.size and (there > 1 if flaw.twice else there == 0).all(), (shape, corners, flaw)
    assert min(seen[kind] for kind in ("None", "True", "False")) > 1000


PINWHEEL: Corners = [((0, 0), (1, 2)), ((0, 2), (2, 3)), ((2, 1), (3, 3)), ((1, 0), (3, 1)), ((1, 1), (2, 2))]


@pytest.mark.parametrize(
    ("corners", "shape", "said"),
    [
        # As many values as the tensor has, and yet one row twice and one not at all.
        ([((0, 0), (2, 2)), ((1, 0), (2, 2)), ((3, 0), (4, 2))], (4, 2), "[1:2, 0:2] is stored more than once"),
        ([((0, 0), (2, 2)), ((3, 0), (4, 2)), ((3, 0), (4, 2))], (4, 2), "[2:3, 0:2] is in no file"),
        ([((0, 0), (4, 1))], (4, 2), "[0:4, 1:2] is in no file"),
        ([((0, 0), (4, 2)), ((0, 1), (4, 2))], (4, 2), "[0:4, 1:2] is stored more than once"),
        ([((0, 0), (2, 4)), ((2, 0), (4, 2))], (4, 4), "[2:4, 2:4] is in no file"),  # an L
        ([((0, 0), (3, 3)), ((2, 2), (4, 4)), ((3, 0), (4, 2)), ((0, 3), (2, 4))], (4, 4), "[2:3, 2:3] is stored more"),
        (PINWHEEL, (3, 3), ""),
        (PINWHEEL[:4], (3, 3), "[1:2, 1:2] is in no file"),
        ([*PINWHEEL, ((1, 1), (2, 2))], (3, 3), "[1:2, 1:2] is stored more than once"),
        ([((), ())], (), ""),
        ([], (), "[] is in no file"),
        ([((), ())] * 2, (), "[] is stored more than once"),
        ([], (0, 3), ""),
        ([((0, 0), (0, 3))] * 2, (0, 3), ""),
        ([((0,), (3,)), ((3,), (3,)), ((1,), (1,))], (3,), ""),  # empty boxes do not count
        ([], (3,), "[0:3] is in no file"),
    ],
)
def test_the_first_flaw_is_named(corners: Corners, shape: tuple[int, ...], said: str) -> None:
    flaw = flaw_of(corners, (0,) * len(shape), shape)
    assert said in str(flaw) if said else flaw is None


def test_a_flaw_of_a_part_has_the_offsets_of_the_whole() -> None:
    assert str(flaw_of([((4, 2), (5, 6))], (4, 2), (6, 6))) == "[5:6, 2:6] is in no file"


def grid(*counts: int) -> Corners:
    return [(at, tuple(a + 1 for a in at)) for at in itertools.product(*map(range, counts))]


def two_squares(size: int) -> Corners:
    """Tile `size` x `size` with squares of 2 and of 1, so that no straight cut separates them."""
    found = []
    for i, j in itertools.product(range(-size, size), repeat=2):
        x, y = 2 * i - j, i + 2 * j
        for low, high in (((x, y), (x + 2, y + 2)), ((x + 2, y), (x + 3, y + 1))):
            a, b = (tuple(min(max(n, 0), size) for n in corner) for corner in (low, high))
            if all(p < q for p, q in zip(a, b, strict=True)):
                found.append((a, b))
    return found


@pytest.mark.parametrize(
    ("corners", "shape"),
    [
        (grid(40_000), (40_000,)),
        (grid(1, 40_000), (1, 40_000)),
        (grid(200, 200), (200, 200)),
        (grid(34, 34, 34), (34, 34, 34)),
        (two_squares(200), (200, 200)),
    ],
    ids=["one dim", "last dim", "two dims", "three dims", "no straight cut"],
)
def test_forty_thousand_boxes_take_seconds(
    corners: Corners, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of all pairs would take a billion steps. Counts the boxes looked at, which no load changes."""
    looked, real = [0], boxes._flaw

    def counting(low: boxes.Ints64, *rest: boxes.Ints64) -> Flaw | None:
        looked[0] += len(low)
        return real(low, *rest)

    monkeypatch.setattr(boxes, "_flaw", counting)
    started = time.process_time()
    assert flaw_of(corners, (0,) * len(shape), shape) is None
    assert looked[0] <= 40 * len(corners) and time.process_time() - started < 20
    assert flaw_of(corners[1:], (0,) * len(shape), shape) is not None
