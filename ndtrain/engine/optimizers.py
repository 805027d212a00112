"""AdamW over a sharded model, learning-rate schedules and the mesh-aware gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of `step`, counted from 0.

    Warm-up rises linearly and reaches `optim.lr` at step `warmup_steps - 1`; cosine and linear then fall to
    `min_lr_ratio * lr` at `train.steps`; wsd (warmup, stable, decay: arXiv:2404.06395) stays and falls linearly over
    the last `decay_steps`.
    """
    section, steps, lr = recipe.schedule, recipe.train.steps, recipe.optim.lr
    if step < section.warmup_steps:
        return lr * (step + 1) / section.warmup_steps
    low = section.min_lr_ratio
    done = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    if section.kind == "constant":
        share = 1.0
    elif section.kind == "linear":
        share = low + (1 - low) * (1 - done)
    elif section.kind == "cosine":
        share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = section.decay_steps or min(max(1, steps // 10), steps - section.warmup_steps)
        left = min(1.0, (steps - step) / max(1, decay))
        share = low + (1 - low) * left
    return lr * share


def sum_over_tp(model: nn.Module, fqns: Iterable[str], group: dist.ProcessGroup) -> None:
    """Add up the gradients of replicated parameters of which every tp rank has only its own heads' part.

    Once per step, after the last micro batch, in one all-reduce.
    """
    grads = [model.get_parameter(fqn).grad for fqn in fqns]
    given = [g for g in grads if g is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in given]
    if not local:
        return
    # Gradients in host memory are summed on the device, where the group's collectives are.
    device = given[0].device_mesh.device_type if isinstance(given[0], DTensor) else local[0].device
    flat = torch.cat([g.reshape(-1).to(device) for g in local])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(local, flat.split([g.numel() for g in local]), strict=True):
        grad.copy_(total.view_as(grad))


def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """2-norm of all gradients, over all ranks and meshes; gradients are scaled in place to at most `max_norm`.

    Returns the norm before scaling, a float32 scalar equal on every rank. Replicas count once: a gradient's square is
    summed only over the mesh axes that shard it.
    """
    groups: dict[tuple[DeviceMesh, tuple[bool, ...], torch.device], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = param.grad
            assert isinstance(grad, DTensor)
            cut = tuple(not isinstance(p, Replicate) for p in grad.placements)
            local = grad.to_local()
            groups.setdefault((grad.device_mesh, cut, local.device), []).append(local)
    squares: list[Tensor] = []
    for (mesh, cut, _), grads in groups.items():
        square = torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).square().sum()
        # Of gradients in host memory too: the groups' collectives are the device's.
        square = square.to(mesh.device_type)
        for axis, is_cut in enumerate(cut):
            if is_cut and mesh.size(axis) > 1:
                dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (_, _, device), grads in groups.items():
        torch._foreach_mul_(grads, scale.to(device))
    return norm
