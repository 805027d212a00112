"""The sharding plan: for every parameter its style, placements, FSDP unit and local shape, or a refusal.

Pure: a meta model, `MeshSizes` and a recipe come in, a `Plan` comes out or a `PlanError` is raised. `parallelize.py`
applies a plan and decides nothing; `inspect` prints it.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from ndtrain.errors import PlanError
from ndtrain.layout import Box, fsdp_over, local_boxes, local_shape
from ndtrain.mesh import MeshSizes
from ndtrain.model import kept_in_fp32, tied_keys
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of transformers' TP plans whose gradients the parity tests cover, and the dim each cuts: {style: {param: dim}}.
# A dim of None is a replicated parameter.
TP_STYLES: dict[str, dict[str, int | None]] = {
    "colwise": {"weight": 0, "bias": 0},
    "colwise_gather_output": {"weight": 0, "bias": 0},
    "rowwise": {"weight": 1, "bias": None},
    "embedding_rowwise": {"weight": 0},
    "replicated_with_grad_allreduce": {"weight": None, "bias": None},
}
# Its hook all-reduces the accumulated gradient at every micro batch, which is wrong from the second one on
# (transformers <= 5.23): ndtrain sums these gradients itself, once, at the step boundary.
SUMMED_STYLE = "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class Unit:
    """Modules that FSDP gathers together."""

    name: str
    modules: tuple[str, ...]
    reshard: bool
    fp32: bool = False
    experts: bool = False  # sharded over efsdp instead of fsdp


@dataclass(frozen=True)
class ParamPlan:
    """One parameter: its global shape, how each mesh axis places it, and the FSDP unit that gathers it."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    style: str
    unit: str
    axes: tuple[str, ...]
    placements: tuple[Placement, ...]

    def local_shape(self, sizes: MeshSizes, rank: int) -> tuple[int, ...]:
        """Shape of what `rank` holds."""
        return local_shape(self.shape, *self._place(sizes, rank))

    def boxes(self, sizes: MeshSizes, rank: int) -> list[Box]:
        """The boxes of the global tensor that `rank` holds."""
        return local_boxes(self.shape, *self._place(sizes, rank))

    def _place(self, sizes: MeshSizes, rank: int) -> tuple[list[int], list[int], tuple[Placement, ...]]:
        place = sizes.coordinate(rank)
        return [getattr(sizes, a) for a in self.axes], [place[a] for a in self.axes], self.placements

    def local_numel(self, sizes: MeshSizes, rank: int) -> int:
        return math.prod(self.local_shape(sizes, rank))

    def copies(self, sizes: MeshSizes) -> int:
        """How many times the mesh holds this parameter, all ranks together."""
        cuts = (
            getattr(sizes, a) for a, p in zip(self.axes, self.placements, strict=True) if not isinstance(p, Replicate)
        )
        return sizes.world_size // math.prod(cuts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything that `parallelize` does to a model, as data."""

    model_type: str
    sizes: MeshSizes
    params: tuple[ParamPlan, ...]
    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    tied: dict[str, str]
    tp_rules: dict[str, str]
    ep_rules: dict[str, str]
    tp_summed: tuple[str, ...]
    head: str | None
    notes: tuple[str, ...]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    def rank_numel(self, rank: int) -> int:
        return sum(p.local_numel(self.sizes, rank) for p in self.params)

    @property
    def tp_coverage(self) -> float:
        """Share of the parameters that tensor parallelism cuts."""
        return sum(p.numel for p in self.params if "tp" in p.axes and not _replicated(p)) / max(1, self.numel)


def _replicated(param: ParamPlan) -> bool:
    return isinstance(param.placements[param.axes.index("tp")], Replicate)


