"""Move a few numbers between host and device so that neither waits for the other."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor `[n]` on `device`."""
    made = torch.tensor(values, dtype=dtype)
    # From memory that is not pinned the host would wait for all that the device has to do before.
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


class Moment:
    """The point in the work of `device` that the host has enqueued up to now; a CPU has done all of it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, before: Moment) -> float:
        """Return the time from `before` to this one, which is past."""
        if self._event is None or before._event is None:
            return self._time - before._time
        return before._event.elapsed_time(self._event) / 1e3


class Readback:
    """Numbers on their way to the host: the 1-dim `values`, as the work enqueued up to now leaves them."""

    def __init__(self, values: Tensor) -> None:
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
        self.moment = Moment(values.device)

    def wait(self) -> list[float]:
        """Return the numbers once they are here."""
        self.moment.wait()
        found: list[float] = self._host.tolist()
        return found
