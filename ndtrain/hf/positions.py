"""Find out how a model obtains the positions of its tokens, and fix rotary frequencies that depend on them."""

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
    """Return the embeddings whose forward takes positions and counts them from 0 if given none (BART)."""
    # Renamed in transformers 5.24
    offsets = {"past_key_values_length", "cache_length"}

    def counts(module: nn.Module) -> bool:
        takes = _parameters(module.forward).keys()
        return isinstance(module, nn.Embedding) and "position_ids" in takes and bool(offsets & takes)

    return [module for module in model.modules() if counts(module)]


def positions_from_ids(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return how a model like RoBERTa counts positions of `[B, S]` ids from its padding id on; None for others."""
    for module in model.modules():
        count: Any = getattr(module, "create_position_ids_from_input_ids", None)
        padding = getattr(module, "padding_idx", None)
        if count is not None and padding is not None:
            return lambda ids: count(ids, padding)
    return None


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether `model` takes `position_ids` itself or passes them on to its decoder."""
    own = _parameters(type(model).forward)
    if "position_ids" in own:
        return True
    decoder = model.get_decoder()
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    return hands_on and decoder is not model and "position_ids" in _parameters(type(decoder).forward)


def varying_frequencies(model: nn.Module) -> list[tuple[Any, str | None, str]]:
    """Return (module, layer type, kind) of rotary embeddings whose frequencies depend on the largest position."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        for layer, k in (kind if isinstance(kind, dict) else {None: kind}).items():
            if isinstance(k, str) and ("dynamic" in k or k == "longrope"):
                found.append((module, layer, k))
    return found


def fix_frequencies(model: nn.Module, length: int | None) -> None:
    """Set varying rotary frequencies to those of a sequence of `length` tokens, permanently.

    With length None, keep their current values.

    transformers derives them from the largest position of each call, which is that of a part of a sequence under
    context parallelism, and of the longest document in the micro batch under packing.
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
