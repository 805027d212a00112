"""Compilation: runs the blocks of a model through torch.compile, each part that can be one graph as one graph.

Blocks are compiled inside FSDP's hooks, so that a graph sees whole parameters, and after the proof, which computes on
other shapes. What cannot be traced stays eager inside its block: exchanges of experts' tokens, modules that FSDP
gathers by themselves, and attention in place of transformers' own (split over cp, or dropping by tp rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ndtrain.errors import RecipeError, first_line
from ndtrain.parallel.cp import ContextParallel
from ndtrain.plan import Plan
from ndtrain.plan.names import is_within
from ndtrain.torch_compat import within_memory_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules of one kernel: a graph of their own would gain nothing.
_PLAIN = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity)


class Compiled(NamedTuple):
    """The FQNs of the modules that are compiled, and of those inside blocks that stay eager because of what they do."""

    modules: list[str]
    eager: list[str]

    def describe(self) -> str:
        """Return in words what is compiled."""
        line = f"train.compile: {len(self.modules)} modules are compiled, which takes a while in the first steps"
        return f"{line}; eager inside them or beside them: {', '.join(self.eager)}" if self.eager else line


def compile_blocks(
    model: PreTrainedModel, plan: Plan, context: ContextParallel | None, *, budget: float | None = None
) -> Compiled:
    """Compile the blocks of `model`, in place, to keep the share `budget` of their activations where it is given.

    Raises `RecipeError` where nothing can be compiled on this machine.
    """
    _check(next(model.parameters()).device)
    # A module whose hooks exchange or gather cannot be part of a graph, nor anything around it.
    opaque = {name for unit in plan.units for name in unit.modules if name not in plan.blocks}
    opaque |= {name for name in plan.ep_rules if plan.sizes.ep > 1}
    opaque = {name for name in opaque if is_within(name, plan.blocks)}
    names = [name for block in plan.blocks for name in _regions(model, block, opaque)]
    # Layers that differ in one number, such as a window, are compiled each for itself, in training and for evaluations.
    torch.compiler.config.recompile_limit = max(8, 4 * len(names))
    eager = sorted({name.rpartition(".")[2] for name in opaque})
    if context is not None:
        context.attend = torch.compiler.disable(context.attend)  # type: ignore[method-assign]
    if context is not None or plan.drops_by_rank:
        eager.append("attention")
    for name in names:
        module = model.get_submodule(name)
        compiled = torch.compile(module.forward, dynamic=False)
        module.forward = compiled if budget is None else within_memory_budget(compiled, budget)  # type: ignore[method-assign]
    return Compiled(names, eager)


def _regions(model: nn.Module, name: str, opaque: set[str]) -> Iterator[str]:
    """Yield the largest modules in the module `name` that have nothing opaque in them."""
    if name in opaque:
        return
    if not any(is_within(inner, [name]) for inner in opaque):
        if not isinstance(model.get_submodule(name), _PLAIN):
            yield name
        return
    for child, _ in model.get_submodule(name).named_children():
        yield from _regions(model, f"{name}.{child}", opaque)


def _check(device: torch.device) -> None:
    """Raise `RecipeError` if torch.compile does not work here, as without a C++ compiler on a CPU."""
    try:
        torch.compile(torch.sigmoid, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler raises
        raise RecipeError(
            f"train.compile = true: torch.compile does not work on this machine ({first_line(error)}); mend that, or "
            "set it to false"
        ) from error
