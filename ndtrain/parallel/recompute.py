"""Recomputation: a block's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndtrain.mesh import Meshes
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_recomputation(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Have every block of `model` recomputed, in place."""
    model.activation_checkpointing_enable({"use_reentrant": False})
