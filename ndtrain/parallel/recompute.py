"""Recomputation: computes a block's activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from ndtrain.hf.compat import wrap_checkpoints
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan
from ndtrain.torch_compat import TorchDispatchMode, all_to_all, flash_for_cpu, grouped_mm, packet_of, to_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten

# Choices of experts: between two that are all but equal another rounding may choose the other one, and gradients would
# be of an output that was not computed.
_CHOICES = {aten.topk, aten.argmax}
# Products, attention, and what ranks exchange.
_COSTLY = {*flop_registry, flash_for_cpu, grouped_mm, all_to_all}
_COSTLY_BY_NAME = {"transformers.grouped_mm_fallback", "torch_attn._varlen_attn"}


def apply_recomputation(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Let blocks of `model` recompute their activations as the plan says, in place."""
    how = plan.recomputation
    assert how is not None
    more: dict[str, Any] = {}
    if how.kind == "selective" or plan.routes:
        more["context_fn"] = partial(_contexts, costly=how.kind == "selective", routes=plan.routes)
    model.activation_checkpointing_enable({"use_reentrant": False, **more}, every_n_layers=how.every)
    if how.kind == "offload":
        wrap_checkpoints(model, _inputs_on_host)


def _contexts(*, costly: bool, routes: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what is around the forward pass of a block, and around its repetition."""
    forward, again = create_selective_checkpoint_contexts(partial(_keeps, costly=costly))
    if not routes or torch.compiler.is_compiling():
        return forward, again
    kept: list[Tensor] = []
    # What torch's modes do not keep reaches the ones around them.
    return _Within(_Chooses(kept), forward), _Within(_ChoosesAgain(kept), again)


def _keeps(context: Any, operator: Any, *args: Any, costly: bool, **kwargs: Any) -> CheckpointPolicy:
    """Say, as torch asks of each operation of a block, whether its result is kept."""
    packet = packet_of(operator)
    # Outside graphs results that are kept must not be changed in place, as routers do with the weights of their choice.
    kept = _comes_to_host(packet, args, kwargs) or (packet in _CHOICES and torch.compiler.is_compiling())
    if costly:
        kept = kept or packet in _COSTLY or str(packet) in _COSTLY_BY_NAME
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Within:
    """One mode of operations inside another."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._modes, self._inside = (outer, inner), ExitStack()

    def __enter__(self) -> None:
        for mode in self._modes:
            self._inside.enter_context(mode)

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


class _OutsideGraphs(TorchDispatchMode):
    """Leaves what is compiled inside, as FlexAttention is, to the compiler."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Chooses(_OutsideGraphs):
    """Keeps the indices of choices, in their order."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if packet_of(func) in _CHOICES:
            self.kept.append(out if isinstance(out, Tensor) else out[1])
        return out


class _ChoosesAgain(_OutsideGraphs):
    """Chooses what `_Chooses` has kept."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        self._next = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if packet_of(func) not in _CHOICES:
            return func(*args, **(kwargs or {}))
        indices = next(self._next)
        if packet_of(func) is aten.argmax:
            return indices
        given = dict(zip(("self", "k", "dim"), args, strict=False)) | (kwargs or {})
        return given["self"].gather(given.get("dim", -1), indices), indices


def _comes_to_host(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation copies to the host, which would wait for the device once more."""
    device = kwargs.get("device")
    return bool(packet is to_copy and device is not None and device.type == "cpu" and args[0].device != device)


def _inputs_on_host(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return `checkpoint`, which runs a block and recomputes it later, with the block's input kept on the host.

    The copies run in the order of the device's other work, so that nobody waits for them.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
            return checkpoint(*args, **kwargs)

    return run


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Return the tensor's device, and a copy of it in host memory."""
    on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, on_host.copy_(tensor, non_blocking=True)


def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    """Return a copy on the device of what `to_host` has kept."""
    device, on_host = kept
    return on_host.to(device, non_blocking=True, copy=True)
