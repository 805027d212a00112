"""Ulysses (arXiv:2309.14509): an all-to-all trades the split along the sequence for a split along the heads.

The model's own attention function then sees whole sequences, so sliding windows, sinks, soft caps and packed documents
work as in one process. Modules that choose their keys themselves, by an indexer for example, work on whole sequences on
every rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.errors import PlanError
from ndtrain.hf.attention import chooses_keys
from ndtrain.hf.attention_functions import own_attention
from ndtrain.hf.compat import ALL_MASK_ATTENTION_FUNCTIONS
from ndtrain.parallel.cp.interface import ContextParallel
from ndtrain.parallel.gather import Gather
from ndtrain.torch_compat import tree_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _AllToAll(torch.autograd.Function):
    """Sends slice i of dim 0 to rank i of the group and puts what rank i sent into slice i."""

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
    """Exchange `[B, H, S/cp, D]` on every rank for `[B, H/cp, S, D]`, all `tensors` at once; cp must divide H."""
    cp = group.size()
    parts = [t.unflatten(1, (cp, t.shape[1] // cp)).movedim(1, 0) for t in tensors]
    flat = torch.cat([p.reshape(cp, -1) for p in parts], dim=1)
    received = _AllToAll.apply(flat, group).split([p[0].numel() for p in parts], dim=1)
    # [cp, B, H/cp, S/cp, D]: the first dim now counts the segments of the sequence.
    return [r.view(p.shape).movedim(0, 2).flatten(2, 3) for r, p in zip(received, parts, strict=True)]


def sequence_for_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange `[B, S, H/cp, D]` on every rank for `[B, S/cp, H, D]`."""
    cp = group.size()
    parts = tensor.unflatten(1, (cp, tensor.shape[1] // cp)).movedim(1, 0).contiguous()
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


class Ulysses(ContextParallel):
    """Context parallelism that splits heads inside attention; cp must divide the number of heads."""

    kind = "ulysses"

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup):
        super().__init__(model, group)
        for module in model.modules():
            if chooses_keys(module):
                self._on_whole_sequences(module)

    def _on_whole_sequences(self, module: nn.Module) -> None:
        """Let `module` take and return this rank's part of sequences but work on the whole; masks are whole already.

        Each rank's gradients come from its own part of the output; summed over the ranks they are those of one process.
        """
        forward = module.forward

        def on_whole_sequences(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled or self.positions is None:
                return forward(*args, **kwargs)
            whole = self.positions.shape[1]
            part = whole // self.size

            def gathered(x: Any) -> Any:
                along = isinstance(x, Tensor) and x.ndim in (2, 3) and x.shape[1] == part
                return Gather.apply(x, whole, self.group) if along else x

            def own_part(x: Any) -> Any:
                along = isinstance(x, Tensor) and x.ndim in (2, 3) and x.shape[1] == whole
                return x.chunk(self.size, dim=1)[self.rank] if along else x

            args, kwargs = tree_map(gathered, (args, kwargs))
            with self.off():
                return tree_map(own_part, forward(*args, **kwargs))

        module.forward = on_whole_sequences  # type: ignore[method-assign]

    def segments(self, rank: int) -> tuple[int, ...]:
        return (rank,)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        heads = query.shape[1]
        if heads % self.size:
            raise PlanError(
                f"mesh.cp = {self.size} does not divide the {heads} attention heads of {type(module).__name__} on this "
                'rank; set cp.kind = "ring" or a mesh.cp that divides them'
            )
        own_heads = slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)
        for name, given in kwargs.items():
            if name == "position_ids":
                kwargs[name] = self.positions
            elif name == "s_aux" and given is not None:
                kwargs[name] = given[own_heads]
            elif isinstance(given, Tensor) and given.ndim:
                raise PlanError(
                    f"{type(module).__name__} passes {name} to its attention function, and context parallelism cannot "
                    "split it; set mesh.cp = 1"
                )
        # With fewer key-value heads than cp, several ranks hold each of them.
        repeats = self.size // math.gcd(key.shape[1], self.size)
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        query, key, value = heads_for_sequence([query, key, value], self.group)
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] == heads > 1:
            attention_mask = attention_mask[:, own_heads]
        # Eager attention reads the values of single heads (attention sinks) from the module.
        own = {n: p[own_heads] for n, p in module.named_parameters(recurse=False) if p.ndim == 1 and len(p) == heads}
        groups: Any = getattr(module, "num_key_value_groups", None)
        if groups is not None:
            own["num_key_value_groups"] = max(1, groups // repeats)
        output = own_attention(self.base, module)(
            _ModuleView(module, own), query, key, value, attention_mask, **kwargs
        )[0]
        return sequence_for_heads(output, self.group)

    def mask(self, q_length: int, kv_length: int, **kwargs: Any) -> Any:
        assert self.positions is not None
        whole = self.positions.shape[1]
        return ALL_MASK_ATTENTION_FUNCTIONS[self.base](q_length=whole, kv_length=whole, **kwargs)


class _ModuleView:
    """Stands for a module in front of its attention function, with some attributes replaced."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]):
        self.__dict__.update(attributes)
        self._module = module

    __class__ = property(lambda self: type(self._module))  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
