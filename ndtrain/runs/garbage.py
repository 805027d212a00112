"""Collect garbage at the same steps on every rank."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Steps between collections.
EVERY = 50


@contextmanager
def collecting() -> Iterator[Callable[[int], object]]:
    """Yield a function of the steps made, to be called after each: it collects garbage every `EVERY` steps.

    Python does so at a moment of its own, on each rank at another one, and all ranks wait for each. Inside, it doesn't.
    Objects that exist before are not looked at.
    """
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield lambda step: None if step % EVERY else gc.collect()
    finally:
        if enabled:
            gc.enable()
