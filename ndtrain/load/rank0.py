"""Read whole weights on rank 0 through transformers and broadcast them; each rank keeps its boxes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.errors import DamagedError
from ndtrain.hf import extra_states
from ndtrain.hf.hub import directory_of
from ndtrain.hf.model import tied_keys
from ndtrain.hf.tied import other_values
from ndtrain.hf.weight_names import model_tensors
from ndtrain.layout import held_boxes, local_part
from ndtrain.load.files import check_report, files_to_load, readable, refuse_nan, unused
from ndtrain.load.sources import refuse_copies, sources
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import on_rank0, together
from ndtrain.runs.process import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights are broadcast in chunks of about this many bytes, so that a rank holds no more than one beside its shards.
CHUNK_BYTES = 64 * 2**20


def load_rank0(model: PreTrainedModel, *, recipe: Recipe, runtime: Runtime, notes: list[str]) -> None:
    """Fill `model` from rank 0, which reads all of it through transformers and broadcasts it in chunks.

    Adds to `notes` on rank 0. Raises `DamagedError` for missing, unreadable, mismatched or NaN weights.
    """
    source: dict[str, Tensor] = {}
    on_rank0(lambda: source.update(_read_whole(model, recipe, notes)))
    # The first touch of memory costs as much as the transfer, so all chunks are received into one buffer.
    received = torch.empty(0 if runtime.is_main else CHUNK_BYTES, dtype=torch.uint8, device=runtime.device)
    for name, target in model_tensors(model).items():
        _send(source.pop(name, None), target, received=received, runtime=runtime)
    # One rank alone may hold the damaged shard; the others must stop with it.
    together(lambda: refuse_nan(model_tensors(model), recipe))


@torch.no_grad()
def _send(full: Tensor | None, target: Tensor, *, received: Tensor, runtime: Runtime) -> None:
    """Fill each rank's part of `target` from rank 0's `full` tensor of the global shape (None on the other ranks).

    The global tensor is broadcast in chunks of whole rows, so that other ranks hold only one chunk of it at a time: in
    `received` (uint8) if it fits.
    """
    local, boxes = local_part(target), held_boxes(target)
    shape = tuple(target.shape)
    rows = shape[0] if shape else 1
    row_bytes = max(1, target.numel() // max(1, rows)) * target.element_size()
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if full is not None:
            chunk = (full[start:stop] if shape else full).to(runtime.device).to(target.dtype).contiguous()
        else:
            size = (stop - start) * row_bytes
            fits = size <= received.numel()
            memory = received if fits else torch.empty(size, dtype=torch.uint8, device=runtime.device)
            chunk = memory[:size].view(target.dtype).view((stop - start, *shape[1:]) if shape else ())
        if runtime.world_size > 1:
            dist.broadcast(chunk, src=0)
        if not shape:
            local.copy_(chunk)
            continue
        for box in boxes:
            low, high = max(start, box.offsets[0]), min(stop, box.offsets[0] + box.sizes[0])
            if low < high:
                offset = box.local_offsets[0] + low - box.offsets[0]
                part = chunk[(slice(low - start, high - start), *box.inside[1:])]
                local[(slice(offset, offset + high - low), *box.local[1:])] = part


def _read_whole(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> dict[str, Tensor]:
    import transformers

    whole: Any
    report: Any

    with readable(recipe):
        files = files_to_load(model, recipe)
        if files.kind == "safetensors":
            refuse_copies(sources(model, files), recipe)
        with extra_states.withheld(model):
            # With output_loading_info it returns (model, report); transformers' annotation has only the model.
            whole, report = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                directory_of(str(recipe.model.name), recipe.model.revision),
                config=copy.deepcopy(model.export_config),
                dtype=torch.float32,
                trust_remote_code=recipe.model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
            )
    for alias, name in sorted(tied_keys(model).items() - tied_keys(whole).items()):
        raise DamagedError(other_values(recipe.model.name, alias, name, name))
    check_report(report["missing_keys"], report["mismatched_keys"], recipe)
    notes += unused(report["unexpected_keys"])
    return model_tensors(whole)
