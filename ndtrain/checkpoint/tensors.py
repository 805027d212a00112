"""Tensors of any sharding in a directory of safetensors files, read back on any mesh.

A tensor directory holds files `00002-of-00004.safetensors` (rank 2 of 4). A tensor whose local part is not one
contiguous box of the global tensor (packed weights under TP) is stored as one piece for each box; a safetensors file
has one entry for each key, so a rank's further pieces of a key are in `00002-of-00004.1.safetensors` and so on. Where a
piece lies is in the header under `DCP_SHARDING_INFO`, as torch's `HuggingFaceStorageWriter` has it (torch 2.13), so
that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads these directories.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ndtrain.checkpoint.manifest import HASH, hasher, is_tensor_file, read_manifest
from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import Ints
from ndtrain.runs.messages import together
from ndtrain.runs.process import rank, world_size
from ndtrain.storage.headers import DTYPE_NAMES, Target, header_of
from ndtrain.storage.paths import allocate, flushing, is_local
from ndtrain.storage.pieces import Piece, held, pieces_in, read_held

_WRITE_BYTES = 1 << 26

# File name -> key -> (this rank's piece, where it begins in the whole tensor)
Files = Mapping[str, Mapping[str, tuple[Tensor, Ints]]]


# ---- writing


def _owned(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys that this rank writes. Every rank computes the same choice, without talking.

    Of R replicas of a tensor the one with the fewest bytes so far writes it, counted for each way of
    replicating.
    """
    loads: dict[Any, list[int]] = {}
    mine = []
    for key, tensor in sorted(tensors.items()):
        if not isinstance(tensor, DTensor):
            if rank() == 0:
                mine.append(key)
            continue
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        copies = tuple(i for i, p in enumerate(tensor.placements) if p.is_replicate() and mesh.shape[i] > 1)
        replicas = math.prod(mesh.shape[i] for i in copies)
        load = loads.setdefault((tuple(mesh.shape), mesh.mesh_dim_names, copies), [0] * replicas)
        chosen = load.index(min(load))
        load[chosen] += tensor.numel() * tensor.element_size() * replicas // mesh.size()
        replica = 0
        for i in copies:
            replica = replica * mesh.shape[i] + (coordinate[i] if coordinate is not None else 0)
        if coordinate is not None and replica == chosen:
            mine.append(key)
    return mine


def files_of(tensors: Mapping[str, Tensor]) -> Files:
    """What this rank writes of `tensors`, by file name; every rank calls it with the same keys, in any order.

    DTensors on any mesh and placements but Partial; other tensors are rank 0's. The entries share memory with them.
    """
    files: dict[str, dict[str, tuple[Tensor, Ints]]] = defaultdict(dict)
    for key in _owned(tensors):
        local, boxes = held(key, tensors[key])
        for k, box in enumerate(boxes):
            name = f"{rank():05d}-of-{world_size():05d}{f'.{k}' if k else ''}.safetensors"
            files[name][key] = (local[box.local].detach(), box.offsets)
    return files


def _write_file(path: Path, entries: Mapping[str, tuple[Tensor, Ints]]) -> dict[str, Any]:
    """One safetensors file of key -> (tensor, global offsets), synced; its size and hash.

    One tensor at a time is on the CPU.
    """
    sharding = {key: {"saved_offsets": list(offsets)} for key, (_, offsets) in entries.items()}
    targets = {key: Target(tuple(tensor.shape), _known_dtype(key, tensor)) for key, (tensor, _) in entries.items()}
    header, starts = header_of(
        targets, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    )
    found, size = hasher(), 0
    with path.open("xb", buffering=0) if is_local(path) else path.open("wb") as file:

        def write(data: memoryview) -> None:
            nonlocal size
            found.update(data)
            size += len(data)
            while data:
                data = data[file.write(data[:_WRITE_BYTES]) :]

        if is_local(path):
            allocate(file.fileno(), len(header) + sum(target.nbytes for target in targets.values()))
        with flushing(lambda: [path]) if is_local(path) else nullcontext():
            write(memoryview(header))
            for key in starts:
                tensor, _ = entries[key]
                if tensor.numel():
                    write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        if is_local(path):
            os.fsync(file.fileno())
    return {"size": size, HASH: found.hexdigest()}


def write_files(directory: Path, files: Files) -> dict[str, Any]:
    """Write this rank's files; {name: its size and hash}."""
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return {name: _write_file(directory / name, entries) for name, entries in files.items()}


# ---- reading


def pieces_of(directory: Path) -> dict[str, list[Piece]]:
    """Where every stored piece of every key lies: in the files of the manifest beside, or without one in all.

    Raises `DamagedError` where a header is damaged.
    """
    if (directory.parent / "manifest.json").exists():
        prefix = directory.name + "/"
        names = [n[len(prefix) :] for n in read_manifest(directory.parent)["files"] if n.startswith(prefix)]
    else:
        names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    stored: dict[str, list[Piece]] = defaultdict(list)
    for name in names:
        if is_tensor_file(name):
            for key, piece in pieces_in(directory / name, f"{directory.parent}: {directory.name}/{name}").items():
                # a replica that another writer stored too is no overlap
                if all((piece.offsets, piece.sizes) != (p.offsets, p.sizes) for p in stored[key]):
                    stored[key].append(piece)
    return dict(stored)


def load_tensors(directory: Path, tensors: Mapping[str, Tensor], *, all_of_it: bool = False) -> None:
    """Fills the tensors in place from a save on any mesh, reading only what this rank holds; collective.

    With `all_of_it` a stored key that is not wanted is an error too: it is of another model.

    Raises DamagedError on all ranks: a key is missing, its shape or dtype differs, pieces do not cover what
    is wanted or overlap, or a file is unreadable. Tensors may be partly filled then.
    """

    def read() -> None:
        stored = pieces_of(directory)
        if all_of_it and (left := sorted(stored.keys() - tensors.keys())):
            raise DamagedError(f"{directory}: holds {left[0]}, which this model does not have")
        read_held(tensors, stored, directory)

    together(read)


def listing(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{key: {shape, dtype}} of `tensors`, as the manifest has it."""
    return {key: {"shape": list(t.shape), "dtype": DTYPE_NAMES[_known_dtype(key, t)]} for key, t in tensors.items()}


def _known_dtype(key: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in DTYPE_NAMES:
        raise NdtrainError(f"{key}: dtype {tensor.dtype} cannot be saved")
    return tensor.dtype


def check_coverage(directory: Path, listed: Mapping[str, Any]) -> None:
    """Raises DamagedError unless the pieces in a tensor directory are those of every tensor of its listing."""
    stored = pieces_of(directory)
    if odd := sorted(stored.keys() - listed.keys()):
        raise DamagedError(f"{directory}: holds {odd[0]}, which its manifest does not have")
    for key, entry in listed.items():
        pieces, shape = stored.get(key, []), entry["shape"]
        if any(p.dtype != entry["dtype"] or len(p.sizes) != len(shape) for p in pieces) or any(
            p.offsets[dim] + p.sizes[dim] > shape[dim] for p in pieces for dim in range(len(shape))
        ):
            raise DamagedError(f"{directory}: {key} is not the {entry['dtype']} of shape {tuple(shape)} that was saved")
        found = sum(math.prod(p.sizes) for p in pieces)
        if found != math.prod(shape):
            raise DamagedError(f"{directory}: {key} has {found:,} of {math.prod(shape):,} values")
