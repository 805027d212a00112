"""Summed cross-entropy over the target tokens, divided by their global count, without full float32 logits.

Where the model returns its head's output unchanged (`Plan.head`), the loss is computed inside the head: it makes the
logits of one chunk of tokens, uses them for loss and gradient, and drops them (the idea of Liger Kernel's fused linear
cross-entropy, arXiv:2410.10989). A head split by the vocabulary keeps its logits split: the tp ranks exchange only the
largest logit, the sum of exponentials and the target's logit of each token (loss parallelism, arXiv:1909.08053).
Elsewhere the model's own logits are cast to float32 one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ndtrain.hf.routers import RouterLoss, Sequences, wanted
from ndtrain.layout import chunk
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100
CHUNK_TOKENS = 1024


def chunk_rows(tokens: int) -> int:
    """Return the rows per chunk: the smaller of `CHUNK_TOKENS` and a quarter of the micro batch."""
    return max(1, min(CHUNK_TOKENS, -(-tokens // 4)))


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of `logits` `[T, V]` against `labels` `[T]` (-100 is ignored), in float32."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


class _SplitCrossEntropy(torch.autograd.Function):
    """Computes `cross_entropy_sum` of logits `[T, V]` of which this rank has `[T, V/tp]`, from column `start` on."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, start: int, group: dist.ProcessGroup
    ) -> Tensor:
        logits = logits.float()
        width = logits.shape[1]
        largest = logits.amax(dim=1) if width else logits.new_full((len(labels),), -torch.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest[:, None]).exp_()
        is_own = (labels >= start) & (labels < start + width)
        column = torch.where(is_own, labels - start, 0)
        target = logits.gather(1, column[:, None])[:, 0] * is_own if width else torch.zeros_like(largest)
        sums = torch.stack([exponentials.sum(dim=1), target])
        dist.all_reduce(sums, group=group)
        # The gradient is the softmax less 1 at the target; it is 0 where the label is ignored.
        counted = (labels != IGNORE).float()
        gradient = exponentials.mul_((counted / sums[0])[:, None])
        if width:
            gradient.scatter_add_(1, column[:, None], -(is_own.float())[:, None])
        ctx.save_for_backward(gradient)
        return ((sums[0].log() + largest - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


class ChunkedHead(torch.autograd.Function):
    """Computes the loss and all its gradients in one pass over chunks of tokens; no logits outlive their chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        scale: Tensor,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        group: dist.ProcessGroup | None,
        *weights: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grads: list[Tensor | None] = [None] * len(weights)
        rows = chunk_rows(hidden.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(part, labels[start : start + rows])
                grads = torch.autograd.grad(loss * scale, [part, *weights])
            total += loss.detach()
            hidden_grad[start : start + rows] = grads[0]
            for i, grad in enumerate(grads[1:]):
                # Chunks are added in float32, so that their number does not change the gradient of a bf16 head.
                weight_grads[i] = grad.float() if weight_grads[i] is None else weight_grads[i].add_(grad)  # type: ignore[union-attr]
        if group is not None:
            dist.all_reduce(hidden_grad, group=group)
        ctx.grads = [
            hidden_grad,
            *(g.to(w.dtype) for g, w in zip(weight_grads, weights, strict=True) if g is not None),
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The gradients already carry the scale of the loss, so that backward runs on the plain sum.
        hidden_grad, *weight_grads = ctx.grads
        ctx.grads = None
        return hidden_grad, None, None, None, None, *weight_grads


class LossModel:
    """Holds a model and its loss: `backward` runs one micro batch and adds to the gradients.

    With `pass_positions` the model gets each document's own positions, which packed rows need; without, it counts them
    itself, which is right for rows of one document.

    The gradient is that of the summed cross-entropy times `scales[0]`, 1 / the number of target tokens of the global
    batch, so that gradients summed over ranks and micro batches are those of the mean loss. Where the model's config
    asks for a router's auxiliary loss, its sum times `scales[1]`, 1 / the number of sequences of the global batch, and
    times the config's coefficient, is added; `cp_group` holds the ranks that have parts of the same sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        *,
        pass_positions: bool,
        tp_group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup | None = None,
    ):
        self.model = model
        self.pass_positions = pass_positions
        self.router = RouterLoss(model, cp_group) if wanted(model) else None
        self._inside_head = plan.head is not None
        self._labels: Tensor | None = None
        self._scale: Tensor | None = None
        if plan.head is not None:
            head = model.get_submodule(plan.head)
            project = head.forward
            # None where the head is whole on every tp rank, or tp is 1.
            group = tp_group if plan.tp_rules.get(plan.head) == "colwise_gather_output" else None

            def loss_of_part(hidden: Tensor, labels: Tensor) -> Tensor:
                if group is None:
                    return cross_entropy_sum(project(hidden), labels)
                weights = [p if p is None else cast(DTensor, p).to_local() for p in (head.weight, head.bias)]
                start, _ = chunk(cast(Tensor, head.weight).shape[0], group.size(), group.rank())
                return _SplitCrossEntropy.apply(F.linear(hidden, *weights), labels, start, group)

            def loss_in_head(hidden: Tensor) -> Tensor:
                if self._labels is None:
                    return project(hidden)
                flat = hidden.reshape(-1, hidden.shape[-1])
                if not torch.is_grad_enabled():
                    rows = chunk_rows(flat.shape[0])
                    parts = zip(flat.split(rows), self._labels.split(rows), strict=True)
                    return torch.stack([loss_of_part(*part) for part in parts]).sum()
                assert self._scale is not None
                weights = list(head.parameters(recurse=False))
                return ChunkedHead.apply(flat, self._labels, self._scale, loss_of_part, group, *weights)

            head.forward = loss_in_head  # type: ignore[method-assign]

    def backward(self, batch: dict[str, Tensor], *, scales: Tensor, sequences: Sequences | None = None) -> Tensor:
        """Run forward and backward on one micro batch of int64 `[B, S]` input_ids, shifted labels, and position_ids.

        `scales` is float32 `[2]` on the device. `sequences` is needed where there is an auxiliary loss. Returns two
        detached sums in float32: of the cross-entropy of this micro batch's targets, and of the auxiliary loss (without
        its coefficient) of its sequences, 0 where there is none.
        """
        loss = self._loss(batch, scales[0])
        target = loss if self._inside_head else loss * scales[0]
        auxiliary = torch.zeros_like(loss)
        if self.router is not None:
            assert sequences is not None
            auxiliary = self.router(sequences)
            # One backward pass for both losses, because recomputed blocks contribute to both.
            target = target + auxiliary * (self.router.coefficient * scales[1])
        target.backward()
        return torch.stack([loss.detach(), auxiliary.detach()])

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of a micro batch's targets, in float32; the model's mode is the caller's."""
        loss = self._loss(batch)
        if self.router is not None:
            self.router.forget()
        return loss

    def _loss(self, batch: dict[str, Tensor], scale: Tensor | None = None) -> Tensor:
        """Return the summed cross-entropy; where it is computed inside the head, its gradients get `scale` there."""
        labels = batch["labels"].reshape(-1)
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if self.pass_positions:
            inputs["position_ids"] = batch["position_ids"]
        if not self._inside_head:
            return self.loss_of(self.model(**inputs).logits, labels)
        self._labels, self._scale = labels, scale
        try:
            loss: Tensor = self.model(**inputs).logits
            return loss
        finally:
            self._labels = self._scale = None

    @staticmethod
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy of `[B, S, V]` logits, in float32 chunk by chunk, recomputed in backward."""
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        flat = logits.reshape(-1, logits.shape[-1])
        rows = chunk_rows(flat.shape[0])
        parts = [
            checkpoint(cross_entropy_sum, flat[s : s + rows], labels[s : s + rows], use_reentrant=False)
            for s in range(0, flat.shape[0], rows)
        ]
        return torch.stack(parts).sum()
