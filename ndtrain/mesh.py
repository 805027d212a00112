"""The N-D mesh: `MeshSizes` is pure arithmetic; `build_mesh` makes torch's device meshes over the same ranks.

World size = dp_replicate x dp_shard x cp x tp, outermost to innermost; ep divides the dp_shard x cp x tp ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ndtrain.errors import RecipeError, counted

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of every mesh axis, all positive; the product of the first four is the world size."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def resolve(
        cls,
        world_size: int,
        *,
        dp_replicate: int = 1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
    ) -> MeshSizes:
        """Fill in `dp_shard = -1` for `world_size` ranks and check every rule.

        Raises `RecipeError` with the numbers and the nearest meshes that would fit.
        """
        given = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp, "ep": ep}
        for axis, size in given.items():
            if size < 1 and not (axis == "dp_shard" and size == -1):
                allowed = "-1 or at least 1" if axis == "dp_shard" else "at least 1"
                raise RecipeError(f"mesh.{axis} = {size} must be {allowed}")
        others = dp_replicate * cp * tp
        if dp_shard == -1:
            if world_size % others:
                raise RecipeError(
                    f"{_product(given, skip='dp_shard')} = {others} does not divide the {counted(world_size, 'rank')}; "
                    f"use a multiple of {others} ranks ({_multiples(others, world_size)}), "
                    f"or {_nearest(given, world_size)}"
                )
            dp_shard = world_size // others
        elif others * dp_shard != world_size:
            raise RecipeError(
                f"the mesh {_product(given)} has {counted(others * dp_shard, 'rank')}, but the world size is "
                f"{world_size}; use {counted(others * dp_shard, 'rank')}, or {_nearest(given, world_size)}"
            )
        sizes = cls(dp_replicate, dp_shard, cp, tp, ep)
        sizes._check_ep()
        return sizes

    def _check_ep(self) -> None:
        if self.ep == 1:
            return
        region = self.dp_shard * self.cp * self.tp
        fitting = [n for n in range(1, region + 1) if region % n == 0 and (n == 1 or n % self.tp == 0)]
        if self.ep not in fitting:
            raise RecipeError(
                f"mesh.ep = {self.ep} must be a multiple of tp = {self.tp} and divide dp_shard x cp x tp = {region}; "
                f"ep may be {either(fitting)}"
            )

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP2 shards dense parameters: dp_shard x cp."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Ranks over which FSDP2 shards each expert: dp_shard x cp x tp / ep."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def batch(self) -> int:
        """Ranks that read different samples: dp_replicate x dp_shard."""
        return self.dp_replicate * self.dp_shard

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the coordinate of `rank` on every axis, outermost first, and on the views fsdp, batch, efsdp, ep."""
        rest, found = rank, {}
        for axis in reversed(AXES):
            rest, found[axis] = divmod(rest, getattr(self, axis))
        found = {axis: found[axis] for axis in AXES}
        found["fsdp"] = found["dp_shard"] * self.cp + found["cp"]
        found["batch"] = found["dp_replicate"] * self.dp_shard + found["dp_shard"]
        found["efsdp"], found["ep"] = divmod(rank % (self.fsdp * self.tp), self.ep)
        return found

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes and views of more than one rank, along which ranks communicate."""
        views = ("dp_replicate", "fsdp", "cp", "tp", *(("efsdp", "ep") if self.ep > 1 else ()))
        return tuple(axis for axis in views if getattr(self, axis) > 1)

    def group(self, axis: str, rank: int) -> range:
        """Return the ranks, `rank` included, that communicate along an axis or a view; "world" is all ranks."""
        if axis == "world":
            return range(self.world_size)
        inner = {
            "tp": 1,
            "cp": self.tp,
            "dp_shard": self.cp * self.tp,
            "fsdp": self.tp,
            "dp_replicate": self.fsdp * self.tp,
            "loss": self.tp,
            "batch": self.cp * self.tp,
            "ep": 1,
            "efsdp": self.ep,
        }
        step = inner[axis]
        ranks = self.dp_replicate * self.fsdp if axis == "loss" else getattr(self, axis)
        first = rank - rank // step % ranks * step
        return range(first, first + ranks * step, step)

    def spread(self, axis: str, rank: int, ranks_per_node: int) -> tuple[int, int]:
        """Return (most ranks on a node, number of nodes) of the group of `rank` along `axis`."""
        nodes = Counter(other // ranks_per_node for other in self.group(axis, rank))
        return max(nodes.values()), len(nodes)

    def spreads(self, axis: str, ranks_per_node: int) -> list[tuple[int, int]]:
        """Return the different `spread`s of the groups along `axis`, those over the most nodes first."""
        firsts = {self.group(axis, rank)[0] for rank in range(self.world_size)}
        found = {self.spread(axis, first, ranks_per_node) for first in firsts}
        return sorted(found, key=lambda spread: (-spread[1], spread[0]))

    def describe(self) -> str:
        """Return the mesh in one line, without axes of size 1."""
        named = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        inside = f" (ep {self.ep} inside)" if self.ep > 1 else ""
        return (" x ".join(named) or "1 rank") + inside


def _product(given: dict[str, int], *, skip: str = "") -> str:
    return " x ".join(f"{axis} {given[axis]}" for axis in AXES if axis != skip)


def _multiples(unit: int, near: int) -> str:
    low = near // unit * unit
    return either([n for n in (low, low + unit) if n > 0])


def either(numbers: list[int]) -> str:
    """Return "1, 2 or 4", for a message."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _nearest(given: dict[str, int], world_size: int) -> str:
    """Suggest up to three meshes for `world_size` ranks: tp as given or less, dp_shard = the ranks that are left."""
    found = []
    for tp in range(given["tp"], 0, -1):
        rest = world_size
        kept: dict[str, int] = {}
        for axis, size in (("tp", tp), ("cp", given["cp"]), ("dp_replicate", given["dp_replicate"])):
            kept[axis] = size if rest % size == 0 else 1
            rest //= kept[axis]
        if kept["tp"] != tp:
            continue
        mesh = {**kept, "dp_shard": rest}
        changed = {axis: n for axis, n in mesh.items() if given[axis] not in (n, -1)}
        text = " ".join(f"--set mesh.{axis}={changed[axis]}" for axis in AXES if axis in changed)
        if text not in found:
            found.append(text)
    return " or ".join(found[:3])


