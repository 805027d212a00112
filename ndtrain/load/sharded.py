"""Read each rank's boxes from the files of the weights.

Tensors that are saved in the model's own form are read directly into the shards. Only tensors that transformers
converts, such as experts that were saved one by one, go through its converting loader (core_model_loading, 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard

from ndtrain.errors import PlanError, RecipeError, Stopped, out_of_memory
from ndtrain.hf import extra_states
from ndtrain.hf.compat import LoadStateDictConfig, convert_and_load_state_dict_in_model, get_model_conversion_mapping
from ndtrain.hf.model import tied_keys
from ndtrain.hf.weight_names import Named, named
from ndtrain.layout import local_part
from ndtrain.load.files import check_report, refuse_nan, unreadable, unused, weight_files
from ndtrain.load.memory import model_tensors
from ndtrain.recipe import Recipe
from ndtrain.storage.pieces import Piece, converts, pieces_in, read_held
from ndtrain.torch_compat import StridedShard, class_before_fsdp, put_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_sharded(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> None:
    """Read this rank's boxes of every weight, and add notes for the user to `notes`.

    Raises `DamagedError` for weights that are missing, unreadable, of another shape or NaN, and `PlanError` for weights
    that transformers converts along a dim that this mesh cuts.
    """
    report = None
    try:
        pieces = {key: piece for path in weight_files(recipe) for key, piece in pieces_in(Path(path)).items()}
        pieces = {key: piece for key, piece in pieces.items() if not extra_states.is_extra(key)}
        with _own_classes(model):
            mapping = get_model_conversion_mapping(model) or []
        direct, others = _apart(model, pieces, mapping)
        if others:
            report = _load_converted(model, pieces, others, mapping)
    except (PlanError, RecipeError, Stopped):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise unreadable(recipe, error) from error
    wanted = model_tensors(model)
    missing, mismatched = wanted.keys() - direct.keys(), []
    if report is not None:
        # The loader returns nothing for experts that are all on other ranks.
        missing = {name for name in missing & report.missing_keys if local_part(wanted[name]).numel()}
        mismatched = list(report.mismatched_keys)
        notes += unused(report.unexpected_keys)
    mismatched += [
        (name, piece.sizes, tuple(wanted[name].shape))
        for name, piece in direct.items()
        if piece.sizes != tuple(wanted[name].shape)
    ]
    check_report(missing, mismatched, recipe)
    refuse_nan({name: tensor for name, tensor in wanted.items() if name not in direct}, recipe)
    stored = {name: [piece] for name, piece in direct.items()}
    read_held({name: wanted[name] for name in direct}, stored, recipe.model.name, as_weights=True)


def _apart(
    model: PreTrainedModel, pieces: Mapping[str, Piece], mapping: Sequence[Any]
) -> tuple[dict[str, Piece], list[Named]]:
    """Split `pieces` into {FQN: piece} of those in the model's own form (tied weights by either name) and others."""
    state, aliases = model.state_dict(keep_vars=True), tied_keys(model)
    direct: dict[str, Piece] = {}
    tied: dict[str, Piece] = {}
    others = []
    for saved in named(model, pieces, state, mapping):
        piece, tensor = pieces[saved.key], state.get(saved.name)
        if saved.converter is not None or tensor is None or not converts(piece.dtype, tensor.dtype):
            others.append(saved)
        elif saved.name in aliases:
            tied.setdefault(aliases[saved.name], piece)
        else:
            direct.setdefault(saved.name, piece)
    return tied | direct, others


def _load_converted(
    model: PreTrainedModel, pieces: Mapping[str, Piece], others: Sequence[Named], mapping: Sequence[Any]
) -> Any:
    """Load the tensors that transformers converts, casts or does not know by its own loader, and return its report."""
    from safetensors import safe_open

    params = dict(model.named_parameters())
    _refuse_converted(params, [saved.converter for saved in others if saved.converter is not None])
    keys = [saved.key for saved in others]
    files = {file: safe_open(file, framework="pt", device="cpu") for file in {pieces[key].file for key in keys}}
    config = LoadStateDictConfig(
        device_map={"": next(model.parameters()).device},
        dtype=torch.float32,
        weight_mapping=list(mapping),
    )
    slices = {key: files[pieces[key].file].get_slice(key) for key in keys}
    report, _ = convert_and_load_state_dict_in_model(model, slices, config)
    _put_back(model, params)
    return report


@contextmanager
def _own_classes(model: nn.Module) -> Iterator[None]:
    """Give modules their classes from before FSDP inside: transformers looks up conversions by class name."""
    wrapped = {module: type(module) for module in model.modules() if isinstance(module, FSDPModule)}
    for module in wrapped:
        module.__class__ = class_before_fsdp(module)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, given in wrapped.items():
            module.__class__ = given


def _refuse_converted(params: Mapping[str, nn.Parameter], converters: Iterable[Any]) -> None:
    """Raise `PlanError` if a weight is merged from saved tensors, or split from one, along a dim that the mesh cuts.

    transformers' loader (5.23) takes each rank's part of every saved tensor and merges those parts. That is correct for
    a packed cut, which takes as much of gate as of up; other cuts silently get rows of other ranks.
    """
    for converter in {id(converter): converter for converter in converters}.values():
        # MergeModulelist stacks experts saved one by one; the loader knows which of them this rank has.
        operations = [o for o in getattr(converter, "operations", ()) if type(o).__name__ != "MergeModulelist"]
        dims = {getattr(operation, "dim", None) for operation in operations}
        targets = [_as_regex(pattern) for pattern in converter.target_patterns]
        for fqn, param in params.items():
            if not isinstance(param, DTensor) or not any(target.search(fqn) for target in targets):
                continue
            axes = range(param.device_mesh.ndim)
            for dim in range(param.ndim) if None in dims else {d % param.ndim for d in dims if d is not None}:
                cuts = [i for i in axes if _cuts(param.placements[i], dim, param) and param.device_mesh.size(i) > 1]
                packed = [i for i in cuts if isinstance(param.placements[i], StridedShard) and i == axes[-1]]
                if cuts != packed:
                    raise PlanError(
                        f"{fqn} is saved in a form that has to be converted along dim {dim}, which this mesh cuts; "
                        'set load.mode = "rank0"'
                    )


def _as_regex(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of transformers' weight conversions, in which `*` matches a number."""
    return re.compile(pattern.replace("*", r"\d+"))


def _cuts(placement: Placement, dim: int, param: Tensor) -> bool:
    return isinstance(placement, Shard | StridedShard) and placement.dim % param.ndim == dim


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, nn.Parameter]) -> None:
    """Copy loaded values into the parameters that FSDP holds, since the loader replaces parameter objects."""
    for name, param in before.items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        loaded = put_parameter(owner, leaf, param)
        if loaded is not param and loaded is not None:
            local_part(param).copy_(local_part(loaded))
