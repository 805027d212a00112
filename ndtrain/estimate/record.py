"""Record what a rank allocates, computes, reads, writes and sends, from the operations that it runs.

Works on real and on fake tensors: it looks at shapes and storages, never at values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry

from ndtrain import torch_compat as names
from ndtrain.layout import local_part
from ndtrain.torch_compat import (
    TorchDispatchMode,
    is_process_group,
    packet_of,
    resolve_process_group,
    storage_key,
    tree_leaves,
    written_in_place,
)

aten = torch.ops.aten

# Kinds of memory.
PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
UNSHARDED, UNSHARDED_GRADIENTS, REDUCTION = "unsharded_parameters", "unsharded_gradients", "gradient_reduction"
ACTIVATIONS, LOGITS, HOST = "activations", "logits", "host"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, UNSHARDED, UNSHARDED_GRADIENTS, REDUCTION, ACTIVATIONS, LOGITS)


# Bytes of a step that concern tensors in host memory: copied to the device; copied back while the device computes;
# copied back while the rank waits; and read or written by operations on the host.
TO_DEVICE, TO_HOST, TO_HOST_WAITING, ON_HOST = "to_device", "to_host", "to_host_waiting", "on_host"


class Work(NamedTuple):
    """The cost of one operation: its dtype, its FLOPs, and the bytes that it reads and writes."""

    dtype: str
    flops: int
    bytes: int


class Collective(NamedTuple):
    """One collective: mesh axis, number of ranks, name, and bytes of the whole message on one rank.

    The message is the larger of input and output: the gathered tensor, or the one to be reduced.
    """

    axis: str
    ranks: int
    op: str
    bytes: int


@dataclass
class Record:
    """One step of a rank: how often each `Work` and `Collective` occurred, and the memory.

    `host` has the bytes of `TO_DEVICE`, `TO_HOST`, `TO_HOST_WAITING` and `ON_HOST`.
    `peaks` maps each stage to its bytes by kind at the moment when they were the most. A stage is (direction, name of
    the FSDP unit) for forward and backward passes, and ("loss", "") or ("update", "").
    """

    work: Counter[Work] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    peaks: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return sum(w.flops * n for w, n in self.work.items())


# A causal mask halves the pairs of query and key, since the kernels skip the masked ones.
def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    *batch, length, width = query.shape
    pairs = float(torch.Size(batch).numel() * length * key.shape[-2])
    return 2 * pairs * (width + value.shape[-1]) * (0.5 if causal else 1.0)


def _forward_causal(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> float:
    return _attention(q, k, v, causal)


def _forward_masked(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, lse: bool, dropout: float = 0.0, causal: bool = False, **_: Any
) -> float:
    return _attention(q, k, v, causal)


def _backward(causal_at: int) -> Callable[..., float]:
    # The scores are recomputed, and each of the two products has two gradients (arXiv:2205.14135).
    def flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any, **_: Any) -> float:
        return 2.5 * _attention(q, k, v, bool(more[causal_at - 4]) if len(more) > causal_at - 4 else False)

    return flops


def _varlen(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Any, longest: int, *more: Any, **__: Any) -> float:
    """Count causal attention of sequences that are all as long as the longest."""
    pairs = 0.5 * q.shape[1] * (begins.shape[0] - 1) * longest**2
    return 2 * pairs * (q.shape[2] + v.shape[2])


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *sizes: Any, **options: Any
) -> float:
    return 2.5 * _varlen(q, k, v, *sizes, **options)


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    """Count the product of rows sorted by expert with each expert's matrix, or (both 2-D) its gradient."""
    return 2.0 * a.shape[-2] * a.shape[-1] * b.shape[-1]


_FORMULAS: dict[Any, Callable[..., float]] = {
    names.flash_for_cpu: _forward_causal,
    names.flash_for_cpu_backward: _backward(7),
    names.flash: _forward_causal,
    names.flash_backward: _backward(11),
    names.efficient: _forward_masked,
    names.cudnn: _forward_masked,
    names.grouped_mm: _grouped,
}


# Operators that exist once their module is imported.
_BY_NAME: dict[str, Callable[..., float]] = {
    "torch_attn._varlen_attn": _varlen,
    "torch_attn._varlen_attn_backward": _varlen_backward,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda a, b, *_, **__: 2 * _grouped(a, b),
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = packet_of(func)
    if packet in _FORMULAS:
        return int(_FORMULAS[packet](*args, **kwargs))
    if (name := str(packet)) in _BY_NAME:
        return int(_BY_NAME[name](*args, **kwargs))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


# Operations that neither read nor write memory.
FREE = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
    names.unsafe_view,
    names.reshape_alias,
    aten.lift_fresh,
    aten.detach,
}
# Operations that write their first argument without reading it.
_OVERWRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "isend": "send",
    "irecv": "recv",
}


