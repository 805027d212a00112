"""Read each rank's boxes from the files of the weights.

Tensors that are saved in the model's own form are read directly into the shards. Only tensors that transformers
converts, such as experts that were saved one by one, go through its converting loader (core_model_loading, 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard

from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf.compat import (
    LoadStateDictConfig,
    changes_loaded_weights,
    convert_and_load_state_dict_in_model,
    may_be_missing,
)
from ndtrain.hf.weight_names import model_tensors
from ndtrain.layout import local_part
from ndtrain.load.files import check_report, files_to_load, readable, refuse_nan, unused
from ndtrain.load.sources import Sources, refuse_copies, sources
from ndtrain.recipe import Recipe
from ndtrain.runs.process import rank, world_size
from ndtrain.storage.pieces import read_held
from ndtrain.torch_compat import StridedShard, put_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_sharded(
    model: PreTrainedModel, recipe: Recipe, notes: list[str], *, progress: Callable[[], None] = lambda: None
) -> None:
    """Read this rank's boxes of every weight, and add notes for the user to `notes`; call `progress` now and then.

    Raises `RecipeError` for weights in other files than safetensors, `DamagedError` for weights that are missing,
    unreadable, of another shape, NaN, or tied but saved with different values, and `PlanError` for weights that
    transformers converts along a dim that this mesh cuts.
    """
    report = None
    with readable(recipe):
        files = files_to_load(model, recipe)
        if files.kind != "safetensors":
            raise RecipeError(
                f'model.name = "{recipe.model.name}" has its weights in {files.main}, which is not safetensors; set '
                'load.mode = "rank0"'
            )
        found = sources(model, files)
        direct = found.direct
        _refuse_converted(model, found)
        if changes_loaded_weights(model):
            raise PlanError('the model itself changes weights that were loaded; set load.mode = "rank0"')
        refuse_copies(found, recipe, part=rank(), parts=world_size())
        if found.others:
            report = _load_converted(model, found)
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
    read_held({name: wanted[name] for name in direct}, stored, recipe.model.name, as_weights=True, progress=progress)


def choose_mode(model: PreTrainedModel, recipe: Recipe) -> tuple[str, str]:
    """Return "sharded" or "rank0" for `load.mode = "auto"`, and why it is "rank0". Reads headers only."""
    with readable(recipe):
        files = files_to_load(model, recipe)
        if files.kind != "safetensors":
            return "rank0", f"{files.main} is not safetensors"
        found = sources(model, files)
        try:
            _refuse_converted(model, found)
        except PlanError as error:
            return "rank0", str(error).rpartition(";")[0]
    if changes_loaded_weights(model):
        return "rank0", "the model itself changes weights that were loaded"
    named_here = {saved.name for saved in found.others}
    absent = [name for name in model_tensors(model) if name not in found.direct and name not in named_here]
    if made := sorted(name for name in absent if may_be_missing(model, name)):
        return "rank0", f"the files do not name {made[0]}, which transformers may leave as the model makes it"
    return "sharded", ""


def _load_converted(model: PreTrainedModel, found: Sources) -> Any:
    """Load the tensors that transformers converts, casts or does not know by its own loader, and return its report."""
    from safetensors import safe_open

    params = dict(model.named_parameters())
    pieces, mapping = found.pieces, found.mapping
    keys = [saved.key for saved in found.others]
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


def _refuse_converted(model: nn.Module, found: Sources) -> None:
    """Raise `PlanError` if a weight is merged from saved tensors, or split from one, along a dim that the mesh cuts.

    transformers' loader (5.23) takes each rank's part of every saved tensor and merges those parts. That is correct for
    a packed cut, which takes as much of gate as of up; other cuts silently get rows of other ranks.
    """
    for converter in {id(saved.converter): saved.converter for saved in found.others if saved.converter}.values():
        # MergeModulelist stacks experts saved one by one; the loader knows which of them this rank has.
        operations = [o for o in getattr(converter, "operations", ()) if type(o).__name__ != "MergeModulelist"]
        dims = {getattr(operation, "dim", None) for operation in operations}
        targets = [_as_regex(pattern) for pattern in converter.target_patterns]
        for fqn, param in model.named_parameters():
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
