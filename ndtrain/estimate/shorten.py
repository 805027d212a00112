"""Replace a deep model by shallow ones: repeated layers cost the same, so a few of them give the cost of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ndtrain.plan import Plan
from ndtrain.plan.names import innermost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Depths(NamedTuple):
    """The depths of two shallow models that differ by one period of layers."""

    short: int
    long: int
    periods: int  # how many periods the short model lacks
    first: int  # layers at the beginning that keep their numbers in the whole model


def depths(model: PreTrainedModel, plan: Plan) -> Depths | None:
    """Return the depths to run instead of the whole model; None if layers do not repeat or are too few."""
    stem, total = _stem(plan)
    if stem is None:
        return None
    kinds = _kinds(model, plan)
    for period in range(1, total // 3 + 1):
        head = next((i for i in range(total - period - 1, -1, -1) if kinds[i] != kinds[i + period]), -1) + 1
        rest = total - head
        # Keep the last period apart from the first: memory peaks between the passes of the last layers.
        short = head + 2 * period + rest % period
        if short + period < total:
            return Depths(short, short + period, (total - short) // period, head + period)
    return None


def whole_name(name: str, plan: Plan, layers: int, found: Depths) -> str | None:
    """Return the name in the whole model of the module `name` of a model cut to `layers` blocks.

    The first blocks keep their numbers, the last stay the last. None for those between, which need less memory.
    """
    stem, total = _stem(plan)
    if stem is None or not name.startswith(f"{stem}."):
        return name
    number, _, rest = name.removeprefix(f"{stem}.").partition(".")
    at = int(number)
    if at >= layers - (found.long - found.short):
        at += total - layers
    elif at >= found.first:
        return None
    return ".".join(part for part in (stem, str(at), rest) if part)


def cut_short(model: PreTrainedModel, plan: Plan, layers: int) -> None:
    """Keep the first `layers` blocks of `model`, in place."""
    stem, _ = _stem(plan)
    assert stem is not None
    parent, _, name = stem.rpartition(".")
    whole = model.get_submodule(stem)
    assert isinstance(whole, nn.ModuleList)
    setattr(model.get_submodule(parent), name, whole[:layers])
    model.config.get_text_config().num_hidden_layers = layers


def _stem(plan: Plan) -> tuple[str | None, int]:
    """Return the name of the list of all blocks, or None if they are not in one, and the number of blocks."""
    stems = {name.rpartition(".")[0] for name in plan.blocks}
    in_order = [name.rpartition(".")[2] for name in plan.blocks] == [str(i) for i in range(len(plan.blocks))]
    return (stems.pop() if len(stems) == 1 and in_order else None), len(plan.blocks)


def _kinds(model: PreTrainedModel, plan: Plan) -> list[object]:
    """Return a value for each block, equal for blocks with the same modules, parameters, placements, config and fate:
    to be recomputed or not.
    """
    config = model.config.get_text_config()
    total = len(plan.blocks)
    by_layer = [value for _, value in sorted(config.to_dict().items()) if isinstance(value, list | tuple)]
    by_layer = [value for value in by_layer if len(value) == total]
    params: dict[str, list[object]] = {name: [] for name in plan.blocks}
    for param in plan.params:
        block = innermost(param.fqn, params)
        if block is not None:
            params[block].append((param.fqn.removeprefix(block), param.shape, param.style, param.placements))
    every = plan.recomputation.every if plan.recomputation is not None else 1
    kinds: list[object] = []
    for i, name in enumerate(plan.blocks):
        modules = [type(module) for module in model.get_submodule(name).modules()]
        kinds.append((modules, params[name], [value[i] for value in by_layer], i % every == 0))
    return kinds
