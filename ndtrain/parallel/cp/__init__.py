"""Context parallelism: every rank of the cp axis works on its own part of each sequence.

`ulysses` trades heads for sequence around the model's own attention function; `ring` passes keys and values round the
ranks. Everything else in a causal LM works token by token and needs no communication; `proof` proves that for the
model at hand before its weights are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndtrain.mesh import Meshes
from ndtrain.parallel.cp.interface import ContextParallel
from ndtrain.parallel.cp.ring import Ring
from ndtrain.parallel.cp.ulysses import Ulysses
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS: dict[str, type[ContextParallel]] = {"ulysses": Ulysses, "ring": Ring}

__all__ = ["KINDS", "ContextParallel", "Ring", "Ulysses", "apply_context_parallelism"]


def apply_context_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> ContextParallel:
    """Make the attention of `model` (on meta) work on this rank's part of each sequence, in place."""
    assert plan.cp is not None
    return KINDS[plan.cp](model, meshes.dense["cp"].get_group())
