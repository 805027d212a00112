"""What a step was and how fast: `StepMetrics`, model FLOPs, peak memory, and the metrics.jsonl sink."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from ndtrain.accelerators import DEVICES
from ndtrain.errors import RecipeError
from ndtrain.plan import Plan
from ndtrain.storage.paths import is_local, os_errors


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. `loss` is the mean over the global batch's targets, `tokens` their count.

    `aux_loss` is the router's, the mean over the global batch's sequences without its coefficient; None, and left out
    of the line, where there is none. A step that is not finite changes no weight: `skipped` counts those of the run up
    to now, and is left out while there are none.
    """

    step: int
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

    def as_dict(self) -> dict[str, Any]:
        """What is written: every field, None for a number that is not finite, which JSON does not have."""
        fields = asdict(self)
        if self.aux_loss is None:
            del fields["aux_loss"]
        if not self.skipped:
            del fields["skipped"]
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def flops_per_token(plan: Plan, config: object, seq_len: int) -> float:
    """Forward and backward FLOPs per token: 6 N plus causal attention 6 L H S (PaLM, arXiv:2204.02311, appendix B).

    N counts the weights that multiply: all but input embeddings, unless they are tied to the head, and of experts as
    many as a token meets.
    """
    tied = set(plan.tied.values())
    active = _active_experts(config)
    multiplied = sum(
        p.numel * (active if ".experts." in p.fqn else 1.0)
        for p in plan.params
        if not ("embed" in p.fqn or "wte" in p.fqn or "wpe" in p.fqn) or p.fqn in tied
    )
    layers = getattr(config, "num_hidden_layers", 0) or 0
    hidden = getattr(config, "hidden_size", 0) or 0
    return 6.0 * multiplied + 6.0 * layers * hidden * seq_len


def expert_count(config: object) -> int:
    """The experts of a mixture's layer, by its config; 0 where it has none or does not say."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _active_experts(config: object) -> float:
    """Share of the experts that a token meets; 1 where the config does not say."""
    total = expert_count(config)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None)
    return min(1.0, chosen / total) if total and chosen else 1.0


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known.bfloat16 for key, known in DEVICES.items() if key.upper() in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: the allocator's on CUDA, the resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sink(Protocol):
    """Where steps are written, by rank 0."""

    def write(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


def require_tensorboard(run_dir: Path) -> None:
    """Raise `RecipeError` where the extra is not installed, or its files could not be written."""
    if not is_local(run_dir):
        raise RecipeError(f'log.tensorboard = true needs a local run.dir, and it is "{run_dir}"')
    if importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("log.tensorboard = true needs the extra: pip install 'ndtrain[tensorboard]'")


class TensorBoard:
    """Writes each step's numbers as TensorBoard scalars."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, metrics: StepMetrics) -> None:
        for name, value in metrics.as_dict().items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class JsonLines:
    """Appends one step a line to metrics.jsonl; a step trained again after a crash is simply appended again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            # A line cut short by a crash must not swallow the next one.
            with path.open("ab") as file:
                file.write(b"\n")

    def write(self, metrics: StepMetrics) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.as_dict(), allow_nan=False) + "\n")

    def close(self) -> None:
        pass


class UploadedLines:
    """metrics.jsonl in an object store, where nothing is appended: the whole file is written now and then."""

    EVERY_S = 30.0

    def __init__(self, path: Path):
        self.path = path
        with os_errors(path):
            self._lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._uploaded = time.monotonic()

    def write(self, metrics: StepMetrics) -> None:
        self._lines.append(json.dumps(metrics.as_dict(), allow_nan=False))
        if time.monotonic() - self._uploaded > self.EVERY_S:
            with suppress(OSError):  # a store that is away for a while has them the next time
                self._upload()

    def close(self) -> None:
        self._upload()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        with os_errors(self.path):
            self.path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")
