"""Measure a step: its targets, its losses over all ranks, and its speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.accelerators import peak_flops
from ndtrain.data import IGNORE, labels_count
from ndtrain.engine import Batch, Engine
from ndtrain.engine.flops import flops_per_token
from ndtrain.hf.routers import sequence_count
from ndtrain.loggers import StepMetrics, now


class Targets(NamedTuple):
    """Counts of the global batch: target tokens, and sequences (`rows`; 0 without a router's auxiliary loss)."""

    tokens: int
    rows: int
    by_source: tuple[int, ...] = ()  # target tokens


class Losses(NamedTuple):
    """Means over the global batch, equal on all ranks. `finite`: whether they and all ranks' gradients are."""

    loss: float
    aux_loss: float
    grad_norm: float
    finite: bool


def count_targets(batches: Sequence[Batch], engine: Engine, sources: npt.NDArray[np.int64] | None = None) -> Targets:
    """Return the counts of the global batch; `batches` are this rank's micro batches. Collective.

    `sources` has the source of each of their rows `[micro batches, m]`, where there are sources.
    """
    routed = engine.loss_model.router is not None
    own = [labels_count(batches), sum(sequence_count(b["labels"]) for b in batches) if routed else 0]
    if sources is not None:
        targets = [(batch["labels"] != IGNORE).sum(-1) for batch in batches]
        count = len(engine.recipe.data.sources)
        counted = np.bincount(sources.ravel(), torch.cat(targets).cpu().numpy(), minlength=count)
        own += counted.astype(np.int64).tolist()
    counts = torch.tensor(own, dtype=torch.int64, device=engine.device)
    dist.all_reduce(counts, group=engine.meshes.loss.get_group())
    tokens, rows, *by_source = (n // engine.sizes.cp for n in counts.tolist())  # cp ranks have the same rows
    return Targets(tokens, rows, tuple(by_source))


class Measure:
    """Compute the metrics of an engine's steps on `ranks` ranks."""

    def __init__(self, engine: Engine, *, ranks: int):
        self.engine, self.ranks = engine, ranks
        config = engine.model.config.get_text_config()
        self._flops_per_token = flops_per_token(engine.plan, config, engine.recipe.data.seq_len)
        self._peak_flops = peak_flops(engine.device, engine.recipe.fsdp.param_dtype)
        self._labels = [source.label for source in engine.recipe.data.sources]

    def reduce(self, sums: Tensor, norm: Tensor, targets: Targets) -> Losses:
        """Return the means over the global batch from each rank's `Engine.gradients` and `Engine.clip`; collective."""
        # tp ranks have the same loss.
        shared = torch.cat([sums / self.engine.sizes.tp, norm.isfinite().logical_not().to(sums)[None]])
        dist.all_reduce(shared)
        loss_sum, aux_sum, ranks_not_finite = shared.tolist()
        loss, aux_loss = loss_sum / max(1, targets.tokens), aux_sum / max(1, targets.rows)
        return Losses(loss, aux_loss, float(norm), not ranks_not_finite and math.isfinite(loss + aux_loss))

    def metrics(
        self,
        losses: Losses,
        targets: Targets,
        *,
        step: int,
        epoch: float,
        lr: float,
        seconds: float,
        peak: int,
        skipped: int,
    ) -> StepMetrics:
        """Return the metrics of a step that took `seconds`; `peak` is in bytes."""
        speed = targets.tokens / seconds
        mfu = speed / self.ranks * self._flops_per_token / self._peak_flops if self._peak_flops else None
        return StepMetrics(
            step=step,
            epoch=epoch,
            loss=losses.loss,
            grad_norm=losses.grad_norm,
            lr=lr,
            tokens=targets.tokens,
            tokens_per_second=speed,
            step_seconds=seconds,
            mfu=mfu,
            peak_memory_bytes=peak,
            time=now(),
            aux_loss=losses.aux_loss if self.engine.loss_model.router is not None else None,
            skipped=skipped,
            sources=dict(zip(self._labels, targets.by_source, strict=True)) if self._labels else None,
        )
