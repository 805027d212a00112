"""Gather sequences that are split over the ranks of a group, with their gradients.

Where the ranks do not divide a sequence, it is padded with zeros at its end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.parallel.exchange import all_gather, reduce_scatter


class Gather(torch.autograd.Function):
    """Gathers `[B, L, ...]` of every rank into `[B, S, ...]`; the ranks' gradients are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _gathered(x, length, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _summed_part(grad, ctx.group), None, None


def _summed_part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    padding = -x.shape[1] % ranks
    padded = nn.functional.pad(x, (*(0, 0) * (x.ndim - 2), 0, padding)) if padding else x
    parts = padded.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    out = torch.empty_like(parts[0])
    reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


def _gathered(x: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    parts = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    all_gather(parts, x.contiguous(), group=group)
    # Never a view: FSDP and later modules may hook it or change it in place.
    whole = torch.cat(parts.chunk(group.size()), dim=1)
    return whole if whole.shape[1] == length else whole[:, :length].clone()
