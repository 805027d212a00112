"""Apply a `Plan` to a model on meta: one transform after another, in the order of `TRANSFORMS`. They decide nothing.

A new kind of parallelism is one file and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ndtrain.mesh import Meshes
from ndtrain.parallel.cp import ContextParallel, apply_context_parallelism
from ndtrain.parallel.documents import AttentionByDocuments
from ndtrain.parallel.dropout import apply_dropout_by_rank
from ndtrain.parallel.ep import apply_expert_parallelism
from ndtrain.parallel.fsdp import apply_fsdp
from ndtrain.parallel.recompute import apply_recomputation
from ndtrain.parallel.sequence import SequenceParallel, apply_sequence_parallelism
from ndtrain.parallel.tp import apply_tensor_parallelism
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "TRANSFORMS",
    "AttentionByDocuments",
    "ContextParallel",
    "SequenceParallel",
    "Splits",
    "Transform",
    "parallelize",
    "transforms_of",
]


class Transform(NamedTuple):
    """Names a change to the model; `wanted` says whether the plan asks for it, `apply` makes it."""

    name: str
    wanted: Callable[[Plan, Recipe], bool]
    apply: Callable[[PreTrainedModel, Plan, Meshes], Any]


class Splits(NamedTuple):
    """Holds the objects that split batches along the sequence over cp, and activations over tp."""

    context: ContextParallel | None
    sequence: SequenceParallel | None


def freeze(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Let the parameters that the plan says have no gradients, in place."""
    for fqn in plan.frozen:
        model.get_parameter(fqn).requires_grad_(False)


TRANSFORMS = (
    Transform("frozen parameters", lambda plan, recipe: bool(plan.frozen), freeze),
    # Its hooks must gather before the hooks of the layers inside see their inputs, so they are registered first.
    Transform(
        "sequence parallelism",
        lambda plan, recipe: plan.sequence is not None,
        apply_sequence_parallelism,
    ),
    Transform("tensor parallelism", lambda plan, recipe: bool(plan.tp_rules), apply_tensor_parallelism),
    Transform("expert parallelism", lambda plan, recipe: bool(plan.ep_rules), apply_expert_parallelism),
    Transform(
        "recomputation",
        lambda plan, recipe: plan.recomputation is not None,
        apply_recomputation,
    ),
    Transform(
        "context parallelism",
        lambda plan, recipe: plan.cp is not None,
        apply_context_parallelism,
    ),
    Transform(
        "dropout by tp rank",
        lambda plan, recipe: plan.drops_by_rank,
        apply_dropout_by_rank,
    ),
    Transform("fsdp", lambda plan, recipe: True, apply_fsdp),
)


def transforms_of(plan: Plan, recipe: Recipe) -> tuple[Transform, ...]:
    """Return the transforms that this plan asks for, in the order in which they are applied."""
    return tuple(transform for transform in TRANSFORMS if transform.wanted(plan, recipe))


def parallelize(model: PreTrainedModel, plan: Plan, meshes: Meshes, *, recipe: Recipe) -> Splits:
    """Turn `model` (on meta) into the sharded model that `plan` describes, in place."""
    made = {transform.name: transform.apply(model, plan, meshes) for transform in transforms_of(plan, recipe)}
    return Splits(made.get("context parallelism"), made.get("sequence parallelism"))
