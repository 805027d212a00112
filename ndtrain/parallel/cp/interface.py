"""Base class of both kinds of context parallelism: splits batches, keeps positions and masks of whole sequences."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.hf.attention_functions import own_attention, take_attention
from ndtrain.hf.compat import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    attention_name,
    blockwise_overlay,
    find_packed_sequence_indices,
    masks_made_by,
    remap_positions_for_packed_sequence,
)
from ndtrain.hf.positions import position_embeddings, positions_from_ids, takes_positions
from ndtrain.parallel.fused import document_bounds, put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100


class ContextParallel(ABC):
    """Spreads the attention of one model over the ranks of one cp group, and splits its batches.

    Call `split` with every micro batch: it remembers the positions of the whole sequences, from which masks are made;
    and run the model inside `apart` where its documents are known. Outside `off()` the model takes and returns this
    rank's part of each sequence.
    """

    kind: str

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.base = attention_name(model.config) or "eager"  # also equal to what a function of ours stands for
        self.enabled = True
        self.positions: Tensor | None = None
        self.own_positions: Tensor | None = None
        self.bounds: list[list[int]] | None = None
        self.documents: Tensor | None = None
        self._packed = True
        self._count_positions = positions_from_ids(model)
        take_attention(model, self._attention, self._mask)
        forward, model_takes_positions = model.forward, takes_positions(model)
        if not model_takes_positions:
            for module in position_embeddings(model):
                self._pass_own_positions(module)

        def with_whole_positions(*args: Any, **kwargs: Any) -> Any:
            if not model_takes_positions:
                kwargs.pop("position_ids", None)
            with self._masks_of_whole_sequences(model) if self.enabled else nullcontext():
                return forward(*args, **kwargs)

        model.forward = with_whole_positions  # type: ignore[method-assign]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model work on whole sequences inside, the same on every rank."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @contextmanager
    def apart(self, documents: Tensor) -> Iterator[None]:
        """Keep these documents `[B, S]` on the host apart inside, counted from 0 in each row; `[B, 0]` if each is one.

        Call it after `split`, around the backward pass too, in which blocks may be recomputed.
        """
        assert self.positions is not None
        self.bounds = document_bounds(documents) if documents.numel() else [[0]]
        if documents.numel():
            # What `split` has added counts its positions from 0.
            padding = documents[:, -1:].expand(-1, self.positions.shape[1] - documents.shape[1]) + 1
            self.documents = put(torch.cat([documents, padding], dim=1), self.positions.device)
        try:
            yield
        finally:
            self.bounds = self.documents = None

    # ---- splitting a sequence

    @abstractmethod
    def segments(self, rank: int) -> tuple[int, ...]:
        """Return which of the equal segments of a sequence `rank` holds, in order; every rank holds as many."""

    def split(self, batch: dict[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
        """Return this rank's part of `[B, S]` input_ids, labels, position_ids.

        S is padded to a multiple of the number of segments. The padding comes after every target and has none itself,
        so it changes nothing.
        """
        count = self.size * len(self.segments(self.rank))
        padding = -batch["input_ids"].shape[1] % count
        if padding:
            last = batch["position_ids"][:, -1:]
            steps = torch.arange(padding, device=last.device)[None].expand(last.shape[0], -1)
            filler = {"labels": IGNORE, "input_ids": 0}
            batch = {
                key: torch.cat([v, steps if packed else last + 1 + steps], dim=1)
                if key == "position_ids"
                else nn.functional.pad(v, (0, padding), value=filler[key])
                for key, v in batch.items()
            }
        self.positions, self._packed = batch["position_ids"], packed
        if self._count_positions is not None:
            batch = {**batch, "position_ids": self._count_positions(batch["input_ids"])}
        parts = {key: self.part_of(v) for key, v in batch.items()}
        self.own_positions = parts["position_ids"]
        return parts

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `[B, S, ...]`, with zeros at the end where the segments do not divide S."""
        own = self.segments(self.rank)
        count = self.size * len(own)
        if padding := -whole.shape[1] % count:
            whole = torch.cat([whole, whole.new_zeros(whole.shape[0], padding, *whole.shape[2:])], dim=1)
        segments = whole.chunk(count, dim=1)
        return torch.cat([segments[i] for i in own], dim=1)

    def gather(self, local: Tensor) -> Tensor:
        """Return `[B, S, ...]` in the order of the sequence from `[B, S/cp, ...]` on every rank, without gradient."""
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        ordered: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            held = self.segments(rank)
            ordered.update(zip(held, part.chunk(len(held), dim=1), strict=True))
        return torch.cat([ordered[i] for i in range(len(ordered))], dim=1)

    def _pass_own_positions(self, embedding: nn.Module) -> None:
        """Give an embedding that counts positions from 0 those of this rank's part, equal in every row."""
        forward = embedding.forward
        signature = inspect.signature(forward)

        def with_own_positions(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled or self.own_positions is None:
                return forward(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            counted = given.arguments.get("position_ids")
            per_row = isinstance(counted, Tensor) and counted.ndim > 1
            given.arguments["position_ids"] = self.own_positions if per_row else self.own_positions[0]
            return forward(*given.args, **given.kwargs)

        embedding.forward = with_own_positions  # type: ignore[method-assign]

    # ---- what transformers calls

    @abstractmethod
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return the attention `[B, S/cp, H, D]` of this rank's queries `[B, H, S/cp, D]` to whole sequences."""

    @abstractmethod
    def mask(self, q_length: int, kv_length: int, **kwargs: Any) -> Any:
        """Return the mask that the model passes to `attend`; takes the arguments of a transformers mask function."""

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not self.enabled:
            own: tuple[Tensor, Tensor | None] = own_attention(self.base, module)(
                module, query, key, value, attention_mask, **kwargs
            )
            return own
        return self.attend(module, query, key, value, attention_mask, **kwargs), None

    def _mask(self, *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if not self.enabled:
            make = ALL_MASK_ATTENTION_FUNCTIONS[self.base]
            return make(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            # The model made it from its part of the tokens, but masks are of whole sequences.
            attention_mask = self.gather(attention_mask.byte()).bool()
        return self.mask(q_length, kv_length, attention_mask=attention_mask, **kwargs)

    def _masks_of_whole_sequences(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Build masks inside from the documents and images of whole sequences; the model sees only its part."""

        def whole(position_ids: Tensor) -> Tensor:
            return self.positions if self.enabled and self.positions is not None else position_ids

        def find(position_ids: Tensor) -> Tensor | None:
            known = self.enabled and (self.bounds is not None or not self._packed)
            return self.documents if known else find_packed_sequence_indices(whole(position_ids))

        return masks_made_by(
            model,
            find=find,
            remap=lambda mask, position_ids: remap_positions_for_packed_sequence(mask, whole(position_ids)),
            overlay=lambda ids: blockwise_overlay(self.gather(ids) if self.enabled else ids),
        )
