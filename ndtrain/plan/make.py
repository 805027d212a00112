"""Make the plan: the style, placements and FSDP unit of every parameter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from ndtrain.errors import PlanError
from ndtrain.hf.model import tied_keys
from ndtrain.hf.routers import expert_count
from ndtrain.layout import fsdp_over, local_shape
from ndtrain.mesh import MeshSizes
from ndtrain.plan import context, expert, groups, manual, refuse, sequence, tensor
from ndtrain.plan import units as fsdp
from ndtrain.plan.names import innermost
from ndtrain.plan.types import EVEN, ParamPlan, Plan, Recomputation
from ndtrain.recipe import Recipe, Recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_plan(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> Plan:
    """Return the plan for `model` (on meta) on a mesh of `sizes`.

    Raises `PlanError`, with the reason and what to change, if the model cannot be trained correctly. Reads no weights.
    """
    model_type = model.config.model_type
    refuse.check(model, sizes, recipe)
    notes = list(refuse.notes(model, sizes, recipe))
    for fqn, param in model.named_parameters():
        if isinstance(param, DTensor):
            raise PlanError(
                f"{model_type}: {fqn} is already a DTensor with placements {param.placements}, but ndtrain shards the "
                "model itself; build it as a plain tensor, make it a DTensor only in set_device_mesh(tp_mesh=...), and "
                "declare its style in base_model_tp_plan"
            )
        if not param.ndim:
            raise PlanError(
                f"{model_type}: {fqn} is a scalar, which FSDP cannot shard; make it a tensor of one element"
            )
    cp, why = context.choose(model, sizes, recipe) if sizes.cp > 1 else (None, None)
    if why:
        notes.append(why)
    if cp and (choosing := context.on_whole_sequences(model)):
        notes.append(
            f"{choosing} selects its keys itself, so each of the {sizes.cp} cp ranks computes it on whole sequences"
        )
    ep_rules = expert.rules(model, sizes, overrides=recipe.ep.plan) if sizes.ep > 1 else {}
    experts = tuple(name for name, style in ep_rules.items() if style == expert.MODULE)
    blocks = tuple(fsdp.find_blocks(model))
    tp_rules: dict[str, str] = {}
    if sizes.tp > 1:
        tp_rules, note = tensor.rules(model, sizes, blocks=blocks, without=experts, overrides=recipe.tp.plan)
        notes += [note] if note else []
        refuse.check_dropout(model)
    along_sequence = None
    if sizes.tp > 1 and recipe.tp.sequence_parallel:
        decided = "the model has dropout" if refuse.dropouts(model) else sequence.decide(model, blocks, tp_rules)
        if isinstance(decided, str):
            notes.append(f"no sequence parallelism: {decided}")
        else:
            along_sequence = decided
    frozen = [fqn for fqn, param in model.named_parameters() if not param.requires_grad]
    if frozen:
        # from_pretrained alone trains what it finds in the files; transformers' own sharded loading does not.
        notes.append(f"{', '.join(frozen[:3])}{', ...' * (len(frozen) > 3)} stay as loaded: their class freezes them")
    tied = tied_keys(model)
    by_hand = recipe.fsdp.mode == "manual"
    if by_hand:
        units = manual.units(model, tied, recipe, experts=experts)
    else:
        units = list(fsdp.units(model, blocks, tied, recipe, experts=experts))
    if not blocks and not by_hand:
        notes.append(f"{model_type}: no repeated blocks found; the model is one FSDP unit")
    head = fsdp.plain_head(model)
    if head is None:
        notes.append("the model changes its head's output before the loss: logits are held in the compute dtype")
    owner = {module: unit.name for unit in units for module in unit.modules}
    members: dict[str, list[str]] = {unit.name: [] for unit in (*units, fsdp.root(recipe))}
    for fqn, _ in model.named_parameters():
        members[_unit_of(fqn, owner)].append(fqn)
    *units, root = (fsdp.with_float32(model, unit, members[unit.name]) for unit in (*units, fsdp.root(recipe)))
    for alias, source in tied.items():
        if _unit_of(alias, owner) != _unit_of(source, owner):
            raise PlanError(
                f"{model_type}: {alias} and {source} are one tied weight in two FSDP units, which is not supported"
            )
    params = tuple(
        _param_plan(fqn, param, sizes, tp_rules=tp_rules, ep_rules=ep_rules, unit=_unit_of(fqn, owner))
        for fqn, param in model.named_parameters()
    )
    regions = along_sequence.regions if along_sequence else ()
    summed = tuple(fqn for fqn, _ in model.named_parameters() if tensor.rule_of(fqn, tp_rules) == tensor.SUMMED)
    if along_sequence:
        # One tp rank alone adds the bias of a region's last layer.
        biases = {f"{region.row}.bias" for region in regions if region.row}
        summed += tuple(fqn for fqn, _ in model.named_parameters() if fqn in biases)
    refuse.check_router(model, summed)
    in_groups = groups.assign(model, recipe.optim.groups, tied)
    not_trained = tuple(fqn for fqn, number in in_groups.items() if recipe.optim.groups[number].frozen)
    if not_trained:
        fewer = sum(param.numel for param in params if param.fqn in {*not_trained})
        notes.append(f"optim.groups freezes {fewer / sum(param.numel for param in params):.1%} of the parameters")
    return Plan(
        model_type=model_type,
        sizes=sizes,
        params=params,
        units=tuple(units),
        root=root,
        blocks=blocks,
        tied=tied,
        tp_rules={name: style for name, style in tp_rules.items() if style != tensor.SUMMED},
        ep_rules=ep_rules,
        tp_summed=summed,
        tp_shared=sequence.shared_inputs(model, tp_rules, but={region.name for region in regions if region.row}),
        sequence=along_sequence,
        cp=cp,
        groups=in_groups,
        frozen=not_trained,
        matrices=groups.matrices(model) if recipe.optim.name == "muon" else frozenset(),
        recomputation=_recomputation(recipe),
        routes=bool(expert_count(model.config.get_text_config())),
        drops_by_rank=sizes.tp > 1 and bool(refuse.dropouts(model)),
        head=head,
        notes=tuple(notes),
    )


def _recomputation(recipe: Recipe) -> Recomputation | None:
    wanted = recipe.train.activation_checkpointing
    if isinstance(wanted, Recompute):
        return Recomputation("full", wanted.every) if wanted.every else None  # the compiler keeps a budget
    return None if wanted == "none" else Recomputation(wanted)


def _param_plan(
    fqn: str,
    param: nn.Parameter,
    sizes: MeshSizes,
    *,
    tp_rules: dict[str, str],
    ep_rules: dict[str, str],
    unit: str,
) -> ParamPlan:
    style = ep_rules.get(fqn) or tensor.rule_of(fqn, tp_rules)
    over_tp = tensor.placement(style, fqn.rpartition(".")[2], param.ndim) if style else None
    shape = tuple(param.shape)
    axes: tuple[str, ...]
    placements: tuple[Placement, ...]
    if fqn in ep_rules:
        axes, placements = ("efsdp", "ep"), (_over_fsdp(shape, Shard(0), (sizes.efsdp, sizes.ep)), Shard(0))
    elif over_tp is not None:
        axes, placements = ("fsdp", "tp"), (_over_fsdp(shape, over_tp, (sizes.fsdp, sizes.tp)), over_tp)
    else:
        axes, placements = ("fsdp",), (_over_fsdp(shape, Replicate(), (sizes.fsdp, 1)),)
    if sizes.dp_replicate > 1:
        axes, placements = ("dp_replicate", *axes), (Replicate(), *placements)
    return ParamPlan(
        fqn=fqn,
        shape=shape,
        dtype=param.dtype,
        style=style or "-",
        unit=unit,
        axes=axes,
        placements=placements,
    )


def _over_fsdp(shape: tuple[int, ...], inner: Placement, mesh: tuple[int, int]) -> Placement:
    """Return FSDP's placement over the first axis of `mesh` for a tensor that `inner` places over the second.

    That is dim 0, as `fully_shard` prefers. If dim 0 fills some ranks much more than others (fewer experts or rows than
    ranks), it is a dim that divides evenly, which `fully_shard` requires of every dim but 0.
    """
    usual = fsdp_over(inner, mesh[1])
    others = [
        Shard(d) for d in reversed(range(1, len(shape))) if shape[d] % mesh[0] == 0 and d != getattr(inner, "dim", None)
    ]

    def fullest(over: Placement) -> int:
        return math.prod(local_shape(shape, mesh, (0, 0), (over, inner)))

    even = math.prod(shape) / mesh[0] / (1 if isinstance(inner, Replicate) else mesh[1])
    if fullest(usual) <= EVEN * even or not others:
        return usual
    return min((usual, *others), key=fullest)


def _unit_of(fqn: str, owner: dict[str, str]) -> str:
    return owner.get(innermost(fqn, owner) or "", "root")
