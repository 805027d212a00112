"""The optimizers that a recipe can name, on sharded parameters, and their state as named tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from ndtrain.errors import NdtrainError
from ndtrain.layout import local_part
from ndtrain.recipe import Recipe

Groups = list[dict[str, Any]]

# Names that the HF Trainer exempts from weight decay (`Trainer.get_decay_parameter_names` of transformers 5.24).
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class Kind:
    """Describes an optimizer: how it is built from parameter groups, and the tensors that it keeps for each parameter.

    `state` maps the name of each tensor to a function that makes it, correctly sharded, for a parameter that has none
    yet. The count of updates, `step`, belongs to the run and is not among these tensors. `heeds_found_inf` says that
    its `step` changes nothing where its attribute `found_inf` is 1, as torch's fused kernels do for `GradScaler`; for
    others the host has to read it.
    """

    build: Callable[[Groups, Recipe], torch.optim.Optimizer]
    state: Mapping[str, Callable[[Tensor], Tensor]]
    heeds_found_inf: bool


def _as_parameter(param: Tensor) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


class _AdamW(torch.optim.AdamW):
    """Torch's AdamW, whose kernel gets this rank's parts: for DTensors it takes the host as long as a few layers."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states = [self.state[param] for param in params]
            for param, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                    state["exp_avg"], state["exp_avg_sq"] = _as_parameter(param), _as_parameter(param)
            adam(
                [local_part(param) for param in params],
                [local_part(param.grad) for param in params],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                decoupled_weight_decay=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _adamw(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    section = recipe.optim
    return _AdamW(
        groups,
        lr=section.lr,
        betas=(section.betas[0], section.betas[1]),
        eps=section.eps,
        fused=True,
    )


# Names of `optim.name`
OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, {"exp_avg": _as_parameter, "exp_avg_sq": _as_parameter}, heeds_found_inf=True)
}


def build_optimizer(model: nn.Module, recipe: Recipe, groups: Mapping[str, int]) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; `groups` maps FQNs of parameters to their group among `[[optim.groups]]`.

    It has one parameter group per device mesh, device, weight decay and peak learning rate ("peak_lr"). A fused or
    foreach kernel cannot mix DTensors of two meshes.
    """
    alike: dict[tuple[DeviceMesh, torch.device, float, float], list[nn.Parameter]] = {}
    section = recipe.optim
    exempt = set() if section.decay_norms else without_decay(model)
    for fqn, param in _trainable(model):
        assert isinstance(param, DTensor)
        peak, decay = section.lr, 0.0 if fqn in exempt else section.weight_decay
        if fqn in groups:
            own = section.groups[groups[fqn]]
            peak, decay = peak if own.lr is None else own.lr, decay if own.weight_decay is None else own.weight_decay
        alike.setdefault((param.device_mesh, local_part(param).device, decay, peak), []).append(param)
    return OPTIMIZERS[section.name].build(
        [
            {"params": params, "weight_decay": decay, "lr": peak, "peak_lr": peak}
            for (_, _, decay, peak), params in alike.items()
        ],
        recipe,
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
        for name, make in kind.state.items():
            if name not in state:
                state[name] = make(param)
            tensors[f"{name}.{fqn}"] = state[name]
    return tensors


def set_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set every parameter's count of updates; call it after the state is loaded."""
    for _, param in _trainable(model):
        state = optimizer.state[param]
        state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(fqn, param) for fqn, param in model.named_parameters() if param.requires_grad]
