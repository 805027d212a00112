"""Agree among all ranks on requests to stop or to save, while a step's work goes on."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.accelerators import peak_memory_bytes
from ndtrain.engine.transfers import to_device
from ndtrain.runs.stop_signals import StopSignals, nothing_to_save
from ndtrain.train.report import Reporter


class Answers(NamedTuple):
    """The largest over all ranks: memory used, requests to stop and to save, whether a save is being written."""

    peak_bytes: int
    stop: int
    save: int
    is_saving: int


class Requests:
    """The requests that all ranks know of: `stop`, as `StopSignals.seen` numbers it, and `save`, until it is met."""

    def __init__(self, signals: StopSignals, *, device: torch.device, is_main: bool) -> None:
        self.signals, self._device, self._is_main = signals, device, is_main
        self.stop = self.save = 0

    def __bool__(self) -> bool:
        return bool(self.stop or self.save)

    def ask(self, *, is_saving: bool) -> Tensor:
        """Return the `Answers` of all ranks, int64 on the device; collective."""
        stop, save = self.signals.seen(files=self._is_main)
        own = Answers(peak_memory_bytes(self._device), stop, save, int(is_saving))
        shared = to_device(own, dtype=torch.int64, device=self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared

    def take(self, answers: Answers) -> None:
        self.stop, self.save = max(self.stop, answers.stop), max(self.save, answers.save)

    def agree(self) -> None:
        """Ask, and wait for the answers; collective."""
        self.take(Answers(*cast("list[int]", self.ask(is_saving=False).tolist())))

    def meet(self, reporter: Reporter) -> None:
        """Remove the files of the requests, which are met; a stop is remembered."""
        if self and self._is_main:
            for path in self.signals.remove_files():
                reporter.info(f"note: {path} cannot be removed and is ignored from now on")
        self.save = 0

    def refuse_stop(self, reporter: Reporter) -> None:
        """Raise `Stopped` if a stop is requested, before the first step."""
        if self.stop:
            self.meet(reporter)
            raise nothing_to_save(self.stop)
