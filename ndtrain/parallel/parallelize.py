"""Apply a `Plan` to a model on meta, in fixed order: tp, ep, activation checkpointing, cp, fsdp. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ndtrain.mesh import Meshes
from ndtrain.parallel.cp import KINDS, ContextParallel
from ndtrain.parallel.dropout import drop_by_rank
from ndtrain.parallel.ep import apply_expert_parallelism
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.parallel.tp import apply_tensor_parallelism
from ndtrain.plan import ParamPlan, Plan, Unit, refuse
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Splits(NamedTuple):
    """What splits batches along the sequence over cp, and activations over tp."""

    context: ContextParallel | None
    sequence: SequenceParallel | None


def parallelize(model: PreTrainedModel, plan: Plan, meshes: Meshes, *, recipe: Recipe) -> Splits:
    """Turn `model` (on meta) into the sharded model that `plan` describes, in place."""
    sequence = SequenceParallel(model, plan.sequence, meshes.tp.get_group()) if plan.sequence else None
    if plan.tp_rules:
        apply_tensor_parallelism(model, plan, meshes)
    if plan.ep_rules:
        apply_expert_parallelism(model, plan, meshes)
    if recipe.train.activation_checkpointing == "full":
        # Its name in transformers until 5.17
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    context = KINDS[plan.cp](model, meshes.dense["cp"].get_group()) if plan.cp else None
    if plan.sizes.tp > 1 and refuse.dropouts(model):
        drop_by_rank(model, plan, meshes.tp.get_local_rank())
    for parameter in model.parameters():
        if not parameter.numel():
            # Nothing to train, and FSDP's reduce-scatter takes no empty gradient (torch <= 2.13).
            parameter.requires_grad_(False)
    planned = {param.fqn: _fsdp_dim(param) for param in plan.params}
    dims = {param: planned[fqn] for fqn, param in model.named_parameters()}
    for unit in (*plan.units, plan.root):
        modules = [model.get_submodule(name) for name in unit.modules]
        mesh = meshes.efsdp if unit.experts else meshes.fsdp
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            reshard_after_forward=unit.reshard,
            shard_placement_fn=dims.__getitem__,
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
    return Splits(context, sequence)


def _mixed_precision(unit: Unit) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, unit.param_dtype),
        reduce_dtype=getattr(torch, unit.reduce_dtype),
        output_dtype=getattr(torch, unit.output_dtype) if unit.output_dtype else None,
        cast_forward_inputs=unit.cast_inputs,
    )


def _fsdp_dim(param: ParamPlan) -> Shard:
    """What `fully_shard` is told: the dim alone, it knows itself what tp or ep have cut before."""
    over = next(p for a, p in zip(param.axes, param.placements, strict=True) if a in ("fsdp", "efsdp"))
    assert isinstance(over, Shard | _StridedShard)
    return Shard(over.dim)
