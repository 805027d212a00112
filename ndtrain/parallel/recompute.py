"""Recomputation: computes a block's activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from ndtrain.hf.compat import wrap_checkpoints
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan
from ndtrain.torch_compat import all_to_all, flash_for_cpu, grouped_mm, packet_of, to_copy

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
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy(costly=how.kind == "selective"))
    model.activation_checkpointing_enable({"use_reentrant": False, **more}, every_n_layers=how.every)
    if how.kind == "offload":
        wrap_checkpoints(model, _inputs_on_host)


def _policy(*, costly: bool) -> Callable[..., CheckpointPolicy]:
    """Return what torch asks of each operation of a block: whether its result is kept."""

    def keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = packet_of(operator)
        kept = packet in _CHOICES or _comes_to_host(packet, args, kwargs)
        if costly:
            kept = kept or packet in _COSTLY or str(packet) in _COSTLY_BY_NAME
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return keeps


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
