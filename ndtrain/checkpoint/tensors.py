"""Write tensors of any sharding to a directory of safetensors files, and read them back on any mesh.

A tensor directory holds files `00002-of-00004.safetensors` (rank 2 of 4). A tensor whose local part is not one
contiguous box of the global tensor (packed weights under TP) is stored as one piece for each box; a safetensors file
has one entry for each key, so a rank's further pieces of a key are in `00002-of-00004.1.safetensors` and so on. A
piece's offsets are in the header under `DCP_SHARDING_INFO`, as torch's `HuggingFaceStorageWriter` writes them (torch
2.13), so that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads these directories.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ndtrain.checkpoint.index import INDEX, check_headers, read_index
from ndtrain.checkpoint.manifest import HASH, hasher, is_tensor_file, read_manifest
from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import Ints
from ndtrain.runs.messages import together
from ndtrain.runs.process import rank, world_size
from ndtrain.storage.headers import DTYPE_NAMES, Target, header_of
from ndtrain.storage.paths import allocate, flushing, is_local
from ndtrain.storage.pieces import (
    local_and_boxes,
    metadata_of,
    pieces_of_files,
    plan_held,
    raw,
    read_planned,
    same_bytes,
)
from ndtrain.storage.table import Piece, Pieces

_WRITE_BYTES = 1 << 26
_COMPARED_AT_ONCE = 16

# File name -> key -> (this rank's piece, its offsets in the global tensor)
Files = Mapping[str, Mapping[str, tuple[Tensor, Ints]]]


# ---- writing


def _owned(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that this rank writes. All ranks compute the same choice, without communication.

    Of a tensor's R replicas the one with the fewest bytes so far writes it; bytes are counted separately for each way
    of replicating. A mesh of fewer ranks than all is one of several slices that hold the same, such as the fsdp axis of
    a tensor that tp does not cut: the slice that has rank 0 writes.
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
        in_charge = mesh.size() == world_size() or bool((mesh.mesh == 0).any())
        if coordinate is not None and replica == chosen and in_charge:
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


def _header(entries: Mapping[str, tuple[Tensor, Ints]]) -> tuple[bytes, dict[str, Target], dict[str, int]]:
    """Return the header of a file of `entries`, its tensors, and their offsets after it in the order of the file."""
    targets = {key: Target(tuple(tensor.shape), _known_dtype(key, tensor)) for key, (tensor, _) in entries.items()}
    header, starts = header_of(targets, metadata_of({key: offsets for key, (_, offsets) in entries.items()}))
    return header, targets, starts


def rows_of(files: Files, listed: Mapping[str, Any]) -> Tensor:
    """Return where this rank's files have their pieces, int64 `[pieces, 3 + 2 dims]`, for the index.

    A row has the number of its key in sorted `listed`, that of its file in `files`, the offset of its values there, and
    offsets and sizes of the box. All ranks' rows have the dims of the largest tensor; others are followed by zeros.
    """
    keys = {key: i for i, key in enumerate(sorted(listed))}
    dims = max((len(entry["shape"]) for entry in listed.values()), default=0)
    rows = []
    for number, entries in enumerate(files.values()):
        header, targets, starts = _header(entries)
        for key, start in starts.items():
            shape, offsets = targets[key].shape, entries[key][1]
            fill = (0,) * (dims - len(shape))
            rows.append([keys[key], number, len(header) + start, *offsets, *fill, *shape, *fill])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3 + 2 * dims)


def _write_file(path: Path, entries: Mapping[str, tuple[Tensor, Ints]]) -> dict[str, Any]:
    """Write and sync a safetensors file of {key: (tensor, global offsets)}; return its size and hash.

    Copies one tensor at a time to the CPU.
    """
    header, targets, starts = _header(entries)
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
                    write(raw(tensor.contiguous().cpu()))
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


def pieces_of(directory: Path) -> dict[str, Pieces]:
    """Return the stored pieces of every key, from the index, or from the headers of all files if there is none.

    Files are those that the manifest beside lists, or all without one. Raises `DamagedError` for a damaged index or
    header. Headers of files that the index lists are not read; `check_headers` compares them.
    """
    return _pieces_of(directory)[0]


def _pieces_of(directory: Path, *, compare: bool = False) -> tuple[dict[str, Pieces], bool]:
    """Return what `pieces_of` does, and whether it is from the index.

    Of pieces of one box only the first is returned. Without an index there are such: each slice of a mesh saved what
    all of them hold, and other writers do. Their values are compared with `compare` and where there is no manifest,
    since nothing else has checked the directory then.
    """
    prefix, files = directory.name + "/", {}
    has_manifest = (directory.parent / "manifest.json").exists()
    if has_manifest:
        files = read_manifest(directory.parent)["files"]
        names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    else:
        names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    names = [name for name in names if is_tensor_file(name)]
    if prefix + INDEX in files:
        return read_index(directory, files[prefix + INDEX], names), True
    where = f"{directory.parent}: {directory.name}"
    stored = pieces_of_files([directory / name for name in names], range(len(names)), where)
    copies: list[tuple[str, Piece, Piece]] = []
    stored = {key: _without_copies(key, pieces, copies) for key, pieces in stored.items()}
    if compare or not has_manifest:
        with ThreadPoolExecutor(_COMPARED_AT_ONCE) as pool:
            same = pool.map(lambda item: same_bytes(*item[1:]), copies)
            for (key, a, b), is_same in zip(copies, same, strict=True):
                if not is_same:
                    both = f"{a.file.name} and {b.file.name}"
                    raise DamagedError(f"{where}: {both} have different values of {key} at offsets {a.offsets}")
    return stored, False


def _without_copies(key: str, pieces: Pieces, copies: list[tuple[str, Piece, Piece]]) -> Pieces:
    """Return the first piece of each box; add the others to `copies` as (key, first piece, other)."""
    if pieces.numel <= math.prod(pieces.shape):
        return pieces
    first: dict[tuple[Ints, Ints], Piece] = {}
    rows = []
    for i, piece in enumerate(pieces):
        original = first.setdefault((piece.offsets, piece.sizes), piece)
        if original is piece:
            rows.append(i)
        else:
            copies.append((key, original, piece))
    return Pieces(pieces.dtype, pieces.files, pieces.table[rows])


def load_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    all_of_it: bool = False,
    cast: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Fill the tensors in place from a save on any mesh, reading only what this rank holds; collective.

    With `all_of_it` a stored key that is not in `tensors` is an error too: it belongs to another model. With `cast`
    floats may have another dtype than the tensor's. `progress` is called after each block.

    Raises `DamagedError` on all ranks: a key is missing, its shape or dtype differs, its pieces overlap or do not cover
    the tensor, or a file cannot be read. Some tensors may be partly filled then.
    """

    def read() -> None:
        stored, indexed = _pieces_of(directory)
        if all_of_it and (left := sorted(stored.keys() - tensors.keys())):
            raise DamagedError(f"{directory}: holds {left[0]}, which this model does not have")
        plan = plan_held(tensors, stored, directory, as_weights=cast)
        if indexed:
            check_headers(stored, directory, lambda number, file: file in plan)
        read_planned(plan, directory, progress=progress)

    together(read)


