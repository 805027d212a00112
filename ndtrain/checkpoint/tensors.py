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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ndtrain.checkpoint.manifest import HASH, hasher, is_tensor_file, read_manifest
from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.layout import Box, Ints, held_boxes, local_part
from ndtrain.places import allocate, flushing, is_local, read_into, read_range, read_ranges
from ndtrain.runtime import rank, together, world_size

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_HEADER_BYTES = 1 << 16  # read at first: most headers are shorter
_WRITE_BYTES = 1 << 26
_READ_BYTES = 1 << 28  # at once, from an object store


# File name -> key -> (this rank's piece, where it begins in the whole tensor)
Files = Mapping[str, Mapping[str, tuple[Tensor, Ints]]]


class _Piece(NamedTuple):
    file: Path
    offsets: Ints
    sizes: Ints
    dtype: str
    start: int  # of its bytes in the file


class _Wanted(NamedTuple):
    key: str
    piece: _Piece
    target: Tensor
    source: tuple[slice, ...]  # of the piece


def _held(key: str, tensor: Tensor) -> tuple[Tensor, list[Box]]:
    """The local tensor (sharing memory) and its boxes. NdtrainError where the two disagree."""
    local, boxes = local_part(tensor), held_boxes(tensor)
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return local, boxes
    if sum(math.prod(box.sizes) for box in boxes) != local.numel() or any(
        start + size > limit
        for box in boxes
        for start, size, limit in zip(box.local_offsets, box.sizes, local.shape, strict=True)
    ):
        raise NdtrainError(
            f"{key}: local shape {tuple(local.shape)} does not fit {tensor.placements} on {tensor.device_mesh}"
        )
    return local, boxes


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
        local, boxes = _held(key, tensors[key])
        for k, box in enumerate(boxes):
            name = f"{rank():05d}-of-{world_size():05d}{f'.{k}' if k else ''}.safetensors"
            files[name][key] = (local[box.local].detach(), box.offsets)
    return files


