"""Make the FSDP units that the recipe chooses: `[fsdp] mode = "manual"` and the patterns of `[fsdp.modules]`."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ndtrain.errors import PlanError
from ndtrain.hf.model import kept_in_fp32
from ndtrain.plan.names import expression_of, folded, innermost
from ndtrain.plan.types import Unit
from ndtrain.plan.units import embeddings, joined, root
from ndtrain.recipe import Recipe
from ndtrain.recipe.problems import dotted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def units(model: PreTrainedModel, tied: dict[str, str], recipe: Recipe, *, experts: tuple[str, ...]) -> list[Unit]:
    """Return the matched modules as units, in the order in which FSDP wraps them, without the root.

    Experts under ep are always units. If no pattern matches them, they have the policies of the unit around them.
    Raises `PlanError` naming the pattern.
    """
    usual = replace(root(recipe), reshard=recipe.fsdp.reshard_after_forward)
    matched = _matched(model, usual, recipe)
    chosen = {name: _unit(name, pattern, usual, recipe) for name, pattern in matched.items()}
    low = any(unit.param_dtype != "float32" for unit in (*chosen.values(), usual))
    for name, pattern in matched.items():
        for outer in experts:
            if name.startswith(f"{outer}."):
                raise PlanError(
                    f"{_at(pattern)} matches {name}, a part of experts, which have to be one unit under mesh.ep; name "
                    f"{outer} instead, or set mesh.ep = 1"
                )
    for name in experts:
        around = _around(name, chosen, usual)
        unit = chosen.get(name) or replace(around, name=name, modules=(name,))
        if unit.param_dtype != around.param_dtype:
            raise PlanError(
                f"{_at(matched[name])} gives {name} a mixed_precision of its own, but experts under mesh.ep compute in "
                f"the dtype of the unit around them, {around.param_dtype}; leave mixed_precision out"
            )
        # Routing weights keep their dtype, as they do when experts are gathered with their block.
        chosen[name] = replace(unit, experts=True, cast_inputs=False)
    kept = [name for name in matched if _is_kept(model, name)]
    for name in kept:
        if recipe.fsdp.modules[matched[name]].mixed_precision in (True, "bfloat16"):
            raise PlanError(
                f"{_at(matched[name])} gives {name} mixed_precision, but {model.config.model_type} keeps its "
                "parameters in float32; leave mixed_precision out"
            )
    _check_none_is_empty(model, matched, chosen)
    head = embeddings(model, "output")
    for name in matched:
        # Units of different dtypes work together if each casts its inputs to its own dtype and its outputs to that of
        # the unit around it. The head's output is the model's result, so it keeps its precision.
        around = _around(name, chosen, usual)
        if low and name not in (*experts, *kept):
            differs = chosen[name].param_dtype != around.param_dtype and model.get_submodule(name) is not head
            output = around.param_dtype if differs else None
            chosen[name] = replace(chosen[name], cast_inputs=True, output_dtype=output)
    together = _tied_together(chosen, matched, tied)
    return sorted(together, key=lambda unit: -max(name.count(".") for name in unit.modules))


def _at(pattern: str) -> str:
    return dotted(("fsdp", "modules", pattern))


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Return whether `pattern` matches a module's FQN (`*` matches anything but a dot) or is its class name."""
    return type(module).__name__ == pattern or expression_of(pattern).fullmatch(name) is not None


def _matched(model: PreTrainedModel, usual: Unit, recipe: Recipe) -> dict[str, str]:
    """Return {module with parameters: the pattern that matches it}."""
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, str] = {}
    for pattern in recipe.fsdp.modules:
        hits = [name for name, module in modules.items() if _matches(pattern, name, module)]
        if not hits:
            raise PlanError(f"{_at(pattern)} matches no module of {model.config.model_type}; {_hint(pattern, model)}")
        if not any(True for name in hits for _ in modules[name].parameters()):
            raise PlanError(f"{_at(pattern)} matches {hits[0]}, which has no parameters; leave it out")
        for name in hits:
            module, other = modules[name], found.get(name)
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
                raise PlanError(
                    f"{_at(pattern)} matches {name}, a {type(module).__name__} without a forward of its own, so FSDP "
                    f'cannot gather its weights before a call; name its modules instead, e.g. "{name}.*"'
                )
            if other is not None and _unit(name, other, usual, recipe) != _unit(name, pattern, usual, recipe):
                raise PlanError(f"{_at(pattern)} and {_at(other)} both match {name}, with different policies; keep one")
            if any(True for _ in module.parameters()):
                found[name] = pattern
    return found


