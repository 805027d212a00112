"""Questions about a module's attention, answered from the source of its forward."""

from __future__ import annotations

import inspect
import re
from functools import cache

from torch import nn

# Arguments of transformers' attention functions that ours read, or that are in masks already.
KNOWN = ("dropout", "scaling", "softcap", "s_aux", "is_causal", "sliding_window", "position_ids")

_CHOICE = re.compile(r"topk|dynamic_mask|self\.(indexer|compressor)\b")


def uses_interface(module: nn.Module) -> bool:
    """Return whether `module` is an attention that calls a function of transformers' AttentionInterface."""
    return "ALL_ATTENTION_FUNCTIONS" in _forward_source(type(module))  # type: ignore[arg-type]


def chooses_keys(module: nn.Module) -> bool:
    """Return whether `module` is an attention that selects the keys of each query itself, as an indexer does."""
    return uses_interface(module) and _CHOICE.search(_forward_source(type(module))) is not None  # type: ignore[arg-type]


@cache
def _forward_source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""
