"""AdamW's state as named tensors, sharded as the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ndtrain.checkpoint.tensors import load_tensors
from ndtrain.errors import NdtrainError


def _trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its group) of every trainable parameter, tied ones once. NdtrainError if one has no
    group."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in named:
        if id(p) not in groups:
            raise NdtrainError(f"{name} is trainable, but the optimizer does not have it")
    return [(name, p, groups[id(p)]) for name, p in named]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments as {"exp_avg.<name>": …, "exp_avg_sq.<name>": …}, sharded as the parameters.

    State that is missing (a fresh optimizer, a parameter never used) is created as AdamW would: zeros, step
    0.
    """
    tensors: dict[str, Tensor] = {}
    for name, p, group in _trainable(model, optimizer):
        state = optimizer.state[p]
        if "step" not in state:
            on_device = group.get("fused") or group.get("capturable")
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=p.device if on_device else "cpu")
        for kind in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group.get("amsgrad") else ())):
            if kind not in state:
                state[kind] = torch.zeros_like(p, memory_format=torch.preserve_format)
            tensors[f"{kind}.{name}"] = state[kind]
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, *, step: int) -> None:
    """Loads AdamW's moments from a tensor directory and sets every parameter's step; collective.

    Gradients need not be there, and do no harm. DamagedError as load_tensors.
    """
    load_tensors(directory, optimizer_tensors(model, optimizer), all_of_it=True)
    for name, p, _ in _trainable(model, optimizer):
        state = optimizer.state.get(p, {})
        if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise NdtrainError(f"{name} has no optimizer state after loading")
        state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)
