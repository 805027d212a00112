"""The optimizers that a recipe can name, on sharded parameters, and their state as named tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ndtrain.engine.adamw import ADAMW_STATE, AdamW
from ndtrain.engine.muon import MUON_STATE, Muon
from ndtrain.engine.rounding import Rounding
from ndtrain.errors import NdtrainError
from ndtrain.layout import local_part
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe

Groups = list[dict[str, Any]]

# Names that the HF Trainer exempts from weight decay (`Trainer.get_decay_parameter_names` of transformers 5.24).
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class Around(NamedTuple):
    """What an optimizer may need beside its groups: `device` computes what is in host memory."""

    recipe: Recipe
    plan: Plan
    device: torch.device
    rounding: Rounding


@dataclass(frozen=True)
class Kind:
    """Describes an optimizer: how it is built from parameter groups, and the tensors that it keeps for each parameter.

    Where its attribute `found_inf` is 1, its `step` changes nothing, as torch's fused kernels do for `GradScaler`.
    `state` returns the names of the tensors for the parameters of a group, each shaped and sharded like its parameter
    and in the group's "state_dtype". The count of updates, `step`, belongs to the run and is not among these tensors.
    """

    build: Callable[[Groups, Around], torch.optim.Optimizer]
    state: Callable[[Mapping[str, Any]], tuple[str, ...]]


def _adamw(groups: Groups, around: Around) -> torch.optim.Optimizer:
    section = around.recipe.optim
    return AdamW(
        groups,
        rounding=around.rounding,
        lr=section.lr,
        betas=(section.betas[0], section.betas[1]),
        eps=section.eps,
        fused=True,
    )


def _muon(groups: Groups, around: Around) -> torch.optim.Optimizer:
    section, plan = around.recipe.optim, around.plan
    return Muon(
        groups,
        {param.fqn: param for param in plan.params if param.fqn in plan.matrices},
        plan.sizes,
        momentum=0.95 if section.momentum is None else section.momentum,
        adjust_lr=section.adjust_lr or "match_rms_adamw",
        betas=(section.betas[0], section.betas[1]),
        eps=section.eps,
        device=around.device,
        rounding=around.rounding,
    )


# Names of `optim.name`
OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, lambda group: ADAMW_STATE),
    "muon": Kind(_muon, lambda group: MUON_STATE if group["matrices"] else ADAMW_STATE),
}


def build_optimizer(model: nn.Module, recipe: Recipe, plan: Plan, device: torch.device) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, which computes on `device` what is in host memory.

    It has one parameter group per device mesh, device, weight decay and peak learning rate ("peak_lr"), and for
    matrices, whose FQNs it has ("matrices"). A fused or foreach kernel cannot mix DTensors of two meshes.
    """
    alike: dict[tuple[DeviceMesh, torch.device, float, float, bool], dict[str, nn.Parameter]] = {}
    section, rounding = recipe.optim, Rounding(recipe.train.seed)
    exempt = set() if section.decay_norms else without_decay(model)
    for fqn, param in _trainable(model):
        assert isinstance(param, DTensor)
        peak, decay = section.lr, 0.0 if fqn in exempt else section.weight_decay
        if fqn in plan.groups:
            own = section.groups[plan.groups[fqn]]
            peak, decay = peak if own.lr is None else own.lr, decay if own.weight_decay is None else own.weight_decay
        key = param.device_mesh, local_part(param).device, decay, peak, fqn in plan.matrices
        alike.setdefault(key, {})[fqn] = param
        rounding.name(fqn, param)
    return OPTIMIZERS[section.name].build(
        [
            {
                "params": list(params.values()),
                "matrices": tuple(params) if matrices else (),
                "weight_decay": decay,
                "lr": peak,
                "peak_lr": peak,
                "state_dtype": getattr(torch, section.state_dtype),
            }
            for (_, _, decay, peak, matrices), params in alike.items()
        ],
        Around(recipe, plan, device, rounding),
    )


def without_decay(model: nn.Module) -> set[str]:
    """Return the FQNs of the parameters that carry no weight decay unless `optim.decay_norms` is set.

    They are those of fewer than two dims (norms, biases, scalars, attention sinks) and those that the HF Trainer
    exempts: in an `nn.LayerNorm`, or with a norm or bias in their names, such as the `[experts, out]` biases of fused
    experts. Embeddings, convolutions and fused experts' weights keep it.
    """
    in_norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    return {
        fqn
        for fqn, param in model.named_parameters()
        if param.dim() < 2 or id(param) in in_norms or _NO_DECAY.search(fqn.lower())
    }


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, kind: Kind) -> dict[str, Tensor]:
    """Return the optimizer's tensors as {"<tensor>.<FQN>": …}, sharded as `kind` says; tied parameters once.

    Makes missing tensors (of a fresh optimizer, or of a parameter never used). Raises `NdtrainError` if a trainable
    parameter is in no parameter group.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    tensors: dict[str, Tensor] = {}
    for fqn, param in _trainable(model):
        if id(param) not in groups:
            raise NdtrainError(
                f"{fqn} is trainable, but in no parameter group of the optimizer; build the optimizer from all "
                "trainable parameters"
            )
        state, group = optimizer.state[param], groups[id(param)]
        if "step" not in state:
            on_device = group.get("fused") or group.get("capturable")
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=param.device if on_device else "cpu")
        for name in kind.state(group):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=group.get("state_dtype"))
            tensors[f"{name}.{fqn}"] = state[name]
    return tensors


def set_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set every parameter's count of updates; call it after the state is loaded."""
    for _, param in _trainable(model):
        state = optimizer.state[param]
        state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(fqn, param) for fqn, param in model.named_parameters() if param.requires_grad]
