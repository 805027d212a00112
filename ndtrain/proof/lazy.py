"""Stand for whole parameters that no rank has memory for: each is gathered where an operation needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ndtrain.torch_compat import disabled_torch_function, make_wrapper_subclass, tree_map


class LazyParameter(Tensor):
    """Stands for a float32 parameter, or a view of one, whose values `fetch()` returns whenever they are needed.

    Autograd keeps it for the backward pass in place of the values, so that a module of such parameters runs forward and
    backward in the memory of a few of them.
    """

    fetch: Callable[[], Tensor]
    __torch_function__ = disabled_torch_function

    @staticmethod
    def __new__(
        cls, like: Tensor, fetch: Callable[[], Tensor], *, device: torch.device, requires_grad: bool = False
    ) -> LazyParameter:
        """Make one with the shape of `like`, which is on meta."""
        made: LazyParameter = make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=requires_grad
        )
        made.fetch = fetch
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def values() -> Any:
            return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))

        if not func.is_view:
            return values()
        shapes = func(*tree_map(_on_meta, args), **(kwargs or {}))
        device = args[0].device
        if isinstance(shapes, Tensor):
            return cls(shapes, values, device=device)
        return [cls(shape, lambda i=i: values()[i], device=device) for i, shape in enumerate(shapes)]  # type: ignore[misc]


def _values(x: Any) -> Any:
    return x.fetch() if isinstance(x, LazyParameter) else x


def _on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


class Recent:
    """Keeps the tensors that were gathered last, of at most `limit` elements together, or the last one alone.

    Experts that are computed one by one ask for the same two parameters again and again.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, name: str, numel: int, gather: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of this name, of `numel` elements, from `gather()` unless it is kept."""
        if name not in self._kept:
            while self._kept and sum(t.numel() for t in self._kept.values()) + numel > self._limit:
                self._kept.popitem(last=False)
            self._kept[name] = gather()
        self._kept.move_to_end(name)
        return self._kept[name]
