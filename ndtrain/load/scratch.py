"""Weights drawn by the model's own initialization, the same on every mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf.compat import guard_torch_init_functions, initialize_own
from ndtrain.hf.model import meta_model
from ndtrain.layout import held_boxes, local_part
from ndtrain.load.memory import model_tensors
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.runs.seeds import random_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initialize(model: PreTrainedModel, plan: Plan, *, recipe: Recipe) -> None:
    """Draw the weights from (train.seed, FQN) with the model's own initialization, the same on every mesh.

    One block at a time is drawn whole on the CPU and its slices are kept. Raises `PlanError` naming a weight that the
    model's own initialization leaves unset.
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
                raise PlanError(f"{fqn} is not set by the model's own initialization; start from saved weights")
            target = targets.pop(fqn)
            local = local_part(target)
            for box in held_boxes(target):
                local[box.local] = value[box.inside]
        module.to("meta")
    if targets:
        raise PlanError(f"{min(targets)} is not set by the model's own initialization; start from saved weights")


def _initialized_together(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Blocks, then every remaining module with tensors of its own: a cut that is the same on every mesh."""
    yield from plan.blocks
    for name, module in model.named_modules():
        inside = any(name == b or name.startswith(f"{b}.") for b in plan.blocks)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not inside:
            yield name


@torch.no_grad()
def _draw(model: PreTrainedModel, module: nn.Module, *, seed: int) -> None:
    try:
        module.to_empty(device="cpu")
    except RuntimeError as error:
        raise RecipeError(f"{type(module).__name__} does not fit this machine's memory; see model.config") from error
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
    """The innermost model whose `_init_weights` is responsible for `module`."""
    from transformers import PreTrainedModel

    owner = model
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and any(m is module for m in candidate.modules()):
            owner = candidate
    return owner
