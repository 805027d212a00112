"""Recomputation: computes a block's activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndtrain.mesh import Meshes
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_recomputation(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Make every block of `model` recompute its activations, in place."""
    model.activation_checkpointing_enable({"use_reentrant": False})
