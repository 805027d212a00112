"""The interface of loggers."""

from __future__ import annotations

from typing import Protocol

from ndtrain.loggers.metrics import Metrics


class Logger(Protocol):
    """Writes the metrics of steps and evaluations; only rank 0 has loggers."""

    def write(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...
