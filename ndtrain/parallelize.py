"""Apply a `Plan` to a model on meta, in fixed order: tp, ep, activation checkpointing, cp, fsdp. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from ndtrain.context_parallel import KINDS, ContextParallel
from ndtrain.expert_parallel import apply_expert_parallelism
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan, Unit
from ndtrain.recipe import Recipe
from ndtrain.tensor_parallel import apply_tensor_parallelism

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parallelize(model: PreTrainedModel, plan: Plan, meshes: Meshes, *, recipe: Recipe) -> ContextParallel | None:
    """Turn `model` (on meta) into the sharded model that `plan` describes, in place; returns what splits batches."""
    if plan.tp_rules:
        apply_tensor_parallelism(model, plan, meshes)
    if plan.ep_rules:
        apply_expert_parallelism(model, plan, meshes)
    if recipe.train.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    context = KINDS[plan.cp](model, meshes.dense["cp"].get_group()) if plan.cp else None
    planned = {param.fqn: param.placements for param in plan.params}
    placements = {param: planned[fqn] for fqn, param in model.named_parameters()}
    for unit in (*plan.units, plan.root):
        modules = [model.get_submodule(name) for name in unit.modules]
        mesh = meshes.efsdp if unit.experts else meshes.fsdp
        place = (lambda param: _fsdp_dim(placements[param])) if unit.experts else None
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            reshard_after_forward=unit.reshard,
            shard_placement_fn=place,
            mp_policy=_mixed_precision(unit),
            # Only memory that a device copies from needs pinning.
            offload_policy=CPUOffloadPolicy(mesh.device_type != "cpu") if unit.cpu_offload else OffloadPolicy(),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global count of target tokens, so gradients are summed, never averaged.
            # gloo has no PREMUL_SUM, hence the forced plain sum (torch <= 2.13).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return context


def _mixed_precision(unit: Unit) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, unit.param_dtype),
        reduce_dtype=getattr(torch, unit.reduce_dtype),
        output_dtype=getattr(torch, unit.output_dtype) if unit.output_dtype else None,
        cast_forward_inputs=unit.cast_inputs,
    )


def _fsdp_dim(placements: tuple[Placement, ...]) -> Shard:
    """What `fully_shard` is told of an expert's placements on ([dp_replicate,] efsdp, ep)."""
    over = placements[-2]
    assert isinstance(over, Shard | _StridedShard)
    return Shard(over.dim)
