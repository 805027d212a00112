"""Weights into the sharded model: from rank 0, from each rank's own slices of the files, or initialized.

Comes in: a parallelized model on meta. Goes out: the same model on the device, every parameter and buffer set.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from ndtrain import extra_state
from ndtrain.errors import DamagedError, NdtrainError, PlanError, RecipeError
from ndtrain.layout import held_boxes, local_part
from ndtrain.model import built_buffers, meta_model, tie, tied_keys
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.runtime import Runtime, broadcast_json, on_rank0, random_seed, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights travel from rank 0 in pieces of at most this many bytes: all that another rank holds beyond its shards.
PIECE_BYTES = 64 * 2**20
# Elements from one NaN to the next in a large tensor whose memory is new.
MARK_EVERY = 2**16


def materialize(model: PreTrainedModel, runtime: Runtime, *, recipe: Recipe, on_host: Collection[str] = ()) -> None:
    """Give every parameter and buffer memory on the device, marked with NaN, and compute the buffers anew.

    Parameters whose FQN is in `on_host` get it in host memory. Buffers that are not in a checkpoint (rotary
    frequencies) come from the model's own initialization or construction, as they do in one process. Raises `PlanError`
    naming a buffer that cannot be made again.
    """
    hosted = {param for fqn, param in model.named_parameters() if fqn in on_host}
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu" if tensor in hosted else runtime.device))
    tie(model)
    saved = set(model.state_dict().keys())
    _mark([*model.parameters(), *model.buffers()])
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = isinstance(tensor, nn.Parameter)  # type: ignore[attr-defined]
    with torch.no_grad():
        model.initialize_weights()
    lost = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and bool(buffer.isnan().any())
    }
    made = built_buffers(model, lost, recipe) if lost else {}
    for name, buffer in lost.items():
        if name not in made or bool(made[name].isnan().any()):
            raise PlanError(f"buffer {name} is made only when the model is built, too large to be made again")
        buffer.copy_(made[name])


@torch.no_grad()
def unset(tensors: Iterable[Tensor]) -> None:
    """Fill with NaN, so that what is never loaded is found."""
    for tensor in tensors:
        if tensor.is_floating_point():
            local_part(tensor).fill_(float("nan"))


@torch.no_grad()
def _mark(tensors: Iterable[Tensor]) -> None:
    """`unset` for new memory, of which it touches little: for the first time that costs as much as to read weights."""
    for tensor in tensors:
        local = local_part(tensor)
        if not tensor.is_floating_point():
            continue
        if local.numel() <= 4 * MARK_EVERY or not local.is_contiguous():
            local.fill_(float("nan"))
        else:
            local.view(-1)[::MARK_EVERY] = local.view(-1)[-1] = float("nan")


@torch.no_grad()
def fill_with_noise(model: PreTrainedModel) -> None:
    """Give the materialized `model` weights of ordinary size that mean nothing: enough to see what depends on what.

    Parts of one tensor differ, replicas are equal.
    """
    for name, tensor in model_tensors(model).items():
        local = local_part(tensor)
        torch.manual_seed(random_seed(name, *(box.offsets for box in held_boxes(tensor))))
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            # Sizes and numbers of buckets, by which some models divide.
            local.fill_(1 if not tensor.is_floating_point() and tensor.dtype != torch.bool else 0)
        elif tensor.ndim < 2 or not tensor.numel():
            local.normal_(mean=1.0, std=0.1)
        else:
            local.normal_(std=tensor.shape[-1] ** -0.5)


def load_weights(model: PreTrainedModel, plan: Plan, *, recipe: Recipe, runtime: Runtime) -> list[str]:
    """Fill the materialized `model` as `[model] init` and `[load] mode` say; the same weights on every mesh.

    Returns what the user should know, on rank 0.
    """
    notes: list[str] = []
    if recipe.model.init == "random":
        initialize(model, plan, recipe=recipe)
    elif recipe.load.mode == "rank0":
        _load_rank0(model, recipe=recipe, runtime=runtime, notes=notes)
    else:
        together(lambda: _load_sharded(model, recipe, notes))
    tie(model)
    if recipe.model.init != "random":
        _load_extra(model, recipe, notes)
    # One rank alone may hold the damaged shard; the others must not go on to wait for it.
    together(lambda: _refuse_nan(model, recipe))
    return notes


def _refuse_nan(model: PreTrainedModel, recipe: Recipe) -> None:
    for name, tensor in model_tensors(model).items():
        local = local_part(tensor)
        # A sum is NaN if any part is (or if infinities meet), and takes a third of the time of looking at each.
        if local.is_floating_point() and bool(local.sum().isnan()) and bool(local.isnan().any()):
            raise DamagedError(f"{name} has NaN after loading from {recipe.model.name or recipe.model.type}")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once: the state dict without tied aliases and extra states."""
    aliases = tied_keys(model)  # type: ignore[arg-type]
    return {
        k: v for k, v in model.state_dict(keep_vars=True).items() if k not in aliases and not extra_state.is_extra(k)
    }


