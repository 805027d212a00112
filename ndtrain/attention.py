"""What a model's code says of its attention and of the positions of its tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHOICE = re.compile(r"topk|dynamic_mask|self\.(indexer|compressor)\b")


def position_embeddings(model: nn.Module) -> list[nn.Module]:
    """Embeddings that are told positions, or else count them from 0, whatever the model itself is told (BART)."""
    asked = {"past_key_values_length", "position_ids"}
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and asked <= _parameters(m.forward).keys()]


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


def chooses_keys(module: nn.Module) -> bool:
    """Whether `module` is an attention that finds out itself which keys each query sees, as an indexer does."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in source and _CHOICE.search(source) is not None


def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
