"""Where steps are written."""

from __future__ import annotations

from typing import Protocol

from ndtrain.loggers.metrics import StepMetrics


class Logger(Protocol):
    """Where steps are written, by rank 0."""

    def write(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...
