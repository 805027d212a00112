"""Report what happens in a run: rank 0 does, the other ranks are silent."""

from __future__ import annotations

from typing import Protocol

from ndtrain.loggers.metrics import StepMetrics


class Reporter(Protocol):
    """Receives what happens on rank 0."""

    def info(self, line: str) -> None: ...

    def progress(self, what: str, done: int, total: int, *, unit: str = "bytes") -> None: ...

    def step(self, metrics: StepMetrics, *, steps: int, show: bool) -> None: ...

    def close(self) -> None: ...


class Silent:
    """The reporter of every rank but 0."""

    def info(self, line: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int, *, unit: str = "bytes") -> None:
        pass

    def step(self, metrics: StepMetrics, *, steps: int, show: bool) -> None:
        pass

    def close(self) -> None:
        pass
