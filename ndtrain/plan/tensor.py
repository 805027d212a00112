"""Plan tensor parallelism: take the model's own plan or derive one, and check that it gives correct gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from ndtrain.errors import PlanError
from ndtrain.hf.compat import expanded_plan
from ndtrain.hf.model import tied_keys
from ndtrain.mesh import MeshSizes, either
from ndtrain.plan import derive
from ndtrain.plan.names import is_within
from ndtrain.plan.override import overridden
from ndtrain.torch_compat import StridedShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of transformers' TP plans (5.23) whose gradients the matrix covers. `CUTTING` styles cut the parameters they
# name (each with the attributes that its module must have), `WRAPPING` styles change a module's inputs and outputs.
CUTTING = {
    "colwise": ("out_features",),
    "colwise_gather_output": ("out_features",),
    "rowwise": ("in_features",),
    "rowwise_split_input": ("in_features",),
    "embedding_rowwise": ("num_embeddings",),
    "packed_colwise": (),
    "packed_rowwise": (),
    "conv1d_colwise": ("nf",),
    "conv1d_colwise_gather_output": ("nf",),
    "conv1d_rowwise": ("nx",),
}
WRAPPING = ("moe_tp_experts", "mla_kv_a_proj", "local_params", "all_reduce", "replicate")
# transformers' hook (<= 5.23) all-reduces the accumulated gradient at every micro batch, which is wrong from the second
# one on, so ndtrain sums these gradients itself, once per step.
SUMMED = "replicated_with_grad_allreduce"
STYLES = (*CUTTING, *WRAPPING, SUMMED)


def rules(
    model: PreTrainedModel,
    sizes: MeshSizes,
    *,
    blocks: tuple[str, ...],
    without: tuple[str, ...],
    overrides: Mapping[str, str],
) -> tuple[dict[str, str], str | None]:
    """Return the checked tensor-parallel plan {FQN: style}, one entry per module, and a note on it or None.

    It is the model's own plan, or one derived from its structure if that cannot be used, with styles replaced by
    `overrides` ({FQN pattern: style}). Modules in `without` and their children are left out. Raises `PlanError` if no
    plan is correct or tp does not divide the heads.
    """
    what = model.config.model_type
    # transformers expands `*` to the model's layer numbers, parameters before modules (private, 5.23).
    declared: dict[str, str] = expanded_plan(model, dict(model.tp_plan or {}))
    own = {name: style for name, style in declared.items() if not is_within(name, without)}
    note = None
    reason = _unusable(model, own, blocks) if own else "declares no tensor-parallel plan"
    if reason:
        own = derive.rules(model, sizes.tp, blocks=blocks, without=without)
        if not own and not overrides:
            raise PlanError(
                f"{what} {reason}, and has no linear layers to cut, so mesh.tp = {sizes.tp} would replicate every "
                "weight; set mesh.tp = 1 and use dp_shard"
            )
        note = f"{what} {reason}; its tensor-parallel plan is derived from its structure"
    found = overridden(model, own, overrides, key="tp.plan", styles=STYLES)
    if overrides and (reason := _unusable(model, found, blocks)):
        raise PlanError(f"{what} with [tp.plan] {reason}")
    _check_heads(what, model.config.get_text_config(), sizes.tp, found)
    return found, note


def _unusable(model: PreTrainedModel, found: dict[str, str], blocks: tuple[str, ...]) -> str | None:
    """Return why these styles would be incorrect, as the end of a sentence; None if no reason is found.

    Deletes from `found` the parameters that have the style of their module.
    """
    if unknown := sorted(set(found.values()) - set(STYLES)):
        return f"has style {unknown[0]} in its tensor-parallel plan, which is not supported"
    modules = dict(model.named_modules())
    for name in [n for n, s in found.items() if n not in modules and s == found.get(n.rpartition(".")[0])]:
        del found[name]
    for name, style in found.items():
        if name in modules and not all(hasattr(modules[name], n) for n in CUTTING.get(style, ())):
            return f"cuts {name}, which is a {type(modules[name]).__name__}, not a linear layer"
        if name in modules and style in CUTTING and _does_more(modules[name]):
            return f"cuts {name}, whose forward does more than that of one layer"
    cut = {
        name: placement(of_it, name.rpartition(".")[2], param.ndim)
        for name, param in model.named_parameters(remove_duplicate=False)
        if (of_it := rule_of(name, found))
    }
    if not any(placed is not None for name, placed in cut.items() if is_within(name, blocks) or not blocks):
        return "leaves every block replicated in its tensor-parallel plan"
    for name, placed in cut.items():
        if "gate_up" in name and rule_of(name, found) == "colwise":
            return f"cuts the fused {name} as one matrix, which mixes gate and up"
        if isinstance(placed, StridedShard) and placed.dim == 0:
            return f"has {name} packed and cut along dim 0, which is not supported"
    for alias, source in tied_keys(model).items():
        if cut.get(alias) != cut.get(source):
            return f"gives one tied weight, {alias} and {source}, two styles"
    return _bare(modules, found)


def _does_more(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer with its own forward, or an embedding with a layer inside."""
    if isinstance(module, nn.Linear):
        return not derive.is_linear(module)
    return isinstance(module, nn.Embedding) and any(True for _ in module.children())


