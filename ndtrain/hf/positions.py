"""What a model's code says of the positions of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndtrain.hf.compat import dynamic_rope_update

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FIXED = "fixed"


def position_embeddings(model: nn.Module) -> list[nn.Module]:
    """Embeddings that are told positions, or else count them from 0, whatever the model itself is told (BART)."""
    # Renamed in transformers 5.24
    offsets = {"past_key_values_length", "cache_length"}

    def counts(module: nn.Module) -> bool:
        takes = _parameters(module.forward).keys()
        return isinstance(module, nn.Embedding) and "position_ids" in takes and bool(offsets & takes)

    return [module for module in model.modules() if counts(module)]


def positions_from_ids(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a model of RoBERTa's kind counts the positions of `[B, S]` ids: from its padding id on; None for others."""
    for module in model.modules():
        count: Any = getattr(module, "create_position_ids_from_input_ids", None)
        padding = getattr(module, "padding_idx", None)
        if count is not None and padding is not None:
            return lambda ids: count(ids, padding)
    return None


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether `model` is told positions by its caller, or hands on what it is told."""
    own = _parameters(type(model).forward)
    if "position_ids" in own:
        return True
    decoder = model.get_decoder()
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    return hands_on and decoder is not model and "position_ids" in _parameters(type(decoder).forward)


def varying_frequencies(model: nn.Module) -> list[tuple[Any, str | None, str]]:
    """Rotary embeddings whose frequencies change with the largest position they see: (module, layer type, kind)."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        for layer, k in (kind if isinstance(kind, dict) else {None: kind}).items():
            if isinstance(k, str) and ("dynamic" in k or k == "longrope"):
                found.append((module, layer, k))
    return found


def fix_frequencies(model: nn.Module, length: int | None) -> None:
    """Give rotary embeddings whose frequencies vary those of a sequence of `length` tokens, once and for all.

    Without a length they stay as they are.

    transformers takes them from the largest position of each call: of a part of a sequence under context parallelism,
    of the longest document that a micro batch happens to have under packing.
    """
    update = dynamic_rope_update(lambda module, x, position_ids, layer_type=None: None)
    for module, layer, _ in varying_frequencies(model):
        if length is not None:
            device = next(module.buffers()).device
            update(module, torch.empty(0, device=device), torch.arange(length, device=device)[None], layer)
        if layer is None:
            module.rope_type = _FIXED
        else:
            module.rope_type[layer] = _FIXED


def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
