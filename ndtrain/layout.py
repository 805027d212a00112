"""Compute which parts of a global tensor a rank holds, from shapes and placements, without communication."""

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
    """A box of a global tensor, and its offsets in the rank's local tensor."""

    offsets: Ints
    sizes: Ints
    local_offsets: Ints

    @property
    def inside(self) -> tuple[slice, ...]:
        """The slices of the global tensor that are this box."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    @property
    def local(self) -> tuple[slice, ...]:
        """The slices of the local tensor that are this box."""
        return tuple(slice(o, o + n) for o, n in zip(self.local_offsets, self.sizes, strict=True))


def fsdp_over(placement: Placement, tp: int) -> Placement:
    """Return the placement that FSDP2 gives a parameter whose tp placement is `placement`, over `tp` ranks."""
    if isinstance(placement, Shard) and placement.dim == 0:
        return StridedShard(0, split_factor=tp)
    return Shard(0)


def chunk(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return start and end of `part` as `torch.chunk` cuts `total` elements; the last parts may be short or empty."""
    size = -(-total // parts)
    start = min(total, size * part)
    return start, min(total, start + size)


def _cut(intervals: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return elements start..end of the concatenation of the intervals [a, b), as intervals."""
    out, offset = [], 0
    for a, b in intervals:
        low, high = max(start, offset), min(end, offset + b - a)
        if low < high:
            out.append((a + low - offset, a + high - offset))
        offset += b - a
    return out


def _split_order(mesh_shape: Sequence[int], splits: Mapping[int, int | None]) -> list[tuple[int, int]]:
    """Return the order in which mesh axes cut one tensor dim, as [(axis number, parts to interleave)].

    `StridedShard(split_factor=s)` means one of two things. FSDP over TP: a plain cut, made after the axes on its
    right, which together make s parts. Otherwise: a packed weight of s blocks, each of which is cut. torch reads both
    as the second, from left to right, which is right for FSDP only if sizes are even and the TP shard is plain.
    """
    order: list[tuple[int, int]] = []
    for axis in sorted(splits, reverse=True):
        factor = splits[axis] or 1
        at, before = 0, 1
        while at < len(order) and before < factor:
            before *= mesh_shape[order[at][0]]
            at += 1
        if factor > 1 and before == factor:
            order.insert(at, (axis, 1))
        elif factor == 1:
            # FSDP over a packed weight, in torch versions whose FSDP does not count packed shards
            order.insert(max((i + 1 for i, (_, f) in enumerate(order) if f > 1), default=0), (axis, 1))
        else:
            order.insert(0, (axis, factor))
    return order


def local_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[Box]:
    """Return the boxes of a global tensor of `shape` that the rank at `coordinate` holds, in row-major order.

    Together they fill the local tensor, each at its local offsets; an empty local tensor has none. Handles uneven and
    packed weights under `fully_shard` over TP. Raises `NdtrainError` on a Partial placement.
    """
    per_dim = []
    for intervals in _held_intervals(shape, mesh_shape, coordinate, placements):
        found, offset = [], 0
        for a, b in intervals:
            if a < b:
                found.append((a, b - a, offset))
            offset += b - a
        per_dim.append(found)
    return [
        Box(tuple(i[0] for i in item), tuple(i[1] for i in item), tuple(i[2] for i in item))
        for item in product(*per_dim)
    ]


def local_shape(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Ints:
    """Return the shape of the local tensor of the rank at `coordinate`."""
    held = _held_intervals(shape, mesh_shape, coordinate, placements)
    return tuple(sum(b - a for a, b in intervals) for intervals in held)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's local part of `tensor`, detached and sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def held_boxes(tensor: Tensor) -> list[Box]:
    """Return the boxes that this rank holds of `tensor`; none on a rank outside its mesh."""
    if not isinstance(tensor, DTensor):
        return local_boxes(tensor.shape, (), (), ())
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    return local_boxes(tensor.shape, tuple(tensor.device_mesh.shape), coordinate, tensor.placements)


def _held_intervals(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[list[tuple[int, int]]]:
    """Return for every dim the intervals [a, b) that the rank at `coordinate` holds, in order."""
    splits: dict[int, dict[int, int | None]] = defaultdict(dict)
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise NdtrainError(
                f"a tensor with placements {tuple(placements)} has no boxes; reduce its Partial placement first"
            )
        if not placement.is_replicate():
            splits[placement.dim % len(shape)][axis] = getattr(placement, "split_factor", None)
    return [held_of_dim(size, mesh_shape, coordinate, splits[dim]) for dim, size in enumerate(shape)]


def held_of_dim(
    size: int, mesh_shape: Sequence[int], coordinate: Sequence[int], splits: Mapping[int, int | None]
) -> list[tuple[int, int]]:
    """Return the intervals [a, b) of a dim of `size` that the rank at `coordinate` holds, in order.

    `splits` maps the number of each mesh axis that cuts the dim to the split factor of its strided shard, or None.
    """
    held = [(0, size)]
    for axis, factor in _split_order(mesh_shape, splits):
        length, parts = sum(b - a for a, b in held), []
        for block in range(factor):
            start, end = chunk(length, factor, block)
            low, high = chunk(end - start, mesh_shape[axis], coordinate[axis])
            parts += _cut(held, start + low, start + high)
        held = []
        for a, b in parts:
            if held and held[-1][1] == a:
                held[-1] = (held[-1][0], b)
            else:
                held.append((a, b))
    return held
