"""Compute the auxiliary loss of mixture-of-experts routers, which makes experts with many tokens less likely.

It is the loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6) as in transformers'
`load_balancing_loss_func`, computed for each sequence and averaged over the sequences of the global batch, so that
neither mesh nor accumulation changes it. A sequence is a whole row of the batch, even if it packs several documents.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ndtrain.errors import PlanError
from ndtrain.hf.compat import recorded_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sequences:
    """Holds the sequence to which each token of this rank's micro batch belongs.

    `ids` has one entry per token, in the order in which the model sees them: the number of its sequence from 0 to
    `rows` - 1, or a negative number for padding.
    """

    ids: Tensor
    rows: int


def expert_count(config: object) -> int:
    """Return the number of experts in a layer by the config; 0 where it has none or does not say."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def sequence_ids(labels: Tensor) -> Tensor:
    """Return `[B, S]` row numbers, -100 for padding, from (already shifted) labels `[B, S]`.

    Padding is everything after the token that a row's last label names; a row without labels is all padding.
    """
    positions = torch.arange(labels.shape[1], device=labels.device)
    last = positions.where(labels >= 0, -2).amax(dim=1, keepdim=True)
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None]
    return rows.where(positions <= last + 1, -100)


def sequence_count(labels: Tensor) -> int:
    """Return the number of rows of labels `[B, S]` that have a label."""
    return int((labels >= 0).any(dim=1).sum())


def auxiliary_loss(
    logits: tuple[Tensor, ...], sequences: Sequences, *, top_k: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the sum of the auxiliary losses of this micro batch's sequences, from each router's logits `[T, E]`.

    If the ranks of `group` hold parts of the sequences, each returns the share of its tokens. The shares add up to the
    loss and their gradients to its gradient, since the counts of chosen experts have no gradient.
    """
    experts = logits[0].shape[-1]
    member = F.one_hot(sequences.ids.reshape(-1).clamp(min=-1) + 1, sequences.rows + 1)[:, 1:].T.float()  # [B, T]
    chosen = member.new_zeros(sequences.rows, experts, dtype=torch.float64)
    likely = member.new_zeros(sequences.rows, experts)
    for layer_logits in logits:
        flat = layer_logits.reshape(-1, experts)
        # The checkpoint keeps only the logits for backward, which the model holds anyway.
        likely = likely + checkpoint(_probabilities, flat, member, use_reentrant=False, preserve_rng_state=False)
        with torch.no_grad():
            picks = flat.float().softmax(dim=-1).topk(top_k, dim=-1).indices
            chosen += member @ member.new_zeros(flat.shape).scatter_(1, picks, 1.0)
    if group is not None:
        dist.all_reduce(chosen, group=group)
    tokens = (chosen.sum(dim=1) / top_k).clamp(min=1)  # of all layers
    weights = experts * chosen / tokens[:, None] ** 2
    return (weights.float() * likely).sum()


def _probabilities(logits: Tensor, member: Tensor) -> Tensor:
    """Return `[B, E]`: the experts' probabilities summed over each sequence's tokens."""
    return member @ logits.float().softmax(dim=-1)


class RouterLoss:
    """Removes the routers' logits from every output of `model` and computes the auxiliary loss from them."""

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup | None):
        self.coefficient, self.top_k = _settings(model)
        self._group = group
        self._logits: tuple[Tensor, ...] = ()
        model.base_model.register_forward_hook(self._take)

    def _take(self, module: nn.Module, args: Any, output: Any) -> None:
        self._logits = output.router_logits
        # Without them the model does not compute its own loss, which is over the whole micro batch.
        output.router_logits = None

    def forget(self) -> None:
        """Free the logits of a forward whose auxiliary loss nobody wants."""
        self._logits = ()

    def __call__(self, sequences: Sequences) -> Tensor:
        """Return the sum of the auxiliary losses of the sequences of the last forward."""
        logits, self._logits = self._logits, ()
        return auxiliary_loss(logits, sequences, top_k=self.top_k, group=self._group)


def wanted(model: PreTrainedModel) -> bool:
    """Return whether the model's config asks for the auxiliary loss."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def router_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the modules whose output transformers records as the router's logits."""
    recorders = recorded_outputs(model, "router_logits")
    kinds = tuple(kind for r in recorders if isinstance(kind := getattr(r, "target_class", r), type))
    return tuple(name for name, module in model.named_modules() if isinstance(module, kinds))


def check(model: PreTrainedModel) -> None:
    """Raise `PlanError` if `model` has no auxiliary loss, or one that differs from `auxiliary_loss`."""
    what, way_out = model.config.model_type, "set model.config.output_router_logits = false"
    theirs = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if theirs is None:
        raise PlanError(f"{what} records its router's logits but has no auxiliary loss; {way_out}")
    if not _is_ours(theirs):
        raise PlanError(
            f"{what} has an auxiliary loss that differs from transformers' load_balancing_loss_func and is not "
            f"supported; {way_out}"
        )
    if not router_names(model):
        raise PlanError(f"{what} of this config has no router, so there is no auxiliary loss; {way_out}")
    if None in _settings(model):
        raise PlanError(
            f"{what} does not give the coefficient of its auxiliary loss, or the number of experts per token; {way_out}"
        )


def _settings(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the loss's coefficient and the number of experts per token; None for what the model does not give."""
    found = []
    for names in (("router_aux_loss_coef", "aux_loss_coef"), ("num_experts_per_tok",)):
        holders = (model, model.config.get_text_config())
        values = (getattr(holder, name, None) for holder in holders for name in names)
        found.append(next((value for value in values if value is not None), None))
    return found[0], found[1]


def _is_ours(theirs: Any) -> bool:
    """Return whether a model file's `load_balancing_loss_func` equals `auxiliary_loss` on an example with padding."""
    logits = tuple(torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)))
    mask = (torch.arange(12) < 9).long()[None]
    try:
        want = theirs(logits, 6, 2, mask)
    except Exception:
        return False
    ours = auxiliary_loss(logits, Sequences(mask - 1, rows=1), top_k=2)
    return torch.allclose(torch.as_tensor(want, dtype=torch.float32), ours, rtol=1e-4)
