"""Context parallelism: every rank of the cp axis works on its own part of each sequence.

Ulysses (arXiv:2309.14509): around the model's own attention function an all-to-all trades the split along the sequence
for a split along the heads, so that sliding windows, sinks, soft caps and packed documents are what they are in one
process. Everything else in a causal LM works token by token and needs no communication; `Trainer` proves that for the
model at hand before its weights are read.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100
_names = itertools.count()


class _AllToAll(torch.autograd.Function):
    """Slice i of dim 0 goes to rank i of the group, and what rank i sent becomes slice i."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        returned = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(returned, grad.contiguous(), group=ctx.group)
        return returned, None


def heads_for_sequence(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """`[B, H, S/cp, D]` on every rank -> `[B, H/cp, S, D]`, all `tensors` in one exchange. H divides by cp."""
    cp = group.size()
    parts = [t.unflatten(1, (cp, t.shape[1] // cp)).movedim(1, 0) for t in tensors]
    flat = torch.cat([p.reshape(cp, -1) for p in parts], dim=1)
    received = _AllToAll.apply(flat, group).split([p[0].numel() for p in parts], dim=1)
    # [cp, B, H/cp, S/cp, D]: the first dim is now the place in the sequence
    return [r.view(p.shape).movedim(0, 2).flatten(2, 3) for r, p in zip(received, parts, strict=True)]


def sequence_for_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[B, S, H/cp, D]` on every rank -> `[B, S/cp, H, D]`."""
    cp = group.size()
    parts = tensor.unflatten(1, (cp, tensor.shape[1] // cp)).movedim(1, 0).contiguous()
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


class ContextParallel:
    """The attention of one model over the ranks of one cp group, and the split of its batches.

    `split` is called with every micro batch and remembers the positions of the whole sequences, from which masks are
    made. Outside `off()` the model takes and returns this rank's part of each sequence.
    """

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup):
        from transformers import AttentionInterface, AttentionMaskInterface

        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.base = str(model.config._attn_implementation)
        self.enabled = True
        self.positions: Tensor | None = None
        name = f"ndtrain_cp_{next(_names)}"
        AttentionInterface.register(name, self._attention)
        AttentionMaskInterface.register(name, self._mask)
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) == self.base:
                config._attn_implementation = name  # type: ignore[union-attr]
        forward = model.forward

        def with_whole_positions(*args: Any, **kwargs: Any) -> Any:
            with self._packing_of_whole_sequences():
                return forward(*args, **kwargs)

        model.forward = with_whole_positions  # type: ignore[method-assign]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model works on whole sequences inside, on every rank the same."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def split(self, batch: dict[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
        """This rank's part of `[B, S]` input_ids, labels, position_ids; S is padded to a multiple of cp.

        The padding follows every target and has none, so that it changes nothing.
        """
        length = batch["input_ids"].shape[1]
        room = -length % self.size
        if room:
            last = batch["position_ids"][:, -1:]
            more = torch.arange(room, device=last.device)[None].expand(last.shape[0], -1)
            filler = {"labels": IGNORE, "input_ids": 0}
            batch = {
                key: torch.cat([v, more if packed else last + 1 + more], dim=1)
                if key == "position_ids"
                else nn.functional.pad(v, (0, room), value=filler[key])
                for key, v in batch.items()
            }
        self.positions = batch["position_ids"]
        part = (length + room) // self.size
        return {key: v[:, self.rank * part : (self.rank + 1) * part].contiguous() for key, v in batch.items()}

    def gather(self, local: Tensor) -> Tensor:
        """`[B, S/cp, ...]` on every rank -> `[B, S, ...]`, without gradient."""
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    # ---- what transformers calls

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        attend = own_attention(self.base, module)
        if not self.enabled:
            return attend(module, query, key, value, attention_mask, **kwargs)
        heads = query.shape[1]
        if heads % self.size:
            raise PlanError(f"mesh.cp = {self.size} does not divide the {heads} heads of {type(module).__name__}")
        # Fewer key-value heads than cp: each is held by several ranks.
        repeats = self.size // math.gcd(key.shape[1], self.size)
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        query, key, value = heads_for_sequence([query, key, value], self.group)
        mine = slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)
        for name, given in kwargs.items():
            if name == "position_ids":
                kwargs[name] = self.positions
            elif name == "s_aux" and given is not None:
                kwargs[name] = given[mine]
            elif isinstance(given, Tensor) and given.ndim:
                raise PlanError(
                    f"{type(module).__name__} hands its attention {name}, which context parallelism cannot split; "
                    "set mesh.cp = 1"
                )
        if attention_mask is not None and attention_mask.shape[1] == heads > 1:
            attention_mask = attention_mask[:, mine]
        # Eager attention reads what belongs to single heads (attention sinks) from the module.
        own = {n: p[mine] for n, p in module.named_parameters(recurse=False) if p.ndim == 1 and len(p) == heads}
        groups: Any = getattr(module, "num_key_value_groups", None)
        if groups is not None:
            own["num_key_value_groups"] = max(1, groups // repeats)
        output = attend(_Instead(module, own), query, key, value, attention_mask, **kwargs)[0]
        return sequence_for_heads(output, self.group), None

    def _mask(self, *args: Any, q_length: int, kv_length: int, **kwargs: Any) -> Any:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if self.enabled:
            assert self.positions is not None
            q_length = kv_length = self.positions.shape[1]
        return ALL_MASK_ATTENTION_FUNCTIONS[self.base](*args, q_length=q_length, kv_length=kv_length, **kwargs)

    @contextmanager
    def _packing_of_whole_sequences(self) -> Iterator[None]:
        """Masks see documents by the positions of whole sequences; the model has only those of its part.

        These two functions of transformers.masking_utils are private (5.23); every mask with documents goes through
        them.
        """
        from transformers import masking_utils

        find, compose = masking_utils.find_packed_sequence_indices, masking_utils.packed_sequence_compatibility_function

        def find_whole(position_ids: Tensor) -> Tensor | None:
            return find(self.positions if self.enabled and self.positions is not None else position_ids)

        def compose_whole(
            mask_function: Callable[..., Any], position_ids: Tensor, packed_sequence_mask: Tensor
        ) -> Callable[..., Any]:
            whole = self.positions if self.enabled and self.positions is not None else position_ids
            return compose(mask_function, whole, packed_sequence_mask)

        masking_utils.find_packed_sequence_indices = find_whole
        masking_utils.packed_sequence_compatibility_function = compose_whole
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = find
            masking_utils.packed_sequence_compatibility_function = compose


class _Instead:
    """A module as its attention function sees it, with some attributes replaced."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]):
        self.__dict__.update(attributes)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def own_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that `module` would have taken: eager attention is each model file's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise PlanError(f"{type(module).__name__} has no attention function of its own; set mesh.cp = 1")
    return own
