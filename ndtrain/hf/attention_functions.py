"""Replace a model's attention function through transformers' AttentionInterface."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ndtrain.errors import PlanError
from ndtrain.hf.compat import ALL_ATTENTION_FUNCTIONS, attention_name, set_attention_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_names = itertools.count()


class _Name(str):
    """A name of a wrapping function that also equals the wrapped function's name, which some models compare with."""

    instead_of: str | None = None
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.instead_of == other

    def __ne__(self, other: object) -> bool:
        return not self == other


def take_attention(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make every module of `model` that uses the model's attention function use `attention`, with masks from `mask`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    wrapped = attention_name(model.config)
    base = str(wrapped)
    name = _Name(f"{base}_ndtrain_{next(_names)}")  # keeps `base`: models search it for "flash"
    name.instead_of = wrapped  # which may be one of ours
    # As plain text: torch.compile traces no dict with keys of a class of ours.
    AttentionInterface.register(str(name), attention)
    AttentionMaskInterface.register(str(name), mask)
    for module in model.modules():
        config = getattr(module, "config", None)
        if attention_name(config) == base:
            set_attention_name(config, name)


@contextmanager
def attention_computes_in(name: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, flash attention `name` gets queries, keys and values in `dtype`, since it takes no float32.

    Its output has the dtype of the queries. Any other attention function is left as it is.
    """
    if "flash" not in name or name not in ALL_ATTENTION_FUNCTIONS:
        yield
        return
    function = ALL_ATTENTION_FUNCTIONS[name]

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def casting(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *more = function(module, cast(query), *map(cast, args), **{k: cast(v) for k, v in kwargs.items()})
        return output.to(query.dtype), *more

    ALL_ATTENTION_FUNCTIONS[name] = casting
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = function


def own_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """Return the function of `module` that `take_attention` replaced; eager attention is defined in each model file.

    Raises `PlanError` if the model file defines none.
    """
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own = getattr(sys.modules[module.__class__.__module__], "eager_attention_forward", None)
    if own is None:
        raise PlanError(
            f"the file of {module.__class__.__name__} defines no eager_attention_forward, which ndtrain has to call; "
            "set mesh.cp = 1"
        )
    return own
