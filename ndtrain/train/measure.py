"""Measure a step: its targets, its losses over all ranks, and its speed."""

from __future__ import annotations

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
from ndtrain.engine.transfers import Moment, Readback, to_device
from ndtrain.hf.routers import sequence_count
from ndtrain.loggers import StepMetrics
from ndtrain.train.requests import Answers


class Made(NamedTuple):
    """A step that the host has enqueued, and its numbers on their way: `Measure.reduce`'s, then `Answers`."""

    step: int
    epoch: float
    lr: float
    time: str
    begun: Moment
    numbers: Readback


class Found(NamedTuple):
    """The numbers of a step: means over the global batch, and counts of it. `finite`: all losses and gradients."""

    loss: float
    aux_loss: float
    grad_norm: float
    finite: bool
    tokens: int
    by_source: tuple[int, ...]
    answers: Answers


def count_targets(batches: Sequence[Batch], engine: Engine, sources: npt.NDArray[np.int64] | None = None) -> Tensor:
    """Return counts of the global batch, int64 on the device: targets, sequences, and targets of each source.

    `batches` are this rank's micro batches, in host memory, and `sources` has the source of each of their rows
    `[micro batches, m]`, where there are sources. Sequences are 0 without a router's auxiliary loss. Collective: to
    count alone, each rank would have to read the rows of all.
    """
    routed = engine.loss_model.router is not None
    own = [labels_count(batches), sum(sequence_count(b["labels"]) for b in batches) if routed else 0]
    if sources is not None:
        targets = np.concatenate([(batch["labels"] != IGNORE).sum(-1).numpy() for batch in batches])
        counted = np.bincount(sources.ravel(), targets, minlength=len(engine.recipe.data.sources))
        own += counted.astype(np.int64).tolist()
    counts = to_device(own, dtype=torch.int64, device=engine.device)
    dist.all_reduce(counts, group=engine.meshes.loss.get_group())
    return counts // engine.sizes.cp  # cp ranks have the same rows


class Measure:
    """Compute the metrics of an engine's steps on `ranks` ranks."""

    def __init__(self, engine: Engine, *, ranks: int):
        self.engine, self.ranks = engine, ranks
        config = engine.model.config.get_text_config()
        self._flops_per_token = flops_per_token(engine.plan, config, engine.recipe.data.seq_len)
        recipe = engine.recipe
        self._peak_flops = peak_flops(engine.device, recipe.fsdp.param_dtype, tf32=recipe.train.tf32)
        self._labels = [source.label for source in engine.recipe.data.sources]

    def reduce(self, sums: Tensor, norm: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's numbers over all ranks, float64, and whether it is to be skipped, a float32 0 or 1.

        Both stay on the device. Takes each rank's `Engine.gradients` and `Engine.clip`, and `count_targets`.
        Collective.
        """
        # tp ranks have the same loss.
        shared = torch.cat([sums / self.engine.sizes.tp, norm.isfinite().logical_not().to(sums)[None]])
        dist.all_reduce(shared)
        means = shared[:2] / counts[:2].clamp(min=1)
        finite = (shared[2] == 0) & means.sum().isfinite()
        skip = (finite & (counts[0] > 0)).logical_not().float()
        return torch.cat([means, torch.stack([norm.to(sums), finite.to(sums)]), counts.to(sums)]), skip

    def read(self, made: Made) -> Found:
        """Wait for the numbers of a step."""
        numbers = made.numbers.wait()
        first, last = numbers[: -len(Answers._fields)], numbers[-len(Answers._fields) :]
        loss, aux_loss, norm, finite, tokens, _, *by_source = first
        counts = tuple(int(count) for count in by_source)
        return Found(loss, aux_loss, norm, bool(finite), int(tokens), counts, Answers(*map(int, last)))

    def metrics(self, made: Made, found: Found, *, skipped: int) -> StepMetrics:
        """Return the metrics of a step; `skipped` as in `StepMetrics`."""
        seconds = made.numbers.moment.seconds_since(made.begun)
        speed = found.tokens / seconds
        mfu = speed / self.ranks * self._flops_per_token / self._peak_flops if self._peak_flops else None
        return StepMetrics(
            step=made.step,
            epoch=made.epoch,
            loss=found.loss,
            grad_norm=found.grad_norm,
            lr=made.lr,
            tokens=found.tokens,
            tokens_per_second=speed,
            step_seconds=seconds,
            mfu=mfu,
            peak_memory_bytes=found.answers.peak_bytes,
            time=made.time,
            aux_loss=found.aux_loss if self.engine.loss_model.router is not None else None,
            skipped=skipped,
            sources=dict(zip(self._labels, found.by_source, strict=True)) if self._labels else None,
        )
