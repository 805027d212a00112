"""Decide which parameters the groups of the recipe's `[[optim.groups]]` have, and which are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ndtrain.errors import PlanError
from ndtrain.hf.routers import expert_count
from ndtrain.plan.names import expression_of, folded
from ndtrain.plan.units import embeddings
from ndtrain.recipe import OptimGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def assign(model: PreTrainedModel, groups: Sequence[OptimGroup], tied: Mapping[str, str]) -> dict[str, int]:
    """Return {FQN of a parameter: index of its group} for those that a group matches; the first that does decides.

    A pattern stands for parameters and for modules with all their parameters; `*` matches any characters but a dot. A
    tied weight is matched by each of its names. Raises `PlanError` for a pattern that matches nothing, for a group of
    which others leave nothing, for names of one weight in different groups, and if all parameters are frozen.
    """
    aliases: dict[str, list[str]] = {}
    for alias, source in tied.items():
        aliases.setdefault(source, []).append(alias)
    names = {fqn: [fqn, *aliases.get(fqn, [])] for fqn, _ in model.named_parameters()}
    around = {name: _around(name) for own in names.values() for name in own}
    known = {prefix for prefixes in around.values() for prefix in prefixes}
    by_name: dict[str, int] = {}
    for number, group in enumerate(groups):
        at, chosen = f"optim.groups[{number}]", set[str]()
        for pattern in group.match:
            expression = expression_of(pattern)
            hit = {name for name in known if expression.fullmatch(name)}
            if not hit:
                near = difflib.get_close_matches(pattern, sorted({*map(folded, known)}), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PlanError(f'{at}.match: "{pattern}" matches nothing in {model.config.model_type}{hint}')
            chosen |= hit
        new = [name for name, prefixes in around.items() if name not in by_name and chosen.intersection(prefixes)]
        if not new:
            raise PlanError(f"{at}: the groups before it have all that it matches; put it before them, or leave it out")
        by_name |= dict.fromkeys(new, number)
    found: dict[str, int] = {}
    for fqn, own in names.items():
        numbers = {by_name[name]: name for name in own if name in by_name}
        if len(numbers) > 1:
            (one, name), (two, other), *_ = sorted(numbers.items())
            raise PlanError(
                f"{name} and {other} are one tied weight, in optim.groups[{one}] and [{two}]; name it in one of them"
            )
        if numbers:
            found[fqn] = next(iter(numbers))
    trainable = [fqn for fqn, param in model.named_parameters() if param.requires_grad and param.numel()]
    if groups and all(fqn in found and groups[found[fqn]].frozen for fqn in trainable):
        raise PlanError("optim.groups freezes all parameters; leave some to train")
    return found


def matrices(model: PreTrainedModel) -> frozenset[str]:
    """Return the FQNs of weights that are matrices of hidden layers, or one matrix for each expert `[E, A, B]`.

    Embeddings, the head, norms, biases, convolutions and what is no `weight` otherwise are none.
    """
    experts = expert_count(model.config.get_text_config())
    outside = {embeddings(model, "output"), *(m for m in model.modules() if isinstance(m, nn.Embedding))}
    ends = {id(param) for module in outside if module is not None for param in module.parameters()}
    return frozenset(
        fqn
        for fqn, param in model.named_parameters()
        if id(param) not in ends
        and min(param.shape, default=0) > 1
        and ((param.ndim == 2 and fqn.endswith(".weight")) or (param.ndim == 3 and experts == param.shape[0]))
    )


def _around(name: str) -> list[str]:
    """Return a parameter's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
