"""Mesh arithmetic for any world size, errors that suggest meshes that fit, and device meshes that agree with it."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from ndtrain.errors import RecipeError
from ndtrain.mesh import AXES, MeshSizes
from tests.ranks import get_pool

REFUSALS: list[tuple[int, dict[str, int], list[str]]] = [
    (8, {"tp": 0}, ["mesh.tp = 0 must be at least 1"]),
    (8, {"cp": -1}, ["mesh.cp = -1 must be at least 1"]),
    (8, {"ep": 0}, ["mesh.ep = 0 must be at least 1"]),
    (8, {"dp_replicate": -2}, ["mesh.dp_replicate = -2 must be at least 1"]),
    (8, {"dp_shard": 0}, ["mesh.dp_shard = 0 must be -1 or at least 1"]),
    (8, {"dp_shard": -2}, ["mesh.dp_shard = -2 must be -1 or at least 1"]),
    (8, {"tp": 3}, ["dp_replicate 1 x cp 1 x tp 3 = 3 does not divide the 8 ranks", "(6 or 9)", "--set mesh.tp=2"]),
    (1, {"tp": 2}, ["tp 2 = 2 does not divide the 1 rank;", "multiple of 2 ranks (2)", "--set mesh.tp=1"]),
    (12, {"dp_replicate": 2, "cp": 2, "tp": 2}, ["= 8 does not divide the 12 ranks", "(8 or 16)"]),
    (
        8,
        {"dp_shard": 2, "tp": 2},
        ["cp 1 x tp 2 has 4 ranks, but the world size is 8; use 4 ranks", "or --set mesh.dp_shard=4"],
    ),
    (1, {"dp_shard": 4}, ["has 4 ranks, but the world size is 1; use 4 ranks, or --set mesh.dp_shard=1"]),
    (
        4,
        {"dp_replicate": 2, "dp_shard": 4, "tp": 2},
        ["has 16 ranks, but the world size is 4", "--set mesh.dp_shard=1 or"],
    ),
    (8, {"tp": 2, "ep": 3}, ["mesh.ep = 3 must be a multiple of tp = 2", "= 8; ep may be 1, 2, 4 or 8"]),
    (8, {"ep": 16}, ["mesh.ep = 16", "divide dp_shard x cp x tp = 8; ep may be 1, 2, 4 or 8"]),
    (8, {"tp": 4, "ep": 2}, ["multiple of tp = 4", "ep may be 1, 4 or 8"]),
    (16, {"dp_replicate": 4, "ep": 8}, ["divide dp_shard x cp x tp = 4; ep may be 1, 2 or 4"]),
    (1, {"ep": 2}, ["dp_shard x cp x tp = 1; ep may be 1"]),
]
MESHES = [MeshSizes(*sizes) for sizes in product((1, 2, 3), (1, 2, 4), (1, 2), (1, 2, 4))]


@pytest.mark.parametrize(("world", "given", "words"), REFUSALS)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(
    world: int, given: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        MeshSizes.resolve(world, **given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("world", "given", "dp_shard"),
    [
        (1, {}, 1),
        (8, {}, 8),
        (8, {"tp": 2}, 4),
        (8, {"dp_replicate": 2, "cp": 2, "tp": 2}, 1),
        (1024, {"dp_replicate": 4, "tp": 8}, 32),
        (6, {"tp": 3}, 2),
        (8, {"dp_shard": 4, "tp": 2}, 4),
    ],
)
def test_dp_shard_takes_the_ranks_that_are_left(world: int, given: dict[str, int], dp_shard: int) -> None:
    sizes = MeshSizes.resolve(world, **given)
    assert (sizes.dp_shard, sizes.world_size) == (dp_shard, world)
    assert all(getattr(sizes, axis) == given.get(axis, 1) for axis in ("dp_replicate", "cp", "tp"))


def test_every_mesh_that_the_message_suggests_fits_the_ranks() -> None:
    seen = 0
    for world, (replicate, shard, cp, tp) in product(
        (1, 2, 6, 8, 12, 24, 64), product((1, 2, 3), (-1, 2, 8), (1, 2), (1, 2, 4, 5))
    ):
        given = {"dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp}
        try:
            MeshSizes.resolve(world, **given)
        except RecipeError as error:
            message = str(error)
        else:
            continue
        numbers, *suggestions = re.split(r", or | or (?=--set)", message.split("; use ")[1])
        assert suggestions, message
        for text in suggestions:
            assert re.fullmatch(r"(--set mesh\.\w+=\d+ ?)+", text), message
            # The message leaves out what stays as it was given.
            mesh = given | {axis: int(n) for axis, n in re.findall(r"mesh\.(\w+)=(\d+)", text)}
            assert MeshSizes.resolve(world, **mesh).world_size == world, (message, text)
        starts = [int(n) for n in re.findall(r"\d+", numbers)]
        if "multiple of" in message:
            starts = starts[1:]
        for ranks in starts:
            assert MeshSizes.resolve(ranks, **given).world_size == ranks, message
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: s.describe())
def test_every_rank_has_its_own_coordinate_with_tp_innermost(sizes: MeshSizes) -> None:
    coordinates = [sizes.coordinate(rank) for rank in range(sizes.world_size)]
    order = [tuple(c[axis] for axis in AXES) for c in coordinates]
    assert order == list(product(*(range(getattr(sizes, axis)) for axis in AXES)))
    assert {c["fsdp"] for c in coordinates} == set(range(sizes.fsdp))
    assert {c["batch"] for c in coordinates} == set(range(sizes.batch))
    # The views tell the ranks apart as well: (dp_replicate, fsdp, tp) and (batch, cp, tp) are the same ranks.
    assert len({(c["dp_replicate"], c["fsdp"], c["tp"]) for c in coordinates}) == sizes.world_size
    assert len({(c["batch"], c["cp"], c["tp"]) for c in coordinates}) == sizes.world_size


@pytest.mark.parametrize(
    ("world", "given", "efsdp"),
    [
        (8, {"ep": 8}, 1),
        (8, {"ep": 2}, 4),
        (8, {"tp": 2, "ep": 4}, 2),
        (8, {"dp_replicate": 2, "ep": 2}, 2),
        (8, {"cp": 2, "tp": 2, "ep": 8}, 1),
        (1024, {"tp": 8, "ep": 64}, 16),
        (8, {"tp": 2}, 8),
    ],
)
def test_experts_are_sharded_over_the_ranks_that_ep_leaves(world: int, given: dict[str, int], efsdp: int) -> None:
    sizes = MeshSizes.resolve(world, **given)
    assert sizes.efsdp == efsdp
    assert sizes.dp_replicate * sizes.efsdp * sizes.ep == world


@pytest.mark.parametrize("world", [1, 4, 8, 12, 64])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_exactly_the_allowed_ep_sizes_are_accepted(world: int, tp: int) -> None:
    if world % tp:
        return
    for ep in range(1, world + 2):
        allowed = ep == 1 or (ep % tp == 0 and world % ep == 0)
        if allowed:
            assert MeshSizes.resolve(world, tp=tp, ep=ep).ep == ep
        else:
            with pytest.raises(RecipeError, match=rf"mesh\.ep = {ep} "):
                MeshSizes.resolve(world, tp=tp, ep=ep)


def test_describe_leaves_out_axes_of_size_1() -> None:
    assert MeshSizes().describe() == "1 rank"
    assert MeshSizes(1, 4, 1, 2).describe() == "dp_shard 4 x tp 2"
    assert re.fullmatch(
        r"dp_replicate 2 x dp_shard 4 x cp 2 x tp 2 (x )?\(ep 4 inside\)", MeshSizes(2, 4, 2, 2, 4).describe()
    )


BUILT = {
    "dp_shard4": MeshSizes(1, 4),
    "dp_shard2-tp2": MeshSizes(1, 2, 1, 2),
    "dp_replicate2-dp_shard2": MeshSizes(2, 2),
    "dp_replicate2-tp2": MeshSizes(2, 1, 1, 2),
    "dp_shard2-cp2": MeshSizes(1, 2, 2, 1),
    "dp_shard4-ep2": MeshSizes(1, 4, 1, 1, 2),
    "dp_shard2-tp2-ep4": MeshSizes(1, 2, 1, 2, 4),
    "dp_replicate2-dp_shard2-ep2": MeshSizes(2, 2, 1, 1, 2),
}


def _groups_of_this_rank(sizes: dict[str, MeshSizes]) -> dict[str, dict[str, Any]]:
    import torch.distributed as dist

    from ndtrain.mesh import build_mesh

    found = {}
    for name, mesh_sizes in sizes.items():
        meshes = build_mesh(mesh_sizes, "cpu")
        ranks = {
            "fsdp": dist.get_process_group_ranks(meshes.train["fsdp"].get_group()),
            "tp": dist.get_process_group_ranks(meshes.tp.get_group()),
            "dp_replicate": dist.get_process_group_ranks(meshes.train["dp_replicate"].get_group()),
            "dp_shard": dist.get_process_group_ranks(meshes.dense["dp_shard"].get_group()),
            "cp": dist.get_process_group_ranks(meshes.dense["cp"].get_group()),
            "loss": dist.get_process_group_ranks(meshes.loss.get_group()),
        }
        if meshes.expert is not None:
            for axis in ("efsdp", "ep"):
                ranks[axis] = dist.get_process_group_ranks(meshes.expert[axis].get_group())
        handed = {
            "ndim": meshes.fsdp.ndim,
            "names": meshes.fsdp.mesh_dim_names,
            "expert": meshes.expert is not None,
        }
        found[name] = {"ranks": ranks, "fsdp": handed}
    return found


def test_device_mesh_groups_agree_with_coordinate() -> None:
    every = get_pool(4).run(_groups_of_this_rank, BUILT)
    for name, sizes in BUILT.items():
        coordinates = [sizes.coordinate(rank) for rank in range(4)]
        for rank, found in enumerate(every):
            ranks, handed = found[name]["ranks"], found[name]["fsdp"]

            def together(*fixed: str, of: Any = coordinates, rank: int = rank) -> list[int]:
                return [r for r in range(4) if all(of[r][a] == of[rank][a] for a in fixed)]

            assert ranks["fsdp"] == together("dp_replicate", "tp"), name
            assert ranks["tp"] == together("dp_replicate", "fsdp"), name
            assert ranks["dp_replicate"] == together("fsdp", "tp"), name
            assert ranks["dp_shard"] == together("dp_replicate", "cp", "tp"), name
            assert ranks["cp"] == together("batch", "tp"), name
            assert ranks["loss"] == together("tp"), name
            two_axes = sizes.dp_replicate > 1
            assert handed["names"] == (("dp_replicate", "fsdp") if two_axes else ("fsdp",)), name
            assert handed["expert"] == (sizes.ep > 1), name
            if sizes.ep > 1:
                first = rank // sizes.ep * sizes.ep
                assert ranks["ep"] == list(range(first, first + sizes.ep)), name
                region = sizes.dp_shard * sizes.cp * sizes.tp
                assert ranks["efsdp"] == [
                    r for r in range(4) if r % sizes.ep == rank % sizes.ep and r // region == rank // region
                ], name


def test_a_group_is_the_ranks_with_the_same_coordinate_on_every_other_axis() -> None:
    sizes = MeshSizes.resolve(48, dp_replicate=2, dp_shard=3, cp=2, tp=4, ep=8)
    fixed = {
        "dp_replicate": ("fsdp", "tp"),
        "dp_shard": ("dp_replicate", "cp", "tp"),
        "cp": ("dp_replicate", "dp_shard", "tp"),
        "tp": ("dp_replicate", "fsdp"),
        "fsdp": ("dp_replicate", "tp"),
        "efsdp": ("dp_replicate", "ep"),
        "ep": ("dp_replicate", "efsdp"),
        "loss": ("tp",),
        "batch": ("cp", "tp"),
        "world": (),
    }
    for axis, others in fixed.items():
        for rank in range(48):
            own = sizes.coordinate(rank)
            want = [r for r in range(48) if all(sizes.coordinate(r)[a] == own[a] for a in others)]
            assert list(sizes.group(axis, rank)) == want, (axis, rank)
    assert sizes.axes == ("dp_replicate", "fsdp", "cp", "tp", "efsdp", "ep")
    assert MeshSizes(dp_shard=4).axes == ("fsdp",)


def test_spread_counts_the_nodes_of_a_group() -> None:
    sizes = MeshSizes(dp_shard=8, tp=4)
    assert sizes.spread("tp", 5, 8) == (4, 1)
    assert sizes.spread("fsdp", 5, 8) == (2, 4)
    assert sizes.spread("fsdp", 5, 4) == (1, 8)
    assert sizes.spread("tp", 5, 2) == (2, 2)
    assert sizes.spreads("fsdp", 8) == [(2, 4)]
    # Ranks 0-3, 4-7 and 8-11 on nodes of 8 ranks.
    uneven = MeshSizes(dp_shard=3, tp=4)
    assert uneven.spread("fsdp", 8, 8) == (2, 2) and uneven.spreads("fsdp", 8) == [(2, 2)]
    assert MeshSizes(dp_shard=3, tp=2).spreads("tp", 3) == [(1, 2), (2, 1)]
