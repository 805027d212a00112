"""Gradients over all ranks and meshes: completed over tp, their norm, and clipping."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate

from ndtrain.torch_compat import foreach_mul_, foreach_norm


@torch.no_grad()
def sum_over_tp(params: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum over tp the gradients of replicated parameters, of which every rank has only the part of its own heads.

    Call it once per step, after the last micro batch; it is one all-reduce.
    """
    found = [p.grad for p in params if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    if not local:
        return
    # Gradients in host memory are summed on the device, because the group's collectives run there.
    device = found[0].device_mesh.device_type if isinstance(found[0], DTensor) else local[0].device
    flat = torch.cat([g.reshape(-1).to(device) for g in local])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(local, flat.split([g.numel() for g in local]), strict=True):
        grad.copy_(total.view_as(grad))


@torch.no_grad()
def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their 2-norm over all ranks and meshes is at most `max_norm`.

    Returns the norm before scaling, a float32 scalar equal on every rank. Replicas count once: a gradient's square is
    summed only over the mesh axes that shard it.
    """
    groups: dict[tuple[DeviceMesh, tuple[bool, ...], torch.device], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = param.grad
            assert isinstance(grad, DTensor)
            local = grad.to_local()
            groups.setdefault((grad.device_mesh, _cut(grad.placements), local.device), []).append(local)
    squares: list[Tensor] = []
    for (mesh, cut, _), grads in groups.items():
        square = torch.stack(foreach_norm(grads, 2.0, dtype=torch.float32)).square().sum()
        # Gradients may be in host memory, but the groups' collectives run on the device.
        square = square.to(mesh.device_type)
        for axis, is_cut in enumerate(cut):
            if is_cut and mesh.size(axis) > 1:
                dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (_, _, device), grads in groups.items():
        foreach_mul_(grads, scale.to(device))
    return norm


@cache
def _cut(placements: tuple[Placement, ...]) -> tuple[bool, ...]:
    """Return which axes of a mesh cut a tensor of these placements."""
    return tuple(not isinstance(p, Replicate) for p in placements)