def _hint(pattern: str, model: PreTrainedModel) -> str:
    if any(folded(pattern) == folded(fqn) for fqn, _ in model.named_parameters()):
        return f'it is a parameter; name its module, "{pattern.rpartition(".")[0]}"'
    names = {folded(name): None for name, _ in model.named_modules() if name}
    names |= {type(module).__name__: None for _, module in model.named_modules()}
    inside = [name for name in names if name.endswith(f".{pattern}")]
    near = inside[:3] or difflib.get_close_matches(pattern, names, n=3)
    return "did you mean " + " or ".join(f'"{n}"' for n in near) + "?" if near else "its modules are " + _some(names)


def _some(names: dict[str, None]) -> str:
    first = [f'"{name}"' for name in names if not name[0].isupper()][:6]
    return ", ".join(first) + ", ..."


def _unit(name: str, pattern: str, usual: Unit, recipe: Recipe) -> Unit:
    """Return the unit of one module; [fsdp] gives the values that its policy leaves out."""
    given = recipe.fsdp.modules[pattern]
    dtype: str = usual.param_dtype
    if given.mixed_precision is False:
        dtype = recipe.model.dtype
    elif isinstance(given.mixed_precision, str):
        dtype = given.mixed_precision
    return replace(
        usual,
        name=name,
        modules=(name,),
        reshard=usual.reshard if given.policy is None else given.policy == "free_full_weight",
        param_dtype=dtype,
        cpu_offload=usual.cpu_offload if given.cpu_offload is None else given.cpu_offload,
    )


def _around(name: str, chosen: dict[str, Unit], usual: Unit) -> Unit:
    outer = innermost(name.rpartition(".")[0], chosen)
    return usual if outer is None else chosen[outer]


def _is_kept(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model keeps all parameters of a module in float32."""
    kept, module = kept_in_fp32(model, torch.bfloat16), model.get_submodule(name)
    return kept is not None and all(kept.search(f"{name}.{own}") for own, _ in module.named_parameters())


def _check_none_is_empty(model: nn.Module, matched: dict[str, str], chosen: dict[str, Unit]) -> None:
    holders = {fqn.rpartition(".")[0] for fqn, _ in model.named_parameters(remove_duplicate=False)}
    used = {innermost(module, chosen) for module in holders}
    for name, pattern in matched.items():
        if name not in used:
            raise PlanError(
                f"{_at(pattern)} matches {name}, all of whose parameters are in units inside it; leave it out"
            )


def _tied_together(chosen: dict[str, Unit], matched: dict[str, str], tied: dict[str, str]) -> list[Unit]:
    """Return the units, with modules that share a weight merged. Raises `PlanError` if they cannot be merged."""
    leader: dict[str, str] = {}
    for alias, source in tied.items():
        modules = [key.rpartition(".")[0] for key in (source, alias)]
        owners = [innermost(module, chosen) for module in modules]
        if owners[0] == owners[1]:
            continue
        first, second = (chosen.get(module) for module in modules)
        policies = [unit and (unit.reshard, unit.param_dtype, unit.cpu_offload) for unit in (first, second)]
        if first is None or second is None or policies[0] != policies[1]:
            named = next(matched[owner] for owner in owners if owner in matched)
            raise PlanError(
                f"{_at(named)}: {alias} and {source} are one tied weight, which must be in one FSDP unit; give "
                f'"{modules[0]}" and "{modules[1]}" the same policies, or match neither'
            )
        leader[modules[1]] = leader.get(modules[0], modules[0])
    together = []
    for name, unit in chosen.items():
        members = (name, *(other for other, first in leader.items() if first == name))
        if name not in leader:
            output = unit.output_dtype if all(chosen[m].output_dtype for m in members) else None
            together.append(replace(unit, name=joined(members), modules=members, output_dtype=output))
    return together
