"""Converts a hub directory of safetensors to an ndtrain checkpoint: weights only, no optimizer and no data position."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ndtrain.checkpoint import check
from ndtrain.checkpoint.index import write_index
from ndtrain.checkpoint.manifest import write_manifest
from ndtrain.checkpoint.tensors import listing, pieces_of
from ndtrain.convert.shards import ShardWriter
from ndtrain.convert.stream import Progress, Stream
from ndtrain.convert.to_hub import meta_model_of
from ndtrain.convert.weights import Group, from_hub
from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.beside import save_config
from ndtrain.hf.files import ModelFiles, model_files, named_weights
from ndtrain.hf.hub import is_beside
from ndtrain.hf.model import kept_in_fp32
from ndtrain.hf.tied import refuse_other_values
from ndtrain.hf.weight_names import model_tensors
from ndtrain.storage.headers import Target
from ndtrain.storage.pieces import metadata_of
from ndtrain.storage.stored import Stored, checkpoint_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 5 * 10**9


def hub_files(directory: Path) -> ModelFiles | None:
    """Return the files of a directory that `from_pretrained` reads; None if it is another one.

    Raises `RecipeError` for weights that are not in safetensors files.
    """
    if not (directory / "config.json").is_file():
        return None
    files = model_files(directory, named=named_weights(directory))  # `meta_model_of` names a damaged config
    if files is None or files.kind == "checkpoint":
        return None
    if files.kind != "safetensors":
        raise RecipeError(
            f"{directory} has its weights in {files.main}, and convert reads safetensors; write them anew with "
            "transformers' save_pretrained"
        )
    return files


def write_checkpoint(
    directory: Path,
    files: ModelFiles,
    out: Path,
    *,
    trust_remote_code: bool,
    verify: bool,
    progress: Progress | None,
) -> list[str]:
    """Fill the directory `out` with the weights of `files` and what lies beside them; return notes for the user.

    Raises `DamagedError`, `PlanError` and `RecipeError`.
    """
    model, published, notes = meta_model_of(directory, None, trust_remote_code=trust_remote_code)
    source = checkpoint_tensors({key: [piece] for key, piece in files.pieces().items()}, directory)
    if quantized := [k for k, t in source.items() if t.dtype.is_floating_point and t.dtype.itemsize == 1]:
        raise PlanError(
            f"{directory}: {quantized[0]} has dtype {source[quantized[0]].dtype}, and only unquantized weights "
            "convert; give the unquantized model"
        )
    unread = {key for key in source if extra_states.is_extra(key)}
    wanted = model_tensors(model)
    state = {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in source.items() if k not in unread}
    # A scalar is stored as one row.
    state |= {k: state[k].reshape(()) for k in state.keys() & wanted.keys() if not wanted[k].ndim}
    groups, unused = from_hub(model, state, wanted)
    copies = {group.name: group.sources for group in groups if group.transform is None and len(group.sources) > 1}
    refuse_other_values(copies, source, directory)
    groups = [group._replace(sources=group.sources[:1]) if group.name in copies else group for group in groups]
    made = {key for group in groups for key in group.outputs}
    targets = {
        key: Target(tuple(tensor.shape), tensor.dtype)
        for key, tensor in wanted.items()
        if tensor.numel() and key in made
    }
    groups = [group for group in groups if not targets.keys().isdisjoint(group.outputs)]
    (out / "model").mkdir()
    out_files = _files(targets)
    stream = Stream(source, groups, targets, model, ready={}, progress=progress)

    def metadata(keys: list[str]) -> dict[str, str]:
        return metadata_of({key: (0,) * len(targets[key].shape) for key in keys})

    stream.write(ShardWriter(out / "model", out_files, targets, metadata))
    if verify:
        stream.verify(out / "model", list(out_files))
    notes += save_config(model, out)
    copy_beside(directory, out)
    (out / "train_state.json").write_text(json.dumps({"step": 0}))
    write_index(out / "model", pieces_of(out / "model"))
    write_manifest(out, {"model": listing({key: wanted[key] for key in targets}), "optim": {}}, {})
    check(out)
    return notes + _notes(source, groups, model, published, unused=unused, unread=unread)


def copy_beside(directory: Path, out: Path) -> None:
    """Copy config, tokenizer and code files that `out` does not have yet; do nothing where `directory` is a file."""
    for file in sorted(directory.rglob("*")) if directory.is_dir() else ():
        path = file.relative_to(directory).as_posix()
        if file.is_file() and is_beside(path, file.stat().st_size) and not (out / path).exists():
            (out / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, out / path)


def _files(targets: dict[str, Target]) -> dict[str, list[str]]:
    """Return the keys of each file, about `FILE_BYTES` a file."""
    files: list[list[str]] = [[]]
    held = 0
    for key, target in targets.items():
        if files[-1] and held + target.nbytes > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(key)
        held += target.nbytes
    return {f"{i:05d}-of-{len(files):05d}.safetensors": keys for i, keys in enumerate(files)}


def _notes(
    source: Mapping[str, Stored],
    groups: list[Group],
    model: PreTrainedModel,
    published: torch.dtype,
    *,
    unused: Collection[str],
    unread: Collection[str],
) -> list[str]:
    notes = []
    if left := sorted(unused):
        notes.append(f"left out (not in the model): {len(left)} of {len(source)} saved weights, first {left[0]}")
    if unread:
        notes.append(f"left out (extra state of modules): {len(unread)} of {len(source)} entries, first {min(unread)}")
    kept = kept_in_fp32(model, published)
    other = [
        key
        for group in groups
        for key in group.sources
        if source[key].dtype.is_floating_point
        and source[key].dtype != (torch.float32 if kept is not None and kept.search(group.outputs[0]) else published)
    ]
    if other:
        notes.append(
            f"dtype other than the config's {published}: {len(other)} of {len(source)} weights, first {other[0]}; "
            "converting the checkpoint back gives them the config's dtype"
        )
    return notes
