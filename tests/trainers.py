"""Trainers on the ranks of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ndtrain.hf.model import meta_model
from ndtrain.plan import make_plan
from ndtrain.recipe import load_recipe
from ndtrain.runs.process import Runtime
from ndtrain.runs.stop_signals import StopSignals
from ndtrain.train import Silent, Trainer, sizes_for


class Said(Silent):
    """Keeps the lines that a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, line: str) -> None:
        self.said.append(line)


def trainer_of(
    path: str, overrides: Sequence[str] = (), *, said: Said | None = None, stop_signals: StopSignals | None = None
) -> Trainer:
    """A trainer of this rank for the recipe at `path`, not yet prepared."""
    recipe = load_recipe(Path(path), overrides)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = meta_model(recipe)
    plan = make_plan(model, sizes_for(recipe, world), recipe)
    runtime = Runtime(rank=rank, local_rank=rank, world_size=world, device=torch.device("cpu"))
    return Trainer(recipe, plan, model, runtime=runtime, reporter=said or Silent(), stop_signals=stop_signals)
