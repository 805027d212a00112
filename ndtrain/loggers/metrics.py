"""The metrics of one step, and of one evaluation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. `loss` is the mean over the global batch's targets, `tokens` their count.

    `epoch` is how many times the data was read after the step: 1.5 is the middle of the second pass.

    `aux_loss` is the router's, the mean over the global batch's sequences without its coefficient; None, and left out
    of the line, without a router. A step that is not finite, or has no target, changes no weight: `skipped` counts
    those of the run up to now, and is left out while it is 0. `sources` has the targets of each source of a mixture,
    and is left out without one.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    step_seconds: float
    mfu: float | None
    peak_memory_bytes: int
    time: str
    aux_loss: float | None = None
    skipped: int = 0
    sources: dict[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields to write, with None for numbers that are not finite, which JSON does not have."""
        fields = asdict(self)
        if self.aux_loss is None:
            del fields["aux_loss"]
        if not self.skipped:
            del fields["skipped"]
        if self.sources is None:
            del fields["sources"]
        return _without_infinities(fields)


@dataclass(frozen=True)
class EvalMetrics:
    """The line of an evaluation in metrics.jsonl: the mean cross-entropy of all `eval_tokens` targets after `step`.

    `sources` has that of each source, and is left out where [eval] has none.
    """

    step: int
    eval_loss: float
    perplexity: float
    eval_tokens: int
    time: str
    sources: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields to write, as `StepMetrics.as_dict` does."""
        fields = asdict(self)
        if self.sources is None:
            del fields["sources"]
        else:
            fields["sources"] = _without_infinities(self.sources)
        return _without_infinities(fields)


Metrics = StepMetrics | EvalMetrics


def _without_infinities(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def now() -> str:
    """Return the time in UTC, in ISO format with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
