"""What the ranks of a tp group exchange inside a block, on plain tensors, with gradients.

Nothing here returns a view of a buffer: FSDP and later modules may hook a result, or change it in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.layout import chunk

# Their names until torch 2.12.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sum(torch.autograd.Function):
    """Adds up the ranks' partial sums `[...]` on every rank; the gradients of the ranks are equal.

    With `in_place`, which is for a contiguous tensor that nothing else uses, it becomes the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, in_place: bool) -> Tensor:  # type: ignore[override]
        if in_place:
            ctx.mark_dirty(x)
        else:
            x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


class SumOfGradients(torch.autograd.Function):
    """Passes on `[...]`, the same on every rank, and adds up its gradients, which are partial sums.

    With `in_place`, where only matrices are multiplied with the result, the gradient becomes the sum: nothing else has
    it. Other operations may hand one gradient to several.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, in_place: bool) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.in_place = group, in_place
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = grad.contiguous() if ctx.in_place else grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


class SumOfLastGradients(torch.autograd.Function):
    """Passes on `[..., H]`, the same on every rank, and adds up the gradients of its last `width` features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.width, ctx.group = width, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        last = grad[..., -ctx.width :].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(last, group=ctx.group)
        return torch.cat([grad[..., : -ctx.width], last], dim=-1), None, None


class GatherFeatures(torch.autograd.Function):
    """Gathers `[..., part]` of every rank into `[..., width]`; the gradients of the ranks are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _gathered_features(x, width, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _own_features(grad, ctx.group), None, None


class SplitFeatures(torch.autograd.Function):
    """Takes this rank's `[..., part]` of `[..., width]`, which is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.width, ctx.group = x.shape[-1], group
        return _own_features(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gathered_features(grad, ctx.width, ctx.group), None


class GatherRows(torch.autograd.Function):
    """Gathers `[1, L, ...]` of every rank into the tokens `[B, S, ...]`; gradients are equal, or `partial` sums."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, rows: int, length: int, group: dist.ProcessGroup, partial: bool
    ) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return _gathered_rows(x, rows, length, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _own_rows(grad, ctx.group, partial=ctx.partial), None, None, None, None


class ScatterRows(torch.autograd.Function):
    """Takes this rank's `[1, L, ...]` of the tokens `[B, S, ...]`, equal on every rank or a `partial` sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.rows, ctx.length = group, x.shape[0], x.shape[1]
        return _own_rows(x, group, partial=partial)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gathered_rows(grad, ctx.rows, ctx.length, ctx.group), None, None


def replaced(change: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """Return the arguments with `change` applied to the first positional one, or else to the keyword `name`."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def _own_features(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    start, end = chunk(x.shape[-1], group.size(), group.rank())
    return x[..., start:end].clone(memory_format=torch.contiguous_format)


def _gathered_features(x: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    most = -(-width // ranks)
    if x.shape[-1] < most:  # the last parts may be short
        x = nn.functional.pad(x, (0, most - x.shape[-1]))
    parts = x.new_empty((ranks, *x.shape))
    all_gather(parts.flatten(0, 1) if x.ndim > 1 else parts.flatten(), x.contiguous(), group=group)
    whole = torch.cat(parts.unbind(), dim=-1)
    return whole if whole.shape[-1] == width else whole[..., :width].clone(memory_format=torch.contiguous_format)


def _own_rows(x: Tensor, group: dist.ProcessGroup, *, partial: bool) -> Tensor:
    """Return the rank's part of all tokens as a row, padded with zeros at their end where the ranks do not divide."""
    ranks, (rows, length, *rest) = group.size(), x.shape
    padding = -rows * length % ranks
    if padding:
        x = nn.functional.pad(x.flatten(0, 1), (*(0, 0) * len(rest), 0, padding))
    parts = x.reshape(ranks, (rows * length + padding) // ranks, *rest)
    if not partial:
        rank = group.rank()
        return parts[rank : rank + 1].clone(memory_format=torch.contiguous_format)
    out = x.new_empty((1, *parts.shape[1:]))
    reduce_scatter(out, parts.contiguous(), group=group)
    return out


def _gathered_rows(x: Tensor, rows: int, length: int, group: dist.ProcessGroup) -> Tensor:
    ranks, (_, own, *rest) = group.size(), x.shape
    divides = rows * length == ranks * own
    whole = x.new_empty((rows, length, *rest) if divides else (ranks, own, *rest))
    all_gather(whole.view(ranks, own, *rest), x.contiguous(), group=group)
    return whole if divides else whole.flatten(0, 1)[: rows * length].unflatten(0, (rows, length)).clone()
