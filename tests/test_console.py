"""What a run shows on a terminal, and where there is none."""

from __future__ import annotations

import io
import sys

import pytest

from ndtrain.console import Reporter
from ndtrain.loggers import StepMetrics, now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=step / 2,
        loss=2.5,
        grad_norm=1.0,
        lr=1e-4,
        tokens=100,
        tokens_per_second=50.0,
        step_seconds=2.0,
        mfu=None,
        peak_memory_bytes=1,
        time=now(),
    )


@pytest.mark.parametrize(("terminal", "term"), [(True, "dumb"), (True, "unknown"), (False, "xterm")])
def test_where_a_line_cannot_be_rewritten_each_step_is_a_line_at_once(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, term: str
) -> None:
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", term)
    reporter = Reporter()
    for step in (1, 2):
        reporter.step(metrics(step), steps=3, show=True)
        line = shown.getvalue().splitlines()[-1]
        assert line.startswith(f"step {step}/3  loss 2.5000") and f"epoch {step / 2:.2f}  ETA" in line
    assert "\x1b" not in shown.getvalue()
    reporter.close()
