"""What a model's code says of its attention, and how another function takes its place."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    pass


_CHOICE = re.compile(r"topk|dynamic_mask|self\.(indexer|compressor)\b")


def uses_interface(module: nn.Module) -> bool:
    """Whether `module` is an attention that takes its function from transformers' AttentionInterface."""
    return "ALL_ATTENTION_FUNCTIONS" in _forward_source(type(module))  # type: ignore[arg-type]


def chooses_keys(module: nn.Module) -> bool:
    """Whether `module` is an attention that finds out itself which keys each query sees, as an indexer does."""
    return uses_interface(module) and _CHOICE.search(_forward_source(type(module))) is not None  # type: ignore[arg-type]


@cache
def _forward_source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""
