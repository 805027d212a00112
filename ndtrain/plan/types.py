"""The data of a plan: `Plan`, its parameters and its FSDP units."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch.distributed.tensor.placement_types import Placement, Replicate

from ndtrain.layout import Box, local_boxes, local_shape
from ndtrain.mesh import MeshSizes
from ndtrain.plan.sequence import Region, SequencePlan

# A plan explains its imbalance if the fullest rank holds more than this many times the mean.
EVEN = 1.15


@dataclass(frozen=True)
class Unit:
    """Modules that FSDP gathers together. Dtypes are torch's names."""

    name: str
    modules: tuple[str, ...]
    reshard: bool
    param_dtype: str = "float32"  # of the gathered weights and the computation
    reduce_dtype: str = "float32"
    in_float32: tuple[str, ...] = ()  # FQNs of the parameters that stay so whatever `param_dtype` is
    cast_inputs: bool = False
    output_dtype: str | None = None  # outputs are cast to it, if the unit around computes in another dtype
    cpu_offload: bool = False
    experts: bool = False  # sharded over efsdp instead of fsdp


@dataclass(frozen=True)
class ParamPlan:
    """One parameter: its global shape, how each mesh axis places it, and the FSDP unit that gathers it."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    style: str
    unit: str
    axes: tuple[str, ...]
    placements: tuple[Placement, ...]

    def local_shape(self, sizes: MeshSizes, rank: int) -> tuple[int, ...]:
        """Return the shape of the part that `rank` holds."""
        return local_shape(self.shape, *self._layout(sizes, rank))

    def boxes(self, sizes: MeshSizes, rank: int) -> list[Box]:
        """Return the boxes of the global tensor that `rank` holds."""
        return local_boxes(self.shape, *self._layout(sizes, rank))

    def _layout(self, sizes: MeshSizes, rank: int) -> tuple[list[int], list[int], tuple[Placement, ...]]:
        """Return the sizes of the parameter's axes, the rank's coordinate on them, and the placements."""
        coordinate = sizes.coordinate(rank)
        return [getattr(sizes, a) for a in self.axes], [coordinate[a] for a in self.axes], self.placements

    def local_numel(self, sizes: MeshSizes, rank: int) -> int:
        return math.prod(self.local_shape(sizes, rank))

    def copies(self, sizes: MeshSizes) -> int:
        """Return how many copies of this parameter all ranks together hold."""
        cuts = (
            getattr(sizes, a) for a, p in zip(self.axes, self.placements, strict=True) if not isinstance(p, Replicate)
        )
        return sizes.world_size // math.prod(cuts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def excess(self, sizes: MeshSizes) -> float:
        """Return the number of elements that rank 0 holds above the mean of all ranks."""
        return self.local_numel(sizes, 0) - self.numel * self.copies(sizes) / sizes.world_size

    def uneven_dims(self, sizes: MeshSizes) -> dict[int, int]:
        """Return {tensor dim: ranks that it is cut over} of the dims of which rank 0 holds more than the mean."""
        over: dict[int, int] = defaultdict(lambda: 1)
        for axis, placement in zip(self.axes, self.placements, strict=True):
            if not isinstance(placement, Replicate):
                over[placement.dim] *= getattr(sizes, axis)  # type: ignore[attr-defined]
        held = self.local_shape(sizes, 0)
        return {dim: ranks for dim, ranks in sorted(over.items()) if held[dim] * ranks > self.shape[dim]}


@dataclass(frozen=True)
class Uneven:
    """Equal parameters of repeated layers, of which rank 0 holds more than the mean of all ranks."""

    fqns: tuple[str, ...]
    shape: tuple[int, ...]
    dims: dict[int, int]  # tensor dim -> ranks that it is cut over
    excess: float  # elements above the mean, summed over `fqns`


@dataclass(frozen=True)
class Recomputation:
    """Which activations the backward pass computes again: those of one block in `every`.

    "full": all of a block; "selective": all but the results of matrix products and attention; "offload": all of a
    block, whose input waits in host memory.
    """

    kind: Literal["full", "selective", "offload"]
    every: int = 1


@dataclass(frozen=True)
class Plan:
    """Everything that `parallelize` does to a model, as data."""

    model_type: str
    sizes: MeshSizes
    params: tuple[ParamPlan, ...]
    units: tuple[Unit, ...]  # in the order in which FSDP wraps them
    root: Unit  # the parameters of no other unit; wrapped last
    blocks: tuple[str, ...]
    tied: dict[str, str]
    tp_rules: dict[str, str]
    ep_rules: dict[str, str]
    tp_summed: tuple[str, ...]
    tp_shared: tuple[Region, ...]  # modules whose cut layers share an input, whose gradient is summed once for all
    sequence: SequencePlan | None
    cp: str | None  # "ulysses" or "ring" if cp > 1
    groups: dict[str, int]  # FQN of a parameter -> its group among `[[optim.groups]]`, where it has one
    frozen: tuple[str, ...]  # FQNs of the parameters that the recipe freezes
    matrices: frozenset[
        str
    ]  # FQNs of the parameters that an optimizer for matrices updates, where the recipe names one
    recomputation: Recomputation | None
    routes: bool  # whether blocks choose among experts
    drops_by_rank: bool  # whether each tp rank draws its own numbers for attention dropout
    head: str | None
    notes: tuple[str, ...]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    @cached_property
    def on_host(self) -> frozenset[str]:
        """The FQNs of the parameters whose shards, gradients and optimizer state are in host memory."""
        offloaded = {unit.name for unit in (*self.units, self.root) if unit.cpu_offload}
        return frozenset(p.fqn for p in self.params if p.unit in offloaded)

    @property
    def low_precision(self) -> bool:
        """Whether any part of the model computes in less than float32."""
        return any(unit.param_dtype != "float32" for unit in (*self.units, self.root))

    def rank_numel(self, rank: int) -> int:
        return sum(p.local_numel(self.sizes, rank) for p in self.params)

    @property
    def mean_numel(self) -> float:
        """The number of elements that a rank holds on average."""
        return sum(p.numel * p.copies(self.sizes) for p in self.params) / self.sizes.world_size

    @property
    def imbalance(self) -> float:
        """The ratio of the elements of the fullest rank to the mean of all ranks.

        Rank 0 is always the fullest, since every cut makes its first part the largest.
        """
        return self.rank_numel(0) / self.mean_numel

    def uneven(self) -> tuple[Uneven, ...]:
        """Return the fewest groups of parameters that explain an `imbalance` above `EVEN`, worst first.

        Without their excess the fullest rank would hold at most `EVEN` times the mean. Empty if the plan is even.
        """
        alike: dict[tuple[object, ...], list[ParamPlan]] = defaultdict(list)
        for param in self.params:
            alike[re.sub(r"\.\d+(?=\.)", ".*", param.fqn), param.shape, param.placements].append(param)
        found = [
            Uneven(
                fqns=tuple(p.fqn for p in params),
                shape=params[0].shape,
                dims=params[0].uneven_dims(self.sizes),
                excess=len(params) * params[0].excess(self.sizes),
            )
            for params in alike.values()
        ]
        left, named = self.rank_numel(0) - EVEN * self.mean_numel, []
        for group in sorted(found, key=lambda g: -g.excess):
            if left <= 0:
                break
            named.append(group)
            left -= group.excess
        return tuple(named)

    @property
    def tp_coverage(self) -> float:
        """The share of the elements that tensor parallelism cuts."""
        return sum(p.numel for p in self.params if "tp" in p.axes and not _replicated(p)) / max(1, self.numel)


def _replicated(param: ParamPlan) -> bool:
    return isinstance(param.placements[param.axes.index("tp")], Replicate)