def _write_file(path: Path, entries: Mapping[str, tuple[Tensor, Ints]]) -> dict[str, Any]:
    """One safetensors file of key -> (tensor, global offsets), synced; its size and hash.

    One tensor at a time is on the CPU.
    """
    sharding = {key: {"saved_offsets": list(offsets)} for key, (_, offsets) in entries.items()}
    info = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    header: dict[str, Any] = {"__metadata__": info}
    end = 0
    # safetensors wants the widest items first, so that all stay aligned
    ordered = sorted(entries.items(), key=lambda item: (-item[1][0].element_size(), item[0]))
    for key, (tensor, _) in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _dtype_name(key, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found, size = hasher(), 0
    with path.open("xb", buffering=0) if is_local(path) else path.open("wb") as file:

        def write(data: memoryview) -> None:
            nonlocal size
            found.update(data)
            size += len(data)
            while data:
                data = data[file.write(data[:_WRITE_BYTES]) :]

        if is_local(path):
            allocate(file.fileno(), 8 + len(text) + end)
        with flushing(lambda: [path]) if is_local(path) else nullcontext():
            write(memoryview(len(text).to_bytes(8, "little") + text))
            for _, (tensor, _) in ordered:
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


def _pieces(file: Path, name: str) -> dict[str, _Piece]:
    """The pieces in one file, with the header checked against the file's length. DamagedError."""
    try:
        size = file.stat().st_size
        begin = read_range(file, 0, min(size, _HEADER_BYTES))
        length = int.from_bytes(begin[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{size:,} bytes cannot hold its header")
        if 8 + length > len(begin):
            begin += read_range(file, len(begin), 8 + length)
        header = json.loads(begin[8 : 8 + length])
        info = header.pop("__metadata__", {})
        sharding = json.loads(info["DCP_SHARDING_INFO"]) if "DCP_SHARDING_INFO" in info else None
        found, end = {}, 0
        for key, entry in header.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            offsets = tuple(sharding[key]["saved_offsets"]) if sharding is not None else (0,) * len(shape)
            numbers = (*shape, *offsets)
            if len(offsets) != len(shape) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{key} has shape {shape} at {offsets}")
            start, stop = entry["data_offsets"]
            width = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
            if not 0 <= start <= stop or (width is not None and stop - start != math.prod(shape) * width):
                raise ValueError(f"{key} has shape {shape} in bytes {start} to {stop}")
            end = max(end, stop)
            found[key] = _Piece(file, offsets, shape, dtype, 8 + length + start)
        if size != 8 + length + end:
            raise ValueError(f"{size:,} of {8 + length + end:,} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(f"{name}: damaged tensor file ({type(error).__name__}: {error})") from error
    return found


def pieces_of(directory: Path) -> dict[str, list[_Piece]]:
    """Where every stored piece of every key lies: in the files of the manifest beside, or without one in all.

    Raises `DamagedError` where a header is damaged.
    """
    if (directory.parent / "manifest.json").exists():
        prefix = directory.name + "/"
        names = [n[len(prefix) :] for n in read_manifest(directory.parent)["files"] if n.startswith(prefix)]
    else:
        names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    stored: dict[str, list[_Piece]] = defaultdict(list)
    for name in names:
        if is_tensor_file(name):
            for key, piece in _pieces(directory / name, f"{directory.parent}: {directory.name}/{name}").items():
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
        by_file: dict[Path, list[_Wanted]] = defaultdict(list)
        for key, tensor in tensors.items():
            local, boxes = _held(key, tensor)
            pieces = stored.get(key, [])
            if tensor.numel() and not pieces:
                raise DamagedError(f"{directory}: {key} is missing")
            for dim in range(tensor.ndim if pieces else 0):
                ends = {len(p.sizes) == tensor.ndim and p.offsets[dim] + p.sizes[dim] for p in pieces}
                if False in ends or max(ends) != tensor.shape[dim]:
                    raise DamagedError(f"{directory}: {key} does not have the shape {tuple(tensor.shape)}")
            if not tensor.ndim and any(piece.sizes for piece in pieces):
                raise DamagedError(f"{directory}: {key} is no scalar")
            for piece in pieces:
                if _DTYPES.get(piece.dtype) != tensor.dtype:
                    raise DamagedError(f"{directory}: {key} is {piece.dtype} in {piece.file.name}, not {tensor.dtype}")
            for box in boxes:
                covered = 0
                for piece in pieces:
                    low = [max(a, b) for a, b in zip(box.offsets, piece.offsets, strict=True)]
                    high = [
                        min(a + s, b + t)
                        for a, s, b, t in zip(box.offsets, box.sizes, piece.offsets, piece.sizes, strict=True)
                    ]
                    sizes = tuple(h - at for at, h in zip(low, high, strict=True))
                    if any(s <= 0 for s in sizes):
                        continue
                    covered += math.prod(sizes)
                    inner = tuple(at - o + lo for at, o, lo in zip(low, box.offsets, box.local_offsets, strict=True))
                    target = local[Box((), sizes, inner).local]
                    source = tuple(
                        slice(at - o, at - o + s) for at, o, s in zip(low, piece.offsets, sizes, strict=True)
                    )
                    by_file[piece.file].append(_Wanted(key, piece, target, source))
                wanted_here = math.prod(box.sizes)
                if covered != wanted_here:
                    raise DamagedError(f"{directory}: {key} has {covered:,} of {wanted_here:,} values at {box.offsets}")
        for file, wanted in sorted(by_file.items(), key=lambda item: str(item[0])):
            try:
                (_fill if is_local(file) else _fill_from_afar)(file, wanted)
            except (SafetensorError, OSError) as error:
                raise DamagedError(f"{file}: damaged tensor file ({error})") from error

    together(read)


def _fill(file: Path, wanted: list[_Wanted]) -> None:
    with safe_open(file, framework="pt") as source_file:
        for key, piece, target, source in wanted:
            whole_rows = all(part == slice(0, size) for part, size in zip(source[1:], piece.sizes[1:], strict=True))
            if source and whole_rows and target.device.type == "cpu" and target.is_contiguous():
                # Straight from the file: pages of a mapped one would have to be met first.
                row = math.prod(piece.sizes[1:]) * target.element_size()
                values: Any = target.reshape(-1).view(torch.uint8).numpy()
                read_into(file, piece.start + source[0].start * row, memoryview(values))
            else:
                # a slice of a 0-dimensional entry cannot be taken
                target.copy_(source_file.get_slice(key)[source] if source else source_file.get_tensor(key))


def _fill_from_afar(file: Path, wanted: list[_Wanted]) -> None:
    """Several requests at once, each for some rows of a piece, at most `_READ_BYTES` (or one row) in memory."""
    batch: list[tuple[_Wanted, slice, int, int]] = []  # with rows of the target, and bytes of the file

    def fetch() -> None:
        found = read_ranges(file, [(start, stop) for *_, start, stop in batch])
        for (want, rows, start, stop), data in zip(batch, found, strict=True):
            if len(data) != stop - start:
                raise OSError(f"{len(data):,} of {stop - start:,} bytes")
            shape = (-1, *want.piece.sizes[1:]) if want.source else ()
            values = torch.frombuffer(bytearray(data), dtype=want.target.dtype).reshape(shape)
            if want.source:
                want.target[rows].copy_(values[(slice(None), *want.source[1:])])
            else:
                want.target.copy_(values)
        batch.clear()

    held = 0
    for want in wanted:
        row = math.prod(want.piece.sizes[1:]) * want.target.element_size()
        first, last = (want.source[0].start, want.source[0].stop) if want.source else (0, 1)
        step = max(1, _READ_BYTES // row)
        for low in range(first, last, step):
            high = min(low + step, last)
            if batch and held + (high - low) * row > _READ_BYTES:
                fetch()
                held = 0
            held += (high - low) * row
            at = want.piece.start
            batch.append((want, slice(low - first, high - first), at + low * row, at + high * row))
    fetch()


def listing(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{key: {shape, dtype}} of `tensors`, as the manifest has it."""
    return {key: {"shape": list(t.shape), "dtype": _dtype_name(key, t)} for key, t in tensors.items()}


def _dtype_name(key: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPE_NAMES:
        raise NdtrainError(f"{key}: dtype {tensor.dtype} cannot be saved")
    return _DTYPE_NAMES[tensor.dtype]


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
        held = sum(math.prod(p.sizes) for p in pieces)
        if held != math.prod(shape):
            raise DamagedError(f"{directory}: {key} has {held:,} of {math.prod(shape):,} values")


def pieces_in(file: Path) -> dict[str, _Piece]:
    """The pieces in one safetensors file, whoever wrote it. Raises `DamagedError`."""
    return _pieces(file, file.name)
