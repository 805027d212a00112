"""Save checkpoints while a run goes on: at most one at a time, and report how each one ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.checkpoint import CheckpointStore
from ndtrain.errors import NdtrainError
from ndtrain.recipe import CheckpointSection
from ndtrain.train.report import Reporter


class Saving:
    """Save a run's checkpoints. `step` is the step of the last one known to be complete, None before the first."""

    def __init__(self, section: CheckpointSection, run_dir: Path, reporter: Reporter, *, progress: Callable[[], None]):
        self.store = CheckpointStore(run_dir, keep=section.keep, background=section.async_, progress=progress)
        self.step: int | None = None
        self._stops, self._reporter = section.on_error == "stop", reporter
        self._begun: int | None = None

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
        self._begun = step
        with self._on_error():
            self._saved(self.store.save(step, model=model, optim=optim, state=state, extra_files=extra_files))

    def settle(self, *, wait: bool) -> None:
        """Report how the save in flight ended, if it has; with `wait`, wait for its end. Collective."""
        if not self.store.in_flight:
            return
        written = torch.tensor(int(wait or self.store.written))
        dist.all_reduce(written, op=dist.ReduceOp.MIN)
        if written:
            with self._on_error():
                self._saved(self.store.settle())

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            self.step = self._begun
            self._reporter.info(f"saved {path}")

    @contextmanager
    def _on_error(self) -> Iterator[None]:
        """Raise the body's `NdtrainError`, which all ranks have, or report it as a warning (`checkpoint.on_error`)."""
        try:
            yield
        except NdtrainError as error:
            if self._stops:
                raise
            self._reporter.info(f"warning: {error}; training continues")
