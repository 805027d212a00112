"""Tensor parallelism: each matrix cut over the tp ranks, by transformers' own styles and those it lacks."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

# transformers.distributed moves between releases (read at 5.23).
from transformers.distributed import tensor_parallel as styles

from ndtrain.mesh import Meshes
from ndtrain.model import tie
from ndtrain.plan import Plan
from ndtrain.plan.tensor import CUTTING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_tensor_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Cut the parameters of `model` (on meta) over the tp axis and put the exchanges around its modules, in place."""
    # Parameters, then the modules around them; a tied alias gets its parameter from `tie`.
    params = {p.fqn: p.style for p in plan.params if p.style in CUTTING}
    rules = params | {name: style for name, style in plan.tp_rules.items() if name not in params}
    styles.apply_tensor_parallelism(model, meshes.tp, rules)
    tie(model)
    # What these give is a view, whose later in-place change autograd refuses, or would drop FSDP's pre-backward hook
    # without an error (torch 2.13 warns of it).
    views = {"embedding_rowwise", "colwise_gather_output", "conv1d_colwise_gather_output"}
    in_place = re.compile(r"\.(add|mul)_\(|^ *\w+ [+*]= (?!\(|1\b)", re.MULTILINE)
    if in_place.search(inspect.getsource(sys.modules[type(model).__module__])):
        views |= {"rowwise", "rowwise_split_input"}
    units = {name for unit in plan.units for name in unit.modules}
    for name, style in plan.tp_rules.items():
        if name not in params and (style in views or (style in CUTTING and name in units)):
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output.clone())


class _Conv1D:
    """A style of linear layers for transformers' Conv1D, whose weight is `[in, out]`."""

    weight: Placement
    bias: Placement

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        full = module._parameters[param]
        assert full is not None
        placed = distribute_tensor(full, mesh, [getattr(self, param)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(placed, requires_grad=full.requires_grad)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.in_features, module.out_features = module.nx, module.nf
        installed: nn.Module = super().install_forward(module, mesh)  # type: ignore[misc]
        return installed


class _Conv1DColwise(_Conv1D, styles.ColwiseParallel):
    weight, bias = Shard(1), Shard(0)


class _Conv1DRowwise(_Conv1D, styles.RowwiseParallel):
    weight, bias = Shard(0), Replicate()


_CONV1D: dict[str, Any] = {
    "conv1d_colwise": _Conv1DColwise(),
    "conv1d_colwise_gather_output": _Conv1DColwise(output_layouts=Replicate()),
    "conv1d_rowwise": _Conv1DRowwise(),
}
for _name, _style in _CONV1D.items():
    styles.ALL_PARALLEL_STYLES.register(_name, _style)
