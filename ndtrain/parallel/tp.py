"""Tensor parallelism: splits each matrix over the tp ranks, by transformers' own styles and those it lacks."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ndtrain.errors import PlanError
from ndtrain.hf.compat import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel
from ndtrain.hf.compat import apply_tensor_parallelism as transformers_apply
from ndtrain.hf.model import tie
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan
from ndtrain.plan.tensor import CUTTING
from ndtrain.torch_compat import own_parameter, put_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_tensor_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Split the parameters of `model` (on meta) over the tp axis and put the exchanges around its modules, in place."""
    # Rules for parameters, then for the modules around them; a tied alias gets its parameter from `tie`.
    params = {p.fqn: p.style for p in plan.params if p.style in CUTTING}
    cut = _cut_by_modules(model, plan, meshes)
    rules = {name: style for name, style in params.items() if name not in cut}
    rules |= {name: style for name, style in plan.tp_rules.items() if name not in params}
    for region in plan.sequence.regions if plan.sequence else ():
        if region.row:
            rules |= {**dict.fromkeys(region.columns, "colwise_in_region"), region.row: "rowwise_in_region"}
    transformers_apply(model, meshes.tp, rules)
    tie(model)
    # These return a view of DTensor's output, and autograd refuses a later in-place change of such a view.
    views = {"embedding_rowwise", "colwise_gather_output", "conv1d_colwise_gather_output"}
    if _works_in_place(model):
        views |= {"rowwise", "rowwise_split_input"}
    units = {name for unit in plan.units for name in unit.modules}
    for name, style in plan.tp_rules.items():
        if name not in params and (style in views or (style in CUTTING and name in units)):
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output.clone())


def _works_in_place(model: PreTrainedModel) -> bool:
    """Return whether the source of `model` changes a tensor in place."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    return re.search(r"\.(add|mul)_\(|^ *\w+ [+*]= (?!\(|1\b)", source, re.MULTILINE) is not None


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


class _Conv1D:
    """Adapts a style for linear layers to transformers' Conv1D, whose weight is `[in, out]`."""

    weight: Placement
    bias: Placement

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        full = own_parameter(module, param)
        assert full is not None
        placed = distribute_tensor(full, mesh, [getattr(self, param)], src_data_rank=None)
        put_parameter(module, param, nn.Parameter(placed, requires_grad=full.requires_grad))

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.in_features, module.out_features = module.nx, module.nf
        installed: nn.Module = super().install_forward(module, mesh)  # type: ignore[misc]
        return installed


class _Conv1DColwise(_Conv1D, ColwiseParallel):
    weight, bias = Shard(1), Shard(0)


class _Conv1DRowwise(_Conv1D, RowwiseParallel):
    weight, bias = Shard(0), Replicate()


class _ColwiseInRegion(ColwiseParallel):
    """Leaves a region's input to `SequenceParallel`, which gathers it and reduces its gradient once for all layers."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        return args, kwargs


class _RowwiseInRegion(RowwiseParallel):
    """Returns this rank's part of a sum, which `SequenceParallel` adds up; only rank 0 adds the bias."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        return args, kwargs

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        bias = own_parameter(module, "bias")
        if bias is None:
            return output
        return output + cast(DTensor, bias).to_local() * float(mesh.get_local_rank() == 0)


_STYLES: dict[str, Any] = {
    "colwise_in_region": _ColwiseInRegion(),
    "rowwise_in_region": _RowwiseInRegion(),
    "conv1d_colwise": _Conv1DColwise(),
    "conv1d_colwise_gather_output": _Conv1DColwise(output_layouts=Replicate()),
    "conv1d_rowwise": _Conv1DRowwise(),
}
for _name, _style in _STYLES.items():
    ALL_PARALLEL_STYLES.register(_name, _style)
