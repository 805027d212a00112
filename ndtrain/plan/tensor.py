"""Tensor parallelism: the model's own plan, checked against what can be done rightly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from ndtrain.errors import PlanError
from ndtrain.mesh import MeshSizes
from ndtrain.model import tied_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of transformers' TP plans whose gradients the parity tests cover, and the dim each cuts: {style: {param: dim}}.
# A dim of None is a replicated parameter.
STYLES: dict[str, dict[str, int | None]] = {
    "colwise": {"weight": 0, "bias": 0},
    "colwise_gather_output": {"weight": 0, "bias": 0},
    "rowwise": {"weight": 1, "bias": None},
    "embedding_rowwise": {"weight": 0},
    "replicated_with_grad_allreduce": {"weight": None, "bias": None},
}
# Its hook all-reduces the accumulated gradient at every micro batch, which is wrong from the second one on
# (transformers <= 5.23): ndtrain sums these gradients itself, once, at the step boundary.
SUMMED = "replicated_with_grad_allreduce"


def rules(model: PreTrainedModel, sizes: MeshSizes, *, without: tuple[str, ...]) -> dict[str, str]:
    """The model's own TP plan, one entry per module, checked against what tensor parallelism can do rightly.

    Modules in `without` and what they contain are left out.
    """
    what, config = model.config.model_type, model.config.get_text_config()
    declared = dict(model.tp_plan or {})
    if not declared:
        raise PlanError(
            f"{what} declares no tensor-parallel plan, so mesh.tp = {sizes.tp} would replicate every weight; "
            "set mesh.tp = 1 and use dp_shard"
        )
    # transformers expands `*` to the model's layer numbers, parameters before modules (private, 5.23).
    expanded: dict[str, str] = {
        name: style
        for name, style in model._expand_parallel_plan(declared).items()
        if not any(name == outer or name.startswith(f"{outer}.") for outer in without)
    }
    params = dict(model.named_parameters(remove_duplicate=False))
    rules = {name: style for name, style in expanded.items() if name not in params}
    loose = [n for n, s in expanded.items() if n in params and rules.get(n.rpartition(".")[0]) != s]
    unknown = sorted({s for s in rules.values() if s not in STYLES})
    if unknown or loose:
        cause = f"style {unknown[0]}" if unknown else f"a rule for the bare parameter {loose[0]}"
        raise PlanError(f"{what} under mesh.tp = {sizes.tp}: its plan has {cause}, not supported yet; set mesh.tp = 1")
    if not any(style in ("colwise", "rowwise") for style in rules.values()):
        raise PlanError(
            f"the tensor-parallel plan of {what} leaves every block replicated; set mesh.tp = 1 and use dp_shard"
        )
    _check_heads(what, config, sizes.tp, rules)
    modules = dict(model.named_modules())
    for name in rules:
        for param_name, _ in modules[name].named_parameters():
            if param_name not in STYLES[rules[name]]:
                raise PlanError(f"{what}: {name}.{param_name} has no tensor-parallel rule; set mesh.tp = 1")
    _check_siblings(what, modules, rules, sizes.tp)
    for alias, source in tied_keys(model).items():
        pair = [_cut(alias, rules), _cut(source, rules)]
        if pair[0] != pair[1]:
            raise PlanError(f"{what}: {alias} and {source} are one tied weight with two plans; set mesh.tp = 1")
    return rules


def _cut(fqn: str, rules: dict[str, str]) -> int | None:
    style, name = rule_of(fqn, rules)
    return STYLES[style][name] if style else None


def _check_heads(what: str, config: object, tp: int, rules: dict[str, str]) -> None:
    if not any(style == "colwise" and name.endswith(("q_proj", "k_proj")) for name, style in rules.items()):
        return
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for count, kind in ((heads, "attention"), (kv_heads, "key-value")):
        counts = count if isinstance(count, list) else [count]
        if any(n is None or n % tp for n in counts):
            whole = math.gcd(*(n for c in (heads, kv_heads) for n in (c if isinstance(c, list) else [c]) if n))
            allowed = [n for n in range(1, whole + 1) if whole % n == 0]
            words = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}" if len(allowed) > 1 else "1"
            raise PlanError(f"mesh.tp = {tp} does not divide the {count} {kind} heads of {what}; tp may be {words}")


def _check_siblings(what: str, modules: dict[str, nn.Module], rules: dict[str, str], tp: int) -> None:
    """Refuse a module that works on a rank's share of features but has parameters that no rule mentions.

    Their gradient would cover this rank's share only (attention sinks, q/k norms without a rule).
    """
    for parent in sorted({name.rpartition(".")[0] for name, style in rules.items() if style == "colwise"}):
        for param_name, _ in modules[parent].named_parameters():
            fqn = f"{parent}.{param_name}" if parent else param_name
            if not any(fqn.startswith(f"{ruled}.") for ruled in rules):
                raise PlanError(
                    f"{what} under mesh.tp = {tp}: {fqn} sits among sharded projections without a rule of its own, "
                    "so its gradient would be incomplete; set mesh.tp = 1"
                )


def rule_of(fqn: str, rules: dict[str, str]) -> tuple[str | None, str]:
    module, _, name = fqn.rpartition(".")
    return rules.get(fqn, rules.get(module)), name
