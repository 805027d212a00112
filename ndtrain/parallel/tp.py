"""Tensor parallelism: splits each matrix over the tp ranks, and puts around each module what its style exchanges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ndtrain.errors import PlanError
from ndtrain.hf.model import tie
from ndtrain.mesh import Meshes
from ndtrain.parallel.exchange import SumOfGradients, replaced
from ndtrain.parallel.styles import STYLES, Around, only_multiplies
from ndtrain.plan import Plan
from ndtrain.plan.tensor import CUTTING
from ndtrain.torch_compat import own_parameter, put_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_tensor_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Split the parameters of `model` (on meta) over the tp axis and put the exchanges around its modules, in place.

    The parameters become DTensors, which FSDP shards further and gathers as plain tensors of this rank's part.
    """
    group, text = meshes.tp.get_group(), model.config.get_text_config()
    modules = dict(model.named_modules())
    for region in plan.tp_shared:
        in_place = all(only_multiplies(modules[name]) for name in region.columns)
        hook = _sum_gradients(region.takes, group, in_place=in_place)
        modules[region.name].register_forward_pre_hook(hook, with_kwargs=True)
    regions = [region for region in (plan.sequence.regions if plan.sequence else ()) if region.row]
    given = {name for region in (*regions, *plan.tp_shared) for name in region.columns}
    parts = {region.row for region in regions}
    kept = plan.recomputation is not None and plan.recomputation.kind == "selective"
    for name, style in plan.tp_rules.items():
        if name in modules:
            module = cast(Any, modules[name])
            module.forward = STYLES[style](module, Around(group, text, name in given, name in parts, kept))
    cut = {p.fqn for p in plan.params if p.style in CUTTING}
    by_modules = _cut_by_modules(model, plan, meshes)
    for param in plan.params:
        if param.fqn in cut - by_modules:
            name, _, leaf = param.fqn.rpartition(".")
            module = model.get_submodule(name)
            full = own_parameter(module, leaf)
            assert full is not None
            placed = distribute_tensor(full, meshes.tp, [param.placements[-1]], src_data_rank=None)
            put_parameter(module, leaf, nn.Parameter(placed, requires_grad=full.requires_grad))
    tie(model)


def _sum_gradients(takes: str, group: dist.ProcessGroup, *, in_place: bool) -> Any:
    """Return a hook that adds up the gradients of a module's argument `takes`."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replaced(lambda x: SumOfGradients.apply(x, group, in_place), args, kwargs, takes)

    return hook


def _cut_by_modules(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> set[str]:
    """Let modules that shard their own weights, such as TransformerEngine's, do so; return the FQNs of these weights.

    Such modules have a method `set_device_mesh`. Raises `PlanError` where the result differs from the plan.
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
                f"{plan.model_type}: set_device_mesh of {name} lays out {leaf} as {found}, but base_model_tp_plan asks "
                f"for {param.style} of {param.shape}; set mesh.tp = 1"
            )
        cut.add(param.fqn)
    return cut
