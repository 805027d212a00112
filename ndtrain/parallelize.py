"""Apply a `Plan` to a model on meta, in fixed order: tp, ep, activation checkpointing, cp, fsdp. Decides nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ndtrain.context_parallel import ContextParallel
from ndtrain.errors import PlanError
from ndtrain.expert_parallel import apply_expert_parallelism
from ndtrain.mesh import Meshes
from ndtrain.model import tie
from ndtrain.plan import ParamPlan, Plan, expert
from ndtrain.plan.tensor import CUTTING
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parallelize(model: PreTrainedModel, plan: Plan, meshes: Meshes, *, recipe: Recipe) -> ContextParallel | None:
    """Turn `model` (on meta) into the sharded model that `plan` describes, in place; returns what splits batches."""
    if plan.tp_rules:
        # transformers.distributed moves between releases (read at 5.23); this is its one caller.
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        # Parameters, then the modules around them; a tied alias gets its parameter from `tie`.
        params = {p.fqn: p.style for p in plan.params if p.style in CUTTING}
        cut = _cut_by_modules(model, plan, meshes)
        rules = {n: s for n, s in params.items() if n not in cut}
        rules |= {name: style for name, style in plan.tp_rules.items() if name not in params}
        apply_tensor_parallelism(model, meshes.tp, rules)
        tie(model)
        # What an embedding, a head or dispatched experts give under tp is a view, whose later in-place change would
        # drop FSDP's pre-backward hook without an error (torch 2.13 warns of it).
        for name, style in (plan.tp_rules | plan.ep_rules).items():
            if style in ("embedding_rowwise", "colwise_gather_output", expert.MODULE):
                model.get_submodule(name).register_forward_hook(lambda module, args, output: output.clone())
    if plan.ep_rules:
        apply_expert_parallelism(model, plan, meshes)
    if recipe.train.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    context = ContextParallel(model, meshes.dense["cp"].get_group()) if plan.sizes.cp > 1 else None
    compute = getattr(torch, recipe.fsdp.param_dtype)
    reduce = getattr(torch, recipe.fsdp.reduce_dtype)
    mixed = MixedPrecisionPolicy(param_dtype=None if compute == torch.float32 else compute, reduce_dtype=reduce)
    for parameter in model.parameters():
        if not parameter.numel():
            # Nothing to train, and FSDP's reduce-scatter takes no empty gradient (torch <= 2.13).
            parameter.requires_grad_(False)
    planned = {param.fqn: _fsdp_dim(param) for param in plan.params}
    dims = {param: planned[fqn] for fqn, param in model.named_parameters()}
    for unit in plan.units:
        modules = [model.get_submodule(name) for name in unit.modules]
        target = modules if len(modules) > 1 else modules[0]
        if unit.experts:
            fully_shard(
                target,
                mesh=meshes.efsdp,
                reshard_after_forward=unit.reshard,
                shard_placement_fn=dims.__getitem__,
                # Routing weights stay in their own dtype, as where experts are gathered with their block.
                mp_policy=replace(mixed, cast_forward_inputs=False),
            )
        else:
            mp_policy = MixedPrecisionPolicy() if unit.fp32 else mixed
            fully_shard(
                target,
                mesh=meshes.fsdp,
                reshard_after_forward=unit.reshard,
                shard_placement_fn=dims.__getitem__,
                mp_policy=mp_policy,
            )
    fully_shard(
        model,
        mesh=meshes.fsdp,
        reshard_after_forward=False,
        shard_placement_fn=dims.__getitem__,
        mp_policy=mixed,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global count of target tokens, so gradients are summed, never averaged.
            # gloo has no PREMUL_SUM, hence the forced plain sum (torch <= 2.13).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return context


def _cut_by_modules(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> set[str]:
    """Let modules that cut their own weights once they are given a mesh do so; returns those parameters.

    As TransformerEngine's `set_device_mesh` does. Raises `PlanError` where one does other than the plan says.
    """
    cut: set[str] = set()
    for param in plan.params:
        name, _, leaf = param.fqn.rpartition(".")
        module = model.get_submodule(name)
        if param.style not in CUTTING or not hasattr(module, "set_device_mesh"):
            continue
        if not isinstance(module.get_parameter(leaf), DTensor):
            cast(Any, module).set_device_mesh(tp_mesh=meshes.tp)
        own = module.get_parameter(leaf)
        found = (tuple(own.shape), own.placements, own.device_mesh) if isinstance(own, DTensor) else tuple(own.shape)
        if found != (param.shape, (param.placements[-1],), meshes.tp):
            raise PlanError(
                f"{plan.model_type}: set_device_mesh of {name} makes {leaf} {found}, but base_model_tp_plan says "
                f"{param.style} of {param.shape}; set mesh.tp = 1"
            )
        cut.add(param.fqn)
    return cut


def _fsdp_dim(param: ParamPlan) -> Shard:
    """What `fully_shard` is told: the dim alone, it knows itself what tp or ep have cut before."""
    over = next(p for a, p in zip(param.axes, param.placements, strict=True) if a in ("fsdp", "efsdp"))
    assert isinstance(over, Shard | _StridedShard)
    return Shard(over.dim)
