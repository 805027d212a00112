"""Tensor parallelism: the model's own plan, checked against what can be done rightly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from ndtrain.errors import PlanError
from ndtrain.mesh import MeshSizes
from ndtrain.model import tied_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of transformers' TP plans (5.23) whose gradients the matrix covers. The first cut the parameters they name
# (with the sizes that their module must have), the others work on a module's inputs and outputs.
CUTTING = {
    "colwise": ("out_features",),
    "colwise_gather_output": ("out_features",),
    "rowwise": ("in_features",),
    "rowwise_split_input": ("in_features",),
    "embedding_rowwise": ("num_embeddings",),
    "packed_colwise": (),
    "packed_rowwise": (),
}
WRAPPING = ("moe_tp_experts", "mla_kv_a_proj", "local_params", "all_reduce", "replicate")
# Its hook all-reduces the accumulated gradient at every micro batch, which is wrong from the second one on
# (transformers <= 5.23): ndtrain sums these gradients itself, once, at the step boundary.
SUMMED = "replicated_with_grad_allreduce"


def rules(
    model: PreTrainedModel, sizes: MeshSizes, *, blocks: tuple[str, ...], without: tuple[str, ...]
) -> dict[str, str]:
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
    modules = dict(model.named_modules())
    unknown = sorted(set(expanded.values()) - {*CUTTING, *WRAPPING, SUMMED})
    if unknown:
        raise PlanError(
            f"{what} under mesh.tp = {sizes.tp}: its plan has style {unknown[0]}, not supported yet; set mesh.tp = 1"
        )
    found = {}
    for name, style in expanded.items():
        if name in modules or style != expanded.get(name.rpartition(".")[0]):
            found[name] = style
        if name in modules and style in CUTTING and not all(hasattr(modules[name], n) for n in CUTTING[style]):
            raise PlanError(f"{what}: {name} is a {type(modules[name]).__name__}, no linear layer; set mesh.tp = 1")
    cut = {
        name: placement(of_it, name.rpartition(".")[2], param.ndim)
        for name, param in params.items()
        if (of_it := rule_of(name, found))
    }
    inside = tuple(f"{block}." for block in blocks)
    if not any(place is not None for name, place in cut.items() if name.startswith(inside)):
        raise PlanError(
            f"the tensor-parallel plan of {what} leaves every block replicated; set mesh.tp = 1 and use dp_shard"
        )
    for name, place in cut.items():
        if "gate_up" in name and rule_of(name, found) == "colwise":
            raise PlanError(f"{what}: its plan cuts {name} in one piece, which mixes gate and up; set mesh.tp = 1")
        if isinstance(place, _StridedShard) and place.dim == 0:
            raise PlanError(f"{what}: {name} is packed and cut along dim 0, not supported yet; set mesh.tp = 1")
    _check_heads(what, config, sizes.tp, found)
    _check_bare(what, modules, found, sizes.tp)
    for alias, source in tied_keys(model).items():
        if cut.get(alias) != cut.get(source):
            raise PlanError(f"{what}: {alias} and {source} are one tied weight with two plans; set mesh.tp = 1")
    return found


def placement(style: str, name: str, ndim: int) -> Placement | None:
    """How `style` cuts a parameter called `name` over tp, or None where it does not."""
    if style in ("colwise", "colwise_gather_output"):
        return Shard(max(0, ndim - 2))
    if style in ("rowwise", "rowwise_split_input"):
        return Replicate() if name == "bias" else Shard(ndim - 1)
    if style == "embedding_rowwise":
        return Shard(0)
    if style == "packed_colwise":
        return Shard(0) if ndim == 1 else _StridedShard(ndim - 2, split_factor=2)
    if style == "packed_rowwise":
        return Replicate() if ndim == 1 else _StridedShard(ndim - 1, split_factor=2)
    return None


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


def _check_bare(what: str, modules: dict[str, nn.Module], rules: dict[str, str], tp: int) -> None:
    """Refuse a module that works on a rank's share of features but has parameters of its own without a rule.

    Their gradient would cover this rank's share only (attention sinks). What deeper modules do shows in the gradients:
    `Trainer` compares those of replicated parameters between the ranks.
    """
    for parent in sorted({name.rpartition(".")[0] for name, style in rules.items() if style == "colwise"}):
        for param_name, _ in modules[parent].named_parameters(recurse=False) if parent in modules else ():
            fqn = f"{parent}.{param_name}" if parent else param_name
            if fqn not in rules:
                raise PlanError(
                    f"{what} under mesh.tp = {tp}: {fqn} sits among sharded projections without a rule of its own, "
                    "so its gradient would be incomplete; set mesh.tp = 1"
                )


def rule_of(fqn: str, rules: dict[str, str]) -> str | None:
    """The style for a parameter: its own, else its module's."""
    return rules.get(fqn, rules.get(fqn.rpartition(".")[0]))
