"""The learning rate at each step."""

from __future__ import annotations

import math

from ndtrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, *, peak: float) -> float:
    """Return the learning rate of `step`, counted from 0, where `peak` is the highest.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps - 1`; cosine and linear then fall to
    `min_lr_ratio * peak` at `train.steps`; wsd (warmup, stable, decay: arXiv:2404.06395) is constant, then falls
    linearly over the last `decay_steps`.
    """
    section, steps, lr = recipe.schedule, recipe.train.steps, peak
    warmup = section.warmup_steps
    if steps is None or warmup is None:
        raise ValueError("the number of steps is not known yet: see Recipe.with_steps")
    if step < warmup:
        return lr * (step + 1) / warmup
    low = section.min_lr_ratio
    done = (step - warmup) / max(1, steps - warmup)
    if section.kind == "constant":
        share = 1.0
    elif section.kind == "linear":
        share = low + (1 - low) * (1 - done)
    elif section.kind == "cosine":
        share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = section.decay_steps or min(max(1, steps // 10), steps - warmup)
        left = min(1.0, (steps - step) / max(1, decay))
        share = low + (1 - low) * left
    return lr * share
