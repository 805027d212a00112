"""Draw weights with the model's own initialization, the same on every mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf.compat import guard_torch_init_functions, initialize_own
from ndtrain.hf.model import meta_model
from ndtrain.hf.weight_names import model_tensors
from ndtrain.layout import held_boxes, local_part
from ndtrain.plan import Plan
from ndtrain.plan.names import is_within
from ndtrain.recipe import Recipe
from ndtrain.runs.seeds import random_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initialize(
    model: PreTrainedModel, plan: Plan, *, recipe: Recipe, progress: Callable[[], None] = lambda: None
) -> None:
    """Draw the weights from (train.seed, FQN) with the model's own initialization, the same on every mesh.

    Draws one whole block at a time on the CPU and keeps this rank's boxes; calls `progress` after each. Raises
    `PlanError` naming a weight that the model's own initialization leaves unset, and `RecipeError` if a block does not
    fit the memory.
    """
    reference = meta_model(recipe)
    targets = model_tensors(model)
    for name in _initialized_together(reference, plan):
        module = reference.get_submodule(name)
        _draw(reference, module, seed=random_seed(recipe.train.seed, name))
        for leaf, value in module.state_dict().items():
            fqn = f"{name}.{leaf}" if name else leaf
            if fqn not in targets:
                continue
            if value.is_floating_point() and bool(value.isnan().any()):
                raise PlanError(_unset_message(fqn))
            target = targets.pop(fqn)
            local = local_part(target)
            for box in held_boxes(target):
                local[box.local] = value[box.inside]
        module.to("meta")
        progress()
    if targets:
        raise PlanError(_unset_message(min(targets)))


def _unset_message(fqn: str) -> str:
    return f"the model's own initialization does not set {fqn}; start from saved weights (model.name)"


def _initialized_together(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Yield the blocks, then every other module with tensors of its own: the same names on every mesh."""
    yield from plan.blocks
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not is_within(name, plan.blocks):
            yield name


@torch.no_grad()
def _draw(model: PreTrainedModel, module: nn.Module, *, seed: int) -> None:
    """Draw the weights of `module` on the CPU; tensors that its initialization does not set stay NaN."""
    try:
        module.to_empty(device="cpu")
    except RuntimeError as error:
        raise RecipeError(
            f"{type(module).__name__} does not fit this machine's memory; reduce its sizes in [model.config]"
        ) from error
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        torch.manual_seed(seed)
        _apply_inside_out(module, _owner(model, module))


def _apply_inside_out(module: nn.Module, owner: PreTrainedModel) -> None:
    from transformers import PreTrainedModel

    for child in module.children():
        _apply_inside_out(child, child if isinstance(child, PreTrainedModel) else owner)
    initialize_own(owner, module)


def _owner(model: PreTrainedModel, module: nn.Module) -> PreTrainedModel:
    """Return the innermost model that contains `module`, whose `_init_weights` initializes it."""
    from transformers import PreTrainedModel

    owner = model
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and any(m is module for m in candidate.modules()):
            owner = candidate
    return owner
