"""Count steps that are skipped, and check weights before a save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import local_part
from ndtrain.loggers import StepMetrics
from ndtrain.runs.messages import together
from ndtrain.torch_compat import foreach_norm


@dataclass
class Skips:
    """Count skipped steps in the whole run, and those that were not finite in a row up to now.

    A step whose loss or gradient is not finite is skipped, and `limit` of them in a row end the run. One without any
    target is skipped too, since it has nothing to learn from, and says nothing of the weights.
    """

    limit: int
    total: int = 0
    in_row: int = 0

    def count(self, *, finite: bool, targets: int) -> None:
        self.total += not (finite and targets)
        self.in_row = 0 if finite else self.in_row + 1

    def line(self, metrics: StepMetrics) -> str | None:
        """Return what a person is to know of the step that was counted last; None if it was not skipped."""
        if self.in_row:
            return (
                f"step {metrics.step} skipped: loss {metrics.loss}, gradient norm {metrics.grad_norm}; no weight "
                f"changed ({self.in_row} in a row, {self.limit} in a row end the run; {self.total} in total)"
            )
        if not metrics.tokens:
            return (
                f"step {metrics.step} skipped: no token of its global batch is a target; no weight changed "
                f"({self.total} in total)"
            )
        return None

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint: the optimizer has made `skipped` updates fewer than the run has steps."""
        return {"skipped": self.total, "skipped_in_row": self.in_row}

    def restore(self, state: Mapping[str, Any], found: Path) -> None:
        """Restore the counts, 0 where `state` has none. Raises `DamagedError` for impossible ones."""
        self.total, self.in_row = state.get("skipped", 0), state.get("skipped_in_row", 0)
        if not (type(self.total) is type(self.in_row) is int and 0 <= self.in_row <= self.total <= state["step"]):
            raise DamagedError(
                f"{found}/train_state.json: skipped = {self.total} and skipped_in_row = {self.in_row} are impossible "
                f"after {state['step']} steps"
            )

    def check_limit(self, step: int, loss: float, grad_norm: float, *, way_on: str) -> None:
        """Raise `NdtrainError`, which ends with `way_on`, if `limit` steps in a row were skipped."""
        if self.in_row >= self.limit:
            steps = f"step {step}" if self.in_row == 1 else f"steps {step - self.in_row + 1} to {step}"
            raise NdtrainError(
                f"{steps} skipped, the limit of train.max_bad_steps: loss {loss}, gradient norm {grad_norm}. No weight "
                f"changed and nothing was saved since. Lower optim.lr or check the data; {way_on}"
            )


@torch.no_grad()
def refuse_not_finite(tensors: Mapping[str, Tensor], *, step: int, way_on: str) -> None:
    """Raise `NdtrainError` on all ranks, which ends with `way_on`, if one has a trained weight that is not finite.

    A checkpoint with non-finite weights must never become the newest.
    """

    def check() -> None:
        named = [(name, local_part(t)) for name, t in tensors.items() if t.requires_grad and local_part(t).numel()]
        # The largest magnitude is NaN if any value is, and cannot overflow as a sum can. One transfer to the host.
        largest = foreach_norm([local for _, local in named], float("inf")) if named else []
        bad = [not math.isfinite(x) for x in torch.stack([x.to(largest[0]) for x in largest]).tolist()] if named else []
        if True in bad:
            name = named[bad.index(True)][0]
            raise NdtrainError(
                f"step {step}: {name} is not finite after the update, so this step was not saved. Lower optim.lr; "
                f"{way_on}"
            )

    together(check)
