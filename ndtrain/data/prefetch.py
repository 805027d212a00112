"""Load the batches of the next step while this one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import NamedTuple

import torch

Batches = list[dict[str, torch.Tensor]]


class _Next(NamedTuple):
    cursor: int
    batches: Future[Batches]


class Prefetch:
    """Loads one global batch ahead of its step, in a thread that ends with the load.

    `load(cursor)` returns micro batches, as `GlobalBatches.load` does. For a CUDA device they come in pinned memory,
    from where copies go on beside computation.
    """

    def __init__(self, load: Callable[[int], Batches], *, device: torch.device) -> None:
        self._load, self._device = load, device
        self._next: _Next | None = None

    def take(self, cursor: int, *, then: int | None) -> Batches:
        """Return the micro batches at `cursor`, and begin to load those at `then` (None: no more are needed).

        Raises what loading them has raised.
        """
        ready, self._next = self._next, None
        found = ready.batches.result() if ready is not None and ready.cursor == cursor else self._pinned(cursor)
        if then is not None:
            self._next = _Next(then, Future())
            Thread(target=self._run, args=(self._next,), name="prefetch", daemon=True).start()
        return found

    def _run(self, wanted: _Next) -> None:
        try:
            wanted.batches.set_result(self._pinned(wanted.cursor))
        except BaseException as error:
            wanted.batches.set_exception(error)

    def _pinned(self, cursor: int) -> Batches:
        batches = self._load(cursor)
        if self._device.type != "cuda":
            return batches
        with torch.cuda.device(self._device):  # in a thread it would be the first device of the machine
            return [{name: values.pin_memory() for name, values in batch.items()} for batch in batches]