def placement(style: str, name: str, ndim: int) -> Placement | None:
    """Return how `style` places a parameter called `name` over tp; None if it does not cut parameters."""
    if style in ("colwise", "colwise_gather_output"):
        return Shard(max(0, ndim - 2))
    if style in ("rowwise", "rowwise_split_input"):
        return Replicate() if name == "bias" else Shard(ndim - 1)
    if style == "embedding_rowwise":
        return Shard(0)
    if style in ("conv1d_colwise", "conv1d_colwise_gather_output"):
        return Shard(ndim - 1)
    if style == "conv1d_rowwise":
        return Replicate() if name == "bias" else Shard(0)
    if style == "packed_colwise":
        return Shard(0) if ndim == 1 else StridedShard(ndim - 2, split_factor=2)
    if style == "packed_rowwise":
        return Replicate() if ndim == 1 else StridedShard(ndim - 1, split_factor=2)
    return None


def _check_heads(what: str, config: object, tp: int, rules: dict[str, str]) -> None:
    """Raise `PlanError` if the projections of heads are cut and tp does not divide the heads."""
    if not any(style == "colwise" and name.endswith(("q_proj", "k_proj")) for name, style in rules.items()):
        return
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for count, kind in ((heads, "attention"), (kv_heads, "key-value")):
        counts = count if isinstance(count, list) else [count]
        if any(n is None or n % tp for n in counts):
            whole = math.gcd(*(n for c in (heads, kv_heads) for n in (c if isinstance(c, list) else [c]) if n))
            allowed = [n for n in range(1, whole + 1) if whole % n == 0]
            raise PlanError(
                f"mesh.tp = {tp} does not divide the {count} {kind} heads of {what}; tp may be {either(allowed)}"
            )


def _bare(modules: dict[str, nn.Module], found: dict[str, str]) -> str | None:
    """Return a reason if a parameter beside cut layers has no style: its gradient would cover only this rank's share.

    Adds to `found` the scalars of learned activations between two layers of an MLP, and the norms of each head: their
    gradients are summed. Does not look into deeper modules: `proof` compares their gradients.
    """
    for parent in sorted({name.rpartition(".")[0] for name, style in found.items() if style == "colwise"}):
        if parent not in modules:
            continue
        for param_name, _ in modules[parent].named_parameters(recurse=False):
            fqn = f"{parent}.{param_name}" if parent else param_name
            if fqn not in found:
                return f"has {fqn} among its cut layers without a style of its own"
        cut = {n for n, _ in modules[parent].named_children() if found.get(f"{parent}.{n}") == "colwise"}
        # Norms of each head: what heads share is no longer than one, where the projections are cut between heads.
        head = getattr(modules[parent], "head_dim", 1) if any(cut.issuperset(names) for names in derive.HEADS) else 1
        for name, child in modules[parent].named_children():
            params = list(child.parameters())
            if f"{parent}.{name}" not in found and params and all(p.numel() in (1, head) for p in params):
                found[f"{parent}.{name}"] = SUMMED
    return None


def rule_of(fqn: str, rules: dict[str, str]) -> str | None:
    """Return a parameter's style: its own, else its module's; None if there is neither."""
    return rules.get(fqn, rules.get(fqn.rpartition(".")[0]))