# ---- rank 0 reads


def _load_rank0(model: PreTrainedModel, *, recipe: Recipe, runtime: Runtime, notes: list[str]) -> None:
    """Rank 0 reads the whole model through transformers; the others receive it piece by piece and keep their slices."""
    source: dict[str, Tensor] = {}
    on_rank0(lambda: source.update(_read_whole(model, recipe, notes)))
    # Memory touched for the first time costs as much as the transfer: every piece is received into the same.
    room = torch.empty(0 if runtime.is_main else PIECE_BYTES, dtype=torch.uint8, device=runtime.device)
    for name, target in model_tensors(model).items():
        _send(source.pop(name, None), target, room=room, runtime=runtime)


def unused(keys: Iterable[Any]) -> list[str]:
    """What to tell of saved weights that the model does not have."""
    names = sorted(key for key in map(str, keys) if not extra_state.is_extra(key))
    return [f"{len(names)} saved weights are not of this model and left out, the first is {names[0]}"] if names else []


@torch.no_grad()
def _send(full: Tensor | None, target: Tensor, *, room: Tensor, runtime: Runtime) -> None:
    """Fill each rank's part of `target` from rank 0's `full` tensor of the global shape (None on the other ranks).

    The global tensor is broadcast in pieces of whole rows, so that no other rank holds more than one piece of it, in
    `room` where it fits.
    """
    local, boxes = local_part(target), held_boxes(target)
    shape = tuple(target.shape)
    rows = shape[0] if shape else 1
    row_bytes = max(1, target.numel() // max(1, rows)) * target.element_size()
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if full is not None:
            piece = (full[start:stop] if shape else full).to(runtime.device, target.dtype).contiguous()
        else:
            size = (stop - start) * row_bytes
            own = room if size <= room.numel() else torch.empty(size, dtype=torch.uint8, device=runtime.device)
            piece = own[:size].view(target.dtype).view((stop - start, *shape[1:]) if shape else ())
        if runtime.world_size > 1:
            dist.broadcast(piece, src=0)
        if not shape:
            local.copy_(piece)
            continue
        for box in boxes:
            low, high = max(start, box.offsets[0]), min(stop, box.offsets[0] + box.sizes[0])
            if low < high:
                at = box.local_offsets[0] + low - box.offsets[0]
                part = piece[(slice(low - start, high - start), *box.inside[1:])]
                local[(slice(at, at + high - low), *box.local[1:])] = part


def _read_whole(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> dict[str, Tensor]:
    import transformers

    whole: Any
    report: Any

    try:
        with extra_state.withheld(model):
            # (model, report), as output_loading_info says; transformers' annotation knows of the model alone
            whole, report = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                str(recipe.model.name),
                config=copy.deepcopy(model.export_config),
                dtype=torch.float32,
                trust_remote_code=recipe.model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below with their names
            )
    except Exception as error:
        raise _unreadable(recipe, error) from error
    _check_report(report["missing_keys"], report["mismatched_keys"], recipe)
    notes += unused(report["unexpected_keys"])
    return model_tensors(whole)


def _unreadable(recipe: Recipe, error: Exception) -> Exception:
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    if "no file named" in line:
        return RecipeError(
            f'model.name = "{recipe.model.name}" has no weights (no safetensors files); set model.init = "random"'
        )
    return DamagedError(f'the weights of model.name = "{recipe.model.name}" cannot be read: {line}')


def _check_report(missing: Any, mismatched: Any, recipe: Recipe) -> None:
    missing = [key for key in missing if not extra_state.is_extra(key)]
    if missing:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" lacks {len(missing)} weights of the model, the first is '
            f'{sorted(missing)[0]}; complete it, or set model.init = "random"'
        )
    if mismatched:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" has weights of another shape than its config says: '
            f"{sorted(map(str, mismatched))[0]}"
        )


