"""Write the metrics of each step and evaluation: one class for each destination, all behind `Logger`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ndtrain.loggers.json_lines import json_lines
from ndtrain.loggers.logger import Logger
from ndtrain.loggers.metrics import EvalMetrics, Metrics, StepMetrics, now
from ndtrain.loggers.tensorboard import TensorBoard, require_tensorboard
from ndtrain.recipe import Recipe

__all__ = ["LOGGERS", "EvalMetrics", "Logger", "Metrics", "StepMetrics", "check_loggers", "now", "open_loggers"]

# Key of [log] -> (check that raises `RecipeError` if the logger cannot work, function that opens it).
LOGGERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Logger]]] = {
    "tensorboard": (require_tensorboard, lambda run_dir: TensorBoard(run_dir / "tensorboard")),
}


def _enabled(recipe: Recipe) -> list[str]:
    return [key for key in LOGGERS if getattr(recipe.log, key)]


def check_loggers(recipe: Recipe, run_dir: Path) -> None:
    """Raise `RecipeError` if a logger that the recipe enables cannot work here."""
    for key in _enabled(recipe):
        LOGGERS[key][0](run_dir)


def open_loggers(recipe: Recipe, run_dir: Path) -> list[Logger]:
    """Open metrics.jsonl and the loggers that the recipe enables."""
    return [json_lines(run_dir / "metrics.jsonl"), *(LOGGERS[key][1](run_dir) for key in _enabled(recipe))]
