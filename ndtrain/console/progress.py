"""Show the progress of a run and of a conversion."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ndtrain.loggers.metrics import StepMetrics


class Reporter:
    """Prints the progress of a run: one live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        # A dumb terminal cannot move its cursor, so that a live line would not be seen before the end.
        self._live = sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed_at = 0.0
        self._pace: float | None = None

    def info(self, line: str) -> None:
        (self._bar.console if self._bar else self._console).print(line, markup=False)

    def _task(self, what: str, total: int) -> TaskID:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:,}/{task.total:,} {task.fields[detail]}", markup=False),
                console=self._console,
            )
            self._bar.start()
        if what not in self._tasks:
            for old in self._tasks.values():
                self._bar.remove_task(old)
            self._tasks = {what: self._bar.add_task(what, total=total, detail="")}
        return self._tasks[what]

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of a long preparation, in bytes."""
        if self._live:
            self._bar_update(what, done, total, detail="bytes")
        elif done >= total or time.monotonic() - self._printed_at > 10:
            self._printed_at = time.monotonic()
            self.info(f"{what} {done:,} of {total:,} bytes")

    def step(self, metrics: StepMetrics, *, steps: int, show: bool) -> None:
        """Show one optimizer step; without a terminal only if `show` is true."""
        self._pace = metrics.step_seconds if self._pace is None else 0.8 * self._pace + 0.2 * metrics.step_seconds
        eta = _duration(self._pace * (steps - metrics.step))
        aux = "" if metrics.aux_loss is None else f"aux {metrics.aux_loss:.4f}  "
        text = (
            f"loss {metrics.loss:.4f}  {aux}grad {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  epoch {metrics.epoch:.2f}  ETA {eta}"
        )
        if self._live:
            self._bar_update("step", metrics.step, steps, detail=text)
        elif show:
            self.info(f"step {metrics.step}/{steps}  {text}")

    def _bar_update(self, what: str, done: int, total: int, *, detail: str) -> None:
        task = self._task(what, total)
        assert self._bar is not None
        self._bar.update(task, completed=done, total=total, detail=detail)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _ErrorStreamProgress:
    """Shows a bar on standard error; nothing if that is not a terminal."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._columns = columns
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(20), *self._columns, console=console)
            self._bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class ByteProgress(_ErrorStreamProgress):
    """Shows bytes, speed and time left."""

    def __init__(self) -> None:
        super().__init__(DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())


class CountProgress(_ErrorStreamProgress):
    """Shows how many of a number of things are done, and the time left."""

    def __init__(self) -> None:
        super().__init__(MofNCompleteColumn(), TimeRemainingColumn())


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
