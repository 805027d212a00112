"""What a step was (`StepMetrics`), and where it is written: one class a place, all behind `Logger`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ndtrain.loggers.json_lines import json_lines
from ndtrain.loggers.logger import Logger
from ndtrain.loggers.metrics import StepMetrics, now
from ndtrain.loggers.tensorboard import TensorBoard, require_tensorboard
from ndtrain.recipe import Recipe

__all__ = ["LOGGERS", "Logger", "StepMetrics", "check_loggers", "now", "open_loggers"]

# Key of [log] that asks for it -> what must be there, raised as a `RecipeError`; and how it is opened.
LOGGERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Logger]]] = {
    "tensorboard": (require_tensorboard, lambda run_dir: TensorBoard(run_dir / "tensorboard")),
}


def _asked(recipe: Recipe) -> list[str]:
    return [key for key in LOGGERS if getattr(recipe.log, key)]


def check_loggers(recipe: Recipe, run_dir: Path) -> None:
    """Raise `RecipeError` for a logger that cannot work here."""
    for key in _asked(recipe):
        LOGGERS[key][0](run_dir)


def open_loggers(recipe: Recipe, run_dir: Path) -> list[Logger]:
    """metrics.jsonl and what the recipe asks for."""
    return [json_lines(run_dir / "metrics.jsonl"), *(LOGGERS[key][1](run_dir) for key in _asked(recipe))]
