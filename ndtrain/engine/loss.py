"""Summed cross-entropy over the target tokens, divided by their global count, without full float32 logits.

Where the model returns its head's output unchanged (`Plan.head`), the loss is computed inside the head, chunk by chunk
(`engine/head.py`). Elsewhere the model's own logits are cast to float32 one chunk at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ndtrain.engine.head import IGNORE, ChunkedLinear, Part, chunk_rows, summed_loss
from ndtrain.hf.routers import RouterLoss, Sequences, wanted
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The style of a head whose ranks have parts of the vocabulary.
_BY_VOCABULARY = "colwise_gather_output"


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of `logits` `[T, V]` against `labels` `[T]` (-100 is ignored), in float32."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


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
        rule = plan.tp_rules.get(plan.head) if plan.head is not None else None
        self._inside_head = plan.head is not None and rule in (None, _BY_VOCABULARY)
        self._labels: Tensor | None = None
        self._scale: Tensor | None = None
        self._targets: Tensor | None = None
        if self._inside_head:
            head = model.get_submodule(cast("str", plan.head))
            part = Part.of(head, tp_group if rule is not None else None)
            project = head.forward

            def loss_in_head(hidden: Tensor) -> Tensor:
                if self._labels is None:
                    return project(hidden)
                own = [p.to_local() if isinstance(p, DTensor) else p for p in (head.weight, head.bias)]
                weight, bias = cast("tuple[Tensor, Tensor | None]", own)
                flat, labels = hidden.reshape(-1, hidden.shape[-1]), self._labels
                if self._targets is not None:
                    flat, labels = flat.index_select(0, self._targets), labels.index_select(0, self._targets)
                if self._scale is None:
                    return summed_loss(flat, labels, part, weight, bias)
                return ChunkedLinear.apply(flat, labels, self._scale, part, weight, bias)

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
        if self._inside_head:
            self._labels, self._scale, self._targets = labels, scale, batch.get("targets")
        try:
            found: Tensor = self.model(**inputs).logits
        finally:
            self._labels = self._scale = self._targets = None
        return found if self._inside_head else self.loss_of(found, labels)

    @staticmethod
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy of `[B, S, V]` logits, in float32 chunk by chunk, recomputed in backward."""
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        flat = logits.reshape(-1, logits.shape[-1])
        rows = chunk_rows(*flat.shape)
        parts = [
            checkpoint(cross_entropy_sum, flat[s : s + rows], labels[s : s + rows], use_reentrant=False)
            for s in range(0, flat.shape[0], rows)
        ]
        return torch.stack(parts).sum()
