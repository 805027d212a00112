"""Allocate a model that was built on meta, and fill it with NaN or noise until its weights are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ndtrain.errors import PlanError
from ndtrain.hf.compat import mark_initialized
from ndtrain.hf.model import built_buffers, tie
from ndtrain.hf.weight_names import model_tensors
from ndtrain.layout import held_boxes, local_part
from ndtrain.recipe import Recipe
from ndtrain.runs.process import Runtime
from ndtrain.runs.seeds import random_seed
from ndtrain.torch_compat import apply_to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Distance in elements between the NaNs that mark a large tensor in new memory.
MARK_EVERY = 2**16


def materialize(model: PreTrainedModel, runtime: Runtime, *, recipe: Recipe, on_host: Collection[str] = ()) -> None:
    """Allocate every parameter and buffer on the device, mark them with NaN, and compute the buffers.

    Parameters whose FQN is in `on_host` are allocated in host memory. Buffers that are not in a checkpoint (rotary
    frequencies) come from the model's own initialization or construction, as they do in one process. Raises `PlanError`
    naming a buffer that cannot be computed again.
    """
    hosted = {param for fqn, param in model.named_parameters() if fqn in on_host}
    apply_to_tensors(
        model, lambda tensor: torch.empty_like(tensor, device="cpu" if tensor in hosted else runtime.device)
    )
    tie(model)
    saved = set(model.state_dict().keys())
    _mark([*model.parameters(), *model.buffers()])
    for tensor in [*model.parameters(), *model.buffers()]:
        mark_initialized(tensor, isinstance(tensor, nn.Parameter))
    with torch.no_grad():
        model.initialize_weights()
    lost = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and bool(buffer.isnan().any())
    }
    made = built_buffers(model, lost, recipe) if lost else {}
    for name, buffer in lost.items():
        if name not in made or bool(made[name].isnan().any()):
            raise PlanError(
                f"buffer {name} is computed only when the model is built, and is too large to be computed again; "
                "ndtrain cannot train this model"
            )
        buffer.copy_(made[name])


@torch.no_grad()
def unset(tensors: Iterable[Tensor]) -> None:
    """Fill floating-point tensors with NaN, so that weights that are never loaded are found."""
    for tensor in tensors:
        if tensor.is_floating_point():
            local_part(tensor).fill_(float("nan"))


@torch.no_grad()
def _mark(tensors: Iterable[Tensor]) -> None:
    """Mark new memory like `unset`, but touch little of it: the first touch costs as much as reading the weights."""
    for tensor in tensors:
        local = local_part(tensor)
        if not tensor.is_floating_point():
            continue
        if local.numel() <= 4 * MARK_EVERY or not local.is_contiguous():
            local.fill_(float("nan"))
        else:
            local.view(-1)[::MARK_EVERY] = local.view(-1)[-1] = float("nan")


@torch.no_grad()
def fill_with_noise(model: PreTrainedModel) -> None:
    """Fill the materialized `model` with random weights of ordinary size, to test which outputs depend on which inputs.

    The parts of a tensor differ, its replicas are equal.
    """
    for name, tensor in model_tensors(model).items():
        local = local_part(tensor)
        torch.manual_seed(random_seed(name, *(box.offsets for box in held_boxes(tensor))))
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            # Some models divide by buffers that hold sizes or numbers of buckets.
            local.fill_(1 if not tensor.is_floating_point() and tensor.dtype != torch.bool else 0)
        elif tensor.ndim < 2 or not tensor.numel():
            local.normal_(mean=1.0, std=0.1)
        else:
            local.normal_(std=tensor.shape[-1] ** -0.5)