class Recorder(TorchDispatchMode):
    """Records the operations that run under it. `axes` maps the name of a process group to its mesh axis.

    Enter it before the first parameter has memory, so that it sees every storage. Memory is the bytes of live storages
    (torch's allocator counts the same, rounded up); a kernel's temporary memory is not seen.
    """

    def __init__(self, axes: Mapping[str, str]):
        super().__init__()
        self.axes = axes
        self.record = Record()
        self.stage = ("forward", "")
        self.times = 1  # how often a step repeats what runs now
        self._kind = ACTIVATIONS
        self._paused = False
        self._held: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str]] = {}
        self._references: dict[int, Any] = {}

    # ---- memory

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Set the kind of the storages of `tensors`."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = local_part(tensor).untyped_storage()
            self._see(storage)
            key = storage_key(storage)
            size, old = self._storages[key]
            self._held[old] -= size
            self._storages[key] = (size, kind)
            self._add(kind, size)

    def copied_to_host(self, tensors: Iterable[Tensor]) -> None:
        """Count copies to host memory that overlap with computation, and take the tensors off the device."""
        tensors = list(tensors)
        self.record.host[TO_HOST] += self.times * sum(_bytes(local_part(tensor)) for tensor in tensors)
        self.label(tensors, HOST)

    def copied_to_device(self, tensors: Iterable[Tensor]) -> None:
        """Count copies from host memory that overlap with computation."""
        for tensor in tensors:
            self.record.host[TO_DEVICE] += self.times * _bytes(tensor)
            self._see(tensor.untyped_storage())

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count what is allocated inside as `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def restart(self) -> None:
        """Drop what was recorded, but keep the live storages."""
        self.record = Record()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (size, self._kind)
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))
        self._add(self._kind, size)

    def _gone(self, key: int) -> None:
        size, kind = self._storages.pop(key)
        del self._references[key]
        self._held[kind] -= size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key not in self._storages:
            self._see(storage)
            return
        size, kind = self._storages[key]
        now = storage.nbytes()
        self._storages[key] = (now, kind)
        self._add(kind, now - size)

    def _add(self, kind: str, size: int) -> None:
        self._held[kind] += size
        if size <= 0 or kind == HOST:
            return
        total = sum(n for k, n in self._held.items() if k != HOST)
        best = self.record.peaks.get(self.stage)
        if best is None or total > sum(best.values()):
            self.record.peaks[self.stage] = {k: n for k, n in self._held.items() if n and k != HOST}

    def __enter__(self) -> Recorder:
        # FSDP resizes storages in place, without an operation to record (torch 2.13).
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self._resized(storage)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor's operations on local tensors are recorded instead
        out = func(*args, **kwargs)
        if self._paused:
            return out
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in tensors:
            self._see(tensor.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            self._count_collective(func, args, out)
        elif not (func.namespace == "prim" or func.is_view or packet_of(func) in FREE):
            self._count_work(func, args, kwargs, out, tensors)
        return out

    def _count_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, tensors: list[Tensor]
    ) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not tensors and not given:
            return
        touched = {id(t): t for t in (*given, *tensors)}
        moved = {key: _bytes(t) for key, t in touched.items()}
        changed = {id(t) for t in tree_leaves(list(written_in_place(func, args, kwargs)))} & set(touched)
        if packet_of(func).__name__ not in _OVERWRITE:  # what is changed in place is read and written
            moved |= {key: 2 * moved[key] for key in changed}
        hosted = {key for key, t in touched.items() if self._is_on_host(t)}
        if hosted:
            moved = self._count_host(func, moved, hosted, {id(t) for t in given} - hosted, changed)
        if not moved:
            return
        floats = next((t for t in (*tensors, *given) if t.is_floating_point()), None)
        dtype = str(floats.dtype).removeprefix("torch.") if floats is not None else "int"
        self.record.work[Work(dtype, _flops(func, args, kwargs, out), sum(moved.values()))] += self.times

    def _is_on_host(self, tensor: Tensor) -> bool:
        return self._storages.get(storage_key(tensor.untyped_storage()), (0, ""))[1] == HOST

    def _count_host(
        self, func: Any, moved: dict[int, int], hosted: set[int], others: set[int], changed: set[int]
    ) -> dict[int, int]:
        """Count an operation that has operands in host memory; return what of `moved` the device reads and writes.

        `moved` has the bytes of all tensors by id; `hosted` and `others` are its operands, on the host and not, and
        `changed` those that it writes in place. Operations on lists work on each tensor where it is.
        """
        host, times = self.record.host, self.times

        def size(keys: Iterable[int]) -> int:
            return times * sum(moved[key] for key in keys)

        if packet_of(func).__name__.startswith(("_foreach_", "_fused_")):
            host[ON_HOST] += size(hosted)
            return {key: each for key, each in moved.items() if key not in hosted}
        if self._kind == UNSHARDED or (others and not changed & hosted):  # the device needs copies
            host[TO_DEVICE] += size(hosted)
            return moved
        host[ON_HOST] += size(moved)
        host[TO_HOST_WAITING] += size(others)
        return {}

    def _count_collective(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        op = COLLECTIVES.get(packet_of(func).__name__)
        if op is None:
            return
        group = _group(args)
        if group is None or group.size() == 1:
            return
        message = max(sum(_bytes(t) for t in tree_leaves(part) if isinstance(t, Tensor)) for part in (*args, out))
        axis = self.axes.get(group.group_name, "world")
        self.record.sent[Collective(axis, group.size(), op, message)] += self.times


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    for arg in args:
        if is_process_group(arg):
            return dist.ProcessGroup.unbox(arg)
        if isinstance(arg, dist.ProcessGroup):
            return arg
    given = [a for a in args if isinstance(a, str)]
    return resolve_process_group(given[-1]) if given else None