def make_plan(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> Plan:
    """Decide every parameter's place for `model` (on meta) on a mesh of `sizes`.

    Raises `PlanError`, before any weight is read, for what cannot be trained rightly, with the reason and what to
    change.
    """
    model_type = model.config.model_type
    _refuse(model, sizes, recipe)
    notes: list[str] = []
    ep_rules = _ep_rules(model, sizes) if sizes.ep > 1 else {}
    experts = tuple(name for name, style in ep_rules.items() if style == EP_MODULE)
    rules: dict[str, str] = {}
    if sizes.tp > 1:
        rules = _tp_rules(model, sizes, without=experts)
        _refuse_dropout(model)
    notes += _notes(model, recipe)
    tied = tied_keys(model)
    blocks = tuple(find_blocks(model))
    units = tuple(_units(model, blocks, tied, recipe, experts=experts))
    if not blocks:
        notes.append(f"{model_type}: no repeated blocks found; the model is one FSDP unit")
    head = _plain_head(model)
    if head is None:
        notes.append("the head's output is changed before the loss: logits are held in the compute dtype")
    owner = {module: unit.name for unit in units for module in unit.modules}
    for alias, source in tied.items():
        if _unit_of(alias, owner) != _unit_of(source, owner):
            raise PlanError(
                f"{model_type}: {alias} and {source} are one tied weight in two FSDP units; not supported yet"
            )
    params = tuple(
        _expert_plan(fqn, param, sizes, style=ep_rules[fqn], owner=owner)
        if fqn in ep_rules
        else _param_plan(fqn, param, sizes, rules=rules, owner=owner)
        for fqn, param in model.named_parameters()
    )
    summed = tuple(fqn for fqn, _ in model.named_parameters() if _rule_of(fqn, rules)[0] == SUMMED_STYLE)
    return Plan(
        model_type=model_type,
        sizes=sizes,
        params=params,
        units=units,
        blocks=blocks,
        tied=tied,
        tp_rules={name: style for name, style in rules.items() if style != SUMMED_STYLE},
        ep_rules=ep_rules,
        tp_summed=summed,
        head=head,
        notes=tuple(notes),
    )


def _rule_of(fqn: str, rules: dict[str, str]) -> tuple[str | None, str]:
    module, _, name = fqn.rpartition(".")
    return rules.get(fqn, rules.get(module)), name


def _param_plan(
    fqn: str, param: nn.Parameter, sizes: MeshSizes, *, rules: dict[str, str], owner: dict[str, str]
) -> ParamPlan:
    style, name = _rule_of(fqn, rules)
    axes: tuple[str, ...] = ("fsdp",)
    placements: tuple[Placement, ...] = (Shard(0),)
    if style is not None and style != SUMMED_STYLE:
        dim = TP_STYLES[style][name]
        tp: Placement = Replicate() if dim is None else Shard(dim)
        axes, placements = ("fsdp", "tp"), (fsdp_over(tp, sizes.tp), tp)
    if sizes.dp_replicate > 1:
        axes, placements = ("dp_replicate", *axes), (Replicate(), *placements)
    return ParamPlan(
        fqn=fqn,
        shape=tuple(param.shape),
        dtype=param.dtype,
        style=style or "-",
        unit=_unit_of(fqn, owner),
        axes=axes,
        placements=placements,
    )


def _expert_plan(fqn: str, param: nn.Parameter, sizes: MeshSizes, *, style: str, owner: dict[str, str]) -> ParamPlan:
    """Experts `[E, ...]`: whole ones on each ep rank, cut over efsdp along another dim where they would run out."""
    shape = tuple(param.shape)
    over: Placement = fsdp_over(Shard(0), sizes.ep)
    if sizes.efsdp * sizes.ep > shape[0]:
        over = next((Shard(d) for d in range(1, len(shape)) if shape[d] % sizes.efsdp == 0), over)
    axes: tuple[str, ...] = ("efsdp", "ep")
    placements: tuple[Placement, ...] = (over, Shard(0))
    if sizes.dp_replicate > 1:
        axes, placements = ("dp_replicate", *axes), (Replicate(), *placements)
    return ParamPlan(fqn, shape, param.dtype, style, _unit_of(fqn, owner), axes, placements)


def _unit_of(fqn: str, owner: dict[str, str]) -> str:
    prefix = fqn.rpartition(".")[0]
    while prefix:
        if prefix in owner:
            return owner[prefix]
        prefix = prefix.rpartition(".")[0]
    return "root"


# ---- FSDP units


def find_blocks(model: nn.Module) -> Iterator[str]:
    """Names of the repeated blocks: what the model declares indivisible, or checkpoints one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    declared = set(getattr(model, "_no_split_modules", None) or ())
    found: list[str] = []
    for name, module in model.named_modules():
        listed = name.rpartition(".")[2].isdigit()
        is_block = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in declared
        if listed and is_block and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield name


def _units(
    model: PreTrainedModel, blocks: tuple[str, ...], tied: dict[str, str], recipe: Recipe, *, experts: tuple[str, ...]
) -> Iterator[Unit]:
    """Units in the order in which FSDP wraps them: a module before the one that contains it; the root is implied."""
    names = {module: name for name, module in model.named_modules()}
    if kept := kept_in_fp32(model, getattr(torch, recipe.fsdp.param_dtype)):
        owners = {fqn.rpartition(".")[0] for fqn, _ in model.named_parameters() if kept.search(fqn)}
        for name in sorted(owners, key=lambda n: (-n.count("."), n)):
            yield Unit(name, (name,), reshard=True, fp32=True)
    reshard = recipe.fsdp.reshard_after_forward
    for name in experts:
        yield Unit(name, (name,), reshard=reshard, experts=True)
    for name in blocks:
        yield Unit(name, (name,), reshard=reshard)
    embed, head = names.get(_embeddings(model, "input")), names.get(_embeddings(model, "output"))
    norm = _final_norm(model, blocks)
    is_tied = head is not None and any(alias.startswith(f"{head}.") for alias in tied)
    if embed is not None and not is_tied:
        yield Unit(embed, (embed,), reshard=reshard)
    # Final norm and head are used last in forward and first in backward: freeing them between would gather them twice.
    tail = [m for m in ((embed if is_tied else None), norm, head) if m is not None]
    if tail:
        yield Unit("+".join(m.rpartition(".")[2] for m in tail), tuple(tail), reshard=False)


def _embeddings(model: PreTrainedModel, which: str) -> nn.Module | None:
    try:
        return model.get_input_embeddings() if which == "input" else model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _final_norm(model: nn.Module, blocks: tuple[str, ...]) -> str | None:
    """The norm that follows the list of blocks inside the module that holds the list."""
    if not blocks:
        return None
    container = blocks[-1].rpartition(".")[0]
    parent = container.rpartition(".")[0]
    after = False
    for name, child in model.get_submodule(parent).named_children():
        if after and "norm" in type(child).__name__.lower() and any(True for _ in child.parameters()):
            return f"{parent}.{name}" if parent else name
        after = after or (f"{parent}.{name}" if parent else name) == container
    return None


def _plain_head(model: PreTrainedModel) -> str | None:
    """Name of the output head if the model's forward passes its output on unchanged, else None.

    Only then can the loss be taken inside the head, chunk by chunk. A soft cap or a logit scale shows in the source
    as a second assignment to `logits`, or as more than a call in the first.
    """
    head = _embeddings(model, "output")
    name = next((n for n, m in model.named_modules() if m is head), None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or name is None or "." in name:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    tree = _drop_unset(tree, model.config.get_text_config())
    writes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        and any(isinstance(t, ast.Name) and t.id == "logits" for t in ast.walk(_target(node)))
    ]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == name]
    if len(writes) != 1 or len(calls) != 1 or not isinstance(writes[0], ast.Assign):
        return None
    value = writes[0].value
    if not (isinstance(value, ast.Call) and value.func is calls[0]):
        return None
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "logits" and isinstance(n.ctx, ast.Load)]
    return name if len(reads) <= 3 else None


def _drop_unset(tree: ast.Module, config: object) -> ast.Module:
    """`tree` without the blocks that run only `if self.config.NAME is not None`, where this config has None."""

    class Dropper(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            match node.test:
                case ast.Compare(
                    left=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="config"), attr=option),
                    ops=[ast.IsNot()],
                    comparators=[ast.Constant(value=None)],
                ) if not node.orelse and getattr(config, option, 0) is None:
                    return ast.Pass()
            self.generic_visit(node)
            return node

    return Dropper().visit(tree)


def _target(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> ast.AST:
    return ast.Tuple(elts=node.targets) if isinstance(node, ast.Assign) else node.target


# ---- tensor parallelism


def _tp_rules(model: PreTrainedModel, sizes: MeshSizes, *, without: tuple[str, ...]) -> dict[str, str]:
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
    unknown = sorted({s for s in rules.values() if s not in TP_STYLES})
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
            if param_name not in TP_STYLES[rules[name]]:
                raise PlanError(f"{what}: {name}.{param_name} has no tensor-parallel rule; set mesh.tp = 1")
    _check_siblings(what, modules, rules, sizes.tp)
    for alias, source in tied_keys(model).items():
        pair = [_cut(alias, rules), _cut(source, rules)]
        if pair[0] != pair[1]:
            raise PlanError(f"{what}: {alias} and {source} are one tied weight with two plans; set mesh.tp = 1")
    return rules


def _cut(fqn: str, rules: dict[str, str]) -> int | None:
    style, name = _rule_of(fqn, rules)
    return TP_STYLES[style][name] if style else None


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


# ---- expert parallelism


EP_MODULE, EP_PARAM = "ep_dispatch_experts", "grouped_gemm"


def _ep_rules(model: PreTrainedModel, sizes: MeshSizes) -> dict[str, str]:
    """The model's own EP plan: expert parameters, then the modules that send tokens to them."""
    what = model.config.model_type
    rules: dict[str, str] = model._expand_parallel_plan(dict(getattr(model, "ep_plan", None) or {}))
    modules = [name for name, style in rules.items() if style == EP_MODULE]
    if not modules:
        raise PlanError(f"{what} declares no experts to spread over mesh.ep = {sizes.ep}; set mesh.ep = 1")
    if unknown := sorted(set(rules.values()) - {EP_MODULE, EP_PARAM}):
        raise PlanError(
            f"{what} under mesh.ep = {sizes.ep}: its plan has style {unknown[0]}, not supported; set mesh.ep = 1"
        )
    for name in modules:
        for param_name, param in model.get_submodule(name).named_parameters():
            fqn = f"{name}.{param_name}"
            if rules.get(fqn) != EP_PARAM:
                raise PlanError(f"{what}: {fqn} has no expert-parallel rule; set mesh.ep = 1")
            if param.shape[0] % sizes.ep:
                raise PlanError(
                    f"mesh.ep = {sizes.ep} does not divide the {param.shape[0]} experts of {what} ({name}); "
                    f"ep may be a divisor of {param.shape[0]}"
                )
    return rules


# ---- refusals that concern the whole model


_MIXING = re.compile(
    r"(?i:lightning|mamba|recurrent|linear_?attn|linear_?attention|delta|rwkv|shortconv|retention)|SSM|(?<![a-z])Ssm"
)


def _refuse(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> None:
    what, config = model.config.model_type, model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise PlanError(
            f"{what} adds a router's auxiliary loss, which is not supported yet; "
            "set model.config.output_router_logits = false"
        )
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise PlanError(f"{what} is quantized; ndtrain trains full-precision weights only")
    forward = inspect.signature(type(model).forward).parameters
    if "input_ids" not in forward:
        raise PlanError(f"{what} takes no input_ids; ndtrain trains text models only")
    if recipe.data.packing and (reason := _no_packing(model, forward)):
        raise PlanError(f"{what}: {reason}, so packed documents would see each other; set data.packing = false")
    if recipe.train.activation_checkpointing == "full" and not model.supports_gradient_checkpointing:
        raise PlanError(f'{what} cannot recompute its blocks; set train.activation_checkpointing = "none"')
    if sizes.cp > 1:
        _refuse_cp(model, sizes, forward)
    limit = getattr(config, "max_position_embeddings", None)
    learned = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not _embeddings(model, "input")]
    if limit and recipe.data.seq_len > limit and any(m.num_embeddings <= limit + 8 for m in learned):
        raise PlanError(f"data.seq_len = {recipe.data.seq_len} exceeds the {limit} learned positions of {what}")


def _refuse_cp(model: PreTrainedModel, sizes: MeshSizes, forward: Mapping[str, object]) -> None:
    """Refuse what is known not to work on parts of sequences; `Trainer` proves the rest on the model itself."""
    what, config = model.config.model_type, model.config.get_text_config()
    if mixing := _mixing(model):
        raise PlanError(f"{what} under mesh.cp = {sizes.cp}: {mixing}; set mesh.cp = 1")
    if "position_ids" not in forward:
        raise PlanError(f"{what} takes no position_ids, which mesh.cp = {sizes.cp} needs; set mesh.cp = 1")
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        raise PlanError(
            f"{what} does not take its attention from transformers' AttentionInterface, which mesh.cp = {sizes.cp} "
            "needs; set mesh.cp = 1"
        )
    heads = getattr(config, "num_attention_heads", None)
    for count in heads if isinstance(heads, list) else [heads]:
        if count is not None and count % (sizes.tp * sizes.cp):
            raise PlanError(
                f"mesh.cp = {sizes.cp} x tp = {sizes.tp} does not divide the {count} attention heads of {what}, which "
                "ulysses needs"
            )


def _dropouts(model: PreTrainedModel) -> dict[str, float]:
    """The config's dropout rates above 0; summary_* and classifier_* belong to other heads than the causal LM's."""
    return {
        key: value
        for key, value in model.config.get_text_config().to_dict().items()
        if "drop" in key and not key.startswith(("summary", "classifier")) and isinstance(value, float) and value > 0
    }


def _notes(model: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    """What a user should know before paying for the run."""
    if dropouts := _dropouts(model):
        rates = ", ".join(f"{key} = {value}" for key, value in dropouts.items())
        yield f"dropout ({rates}) draws other random numbers on another mesh or micro_batch_size"
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.data.seq_len > limit:
        yield f"data.seq_len = {recipe.data.seq_len} is beyond the model's max_position_embeddings = {limit}"


def _refuse_dropout(model: PreTrainedModel) -> None:
    """Under tp every rank would drop other elements of what should be one replicated activation."""
    for key, value in _dropouts(model).items():
        raise PlanError(
            f"{model.config.model_type} has {key} = {value}: dropout under mesh.tp > 1 is not supported yet; "
            f"set model.config.{key} = 0.0 or mesh.tp = 1"
        )


def _mixing(model: PreTrainedModel) -> str | None:
    """The module that mixes tokens other than by attention, as a sentence, or None."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d) or _MIXING.search(type(module).__name__):
            return f"{type(module).__name__} mixes along the sequence without a mask"
    return None


def _no_packing(model: PreTrainedModel, forward: Mapping[str, object]) -> str | None:
    """Why packed documents are not kept apart by this model's attention, or None if they are."""
    if mixing := _mixing(model):
        return mixing
    if "position_ids" not in forward:
        return "it takes no position_ids"
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    if "create_causal_mask" not in source and "create_masks_for_generate" not in source:
        return "it does not build its mask from position_ids"
    if "position_ids_from_input_ids" in source or re.search(r"attention_mask = torch\.ones", source):
        return "it replaces the mask or the positions that tell documents apart"
    return None
