"""Another attention function in a model's place of its own, through transformers' AttentionInterface."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ndtrain.errors import PlanError
from ndtrain.hf.compat import ALL_ATTENTION_FUNCTIONS, attention_name, set_attention_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_names = itertools.count()


class _Name(str):
    """The name of a function that wraps another, and for models that ask which they have, equal to that one's."""

    instead_of: str | None = None
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.instead_of == other

    def __ne__(self, other: object) -> bool:
        return not self == other


def take_attention(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Have every module of `model` that takes the model's attention function take `attention`, with masks by `mask`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    base = str(attention_name(model.config))
    name = _Name(f"{base}_ndtrain_{next(_names)}")  # models look for "flash" in it
    name.instead_of = base
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    for module in model.modules():
        config = getattr(module, "config", None)
        if attention_name(config) == base:
            set_attention_name(config, name)


def own_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that `module` would have taken: eager attention is each model file's own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise PlanError(f"{type(module).__name__} has no attention function of its own; set mesh.cp = 1")
    return own
