"""Converts a hub directory of safetensors to an ndtrain checkpoint: weights only, no optimizer and no data position."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ndtrain.checkpoint import check
from ndtrain.checkpoint.index import write_index
from ndtrain.checkpoint.manifest import write_manifest
from ndtrain.checkpoint.tensors import listing, pieces_of
from ndtrain.convert.shards import ShardWriter
from ndtrain.convert.stored import Stored, checkpoint_tensors
from ndtrain.convert.stream import Progress, Stream
from ndtrain.convert.to_hub import INDEX, meta_model_of, state_to_store
from ndtrain.convert.weights import Group, from_hub
from ndtrain.errors import DamagedError, PlanError
from ndtrain.hf import extra_states
from ndtrain.hf.model import kept_in_fp32, tied_keys
from ndtrain.storage.headers import Target
from ndtrain.storage.pieces import pieces_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
# Endings of config and tokenizer files; weights in other formats are not copied.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".bpe", ".md")


def is_hub_directory(path: Path) -> bool:
    """Return whether `path` looks like a directory that `save_pretrained` wrote."""
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    return has_weights and (path / "config.json").is_file() and not (path / "manifest.json").exists()


def hub_tensors(directory: Path) -> dict[str, Stored]:
    """Return every tensor of the directory's index, or of its one file. Raises `DamagedError`.

    An index that names a file outside the directory is refused.
    """
    if not (directory / INDEX).is_file():
        return checkpoint_tensors({k: [p] for k, p in pieces_in(directory / SINGLE).items()}, directory)
    try:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        for key, name in weight_map.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{key} is in {name!r}, which is not a safetensors file of the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory / INDEX} is damaged ({type(error).__name__}: {error})") from error
    pieces: dict[str, list[Any]] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise DamagedError(f"{directory}: {name} is missing, which {INDEX} names")
        pieces |= {key: [p] for key, p in pieces_in(directory / name).items() if weight_map.get(key) == name}
    if lost := sorted(weight_map.keys() - pieces.keys()):
        raise DamagedError(f"{directory}: {lost[0]} is not in {weight_map[lost[0]]}, where {INDEX} says it is")
    return checkpoint_tensors(pieces, directory)


def write_checkpoint(directory: Path, out: Path, *, verify: bool, progress: Progress | None) -> list[str]:
    """Fill the directory `out`; return notes for the user. Raises `DamagedError` and `PlanError`."""
    model, published = meta_model_of(directory, None)
    source = hub_tensors(directory)
    if quantized := [k for k, t in source.items() if t.dtype.is_floating_point and t.dtype.itemsize == 1]:
        raise PlanError(
            f"{directory}: {quantized[0]} has dtype {source[quantized[0]].dtype}, and only unquantized weights "
            "convert; give the unquantized model"
        )
    unread = {key for key in source if extra_states.is_extra(key)}
    wanted = state_to_store(model)
    state = {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in source.items() if k not in unread}
    # A scalar is stored as one row.
    state |= {k: state[k].reshape(()) for k in state.keys() & wanted.keys() if not wanted[k].ndim}
    groups, unused = from_hub(model, state, wanted)
    made = {key for group in groups for key in group.outputs}
    targets = {
        key: Target(tuple(tensor.shape), tensor.dtype)
        for key, tensor in wanted.items()
        if tensor.numel() and key in made
    }
    groups = [group for group in groups if not targets.keys().isdisjoint(group.outputs)]
    (out / "model").mkdir()
    files = _files(targets)
    stream = Stream(source, groups, targets, model, ready={}, progress=progress)
    stream.write(ShardWriter(out / "model", files, targets, lambda keys: _metadata(keys, targets)))
    if verify:
        stream.verify(out / "model", list(files))
    copy_beside(directory, out)
    (out / "train_state.json").write_text(json.dumps({"step": 0}))
    write_index(out / "model", pieces_of(out / "model"))
    write_manifest(out, {"model": listing({key: wanted[key] for key in targets}), "optim": {}}, {})
    check(out)
    return _notes(source, groups, model, published, unused=unused, unread=unread)


def copy_beside(directory: Path, out: Path) -> None:
    """Copy config and tokenizer files that `out` does not have yet; do nothing where `directory` is a file."""
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        wanted = file.suffix in _BESIDE and not file.name.startswith(".") and not file.name.endswith(".index.json")
        if wanted and file.is_file() and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


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


def _metadata(keys: list[str], targets: dict[str, Target]) -> dict[str, str]:
    sharding = {key: {"saved_offsets": [0] * len(targets[key].shape)} for key in keys}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}


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
    aliases = tied_keys(model)
    if left := sorted(key for key in unused if key not in aliases):
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