def listing(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return {key: {shape, dtype}} of `tensors`, as the manifest lists them."""
    return {key: {"shape": list(t.shape), "dtype": DTYPE_NAMES[_known_dtype(key, t)]} for key, t in tensors.items()}


def _known_dtype(key: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in DTYPE_NAMES:
        raise NdtrainError(f"{key}: dtype {tensor.dtype} cannot be saved")
    return tensor.dtype


def check_coverage(directory: Path, listed: Mapping[str, Any]) -> dict[str, Pieces]:
    """Return the pieces in a tensor directory if they are exactly those of the tensors in `listed`.

    Raises `DamagedError`, naming the first box of a tensor that is in no piece or in two.
    """
    stored, _ = _pieces_of(directory, compare=True)
    if extra := sorted(stored.keys() - listed.keys()):
        raise DamagedError(f"{directory}: holds {extra[0]}, which its manifest does not list")
    for key, entry in listed.items():
        shape = tuple(entry["shape"])
        pieces = stored[key] if key in stored else Pieces(entry["dtype"], (), np.empty((0, 2 + 2 * len(shape)), int))
        if pieces.dtype != entry["dtype"] or not pieces.fits(shape):
            raise DamagedError(
                f"{directory}: the manifest lists {key} as {entry['dtype']} of shape {shape}, the files do not"
            )
        if flaw := pieces.flaw(shape):
            raise DamagedError(f"{directory}: {key}{flaw}")
    return stored
