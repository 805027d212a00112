"""Attention by documents: packed documents attend one after another, so that no mask `[S, S]` keeps them apart.

A row of n documents of S/n tokens costs 1/n of the attention that it costs under a mask, and a causal call without a
mask takes a faster kernel. Masks that models make for other reasons, such as windows, are cut to each document. Works
on CPU, where a call for each document costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndtrain.errors import PlanError
from ndtrain.hf.attention import chooses_keys
from ndtrain.hf.attention_functions import own_attention, take_attention
from ndtrain.hf.compat import ALL_MASK_ATTENTION_FUNCTIONS, attention_name, documents_given
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_RELATIVE = {"full_attention", "sliding_attention"}


class AttentionByDocuments:
    """Lets every module of `model` that uses its attention function attend within documents, inside `given`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.enabled = model, True
        self.base = str(attention_name(model.config))
        self._bounds: list[list[int]] | None = None
        take_attention(model, self._attention, ALL_MASK_ATTENTION_FUNCTIONS[self.base])

    @contextmanager
    def given(self, documents: Tensor) -> Iterator[None]:
        """Keep these documents `[B, S]` apart inside, counted from 0 in each row; `[B, 0]` if each row is one.

        Around the backward pass too, in which blocks may be recomputed.
        """
        self._bounds = _bounds(documents) if documents.numel() else None
        try:
            with documents_given(self.model, documents[:, :0]):
                yield
        finally:
            self._bounds = None

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        attend = own_attention(self.base, module)
        if self._bounds is None:
            found: tuple[Tensor, Any] = attend(module, query, key, value, attention_mask, **kwargs)
            return found
        length = query.shape[2]
        if key.shape[2] != length or not (attention_mask is None or _is_square(attention_mask, length)):
            raise PlanError(
                f"{type(module).__name__} attends to other tokens than those of its row, where packed documents cannot "
                'be kept apart; set model.attn to "sdpa" or "eager"'
            )

        def part(rows: slice, bounds: list[int]) -> Tensor:
            # A padded row ends with padding, which its last document may see: that comes after all targets.
            return torch.cat(
                [
                    attend(
                        module,
                        *(x[rows, :, first:end] for x in (query, key, value)),
                        None if attention_mask is None else _cut(attention_mask, rows, first, end),
                        **kwargs,
                    )[0]
                    for first, end in pairwise([*bounds, length])
                ],
                dim=1,
            )

        if all(bounds == self._bounds[0] for bounds in self._bounds):
            return part(slice(None), self._bounds[0]), None
        rows = [part(slice(row, row + 1), bounds) for row, bounds in enumerate(self._bounds)]
        return torch.cat(rows), None


def attention_by_documents(
    model: PreTrainedModel, plan: Plan, recipe: Recipe, *, device: torch.device
) -> AttentionByDocuments | None:
    """Let the attention of `model` work by documents, in place, where that is possible and faster."""
    wanted = recipe.model.attn == "auto" and bool(recipe.data.packing) and device.type == "cpu"
    # Neither tokens split over cp nor dropout by rank leaves the attention function free, and no graph can follow it.
    possible = plan.cp is None and not plan.drops_by_rank and not recipe.train.compile
    return AttentionByDocuments(model) if wanted and possible and _is_relative(model) else None


def _is_relative(model: PreTrainedModel) -> bool:
    """Return whether the masks of `model` depend on distances alone, so that those of a document can be cut from a row.

    Chunks begin at places of the row, and attention that chooses its keys chooses among all of the row: the short rows
    of the check before the first step would not show it.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())}
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return not chunked and kinds <= _RELATIVE and not any(chooses_keys(module) for module in model.modules())


def _bounds(documents: Tensor) -> list[list[int]]:
    """Return the first position of each document, row by row."""
    begins = torch.cat([torch.ones_like(documents[:, :1], dtype=torch.bool), documents.diff(dim=1) != 0], dim=1)
    return [row.nonzero().flatten().tolist() for row in begins]


def _is_square(mask: Any, length: int) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (length, length)


def _cut(mask: Tensor, rows: slice, first: int, end: int) -> Tensor:
    return mask[rows if mask.shape[0] > 1 else slice(None), :, first:end, first:end]