# ---- every rank reads its slices


def _load_sharded(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> None:
    """Read only this rank's slices, through transformers' own converting loader (core_model_loading, 5.23)."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    try:
        handles = [safe_open(path, framework="pt", device="cpu") for path in _weight_files(recipe)]
        slices = {key: handle.get_slice(key) for handle in handles for key in handle.keys()}  # noqa: SIM118
        slices = {key: value for key, value in slices.items() if not extra_state.is_extra(key)}
        before = dict(model.named_parameters())
        mapping = get_model_conversion_mapping(model) or []
        _refuse_stitched(before, slices, mapping)
        config = LoadStateDictConfig(
            device_map={"": next(model.parameters()).device},
            dtype=torch.float32,
            weight_mapping=mapping,  # type: ignore[arg-type]
        )
        report, _ = convert_and_load_state_dict_in_model(model, slices, config)
    except NdtrainError:
        raise
    except Exception as error:
        raise _unreadable(recipe, error) from error
    missing = {k for k in report.missing_keys if k not in tied_keys(model)}
    _check_report(missing, report.mismatched_keys, recipe)
    notes += unused(report.unexpected_keys)
    _put_back(model, before)


def _refuse_stitched(params: Mapping[str, nn.Parameter], keys: Iterable[str], mapping: Iterable[Any]) -> None:
    """Raise `PlanError` where a weight is stitched from saved pieces, or cut into them, along a dim that ranks share.

    transformers' loader takes each rank's part of every piece and stitches those (5.23): right for a packed cut, which
    takes as much of gate as of up; any other gets rows of other ranks, without an error.
    """
    for converter in mapping:
        # Experts saved one by one are stacked: that loader knows which are this rank's.
        operations = [o for o in getattr(converter, "operations", ()) if type(o).__name__ != "MergeModulelist"]
        sources = [_as_regex(pattern) for pattern in getattr(converter, "source_patterns", ())]
        if not operations or not any(source.search(key) for key in keys for source in sources):
            continue
        dims = {getattr(operation, "dim", None) for operation in operations}
        targets = [_as_regex(pattern) for pattern in converter.target_patterns]
        for fqn, param in params.items():
            if not isinstance(param, DTensor) or not any(target.search(fqn) for target in targets):
                continue
            axes = range(param.device_mesh.ndim)
            for dim in range(param.ndim) if None in dims else {d % param.ndim for d in dims if d is not None}:
                cuts = [i for i in axes if _cuts(param.placements[i], dim, param) and param.device_mesh.size(i) > 1]
                packed = [i for i in cuts if isinstance(param.placements[i], _StridedShard) and i == axes[-1]]
                if cuts != packed:
                    raise PlanError(
                        f'{fqn} is saved in another form along dim {dim}, which this mesh cuts; set load.mode = "rank0"'
                    )


def _as_regex(pattern: str) -> re.Pattern[str]:
    """A pattern of transformers' weight conversions, in which `*` stands for a number."""
    return re.compile(pattern.replace("*", r"\d+"))


def _cuts(placement: Placement, dim: int, param: Tensor) -> bool:
    return isinstance(placement, Shard | _StridedShard) and placement.dim % param.ndim == dim


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, nn.Parameter]) -> None:
    """Move loaded values into the parameters that FSDP knows: the loader replaces parameter objects."""
    for name, param in before.items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        loaded = owner._parameters[leaf]
        if loaded is not param and loaded is not None:
            local_part(param).copy_(local_part(loaded))
            owner._parameters[leaf] = param


