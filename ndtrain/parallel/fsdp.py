"""FSDP2: shards every unit of the plan over its mesh. A mesh of one rank takes the same path as all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.placement_types import Placement, Shard

from ndtrain.mesh import Meshes
from ndtrain.plan import ParamPlan, Plan, Unit
from ndtrain.torch_compat import forget_forwards, gather_as_local, in_backward, keep_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_fsdp(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Shard the parameters of `model` (on meta) in place; gradients are then summed, never averaged."""
    for parameter in model.parameters():
        if not parameter.numel():
            # It has nothing to train, and FSDP's reduce-scatter takes no empty gradient (torch <= 2.13).
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
            # Only memory that a device copies from needs to be pinned.
            offload_policy=CPUOffloadPolicy(mesh.device_type != "cpu") if unit.cpu_offload else OffloadPolicy(),
        )
        # A module that cuts its own weights expects them as it has cut them.
        gather_as_local(modules[0], lambda owner: not hasattr(owner, "set_device_mesh"))
        if unit.in_float32:
            keep_in_float32(modules[0], [model.get_parameter(fqn) for fqn in unit.in_float32])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global count of target tokens. gloo has no PREMUL_SUM, hence the forced plain
            # sum (torch <= 2.13).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if plan.sizes.dp_replicate > 1:
        exchange_repeated_at_once(model)


def end_of_forward(model: nn.Module) -> None:
    """Shard all units of `model` again after forwards that no backward follows.

    Units that stay gathered for the backward pass would stay so, and the next one would gather ahead of itself in the
    order of these forwards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    forget_forwards(model)


def exchange_repeated_at_once(model: nn.Module) -> None:
    """Let units that run more than once in a forward pass exchange gradients between replicas after each run.

    FSDP adds up what it defers in one buffer a unit, whatever parameters a run has used (torch <= 2.13): a looped block
    that uses some of them in its later runs alone would get gradients of other parameters, or none.
    """
    ran: set[nn.Module] = set()

    def before(module: nn.Module, args: object) -> None:
        if in_backward():
            return  # recomputed
        if module is model:
            ran.clear()
        elif module in ran:
            cast(FSDPModule, module).set_requires_all_reduce(True, recurse=False)
        ran.add(module)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(before)


def _mixed_precision(unit: Unit) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, unit.param_dtype),
        reduce_dtype=getattr(torch, unit.reduce_dtype),
        output_dtype=getattr(torch, unit.output_dtype) if unit.output_dtype else None,
        cast_forward_inputs=unit.cast_inputs,
    )


def _fsdp_dim(param: ParamPlan) -> Shard:
    """Return the dim that `fully_shard` splits, without strides: it sees for itself what tp or ep have split before."""
    over: Placement = next(p for a, p in zip(param.axes, param.placements, strict=True) if a in ("fsdp", "efsdp"))
    return Shard(over.dim)  # type: ignore[attr-defined]
