"""Write steps and evaluations as TensorBoard scalars."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ndtrain.errors import RecipeError
from ndtrain.loggers.metrics import EvalMetrics, Metrics
from ndtrain.storage.paths import is_local


def require_tensorboard(run_dir: Path) -> None:
    """Raise `RecipeError` if tensorboard is not installed or `run_dir` is not local."""
    if not is_local(run_dir):
        raise RecipeError(f'log.tensorboard = true needs a local run.dir, not "{run_dir}"')
    if importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(
            "log.tensorboard = true needs a package that is not installed: pip install 'ndtrain[tensorboard]'"
        )


class TensorBoard:
    """Write the numbers of each step and evaluation as TensorBoard scalars."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, metrics: Metrics) -> None:
        for name, value in metrics.as_dict().items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, metrics.step)
        of_source = "eval_loss" if isinstance(metrics, EvalMetrics) else "tokens"
        for label, value in (metrics.sources or {}).items():
            self._writer.add_scalar(f"{of_source}/{label}", value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
