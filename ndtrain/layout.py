"""Which part of a global tensor a rank holds: arithmetic on shapes and placements, no process group."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and length of part `index` when `torch.chunk` cuts `size` elements: equal parts, a short or empty tail."""
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(step, size - start)


def fsdp_over(placement: Placement, tp: int) -> Placement:
    """Placement that FSDP2 gives dim 0 of a parameter that tensor parallelism has already placed."""
    if isinstance(placement, Shard) and placement.dim == 0:
        return _StridedShard(0, split_factor=tp)
    return Shard(0)


def local_box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global offsets and sizes of the one box that a rank holds.

    Axes are cut innermost first (tp, then fsdp), as FSDP2 shards what tensor parallelism left on the rank. Raises
    `ValueError` for a placement that is not one contiguous box.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    inner = 1
    for parts, index, placement in reversed(list(zip(mesh_shape, coordinate, placements, strict=True))):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise ValueError(f"{placement} is not a sharding")
        if isinstance(placement, _StridedShard) and placement.split_factor != inner:
            raise ValueError(f"{placement} inside {inner} outer parts is not one contiguous box")
        start, length = chunk(sizes[placement.dim], parts, index)
        offsets[placement.dim] += start
        sizes[placement.dim] = length
        inner *= parts
    return tuple(offsets), tuple(sizes)
