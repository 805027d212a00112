"""Checkpoints: tensors of any sharding as safetensors, published whole or not at all.

A tensor directory holds files `00002-of-00004.safetensors` (rank 2 of 4). A tensor whose local part is not
one contiguous box of the global tensor (packed weights under TP) is stored as one piece for each box; a
safetensors file has one entry for each key, so a rank's further pieces of a key are in
`00002-of-00004.1.safetensors` and so on. Where a piece lies is in the header under `DCP_SHARDING_INFO`, as
torch's `HuggingFaceStorageWriter` has it (torch 2.13), so that
`torch.distributed.checkpoint.HuggingFaceStorageReader` reads these directories. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ndtrain.errors import DamagedError, NdtrainError

FORMAT_VERSION = 1
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_STEP = re.compile(r"step-(\d{8,})")
_MESSAGE_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

Ints = tuple[int, ...]


class Box(NamedTuple):
    """A contiguous box of a global tensor, and where it lies in this rank's local tensor."""

    offsets: Ints
    sizes: Ints
    local_offsets: Ints


class _Piece(NamedTuple):
    file: Path
    offsets: Ints
    sizes: Ints
    dtype: str


# Layout: which part of a tensor a rank holds


def _chunk(total: int, chunks: int, index: int) -> tuple[int, int]:
    """Start and end of the index-th part as `torch.chunk` cuts it; the last parts may be empty."""
    size = -(-total // chunks)
    start = min(total, size * index)
    return start, min(total, start + size)


def _cut(intervals: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Elements start..end of the concatenation of the intervals [a, b)."""
    out, position = [], 0
    for a, b in intervals:
        low, high = max(start, position), min(end, position + b - a)
        if low < high:
            out.append((a + low - position, a + high - position))
        position += b - a
    return out


def _split_order(mesh_shape: Sequence[int], splits: Mapping[int, int | None]) -> list[tuple[int, int]]:
    """The order in which mesh dimensions cut one tensor dimension, as [(mesh dim, parts to interleave)].

    `_StridedShard(split_factor=s)` means one of two things. FSDP over TP: cut plainly, but after mesh
    dimensions on its right that make s parts together. Otherwise a packed weight of s blocks, each of which
    is cut. Reading FSDP's as the second, as torch does from left to right, is the same only where sizes are
    even and the TP one is plain.
    """
    order: list[tuple[int, int]] = []
    for dim in sorted(splits, reverse=True):
        factor = splits[dim] or 1
        at, before = 0, 1
        while at < len(order) and before < factor:
            before *= mesh_shape[order[at][0]]
            at += 1
        if factor > 1 and before == factor:
            order.insert(at, (dim, 1))
        elif factor == 1:
            # left of a packed one: FSDP over it, in torch versions whose FSDP does not count packed shards
            order.insert(max((i + 1 for i, (_, f) in enumerate(order) if f > 1), default=0), (dim, 1))
        else:
            order.insert(0, (dim, factor))
    return order


def local_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[Box]:
    """The boxes of a global tensor of `shape` that the rank at `coordinate` holds, in row-major order.

    The local tensor is exactly these boxes, box b at its local offsets. No boxes where the local part is
    empty. Right for what `fully_shard` over TP makes (uneven and packed too). Raises NdtrainError on a
    Partial placement.
    """
    splits: dict[int, dict[int, int | None]] = defaultdict(dict)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            raise NdtrainError(f"a tensor with placements {tuple(placements)} cannot be saved: it is not reduced yet")
        if not placement.is_replicate():
            splits[placement.dim % len(shape)][mesh_dim] = getattr(placement, "split_factor", None)
    per_dim: list[list[tuple[int, int, int]]] = []
    for dim, size in enumerate(shape):
        held = [(0, size)]
        for mesh_dim, factor in _split_order(mesh_shape, splits[dim]):
            length, parts = sum(b - a for a, b in held), []
            for block in range(factor):
                start, end = _chunk(length, factor, block)
                low, high = _chunk(end - start, mesh_shape[mesh_dim], coordinate[mesh_dim])
                parts += _cut(held, start + low, start + high)
            held = []
            for a, b in parts:
                if held and held[-1][1] == a:
                    held[-1] = (held[-1][0], b)
                else:
                    held.append((a, b))
        placed, position = [], 0
        for a, b in held:
            if a < b:
                placed.append((a, b - a, position))
            position += b - a
        per_dim.append(placed)
    return [
        Box(tuple(i[0] for i in item), tuple(i[1] for i in item), tuple(i[2] for i in item))
        for item in product(*per_dim)
    ]


def _held(key: str, tensor: Tensor) -> tuple[Tensor, list[Box]]:
    """The local tensor (sharing memory) and its boxes. NdtrainError where the two disagree."""
    detached = tensor.detach()
    if not isinstance(detached, DTensor):
        return detached, local_boxes(tensor.shape, (), (), ())
    local, mesh = detached.to_local(), detached.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return local, []
    boxes = local_boxes(tensor.shape, tuple(mesh.shape), coordinate, detached.placements)
    if sum(math.prod(box.sizes) for box in boxes) != local.numel() or any(
        start + size > limit
        for box in boxes
        for start, size, limit in zip(box.local_offsets, box.sizes, local.shape, strict=True)
    ):
        raise NdtrainError(f"{key}: local shape {tuple(local.shape)} does not fit {detached.placements} on {mesh}")
    return local, boxes


def _view(local: Tensor, box: Box) -> Tensor:
    return local[tuple(slice(o, o + s) for o, s in zip(box.local_offsets, box.sizes, strict=True))]


# Agreement between ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device() -> torch.device:
    config = str(dist.get_backend_config())  # such as "cpu:gloo,cuda:nccl"
    return torch.device("cpu") if "cpu:" in config else torch.device("cuda", torch.cuda.current_device())


def _together(work: Callable[[], None]) -> None:
    """Runs `work` on every rank; where any failed, all raise with the first failing rank's message.

    Also a barrier. DCP's and a user's interrupts are BaseExceptions, and a rank that left alone would leave
    the others in the next collective. Raises DamagedError where that was the cause, otherwise NdtrainError.
    """
    error: BaseException | None = None
    try:
        work()
    except BaseException as caught:
        error = caught
    text = b""
    if error is not None:
        known = isinstance(error, NdtrainError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        text = bytes([2 if isinstance(error, DamagedError) else 1]) + message.encode()
    messages = [text]
    if _world() > 1:
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.tensor(list(text[:_MESSAGE_BYTES]), dtype=torch.uint8)
        mine = mine.to(_device())
        every = [torch.empty_like(mine) for _ in range(_world())]
        dist.all_gather(every, mine)
        messages = [bytes(t.cpu().tolist()).rstrip(b"\0") for t in every]
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    for rank, found in enumerate(messages):
        if found:
            kind = DamagedError if found[0] == 2 else NdtrainError
            where = f"rank {rank}: " if _world() > 1 else ""
            raise kind(where + found[1:].decode(errors="replace")) from error


def _broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank; as bytes, since broadcast_object_list unpickles."""
    if _world() == 1:
        return value
    data = json.dumps(value).encode() if _rank() == 0 else b""
    length = torch.tensor([len(data)], device=_device())
    dist.broadcast(length, 0)
    payload = torch.zeros(int(length.item()), dtype=torch.uint8)
    if _rank() == 0:
        payload = torch.tensor(list(data), dtype=torch.uint8)
    payload = payload.to(_device())
    dist.broadcast(payload, 0)
    return json.loads(bytes(payload.cpu().tolist()))


def _on_rank_0(work: Callable[[], None]) -> None:
    _together(work if _rank() == 0 else lambda: None)


# Writing tensors


def _owned(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys that this rank writes. Every rank computes the same choice, without talking.

    Of R replicas of a tensor the one with the fewest bytes so far writes it, counted for each way of
    replicating.
    """
    loads: dict[Any, list[int]] = {}
    mine = []
    for key, tensor in sorted(tensors.items()):
        if not isinstance(tensor, DTensor):
            if _rank() == 0:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(path: Path, entries: Mapping[str, tuple[Tensor, Ints]]) -> None:
    """One safetensors file of key -> (tensor, global offsets); one tensor at a time is on the CPU."""
    sharding = {key: {"saved_offsets": list(offsets)} for key, (_, offsets) in entries.items()}
    info = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    header: dict[str, Any] = {"__metadata__": info}
    end = 0
    # safetensors wants the widest items first, so that all stay aligned
    ordered = sorted(entries.items(), key=lambda item: (-item[1][0].element_size(), item[0]))
    for key, (tensor, _) in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise NdtrainError(f"{key}: dtype {tensor.dtype} cannot be saved")
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (tensor, _) in ordered:
            file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes every tensor once, each rank its part; all ranks call it with the same keys, in any order.

    DTensors on any mesh and placements but Partial; other tensors are rank 0's. The directory is there or is
    made. Raises NdtrainError on all ranks where one failed.
    """

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        files: dict[int, dict[str, tuple[Tensor, Ints]]] = defaultdict(dict)
        for key in _owned(tensors):
            local, boxes = _held(key, tensors[key])
            for k, box in enumerate(boxes):
                files[k][key] = (_view(local, box), box.offsets)
        for k, entries in files.items():
            part = f".{k}" if k else ""
            _write_file(directory / f"{_rank():05d}-of-{_world():05d}{part}.safetensors", entries)

    _together(write)


# Reading tensors


def _pieces(file: Path, name: str) -> dict[str, _Piece]:
    """The pieces in one file, with the header checked against the file's length. DamagedError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"{size:,} bytes cannot hold its header")
            header = json.loads(stream.read(length))
        info = header.pop("__metadata__", {})
        sharding = json.loads(info["DCP_SHARDING_INFO"]) if "DCP_SHARDING_INFO" in info else None
        found, end = {}, 0
        for key, entry in header.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            offsets = tuple(sharding[key]["saved_offsets"]) if sharding is not None else (0,) * len(shape)
            numbers = (*shape, *offsets)
            if len(offsets) != len(shape) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{key} has shape {shape} at {offsets}")
            end = max(end, entry["data_offsets"][1])
            found[key] = _Piece(file, offsets, shape, dtype)
        if size != 8 + length + end:
            raise ValueError(f"{size:,} of {8 + length + end:,} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(f"{name}: damaged tensor file ({type(error).__name__}: {error})") from error
    return found


def _stored(directory: Path) -> dict[str, list[_Piece]]:
    """All pieces by key; from the files of the manifest beside, or all in the directory without one."""
    if (directory.parent / "manifest.json").exists():
        prefix = directory.name + "/"
        names = [n[len(prefix) :] for n in _manifest(directory.parent)["files"] if n.startswith(prefix)]
    else:
        names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    stored: dict[str, list[_Piece]] = defaultdict(list)
    for name in names:
        if name.endswith(".safetensors"):
            for key, piece in _pieces(directory / name, f"{directory.name}/{name}").items():
                # a replica that another writer stored too is no overlap
                if all((piece.offsets, piece.sizes) != (p.offsets, p.sizes) for p in stored[key]):
                    stored[key].append(piece)
    return stored


def load_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the tensors in place from a save on any mesh, reading only what this rank holds; collective.

    Raises DamagedError on all ranks: a key is missing, its shape or dtype differs, pieces do not cover what
    is wanted or overlap, or a file is unreadable. Tensors may be partly filled then.
    """

    def read() -> None:
        stored = _stored(directory)
        by_file: dict[Path, list[tuple[str, Tensor, tuple[slice, ...]]]] = defaultdict(list)
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
                    target = _view(local, Box((), sizes, inner))
                    source = tuple(
                        slice(at - o, at - o + s) for at, o, s in zip(low, piece.offsets, sizes, strict=True)
                    )
                    by_file[piece.file].append((key, target, source))
                wanted_here = math.prod(box.sizes)
                if covered != wanted_here:
                    raise DamagedError(f"{directory}: {key} has {covered:,} of {wanted_here:,} values at {box.offsets}")
        for file, wanted in sorted(by_file.items()):
            try:
                with safe_open(file, framework="pt") as source_file:
                    for key, target, source in wanted:
                        # a slice of a 0-dimensional entry cannot be taken
                        value = source_file.get_slice(key)[source] if source else source_file.get_tensor(key)
                        target.copy_(value)
            except (SafetensorError, OSError) as error:
                raise DamagedError(f"{file}: damaged tensor file ({error})") from error

    _together(read)


# Publishing whole checkpoints


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _write_manifest(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Checks that all of every tensor was written, syncs what rank 0 wrote, and writes manifest.json last."""
    listed: dict[str, Any] = {}
    for part, group in tensors.items():
        stored = _stored(directory / part)
        listed[part] = {}
        for key, tensor in group.items():
            if sum(math.prod(p.sizes) for p in stored.get(key, [])) != tensor.numel():
                raise NdtrainError(f"{directory / part}: not all of {key} was written")
            listed[part][key] = {"shape": list(tensor.shape), "dtype": _DTYPE_NAMES[tensor.dtype]}
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            continue
        if not _FILE.fullmatch(name):
            raise NdtrainError(f"{directory}: no checkpoint file can have the name {name!r}")
        files[name] = {"size": path.stat().st_size}
        if path.suffix != ".safetensors":
            files[name]["blake2b"] = _digest(path)
            _sync(path)
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({"version": FORMAT_VERSION, "files": files, "tensors": listed}, indent=1))
    _sync(manifest)
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        _sync(path)


def _manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its file names checked never to leave the directory. DamagedError."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
        if manifest["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {manifest['version']}, this ndtrain reads {FORMAT_VERSION}")
        for name, entry in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise ValueError(f"file name {name!r}")
            if type(entry["size"]) is not int or not isinstance(entry.get("blake2b", ""), str):
                raise ValueError(f"entry of {name}")
    except FileNotFoundError as error:
        raise DamagedError(f"{directory}: manifest.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory}: manifest.json is damaged ({type(error).__name__}: {error})") from error
    return manifest


def check(directory: Path) -> None:
    """Raises DamagedError, naming the file, unless every file of the manifest is there and whole.

    Tensor files by size (and by header when read), all others by hash.
    """
    files = _manifest(directory)["files"]
    for name in {"train_state.json": None, **files}:
        path = directory / name
        if name not in files or not path.is_file() or path.is_symlink():
            raise DamagedError(f"{directory}: {name} is missing")
        size, wanted = path.stat().st_size, files[name]["size"]
        if size != wanted:
            raise DamagedError(f"{directory}: {name} has {size:,} of {wanted:,} bytes")
        if "blake2b" in files[name] and _digest(path) != files[name]["blake2b"]:
            raise DamagedError(f"{directory}: {name} was altered")


def read_state(directory: Path) -> dict[str, Any]:
    """train_state.json. DamagedError."""
    try:
        state = json.loads((directory / "train_state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{directory}: train_state.json cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{directory}: train_state.json holds no object")
    return state


class CheckpointStore:
    """The checkpoints of one run, on a file system that all ranks share."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, it has to be at least 1")
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _steps(self) -> list[tuple[int, Path]]:
        found = [(_STEP.fullmatch(p.name), p) for p in self.root.iterdir()] if self.root.is_dir() else []
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def _clean(self) -> None:
        """Removes what a crash left; rank 0. A replaced checkpoint whose successor never came is put back."""
        for path in self.root.glob(".old-step-*") if self.root.is_dir() else ():
            with contextlib.suppress(OSError, DamagedError):
                final = self.root / path.name.removeprefix(".old-")
                if not final.exists():
                    check(path)
                    path.rename(final)
        for pattern in (".tmp-step-*", ".old-step-*", ".del-step-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optim: Mapping[str, Tensor],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes the checkpoint beside, then renames it: the final name is complete or absent; collective.

        `state` is JSON; `extra_files(directory)` runs on rank 0 alone. Then all but the `keep` newest up to
        this step are removed; later ones, which a resume has gone back behind, stay. Where any rank fails,
        all raise NdtrainError with its message, nothing is left of this checkpoint, and the older ones stay.
        """
        final = self.path(step)
        work = self.root / f".tmp-{final.name}"
        groups = {"model": model, "optim": optim}

        def prepare() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            for part in groups:
                (work / part).mkdir(parents=True)

        def publish() -> None:
            (work / "train_state.json").write_text(json.dumps(state, indent=1))
            if extra_files is not None:
                extra_files(work)
            _write_manifest(work, groups)
            if final.exists():
                # os.rename cannot replace a directory; aside, the old one can be put back after a crash
                final.rename(self.root / f".old-{final.name}")
            work.rename(final)
            _sync(self.root)

        try:
            _on_rank_0(prepare)
            for part, group in groups.items():
                save_tensors(work / part, group)
            _on_rank_0(publish)
        except BaseException:
            # every rank is here, or was interrupted by its user: _together has made them agree
            if _rank() == 0:
                shutil.rmtree(work, ignore_errors=True)
                self._clean()
            raise
        if _rank() == 0:
            with contextlib.suppress(OSError):  # the checkpoint is there: room not freed is no reason to fail
                for old in [path for number, path in self._steps() if number <= step][: -self.keep]:
                    # renamed first, so that a half removed one is never taken for a checkpoint
                    old.rename(self.root / f".del-{old.name}")
                self._clean()
        return final

    def newest_step(self) -> int | None:
        """Number of the newest published step, whole or not; None where there is none."""
        steps = self._steps()
        return steps[-1][0] if steps else None

    def newest_valid(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest whole checkpoint, and (path, reason) of newer ones that are not; for rank 0."""
        refused: list[tuple[Path, str]] = []
        for _, path in reversed(self._steps()):
            try:
                check(path)
            except DamagedError as error:
                refused.append((path, str(error)))
            else:
                return path, refused
        return None, refused

    def find(self, resume: str | Path) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and messages for the user; collective, rank 0 decides.

        `resume` is "never", "auto" (the newest whole one; none where there are no checkpoints) or a
        checkpoint's path. DamagedError on all ranks where the named one, or every one, is damaged.
        """
        answer: dict[str, Any] = {"path": None, "messages": []}

        def decide() -> None:
            if str(resume) == "never":
                return
            self._clean()
            if str(resume) != "auto":
                path = Path(resume)
                if not path.is_dir():
                    raise DamagedError(f"{path}: there is no such checkpoint")
                check(path)
                answer["path"] = str(path)
                return
            newest, refused = self.newest_valid()
            if newest is None and refused:
                raise DamagedError(f"no checkpoint is whole: {refused[0][1]}")
            answer["path"] = None if newest is None else str(newest)
            answer["messages"] = [f"{reason}; going back to {newest}" for _, reason in refused]

        _on_rank_0(decide)
        answer = _broadcast_json(answer)
        return (Path(answer["path"]) if answer["path"] else None), answer["messages"]


# The optimizer's tensors


def _trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its group) of every trainable parameter, tied ones once. NdtrainError if one has no
    group."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in named:
        if id(p) not in groups:
            raise NdtrainError(f"{name} is trainable, but the optimizer does not have it")
    return [(name, p, groups[id(p)]) for name, p in named]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments as {"exp_avg.<name>": …, "exp_avg_sq.<name>": …}, sharded as the parameters.

    State that is missing (a fresh optimizer, a parameter never used) is created as AdamW would: zeros, step
    0.
    """
    tensors: dict[str, Tensor] = {}
    for name, p, group in _trainable(model, optimizer):
        state = optimizer.state[p]
        if "step" not in state:
            on_device = group.get("fused") or group.get("capturable")
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=p.device if on_device else "cpu")
        for kind in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group.get("amsgrad") else ())):
            if kind not in state:
                state[kind] = torch.zeros_like(p, memory_format=torch.preserve_format)
            tensors[f"{kind}.{name}"] = state[kind]
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, *, step: int) -> None:
    """Loads AdamW's moments from a tensor directory and sets every parameter's step; collective.

    Gradients need not be there, and do no harm. DamagedError as load_tensors.
    """
    load_tensors(directory, optimizer_tensors(model, optimizer))
    for name, p, _ in _trainable(model, optimizer):
        state = optimizer.state.get(p, {})
        if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise NdtrainError(f"{name} has no optimizer state after loading")
        state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)
