"""Decide where the gradients of several micro batches are added up."""

from __future__ import annotations

import math

from torch.distributed.tensor.placement_types import Replicate

from ndtrain.data.batches import micro_batches
from ndtrain.plan import ParamPlan, Plan
from ndtrain.recipe import Recipe

# Parameters, gradients and the optimizer's state of a rank, and whole gradients, may take this share of its memory: the
# rest is for activations, logits and gathered weights.
_SHARE = 0.5
_STATES, _WHOLE = 16, 4  # bytes an element


def accumulates_locally(recipe: Recipe, plan: Plan, memory: float | None) -> bool:
    """Return whether micro batches add up whole gradients, on ranks whose device has `memory` bytes; None: not known.

    It saves the reduction after each micro batch but the last, and takes the memory of whole gradients.
    """
    train, how = recipe.train, recipe.fsdp.accumulate
    _, steps = micro_batches(train.global_batch_size, plan.sizes.batch, train.micro_batch_size)
    if steps == 1 or plan.sizes.fsdp * plan.sizes.dp_replicate == 1 or how == "sharded":
        return False  # nothing is added up, or nothing reduced
    if how == "local" or memory is None:
        return how == "local"
    whole = sum(_gathered(param, plan) for param in plan.params if param.fqn not in plan.frozen)
    return _STATES * plan.rank_numel(0) + _WHOLE * whole <= _SHARE * memory


def _gathered(param: ParamPlan, plan: Plan) -> float:
    """Return how many elements of a parameter a rank has while it is gathered."""
    cut = (a for a, p in zip(param.axes, param.placements, strict=True) if not isinstance(p, Replicate))
    return param.numel / math.prod(getattr(plan.sizes, axis) for axis in cut if axis in ("tp", "ep"))
