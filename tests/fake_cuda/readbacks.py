"""Finds where a step on fake CUDA tensors makes the host wait for the device, and counts what it runs there."""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

import ndtrain
from ndtrain.estimate.record import COLLECTIVES, FREE
from ndtrain.torch_compat import (
    DataDependentOutputException,
    FakeTensor,
    TorchDispatchMode,
    packet_of,
    tree_leaves,
)
from tests.fake_cuda import faults

aten = torch.ops.aten

# Operators whose result's shape depends on values: CUDA copies a number to the host and waits for it.
_OF_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount}
# Whose lines are told, and what of them is not: code that only watches.
_PLACES = [str(Path(file).parent) for file in (ndtrain.__file__, transformers.__file__)] + [str(Path(faults.__file__))]
_WATCHES = (f"{_PLACES[0]}/estimate/", f"{_PLACES[0]}/torch_compat.py")


class ReadBacks(TorchDispatchMode):
    """Counts kernels, collectives and read-backs, and gives values to those who read: enter it inside a fake mode.

    A truth value of `all` is False and of `any` True, as in a batch of packed documents; other numbers are 1.
    """

    def __init__(self, squares: Collection[int] = ()) -> None:
        super().__init__()
        self._squares = {(size, size) for size in squares}
        self.kernels = self.masks = 0
        self.collectives: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()  # forward passes, by operator
        self.found: Counter[tuple[str, str]] = Counter()  # (what, line of code)
        self._of_all: dict[int, weakref.ref[Tensor]] = {}  # by id: tensors compare element by element

    def restart(self) -> None:
        """Forget what was counted."""
        self.kernels = self.masks = 0
        self.collectives.clear()
        self.attention.clear()
        self.found.clear()

    def waits(self, what: str) -> None:
        """Count one stop of the host, at the line that runs now."""
        self.found[what, _line()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        packet = packet_of(func)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.is_cuda for t in given)
        if packet is aten._local_scalar_dense:
            if on_device:
                self.waits("item")
            try:
                return func(*args, **kwargs)  # of a tensor on the host that was made from numbers
            except DataDependentOutputException:
                return self._value(given[0])
        if on_device and packet is aten.equal:
            self.waits("equal")
            return True
        if on_device and packet in _OF_VALUES:
            self.waits(packet.__name__)
            return _whole(packet, args)
        if on_device and packet is aten.repeat_interleave and kwargs.get("output_size") is None and len(given) == 1:
            self.waits("repeat_interleave")
        if packet in (aten.index, aten.index_put_, aten.index_put) and any(map(_is_mask, args[1])):
            if packet is not aten.index and args[2].numel() == 1:
                func = aten.masked_fill_.Tensor if packet is aten.index_put_ else aten.masked_fill.Tensor
                # As CUDA does, which then need not know how many there are.
                args = (
                    args[0],
                    args[1][0].reshape(*args[1][0].shape, *[1] * (args[0].dim() - args[1][0].dim())),
                    args[2],
                )
            else:
                self.waits("mask index")
                args = (args[0], [i for index in args[1] for i in _numbers(index)], *args[2:])
        if packet in (aten._to_copy, aten.copy_):
            self._copied(packet, args, kwargs)
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if packet is aten.all:
            self._of_all.update({id(t): weakref.ref(t) for t in made})
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            if (name := COLLECTIVES.get(packet.__name__)) is not None:
                self.collectives[name] += 1
        elif not (func.namespace == "prim" or func.is_view or packet in FREE):
            self.kernels += any(t.is_cuda for t in (*given, *made))
            self.masks += any(t.shape[-2:] in self._squares for t in made)
            if ("attention" in packet.__name__ or "attn" in packet.__name__) and "backward" not in packet.__name__:
                self.attention[packet.__name__] += 1
        return out

    def _copied(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a copy between host and device that is waited for, or casts on the host, as torch then does."""
        if packet is aten.copy_:
            target, source, *more = args
            device, dtype, non_blocking = target.device, target.dtype, more[:1] == [True]
        else:
            (source,), non_blocking = args, False
            device, dtype = kwargs.get("device") or source.device, kwargs.get("dtype") or source.dtype
        if source.device.type == device.type:
            return
        if source.dtype != dtype:
            self.waits("cast on the host")
        if not (non_blocking or kwargs.get("non_blocking")):
            self.waits("copy to the device" if device.type == "cuda" else "copy to the host")

    def _value(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            made = self._of_all.get(id(tensor))
            return made is None or made() is not tensor
        return 1.0 if tensor.is_floating_point() else 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Have `tolist` of a fake tensor be one read-back inside, also where it was replaced before."""
        of_host = FakeTensor.tolist

        def tolist(tensor: Any) -> Any:
            if not tensor.is_cuda:
                return of_host(tensor)
            self.waits("tolist")
            with mock.patch.object(ReadBacks, "waits", lambda *args: None):
                return of_host(tensor) if tensor.dim() != 0 else self._value(tensor)

        with mock.patch.object(FakeTensor, "tolist", tolist), self:
            yield


def _whole(packet: Any, args: tuple[Any, ...]) -> Any:
    """Return what `packet` gives where every value counts."""
    tensor = args[0]
    if packet is aten.nonzero:
        return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
    if packet is aten.masked_select:
        return tensor.new_empty(tensor.numel())
    if packet is aten.bincount:
        return tensor.new_empty(max(1, args[2] if len(args) > 2 else 1), dtype=torch.int64)
    counts = tensor.new_empty(tensor.shape, dtype=torch.int64)
    return tensor.clone(), counts, counts.clone()


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_cuda and index.dtype in (torch.bool, torch.uint8)


def _numbers(index: Any) -> list[Any]:
    """Return a mask as the indices of all its elements, one tensor for each dim, and another index as it is."""
    if not _is_mask(index):
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]


def _line() -> str:
    """Return the innermost line of ndtrain or transformers that runs now, or that of autograd's own thread."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        place = next((place for place in _PLACES if file.startswith(place)), None)
        if place is not None and not file.startswith(_WATCHES):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).relative_to(Path(place).parent)}:{frame.f_code.co_name}: {text}"
        frame = frame.f_back
    return "autograd"
