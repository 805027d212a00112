"""Which parts of a global tensor a rank holds: arithmetic on shapes and placements, without communication."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard

from ndtrain.errors import NdtrainError
from ndtrain.torch_compat import StridedShard

Ints = tuple[int, ...]


class Box(NamedTuple):
    """A contiguous box of a global tensor, and where it lies in this rank's local tensor."""

    offsets: Ints
    sizes: Ints
    local_offsets: Ints

    @property
    def inside(self) -> tuple[slice, ...]:
        """Its index in the global tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    @property
    def local(self) -> tuple[slice, ...]:
        """Its index in the local tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.local_offsets, self.sizes, strict=True))


def fsdp_over(placement: Placement, tp: int) -> Placement:
    """Placement that FSDP2 gives dim 0 of a parameter that tensor parallelism has already placed."""
    if isinstance(placement, Shard) and placement.dim == 0:
        return StridedShard(0, split_factor=tp)
    return Shard(0)


def chunk(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and end of part `index` as `torch.chunk` cuts `total` elements; the last parts may be short or empty."""
    size = -(-total // parts)
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

    `StridedShard(split_factor=s)` means one of two things. FSDP over TP: cut plainly, but after mesh
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

    The local tensor is exactly these boxes, box b at its local offsets. No boxes where the local part is empty. Right
    for what `fully_shard` over TP makes, uneven and packed too. Raises `NdtrainError` on a Partial placement.
    """
    per_dim = []
    for intervals in _held_intervals(shape, mesh_shape, coordinate, placements):
        placed, position = [], 0
        for a, b in intervals:
            if a < b:
                placed.append((a, b - a, position))
            position += b - a
        per_dim.append(placed)
    return [
        Box(tuple(i[0] for i in item), tuple(i[1] for i in item), tuple(i[2] for i in item))
        for item in product(*per_dim)
    ]


def local_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Ints:
    """Shape of the local tensor that `local_boxes` fill."""
    held = _held_intervals(shape, mesh_shape, coordinate, placements)
    return tuple(sum(b - a for a, b in intervals) for intervals in held)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, detached and sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def held_boxes(tensor: Tensor) -> list[Box]:
    """The boxes of `tensor` that its local part consists of; none on a rank outside its mesh."""
    if not isinstance(tensor, DTensor):
        return local_boxes(tensor.shape, (), (), ())
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    return local_boxes(tensor.shape, tuple(tensor.device_mesh.shape), coordinate, tensor.placements)


def _held_intervals(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[list[tuple[int, int]]]:
    """For every tensor dimension the intervals [a, b) that the rank at `coordinate` holds, in order."""
    splits: dict[int, dict[int, int | None]] = defaultdict(dict)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            raise NdtrainError(f"a tensor with placements {tuple(placements)} is not reduced yet")
        if not placement.is_replicate():
            splits[placement.dim % len(shape)][mesh_dim] = getattr(placement, "split_factor", None)
    return [held_of_dim(size, mesh_shape, coordinate, splits[dim]) for dim, size in enumerate(shape)]


def held_of_dim(
    size: int, mesh_shape: Sequence[int], coordinate: Sequence[int], splits: Mapping[int, int | None]
) -> list[tuple[int, int]]:
    """The intervals [a, b) of a tensor dimension of `size` that the rank at `coordinate` holds, in order.

    `splits` has the mesh dimensions that cut it, with the split factor of a strided shard.
    """
    held = [(0, size)]
    for mesh_dim, factor in _split_order(mesh_shape, splits):
        length, parts = sum(b - a for a, b in held), []
        for block in range(factor):
            start, end = chunk(length, factor, block)
            low, high = chunk(end - start, mesh_shape[mesh_dim], coordinate[mesh_dim])
            parts += _cut(held, start + low, start + high)
        held = []
        for a, b in parts:
            if held and held[-1][1] == a:
                held[-1] = (held[-1][0], b)
            else:
                held.append((a, b))
    return held
