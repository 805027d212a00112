"""The loss inside a model's head: no logits of more than one chunk of tokens exist at any time.

A chunk's logits become its loss and, in place, their own gradient, which is used at once and dropped (the idea of Liger
Kernel's fused linear cross-entropy, arXiv:2410.10989). A head split by the vocabulary keeps its logits split: the tp
ranks exchange only the largest logit, the sum of exponentials and the target's logit of each token (loss parallelism,
arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ndtrain.layout import chunk

IGNORE = -100
# Bytes of a chunk's logits in float32. A chunk of few rows reads and writes the head's whole gradient for little.
CHUNK_BYTES = 512 << 20


def chunk_rows(tokens: int, width: int) -> int:
    """Return the rows of logits `[tokens, width]` in a chunk: `CHUNK_BYTES`, but at most a quarter of many rows."""
    return max(1, min(CHUNK_BYTES // (4 * max(1, width)), max(256, -(-tokens // 4))))


class Part(NamedTuple):
    """The columns of the logits that this rank has, from `start` on; the other ranks of `group` have the others.

    `width` is the most columns that one of them has: all make equal chunks of it.
    """

    width: int
    start: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, head: nn.Module, group: dist.ProcessGroup | None) -> Part:
        weight = head.weight
        assert isinstance(weight, Tensor)
        if group is None:
            return cls(weight.shape[0])
        return cls(-(-weight.shape[0] // group.size()), chunk(weight.shape[0], group.size(), group.rank())[0], group)


def loss_in_place(logits: Tensor, labels: Tensor, part: Part, *, scale: Tensor | None = None) -> Tensor:
    """Return the summed cross-entropy of float32 `logits` `[T, V]` against `labels` `[T]`, of which -100 are ignored.

    With `scale`, `logits` become its gradient times `scale`; else they are of no use afterwards. Where ranks have parts
    of the columns, all return the whole loss; collective over `part.group`.
    """
    width, group = logits.shape[1], part.group
    largest = logits.amax(dim=1) if width else logits.new_full((len(labels),), -torch.inf)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    is_own = (labels >= part.start) & (labels < part.start + width)
    column = torch.where(is_own, labels - part.start, 0)[:, None]
    logits.sub_(largest[:, None])
    target = logits.gather(1, column)[:, 0] * is_own if width else torch.zeros_like(largest)
    sums = torch.stack([logits.exp_().sum(dim=1), target])
    if group is not None:
        dist.all_reduce(sums, group=group)
    counted = labels != IGNORE
    if scale is not None and width:
        # The softmax less 1 at the target; 0 where the label is ignored.
        logits.mul_((counted * scale / sums[0])[:, None])
        logits.scatter_add_(1, column, -(is_own * scale)[:, None])
    return ((sums[0].log() - sums[1]) * counted).sum()


def summed_loss(hidden: Tensor, labels: Tensor, part: Part, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the loss that `ChunkedLinear` computes, where no gradient is wanted."""
    rows = chunk_rows(hidden.shape[0], part.width)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for of, own in zip(hidden.split(rows), labels.split(rows), strict=True):
        total += loss_in_place(F.linear(of, weight, bias).float(), own, part)
    return total


class ChunkedLinear(torch.autograd.Function):
    """Computes the summed loss of a linear head, and its gradients times `scale`, in one pass over chunks of tokens.

    Takes hidden states `[T, H]`, labels `[T]`, and this rank's part of the head's weight `[V, H]` and bias `[V]`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, labels: Tensor, scale: Tensor, part: Part, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        # Chunks are added in float32, so that their number does not change the gradient of a bf16 head.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        rows = chunk_rows(hidden.shape[0], part.width)
        for of, own, grad in zip(hidden.split(rows), labels.split(rows), hidden_grad.split(rows), strict=True):
            logits = F.linear(of, weight, bias).float()
            total += loss_in_place(logits, own, part, scale=scale)
            if bias_grad is not None:
                bias_grad += logits.sum(dim=0)
            gradient = logits.to(of.dtype)
            torch.mm(gradient, weight, out=grad)
            if of.dtype == torch.float32:
                torch.addmm(weight_grad, gradient.T, of, out=weight_grad)
            else:
                weight_grad += gradient.T @ of
        if part.group is not None:
            dist.all_reduce(hidden_grad, group=part.group)
        ctx.grads = [
            hidden_grad,
            weight_grad.to(weight.dtype),
            bias_grad if bias is None else bias_grad.to(bias.dtype),  # type: ignore[union-attr]
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The gradients already carry the scale of the loss, so that backward runs on the plain sum.
        hidden_grad, weight_grad, bias_grad = ctx.grads
        ctx.grads = None
        return hidden_grad, None, None, None, weight_grad, bias_grad