@dataclass(frozen=True)
class Meshes:
    """Device meshes over the same ranks.

    `train` is (dp_replicate, fsdp, tp), the parent mesh of all sharding; `dense` is (dp_replicate, dp_shard, cp, tp);
    `expert` is (dp_replicate, efsdp, ep), None when ep = 1; `loss` is dp_replicate x fsdp flattened.
    """

    sizes: MeshSizes
    train: DeviceMesh
    dense: DeviceMesh
    expert: DeviceMesh | None
    loss: DeviceMesh

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for `fully_shard`: 1-D (fsdp), or 2-D (dp_replicate, fsdp) when there are replicas."""
        return self.train["dp_replicate", "fsdp"] if self.sizes.dp_replicate > 1 else self.train["fsdp"]

    @property
    def efsdp(self) -> DeviceMesh:
        """Mesh for `fully_shard` of experts: (efsdp), or (dp_replicate, efsdp) when there are replicas."""
        assert self.expert is not None
        return self.expert["dp_replicate", "efsdp"] if self.sizes.dp_replicate > 1 else self.expert["efsdp"]

    @property
    def tp(self) -> DeviceMesh:
        return self.train["tp"]


def build_mesh(sizes: MeshSizes, device_type: str) -> Meshes:
    """Make the device meshes for `sizes`; every rank of the default process group calls this."""
    from torch.distributed.device_mesh import init_device_mesh

    from ndtrain.torch_compat import flatten_mesh

    # fsdp is an axis of the train mesh, not a flattened view, because fully_shard requires its mesh and the tp mesh to
    # be slices of one parent.
    train = init_device_mesh(
        device_type, (sizes.dp_replicate, sizes.fsdp, sizes.tp), mesh_dim_names=("dp_replicate", "fsdp", "tp")
    )
    dense = init_device_mesh(device_type, tuple(getattr(sizes, a) for a in AXES), mesh_dim_names=AXES)
    expert = None
    if sizes.ep > 1:
        expert = init_device_mesh(
            device_type,
            (sizes.dp_replicate, sizes.efsdp, sizes.ep),
            mesh_dim_names=("dp_replicate", "efsdp", "ep"),
        )
    loss = flatten_mesh(train["dp_replicate", "fsdp"], "loss")
    return Meshes(sizes=sizes, train=train, dense=dense, expert=expert, loss=loss)
