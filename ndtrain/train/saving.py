"""Save checkpoints while a run goes on: at most one at a time, and report how each one ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ndtrain.checkpoint import CheckpointStore
from ndtrain.checkpoint.tensors import files_of
from ndtrain.errors import NdtrainError
from ndtrain.recipe import CheckpointSection
from ndtrain.runs.messages import of_rank0
from ndtrain.train.report import Reporter


class Best(NamedTuple):
    """A checkpoint and its held-out loss."""

    step: int
    loss: float


class Saving:
    """Save a run's checkpoints. `step` is the step of the last one known to be complete, None before the first.

    With `checkpoint.keep_best`, `best` is the complete checkpoint of the lowest held-out loss, None without one, and
    `candidate` that with the next one to be saved.
    """

    def __init__(self, section: CheckpointSection, run_dir: Path, reporter: Reporter, *, progress: Callable[[], None]):
        self.store = CheckpointStore(run_dir, keep=section.keep, background=section.async_, progress=progress)
        self.step: int | None = None
        self.best: Best | None = None
        self.candidate: Best | None = None
        self._keeps_best = section.keep_best
        self._stops, self._reporter = section.on_error == "stop", reporter
        self._begun: tuple[int | None, Best | None] = None, None

    def reserve(self, *, model: Mapping[str, Tensor], optim: Mapping[str, Tensor]) -> None:
        """Take the host memory that background saves of these tensors need, so that no step waits for it."""
        if self.store.background:
            self.store.staging.reserve({"model": files_of(model), "optim": files_of(optim)})

    def offer(self, step: int, loss: float) -> bool:
        """Return whether the checkpoint of `step`, with this held-out loss, is to be saved as the best. Collective."""
        if not self._keeps_best:
            return False
        self.settle()  # a better one in flight may fail
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best.loss):
            return False
        if self.step == step:  # it is saved already
            self.restore_best(Best(step, loss))
            return False
        self.candidate = Best(step, loss)
        return True

    def restore_best(self, best: Best) -> bool:
        """Let `best` be the best, and the file `best` name it; return whether its checkpoint exists. Collective."""
        exists = bool(of_rank0(lambda: self.store.name_best(best.step)))
        if exists:
            self.best = self.candidate = best
        return exists

    def begin(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optim: Mapping[str, Tensor],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None],
    ) -> None:
        """Write the checkpoint of `step`, or start to in the background. No save may be in flight. Collective."""
        best, self._begun = self.candidate, (step, self.candidate)
        with self._on_error():
            self._saved(
                self.store.save(
                    step,
                    model=model,
                    optim=optim,
                    state=state,
                    extra_files=extra_files,
                    best_step=best.step if best is not None else None,
                )
            )

    def settle(self) -> None:
        """Wait for the end of the save in flight, if there is one, and report how it ended. Collective."""
        if self.store.in_flight:
            with self._on_error():
                self._saved(self.store.settle())

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            self.step, self.best = self._begun
            self._reporter.info(f"saved {path}")

    @contextmanager
    def _on_error(self) -> Iterator[None]:
        """Raise the body's `NdtrainError`, which all ranks have, or report it as a warning (`checkpoint.on_error`)."""
        try:
            yield
        except NdtrainError as error:
            self.candidate = self.best
            if self._stops:
                raise
            self._reporter.info(f"warning: {error}; training continues")
