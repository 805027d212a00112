"""Write tensors of any sharding to a directory of safetensors files, and read them back on any mesh.

A tensor directory holds files `00002-of-00004.safetensors` (rank 2 of 4). A tensor whose local part is not one
contiguous box of the global tensor (packed weights under TP) is stored as one piece for each box; a safetensors file
has one entry for each key, so a rank's further pieces of a key are in `00002-of-00004.1.safetensors` and so on. A
piece's offsets are in the header under `DCP_SHARDING_INFO`, as torch's `HuggingFaceStorageWriter` writes them (torch
2.13), so that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads these directories.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
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
from ndtrain.storage.pieces import Piece, local_and_boxes, pieces_in, read_held

_WRITE_BYTES = 1 << 26

# File name -> key -> (this rank's piece, its offsets in the global tensor)
Files = Mapping[str, Mapping[str, tuple[Tensor, Ints]]]


# ---- writing


def _owned(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that this rank writes. All ranks compute the same choice, without communication.

    Of a tensor's R replicas the one with the fewest bytes so far writes it; bytes are counted separately for each way
    of replicating.
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
    """Return the pieces of `tensors` that this rank writes; every rank calls it with the same keys, in any order.

    Takes DTensors on any mesh with any placements but Partial; other tensors are written by rank 0. The pieces share
    memory with the tensors.
    """
    files: dict[str, dict[str, tuple[Tensor, Ints]]] = defaultdict(dict)
    for key in _owned(tensors):
        local, boxes = local_and_boxes(key, tensors[key])
        for k, box in enumerate(boxes):
            name = f"{rank():05d}-of-{world_size():05d}{f'.{k}' if k else ''}.safetensors"
            files[name][key] = (local[box.local].detach(), box.offsets)
    return files


def _write_file(path: Path, entries: Mapping[str, tuple[Tensor, Ints]]) -> dict[str, Any]:
    """Write and sync a safetensors file of {key: (tensor, global offsets)}; return its size and hash.

    Copies one tensor at a time to the CPU.
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


def write_files(directory: Path, files: Files, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write this rank's files; return {name: size and hash}. `progress` is called after each file."""
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, entries in files.items():
        written[name] = _write_file(directory / name, entries)
        progress()
    return written


# ---- reading


def pieces_of(directory: Path) -> dict[str, list[Piece]]:
    """Return the stored pieces of every key, from the files that the manifest beside lists, or from all without one.

    Raises `DamagedError` for a damaged header.
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
                # the same box written by another rank too is not an overlap
                if all((piece.offsets, piece.sizes) != (p.offsets, p.sizes) for p in stored[key]):
                    stored[key].append(piece)
    return dict(stored)


def load_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    all_of_it: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fill the tensors in place from a save on any mesh, reading only what this rank holds; collective.

    With `all_of_it` a stored key that is not in `tensors` is an error too: it belongs to another model. `progress` is
    called after each block.

    Raises `DamagedError` on all ranks: a key is missing, its shape or dtype differs, its pieces overlap or do not cover
    the tensor, or a file cannot be read. Some tensors may be partly filled then.
    """

    def read() -> None:
        stored = pieces_of(directory)
        if all_of_it and (left := sorted(stored.keys() - tensors.keys())):
            raise DamagedError(f"{directory}: holds {left[0]}, which this model does not have")
        read_held(tensors, stored, directory, progress=progress)

    together(read)


def listing(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return {key: {shape, dtype}} of `tensors`, as the manifest lists them."""
    return {key: {"shape": list(t.shape), "dtype": DTYPE_NAMES[_known_dtype(key, t)]} for key, t in tensors.items()}


def _known_dtype(key: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in DTYPE_NAMES:
        raise NdtrainError(f"{key}: dtype {tensor.dtype} cannot be saved")
    return tensor.dtype


def check_coverage(directory: Path, listed: Mapping[str, Any]) -> None:
    """Raise `DamagedError` unless the pieces in a tensor directory are exactly those of the tensors in `listed`."""
    stored = pieces_of(directory)
    if extra := sorted(stored.keys() - listed.keys()):
        raise DamagedError(f"{directory}: holds {extra[0]}, which its manifest does not list")
    for key, entry in listed.items():
        pieces, shape = stored.get(key, []), entry["shape"]
        if any(p.dtype != entry["dtype"] or len(p.sizes) != len(shape) for p in pieces) or any(
            p.offsets[dim] + p.sizes[dim] > shape[dim] for p in pieces for dim in range(len(shape))
        ):
            raise DamagedError(
                f"{directory}: the manifest lists {key} as {entry['dtype']} of shape {tuple(shape)}, the files do not"
            )
        found = sum(math.prod(p.sizes) for p in pieces)
        if found != math.prod(shape):
            raise DamagedError(f"{directory}: {key} has {found:,} of {math.prod(shape):,} values")