def _weight_files(recipe: Recipe) -> list[str]:
    """Paths of the model's safetensors files, from a local directory or through the hub's cache."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name = str(recipe.model.name)
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files, _ = get_checkpoint_shard_files(name, index)
        return list(files)
    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise RecipeError(
            f'model.name = "{name}" has no safetensors files; set load.mode = "rank0", or model.init = "random"'
        )
    return [single]


def _load_extra(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> None:
    """Hand the extra states that the files hold as data to their modules, on every rank the same."""
    from safetensors import safe_open

    found: dict[str, Any] = {}

    def read() -> None:
        with suppress(RecipeError):  # files of another kind, which transformers has read
            for path in _weight_files(recipe):
                with safe_open(path, framework="pt", device="cpu") as file:
                    for key in filter(extra_state.is_extra, file.keys()):
                        tensor = file.get_tensor(key)
                        with suppress(TypeError):
                            found[key.removesuffix(extra_state.SUFFIX).rstrip(".")] = (
                                extra_state.to_json(tensor) if tensor.numel() else None
                            )
                        found.setdefault(key.removesuffix(extra_state.SUFFIX).rstrip("."), "bytes")

    on_rank0(read)
    found = broadcast_json(found)
    modules = {name for name, _ in model.named_modules()}
    extra_state.restore(
        model, {name: state for name, state in found.items() if isinstance(state, dict) and name in modules}
    )
    if left_out := [name for name, state in found.items() if state == "bytes" or name not in modules]:
        notes.append(extra_state.left_out_note(left_out, "not read from the weights"))


# ---- random initialization


def initialize(model: PreTrainedModel, plan: Plan, *, recipe: Recipe) -> None:
    """Draw the weights from (train.seed, FQN) with the model's own initialization, the same on every mesh.

    One block at a time is drawn whole on the CPU and its slices are kept. Raises `PlanError` naming a weight that the
    model's own initialization leaves unset.
    """
    reference = meta_model(recipe)
    targets = model_tensors(model)
    for name in _initialized_together(reference, plan):
        module = reference.get_submodule(name)
        _draw(reference, module, seed=random_seed(recipe.train.seed, name))
        for leaf, value in module.state_dict().items():
            fqn = f"{name}.{leaf}" if name else leaf
            if fqn not in targets:
                continue
            if value.is_floating_point() and bool(value.isnan().any()):
                raise PlanError(f"{fqn} is not set by the model's own initialization; start from saved weights")
            target = targets.pop(fqn)
            local = local_part(target)
            for box in held_boxes(target):
                local[box.local] = value[box.inside]
        module.to("meta")
    if targets:
        raise PlanError(f"{min(targets)} is not set by the model's own initialization; start from saved weights")


def _initialized_together(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Blocks, then every remaining module with tensors of its own: a cut that is the same on every mesh."""
    yield from plan.blocks
    for name, module in model.named_modules():
        inside = any(name == b or name.startswith(f"{b}.") for b in plan.blocks)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not inside:
            yield name


@torch.no_grad()
def _draw(model: PreTrainedModel, module: nn.Module, *, seed: int) -> None:
    import transformers.initialization as init

    try:
        module.to_empty(device="cpu")
    except RuntimeError as error:
        raise RecipeError(f"{type(module).__name__} does not fit this machine's memory; see model.config") from error
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    with torch.random.fork_rng(devices=[]), init.guard_torch_init_functions():
        torch.manual_seed(seed)
        _apply_inside_out(module, _owner(model, module)._init_weights)


def _apply_inside_out(module: nn.Module, fn: Callable[[nn.Module], None]) -> None:
    from transformers import PreTrainedModel

    for child in module.children():
        _apply_inside_out(child, child._init_weights if isinstance(child, PreTrainedModel) else fn)
    fn(module)


def _owner(model: PreTrainedModel, module: nn.Module) -> PreTrainedModel:
    """The innermost model whose `_init_weights` is responsible for `module`."""
    from transformers import PreTrainedModel

    owner = model
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and any(m is module for m in candidate.modules()):
            owner = candidate
    return owner
