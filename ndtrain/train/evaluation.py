"""Measure a model's loss on held-out rows, and count how long it has not become lower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ndtrain.data import GlobalBatches, labels_count
from ndtrain.engine import Engine
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.loggers import EvalMetrics, now


class Evaluation:
    """The evaluations of a run of `steps` steps; `batches` holds all rows of [eval] as one global batch.

    `step` is that of the last one, -1 before the first. `lowest` is the lowest loss of those after the first step, and
    `worse` how many in a row since then were not lower.
    """

    def __init__(self, engine: Engine, batches: GlobalBatches, *, steps: int):
        section = engine.recipe.eval
        assert section is not None
        self.section, self.engine, self.batches, self.steps = section, engine, batches, steps
        self.rows = batches.global_batch_size
        self.step, self.lowest, self.worse = -1, math.inf, 0

    def due(self, step: int) -> bool:
        """Return whether the model is to be evaluated after `step` (0: before the first) and has not been."""
        if step == self.step:
            return False
        if step == 0:
            return self.section.at_start
        return step == self.steps or bool(self.section.every and step % self.section.every == 0)

    @property
    def ends_run(self) -> bool:
        """Whether `eval.patience` evaluations in a row did not give a new lowest loss."""
        return self.section.patience is not None and self.worse >= self.section.patience

    def measure(self, step: int, *, goes_on: Callable[[int, int], bool] = lambda done, rows: True) -> EvalMetrics | None:
        """Return the mean loss of all targets of all rows. Collective.

        `goes_on(rows done, rows)` is called after each micro batch; None is returned if it returns False, as it must on
        all ranks alike. Raises `RecipeError` if no token of the rows is a target.
        """
        engine, batches = self.engine, self.batches
        # Sums of many losses; a float64 also counts targets exactly, up to 2^53.
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        per_round = batches.batch_ranks * batches.micro_batch_size
        with engine.evaluating():
            for number, batch in enumerate(batches.each(0), start=1):
                on_device = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
                sums[0] += engine.loss_sum(on_device)
                sums[1] += labels_count([batch])
                if not goes_on(min(number * per_round, self.rows), self.rows):
                    return None
        # tp ranks have the same loss; cp ranks have parts of it, and all targets of their rows.
        dist.all_reduce(sums, group=engine.meshes.loss.get_group())
        loss_sum, targets = float(sums[0]), int(sums[1]) // engine.sizes.cp
        if not targets:
            raise RecipeError(f'eval.path = "{self.section.path}": none of its {self.rows:,} rows has a target')
        loss = loss_sum / targets
        return EvalMetrics(step=step, eval_loss=loss, perplexity=_exp(loss), eval_tokens=targets, time=now())

    def count(self, metrics: EvalMetrics) -> None:
        """Take note of an evaluation. One before the first step is no bar for those after it."""
        self.step = metrics.step
        if not self.step:
            return
        lower = metrics.eval_loss < self.lowest
        self.lowest, self.worse = (metrics.eval_loss, 0) if lower else (self.lowest, self.worse + 1)

    # ---- in a checkpoint

    @property
    def fingerprint(self) -> str:
        """Text that identifies the rows; losses can be compared only where it is equal."""
        return f"{self.batches.fingerprint} rows={self.rows}"

    def state(self) -> dict[str, Any]:
        """Return the counts for a checkpoint, as JSON."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {"data": self.fingerprint, "step": self.step, "lowest": lowest, "worse": self.worse}

    def restore(self, state: Mapping[str, Any], found: Path) -> bool:
        """Restore the counts, unless they are of other rows; return whether they are of these.

        Raises `DamagedError` for impossible ones.
        """
        if state.get("data") != self.fingerprint:
            return False
        step, lowest, worse = (state.get(key) for key in ("step", "lowest", "worse"))
        counts = type(step) is type(worse) is int and step >= -1 and worse >= 0
        if not counts or not (lowest is None or type(lowest) is float):
            raise DamagedError(f"{found}/train_state.json: eval = {dict(state)} is impossible")
        self.step, self.lowest, self.worse = step, math.inf if lowest is None else lowest, worse
        return True


def describe(metrics: EvalMetrics) -> str:
    """Return the result of an evaluation in words."""
    return (
        f"eval loss {metrics.eval_loss:.4f}  perplexity {metrics.perplexity:.4g}  ({metrics.eval_tokens:,} tokens)"
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
