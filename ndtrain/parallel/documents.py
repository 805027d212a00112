"""Attention by documents: packed documents attend one after another, so that no mask `[S, S]` keeps them apart.

A row of n documents of S/n tokens costs 1/n of the attention that it costs under a mask. On CPU, where a call costs
little, each document is one call of the model's own attention function, with its part of masks that models make for
other reasons, such as windows. On CUDA one kernel takes all documents (`fused`); windows are arguments of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndtrain.errors import PlanError
from ndtrain.hf.attention import KNOWN, chooses_keys
from ndtrain.hf.attention_functions import own_attention, take_attention
from ndtrain.hf.causal import Causal, causal_attention
from ndtrain.hf.compat import ALL_MASK_ATTENTION_FUNCTIONS, attention_name, documents_given
from ndtrain.parallel import fused
from ndtrain.parallel.fused import Rows, document_bounds
from ndtrain.plan import Plan
from ndtrain.plan.refuse import dropouts
from ndtrain.recipe import Recipe
from ndtrain.torch_compat import storage_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_RELATIVE = {"full_attention", "sliding_attention"}


class AttentionByDocuments:
    """Lets every module of `model` that uses its attention function attend within documents, inside `given`.

    With `fused` a kernel takes all documents at once, otherwise one after another. Inside `proving` each kind of call
    that is new is checked first, and what computes it is added to `kernels`.
    """

    def __init__(self, model: PreTrainedModel, *, fused: bool = False) -> None:
        self.model, self.enabled, self.fused = model, True, fused
        self.base = str(attention_name(model.config))
        self.kernels: set[str] = set()
        self._rows: Rows | None = None
        self._masks: dict[int, tuple[Tensor, Causal]] = {}  # stand-ins and what they mean, by their storage
        self._proving = False
        self._proven: set[tuple[Any, ...]] = set()
        take_attention(model, self._attention, self._mask)

    @contextmanager
    def given(self, documents: Tensor) -> Iterator[None]:
        """Keep these documents `[B, S]` on the host apart inside, counted from 0 in each row; `[B, 0]` if each is one.

        Around the backward pass too, in which blocks may be recomputed.
        """
        if documents.numel():
            self._rows = Rows(document_bounds(documents))
        elif self.fused:
            self._rows = Rows([[0]] * len(documents))
        try:
            with documents_given(self.model, documents[:, :0]):
                yield
        finally:
            self._rows = None
            self._masks.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model attend under its own masks inside."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    @contextmanager
    def proving(self, wanted: bool) -> Iterator[None]:
        """Check each new kind of call inside, if `wanted`; raises `PlanError` for a kernel that computes another."""
        self._proving = wanted
        try:
            yield
        finally:
            self._proving = False

    def _mask(self, **asked: Any) -> Any:
        if self._rows is None or not self.fused:
            return ALL_MASK_ATTENTION_FUNCTIONS[self.base](**asked)
        causal = causal_attention(asked)
        if causal is None or asked["q_length"] != asked["kv_length"]:
            raise PlanError(f"its masks are not only causal; {_OTHERWISE}")
        shape = asked["batch_size"], 1, asked["q_length"], asked["kv_length"]
        stand_in = torch.ones((), dtype=torch.bool, device=asked.get("device", "cpu")).expand(shape)
        self._masks[storage_key(stand_in.untyped_storage())] = stand_in, causal
        return stand_in

    def _causal(self, mask: Any) -> Causal | None:
        """Return what a stand-in, or a view of all of it, means; None for another mask."""
        if not isinstance(mask, Tensor):
            return None
        stand_in, causal = self._masks.get(storage_key(mask.untyped_storage()), (None, None))
        return causal if stand_in is not None and mask.shape == stand_in.shape else None

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if self._rows is None:
            attend = own_attention(self.base, module)
            found: tuple[Tensor, Any] = attend(module, query, key, value, attention_mask, **kwargs)
            return found
        by = self._at_once if self.fused else self._one_by_one
        return by(self._rows, module, query, key, value, attention_mask, **kwargs), None

    def _at_once(
        self,
        rows: Rows,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Tensor:
        caller, causal = module.__class__.__name__, self._causal(attention_mask)
        if attention_mask is None and self.base == "sdpa":  # which is causal then by itself
            given = kwargs.get("is_causal")
            causal = Causal() if (getattr(module, "is_causal", True) if given is None else given) else None
        if causal is None or key.shape[2] != query.shape[2]:
            raise PlanError(f"{caller} makes masks of its own or attends to other tokens than its row's; {_OTHERWISE}")
        passed = [name for name, x in kwargs.items() if name not in KNOWN and isinstance(x, Tensor) and x.ndim]
        if passed or kwargs.get("dropout"):
            raise PlanError(f"{caller} passes {', '.join(passed) or 'dropout'} to its attention function; {_OTHERWISE}")
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        heads = fused.Heads(scale, causal.window, kwargs.get("softcap"), kwargs.get("s_aux"))
        if self._proving:
            self._prove(query, key, value, heads)
        return fused.attend(query, key, value, rows, heads)

    def _prove(self, query: Tensor, key: Tensor, value: Tensor, heads: fused.Heads) -> None:
        case = (query.dtype, *(x.shape[i] for x in (query, key, value) for i in (1, 3)), heads._replace(sinks=None))
        if (case, heads.sinks is None) not in self._proven:
            self.kernels.add(fused.prove(query, key, value, heads))
            self._proven.add((case, heads.sinks is None))

    def _one_by_one(
        self,
        rows: Rows,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Tensor:
        length, attend = query.shape[2], own_attention(self.base, module)
        if key.shape[2] != length or not (attention_mask is None or _is_square(attention_mask, length)):
            raise PlanError(
                f"{module.__class__.__name__} attends to other tokens than those of its row, where packed documents "
                f"cannot be kept apart; {_OTHERWISE}"
            )

        def part(row: slice, bounds: list[int]) -> Tensor:
            # A padded row ends with padding, which its last document may see: that comes after all targets.
            return torch.cat(
                [
                    attend(
                        module,
                        *(x[row, :, first:end] for x in (query, key, value)),
                        None if attention_mask is None else _cut(attention_mask, row, first, end),
                        **kwargs,
                    )[0]
                    for first, end in pairwise([*bounds, length])
                ],
                dim=1,
            )

        if all(bounds == rows.bounds[0] for bounds in rows.bounds):
            return part(slice(None), rows.bounds[0])
        return torch.cat([part(slice(row, row + 1), bounds) for row, bounds in enumerate(rows.bounds)])


_OTHERWISE = 'set model.attn to "sdpa" or "eager"'


def attention_by_documents(
    model: PreTrainedModel, plan: Plan, recipe: Recipe, *, kernels_of: str
) -> AttentionByDocuments | None:
    """Let the attention of `model` work by documents, in place, where `recipe` has any and nothing forbids it.

    `kernels_of` is the type of device whose kernels are taken.
    """
    wanted = recipe.model.attn == "auto" and recipe.data.packing
    if not wanted or under_masks(model, plan, recipe, kernels_of=kernels_of) is not None:
        return None
    # Ring attention keeps documents apart itself, and is compared with this.
    return AttentionByDocuments(model, fused=kernels_of == "cuda" and plan.cp != "ring")


def under_masks(model: PreTrainedModel, plan: Plan, recipe: Recipe, *, kernels_of: str) -> str | None:
    """Return why the attention of `model` has to keep packed documents apart by masks; None where it need not."""
    if recipe.train.compile:
        return "compiled blocks take no attention by documents"
    if plan.drops_by_rank:
        return "attention drops by tp rank"
    if kernels_of == "cuda" and (found := dropouts(model)):
        return f"no kernel by documents drops weights ({', '.join(found)})"
    return None if _is_relative(model) else "its masks depend on places of the row, or it chooses keys itself"


def _is_relative(model: PreTrainedModel) -> bool:
    """Return whether the masks of `model` depend on distances alone, so that those of a document can be cut from a row.

    Chunks begin at places of the row, and attention that chooses its keys chooses among all of the row: the short rows
    of the check before the first step would not show it.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())}
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return not chunked and kinds <= _RELATIVE and not any(chooses_keys(module) for module in model.modules())


def _is_square(mask: Any, length: int) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (length, length)


def _cut(mask: Tensor, rows: slice, first: int, end: int) -> Tensor:
    return mask[rows if mask.shape[0] > 1 else slice(None), :, first:end, first:end]
