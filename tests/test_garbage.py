"""Garbage is collected at the same steps on every rank, and at no other moment."""

import gc
import weakref

import pytest

from ndtrain.runs.garbage import EVERY, collecting


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_freed_after_the_same_step_everywhere() -> None:
    with collecting() as collect:
        assert not gc.isenabled()
        for step in range(1, 2 * EVERY + 1):
            found = weakref.ref(Cycle())
            collect(step)
            assert (found() is None) == (step % EVERY == 0)


def test_python_collects_again_after_an_error() -> None:
    with pytest.raises(OSError), collecting():
        raise OSError
    assert gc.isenabled()
