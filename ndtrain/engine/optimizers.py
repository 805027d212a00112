"""Optimizers for sharded parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ndtrain.layout import local_part
from ndtrain.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with one parameter group per device mesh and device: a fused kernel cannot mix DTensors of two."""
    groups: dict[tuple[DeviceMesh, torch.device], list[nn.Parameter]] = {}
    for param in model.parameters():
        if param.requires_grad:
            assert isinstance(param, DTensor)
            groups.setdefault((param.device_mesh, local_part(param).device), []).append(param)
    section = recipe.optim
    return torch.optim.AdamW(
        [{"params": params} for params in groups.values()],
        lr=section.lr,
        betas=(section.betas[0], section.betas[1]),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )
