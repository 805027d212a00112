"""The interface of loggers."""

from __future__ import annotations

from typing import Protocol

from ndtrain.loggers.metrics import StepMetrics


class Logger(Protocol):
    """Writes the metrics of steps; only rank 0 has loggers."""

    def write(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...
