"""Checkpoints: the layout against torch and FSDP, saving on one mesh and loading on another, damage,
crashes."""

import math
import random
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ndtrain.checkpoint import (
    CheckpointStore,
    check,
    check_together,
    load_tensors,
    read_state,
)
from ndtrain.checkpoint.index import write_index
from ndtrain.checkpoint.manifest import hash_of, write_manifest
from ndtrain.checkpoint.tensors import files_of, pieces_of, write_files
from ndtrain.engine.optimizers import OPTIMIZERS, set_step, state_tensors
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.layout import local_boxes
from ndtrain.runs.messages import together
from ndtrain.storage.pieces import pieces_in, pieces_of_files, plan_held
from ndtrain.storage.stored import checkpoint_tensors
from ndtrain.storage.table import Pieces
from tests.benchmarks.plan_headers import key_of, with_index, write_checkpoint
from tests.ranks import RanksFailed, get_pool
from tests.tiny import forged

R = Replicate()
MESHES = {"dp4": (4, 1), "tp4": (1, 4), "dp2tp2": (2, 2), "hsdp": (2, 2)}


def save_tensors(directory: Path, tensors: dict[str, Any]) -> None:
    """Write every tensor once, each rank its part; collective."""
    together(lambda: write_files(directory, files_of(tensors)))


def strided(dim: int, factor: int) -> Any:
    return _StridedShard(dim, split_factor=factor)


def gather(shape: Any, mesh: Any, coordinate: Any, placements: Any, local: Tensor, out: Tensor) -> int:
    """Copy a local tensor into a global one by its boxes; return the number of values copied."""
    boxes = local_boxes(shape, mesh, coordinate, placements)
    for box in boxes:
        there = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        here = tuple(slice(o, o + s) for o, s in zip(box.local_offsets, box.sizes, strict=True))
        out[there] = local[here]
    return int(sum(torch.Size(box.sizes).numel() for box in boxes))


# Layout


def layouts_as_torch() -> int:
    meshes = {shape: init_device_mesh("cpu", shape) for shape in ((4,), (2, 2), (1, 4), (4, 1), (2, 1, 2))}
    count = 0
    for shape in ((8, 4), (67, 5), (3, 16), (1, 2), (5,), (12, 2, 8)):
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        kinds = [R, *(Shard(d) for d in range(len(shape))), *(strided(d, 2) for d in range(len(shape)))]
        for mesh_shape, mesh in meshes.items():
            for placements in product(kinds, repeat=len(mesh_shape)):
                dims = [p.dim for p in placements if isinstance(p, (Shard, _StridedShard))]
                if len(set(dims)) < len(dims) and any(isinstance(p, _StridedShard) for p in placements):
                    continue  # FSDP over TP: compared with FSDP itself below
                local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
                out = torch.full(shape, -1)
                put = gather(shape, mesh_shape, mesh.get_coordinate(), placements, local, out)
                assert put == local.numel(), (shape, placements)
                assert torch.equal(out[out >= 0], whole[out >= 0]), (shape, placements)
                count += 1
    return count


def test_local_boxes_match_torch_distribute_tensor() -> None:
    assert min(get_pool(4).run(layouts_as_torch)) > 300


class One(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def layouts_as_fsdp() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen = []
    for shape in ((16, 4), (12, 8), (67, 5), (9, 2), (6, 4), (2, 4), (1, 2)):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        for placement in (R, Shard(0), Shard(1), strided(0, 2), strided(1, 2)):
            placed = distribute_tensor(whole, mesh["tp"], (placement,), src_data_rank=None)
            if placement == strided(0, 2) and shape[0] % 4:
                continue  # distribute_tensor pads here
            module = One(placed)
            fully_shard(module, mesh=mesh["dp"])
            weight = module.weight.detach()
            assert isinstance(weight, DTensor)
            out = torch.full(shape, -1.0)
            put = gather(shape, (2, 2), mesh.get_coordinate(), weight.placements, weight.to_local(), out)
            assert put == weight.to_local().numel()
            assert torch.equal(out[out >= 0], whole[out >= 0]), (shape, weight.placements)
            dist.all_reduce(out, op=dist.ReduceOp.MAX)
            assert torch.equal(out, whole), (shape, weight.placements)
            seen.append(str(weight.placements))
    return seen


def test_local_boxes_match_fsdp_over_tp() -> None:
    seen = get_pool(4).run(layouts_as_fsdp)[0]
    assert len(seen) > 25
    assert sum("S" in s for s in seen) == len(seen)


def test_local_boxes_of_packed_and_fsdp() -> None:
    # gate rows 0-7, up rows 8-15; tp 1 holds rows 4-7 and 12-15, and FSDP gives the first half to dp 0
    boxes = [local_boxes((16,), (2, 2), (dp, 1), (strided(0, 2), strided(0, 2))) for dp in (0, 1)]
    assert boxes == [[((4,), (4,), (0,))], [((12,), (4,), (0,))]]
    plain = [local_boxes((16,), (2, 2), (dp, 1), (Shard(0), strided(0, 2))) for dp in (0, 1)]
    assert plain == boxes
    assert local_boxes((16,), (1, 2), (0, 1), (Shard(0), strided(0, 2))) == [
        ((4,), (4,), (0,)),
        ((12,), (4,), (4,)),
    ]
    assert local_boxes((), (2,), (1,), (R,)) == [((), (), ())]
    assert local_boxes((3,), (4,), (3,), (Shard(0),)) == []


# From mesh to mesh


def build(name: str, *, fill: bool) -> dict[str, Tensor]:
    """Return tensors of every kind, FSDP's included, on a mesh; the values depend on the key alone."""
    mesh = init_device_mesh("cpu", MESHES[name], mesh_dim_names=("dp", "tp"))
    hsdp = name == "hsdp"
    dp0, dp1 = (R, R) if hsdp else (Shard(0), Shard(1))
    tensors: dict[str, Tensor] = {}

    def add(key: str, shape: tuple[int, ...], placements: Any, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(len(key) + shape[0] if shape else 1)
        whole = torch.randint(-99, 99, shape, generator=generator).to(dtype)
        if not fill:
            whole = torch.zeros_like(whole)
        tensors[key] = distribute_tensor(whole, mesh, placements, src_data_rank=None)

    add("rows", (16, 6), (dp0, R))
    add("columns", (8, 16), (dp1, R))
    add("both", (8, 12), (dp0, Shard(1)))
    add("uneven", (67, 5), (dp0, R))
    add("uneven.tp", (67, 5), (R, Shard(0)))
    add("packed", (32, 4), (R, strided(0, 2)))
    add("packed.experts", (4, 16, 8), (dp0, strided(1, 2)))
    add("norm", (7,), (R, R))
    add("norm2", (9,), (dp0, R))
    add("few", (2, 3), (dp0, R))
    add("ints", (10, 3), (dp0, R), torch.int64)
    add("bools", (9,), (R, Shard(0)), torch.bool)
    add("half", (12, 4), (dp0, R), torch.bfloat16)
    add("scalar", (), (R, R))
    tensors["plain"] = torch.arange(5.0) if fill else torch.zeros(5)
    for key, shape, placement in (
        ("fsdp", (67, 5), Shard(0)),
        ("fsdp.packed", (32, 3), strided(0, 2)),
        ("fsdp.packed1", (8, 16), strided(1, 2)),
        ("fsdp.empty", (3, 2), Shard(0)),
    ):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        module = One(distribute_tensor(whole if fill else whole * 0, mesh["tp"], (placement,), src_data_rank=None))
        fully_shard(module, mesh=mesh["dp"])
        tensors[key] = module.weight
    return tensors


def local_of(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def locals_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: local_of(t) for k, t in tensors.items()}


def every_mesh_to_every_mesh(root: Path) -> None:
    for name in MESHES:
        save_tensors(root / name, build(name, fill=True))
    for source, target in product(MESHES, MESHES):
        wanted, got = build(target, fill=True), build(target, fill=False)
        load_tensors(root / source, got)
        for key, value in locals_of(got).items():
            assert torch.equal(value, locals_of(wanted)[key]), (source, target, key)


def test_save_on_one_mesh_load_on_another(tmp_path: Path) -> None:
    get_pool(4).run(every_mesh_to_every_mesh, tmp_path)
    for name in MESHES:  # one process reads them all, and so does plain DCP
        whole: dict[str, Tensor] = {}
        from safetensors import safe_open

        written: dict[str, int] = {}
        for file in (tmp_path / name).iterdir():
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    written[key] = written.get(key, 0) + opened.get_tensor(key).numel()
        assert written["norm"] == 7, "a replicated tensor is written once"
        assert written["uneven"] == 67 * 5
        whole = {"uneven": torch.zeros(67, 5), "fsdp.packed": torch.zeros(32, 3), "norm": torch.zeros(7)}
        whole |= {
            "packed": torch.zeros(32, 4),
            "packed.experts": torch.zeros(4, 16, 8),
            "fsdp": torch.zeros(67, 5),
        }
        whole |= {
            "half": torch.zeros(12, 4, dtype=torch.bfloat16),
            "ints": torch.zeros(10, 3, dtype=torch.int64),
        }
        whole |= {"bools": torch.zeros(9, dtype=torch.bool), "plain": torch.zeros(5)}
        ours = {key: torch.zeros_like(value) for key, value in whole.items()}
        load_tensors(tmp_path / name, ours)
        load_plain_dcp(tmp_path / name, whole)
        for key, value in whole.items():
            assert torch.equal(ours[key], value), (name, key)
        assert torch.equal(ours["fsdp"], torch.arange(335.0).reshape(67, 5))
        assert torch.equal(ours["fsdp.packed"], torch.arange(96.0).reshape(32, 3))


def load_plain_dcp(directory: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(action="ignore"):  # torch warns that this process has no group
        load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


def test_two_ranks_and_one(tmp_path: Path) -> None:
    get_pool(2).run(save_two, tmp_path)
    got = {"w": torch.zeros(6, 2)}
    load_tensors(tmp_path, got)
    assert torch.equal(got["w"], torch.arange(12.0).reshape(6, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000-of-00002.1.safetensors",
        "00000-of-00002.safetensors",
        "00001-of-00002.1.safetensors",
        "00001-of-00002.safetensors",
    ]


def save_two(directory: Path) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    mesh = init_device_mesh("cpu", (2,))
    save_tensors(directory, {"w": distribute_tensor(whole, mesh, (strided(0, 2),), src_data_rank=None)})


# Damage


def tensors_of(number: float) -> dict[str, Tensor]:
    value = float(number)
    return {"w": torch.full((64, 8), value), "../evil": torch.full((3,), value), "s": torch.tensor(value)}


def write_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "x"}')


def save_step(run: Path, step: int, keep: int = 2) -> Path:
    store = CheckpointStore(run, keep=keep)
    path = store.save(
        step,
        model=tensors_of(step),
        optim={"exp_avg.w": torch.full((64, 8), step / 2)},
        state={"step": step, "rng": [2**63, None, "x"]},
        extra_files=write_config,
    )
    assert path == store.path(step)
    return path


def test_save_find_read_and_keep(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.find("auto") == (None, [])
    paths = [save_step(tmp_path, step) for step in (1, 2, 3, 3)]
    assert sorted(p.name for p in store.root.iterdir()) == ["step-00000002", "step-00000003"]
    assert store.find("auto") == (paths[-1], [])
    assert store.find("never") == (None, [])
    assert store.find(paths[1]) == (paths[1], [])
    assert read_state(paths[-1]) == {"step": 3, "rng": [2**63, None, "x"]}
    got = {key: value * 0 for key, value in tensors_of(1).items()}
    load_tensors(paths[-1] / "model", got)
    assert all(torch.equal(got[key], value) for key, value in tensors_of(3).items())
    assert not list(tmp_path.rglob("*evil*"))
    save_step(tmp_path, 1, keep=1)  # resumed from an older step: this one is kept although there are later ones
    assert store.path(1).is_dir()


TENSOR_FILE = "model/00000-of-00001.safetensors"


FILES = [
    TENSOR_FILE,
    TENSOR_FILE.replace("model", "optim"),
    "model/pieces.index",
    "optim/pieces.index",
    "train_state.json",
    "config.json",
    "manifest.json",
]


def damages(kind: str, content: bytes) -> Iterator[bytes | None]:
    """Yield damaged forms of `content`; None stands for a missing file."""
    rng = random.Random(1)
    if kind == "delete":
        yield None
    for _ in range(20 if kind == "truncate" else 0):
        yield content[: rng.randrange(len(content))]
    for _ in range(200 if kind == "flip" else 0):
        offset = rng.randrange(len(content))
        flipped = bytes([content[offset] ^ 1 << rng.randrange(8)])
        yield content[:offset] + flipped + content[offset + 1 :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("kind", "verify"), [("delete", False), ("truncate", False), ("flip", True)])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(
    tmp_path: Path, name: str, kind: str, verify: bool
) -> None:
    before, last = save_step(tmp_path, 1), save_step(tmp_path, 2)
    store, content = CheckpointStore(tmp_path, keep=2), (last / name).read_bytes()
    for damaged in damages(kind, content):
        (last / name).unlink()
        if damaged is not None:
            (last / name).write_bytes(damaged)
        found, (message,) = store.find("auto", verify=verify)
        assert found == before
        assert str(last) in message and f"resuming from {before} instead" in message
        # For an altered header the message may name the tensor instead.
        assert kind == "flip" or name in message
        (last / name).write_bytes(content)
    assert store.find("auto", verify=True) == (last, [])


def test_a_flipped_byte_in_a_header_is_found_without_hashes_or_changes_nothing(tmp_path: Path) -> None:
    before, last = save_step(tmp_path, 1), save_step(tmp_path, 2)
    store, content = CheckpointStore(tmp_path, keep=2), (last / TENSOR_FILE).read_bytes()
    length, refused = 8 + int.from_bytes(content[:8], "little"), 0
    for damaged in damages("flip", content[:length]):
        assert damaged is not None
        (last / TENSOR_FILE).write_bytes(damaged + content[length:])
        found, _ = store.find("auto")
        if found == before:
            refused += 1
            continue
        got = {key: torch.full_like(value, math.nan) for key, value in tensors_of(2).items()}
        load_tensors(last / "model", got, all_of_it=True)
        assert all(torch.equal(got[key], value) for key, value in tensors_of(2).items())
    assert refused > 100


def test_a_damaged_checkpoint_given_by_path_is_refused(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / TENSOR_FILE).write_bytes((path / TENSOR_FILE).read_bytes()[:-1] + b"\1")
    store = CheckpointStore(tmp_path, keep=2)
    assert store.find(path) == (path, [])
    with pytest.raises(DamagedError, match=f"{TENSOR_FILE} was altered"):
        store.find(path, verify=True)


def test_resume_is_refused_if_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    (save_step(tmp_path, 1) / "config.json").unlink()
    store = CheckpointStore(tmp_path, keep=2)
    with pytest.raises(DamagedError, match=r"every checkpoint in .* is damaged"):
        store.find("auto")


def test_a_path_that_is_no_checkpoints_is_the_recipes_fault(tmp_path: Path) -> None:
    store, step = CheckpointStore(tmp_path / "run", keep=2), save_step(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    for path, words in {
        "nowhere": "does not exist",
        "run": "is a run's directory",
        "empty": "is no checkpoint",
    }.items():
        with pytest.raises(RecipeError, match=rf'^checkpoint.resume = ".*{path}" {words}.*; give a checkpoint like'):
            store.find(tmp_path / path)
    (step / "manifest.json").unlink()
    with pytest.raises(DamagedError):
        store.find(step)


def test_links_are_not_followed(tmp_path: Path) -> None:
    last = save_step(tmp_path, 2)
    (last / "config.json").rename(tmp_path / "elsewhere")
    (last / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match=r"config\.json is missing"):
        check(last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"]["model"].pop("w"), "holds w, which its manifest does not list"),
        (lambda m: m["tensors"]["model"].update(x={"shape": [2], "dtype": "F32"}), r"x\[0:2\] is in no file"),
        (lambda m: m["tensors"]["model"]["w"].update(shape=[65, 8]), r"w\[64:65, 0:8\] is in no file"),
        (lambda m: m["tensors"]["model"]["w"].update(shape=[8, 64]), r"lists w as F32 of shape \(8, 64\)"),
        (lambda m: m["tensors"]["model"]["w"].update(dtype="BF16"), "lists w as BF16"),
        (lambda m: m["tensors"]["model"]["w"].update(shape=[2**80, 8]), "bad entry of w"),
        (lambda m: m["tensors"].update({"../model": {}}), "part '../model'"),
        (lambda m: m["files"].pop("train_state.json"), "train_state.json is missing"),
        (lambda m: m.update(version=99), "format version 99"),
        (lambda m: m.update(files=[]), "damaged"),
    ],
)
def test_a_manifest_that_does_not_match_the_files_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = save_step(tmp_path, 1)
    forged(path, change)
    with pytest.raises(DamagedError, match=message):
        check(path)


def test_a_truncated_file_is_named_with_its_bytes(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    size = (path / TENSOR_FILE).stat().st_size
    (path / TENSOR_FILE).write_bytes((path / TENSOR_FILE).read_bytes()[:1024])
    with pytest.raises(DamagedError, match=f"{TENSOR_FILE} has 1,024 of {size:,} bytes"):
        check(path)
    with pytest.raises(DamagedError, match=TENSOR_FILE):
        load_tensors(path / "model", tensors_of(0))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "model/../../evil", "", ".hidden", "a//b", "a\n"])
def test_file_names_outside_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    path = save_step(tmp_path, 1)
    forged(path, lambda manifest: manifest["files"].update({name: {"size": 1}}))
    with pytest.raises(DamagedError, match="file name"):
        check(path)
    with pytest.raises(DamagedError, match="file name"):
        load_tensors(path / "model", tensors_of(0))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"other": torch.zeros(2)}, "other is missing"),
        ({"w": torch.zeros(64, 9)}, "shape"),
        ({"w": torch.zeros(64)}, "shape"),
        ({"w": torch.zeros(())}, "shape"),
        ({"s": torch.zeros(1)}, "shape"),
        ({"w": torch.zeros(64, 8, dtype=torch.bfloat16)}, "F32"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(tmp_path: Path, wanted: dict[str, Tensor], message: str) -> None:
    save_tensors(tmp_path, tensors_of(1))
    with pytest.raises(DamagedError, match=message):
        load_tensors(tmp_path, wanted)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}'])
def test_garbage_headers_are_refused(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(garbage)
    with pytest.raises(DamagedError, match=r"x\.safetensors"):
        load_tensors(tmp_path, {"a": torch.zeros(1)})


def test_a_missing_piece_is_refused(tmp_path: Path) -> None:
    get_pool(2).run(save_two, tmp_path)
    (tmp_path / "00000-of-00002.1.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"w\[3:5, 0:2\] is in no file"):
        load_tensors(tmp_path, {"w": torch.zeros(6, 2)})


# Pieces that do not make up a tensor

ROWS_TWICE = [((0, 0), (2, 2)), ((1, 0), (1, 2)), ((3, 0), (1, 2))]  # (offsets, sizes); as many values as [4, 2] has
DAMAGED = {
    "rows twice and not at all": (ROWS_TWICE, "w[1:2, 0:2] is stored more than once"),
    "rows missing": ([((0, 0), (2, 2)), ((3, 0), (1, 2))], "w[2:3, 0:2] is in no file"),
    "columns missing": ([((0, 0), (4, 1))], "[0:4, 1:2] is in no file"),
    "columns overlap": ([((0, 0), (4, 1)), ((0, 0), (4, 2))], "w[0:4, 0:1] is stored more than once"),
    "a corner missing": ([((0, 0), (2, 2)), ((2, 0), (2, 1))], "w[2:4, 1:2] is in no file"),
    "outside": ([((0, 0), (4, 2)), ((4, 0), (1, 2))], "shape (4, 2)"),
    "empty and outside": ([((0, 0), (4, 2)), ((9, 0), (0, 2))], "shape (4, 2)"),
    "another number of dims": ([((0, 0), (3, 2)), ((3,), (1,))], "w has pieces that differ in dtype or number of dims"),
}
WHOLE = torch.arange(8.0).reshape(4, 2)


def write_pieces(directory: Path, corners: Any) -> None:
    """Write a piece of `WHOLE` to a file of its own for each (offsets, sizes); rows beyond it are zeros."""
    wide = torch.cat([WHOLE, torch.zeros(8, 2)])
    for i, (offsets, sizes) in enumerate(corners):
        part = wide[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        part = part if part.ndim == len(sizes) and part.numel() else torch.zeros(sizes)
        write_files(directory, {f"{i:05d}-of-00009.safetensors": {"w": (part.reshape(sizes).contiguous(), offsets)}})


def step_with(directory: Path, *, indexed: bool = False) -> Path:
    """Complete a checkpoint of `w` whose tensor files are written."""
    if indexed:
        files = sorted((directory / "model").iterdir())
        write_index(directory / "model", pieces_of_files(files, range(len(files)), "here"))
    (directory / "train_state.json").write_text("{}")
    write_manifest(directory, {"model": {"w": {"shape": [4, 2], "dtype": "F32"}}}, {})
    return directory


# No index can have pieces of several numbers of dims.
@pytest.mark.parametrize(
    ("kind", "indexed"), [(k, i) for k, i in product(DAMAGED, (False, True)) if not (i and "dims" in k)]
)
def test_pieces_that_overlap_or_leave_gaps_are_refused_by_every_reader(
    tmp_path: Path, kind: str, indexed: bool
) -> None:
    corners, said = DAMAGED[kind]
    model = tmp_path / "model"
    write_pieces(model, corners)
    with pytest.raises(DamagedError, match=re.escape(said)):
        load_tensors(model, {"w": torch.full((4, 2), math.nan)})
    step = step_with(tmp_path, indexed=indexed)
    readers: list[Any] = [
        lambda: check(step),
        lambda: check_together(step),
        lambda: CheckpointStore(tmp_path / "run", keep=1).find(step),
        lambda: load_tensors(model, {"w": torch.full((4, 2), math.nan)}),
    ]
    if "outside" not in kind and "columns missing" not in kind:  # conversion compares these with the model's config
        readers.append(lambda: checkpoint_tensors(pieces_of(model), model))
    for reader in readers:
        with pytest.raises(DamagedError, match=rf"w as F32|{re.escape(said)}"):
            reader()


@pytest.mark.parametrize(
    "corners",
    [
        [((0, 0), (4, 2))],
        [((2, 0), (2, 2)), ((0, 0), (2, 1)), ((0, 1), (2, 1))],
        [((0, 0), (4, 2)), ((4, 0), (0, 2)), ((0, 0), (4, 0))],  # empty ones inside
        [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((0, 0), (2, 2))],  # a copy
    ],
)
def test_a_load_leaves_no_memory_as_it_was(tmp_path: Path, corners: Any) -> None:
    write_pieces(tmp_path / "model", corners)
    got = {"w": torch.full((4, 2), math.nan)}
    load_tensors(tmp_path / "model", got)
    assert torch.equal(got["w"], WHOLE)
    assert checkpoint_tensors(pieces_of(tmp_path / "model"), tmp_path)["w"].shape == (4, 2)


def test_a_box_stored_twice_is_read_if_both_have_the_same_bytes(tmp_path: Path) -> None:
    write_pieces(tmp_path, [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((0, 0), (2, 2))])
    got = {"w": torch.full((4, 2), math.nan)}
    load_tensors(tmp_path, got)
    assert torch.equal(got["w"], WHOLE)
    file = tmp_path / "00002-of-00009.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    said = "00000-of-00009.safetensors and 00002-of-00009.safetensors have different values of w at offsets (0, 0)"
    with pytest.raises(DamagedError, match=re.escape(said)):
        load_tensors(tmp_path, got)
    (tmp_path / "step" / "model").mkdir(parents=True)
    for file in tmp_path.glob("*.safetensors"):
        file.rename(tmp_path / "step" / "model" / file.name)
    with pytest.raises(DamagedError, match=re.escape(said)):
        check(step_with(tmp_path / "step"))


def part_of_each_rank(directory: Path) -> str:
    """Return the error of loading 3 of 6 rows on each of two ranks, whose memory is NaN before."""
    mesh = init_device_mesh("cpu", (2,))
    held = DTensor.from_local(torch.full((3, 2), math.nan), mesh, [Shard(0)])
    try:
        load_tensors(directory, {"w": held})
    except DamagedError as error:
        return str(error)
    assert torch.equal(held.to_local(), torch.arange(12.0).reshape(6, 2).chunk(2)[dist.get_rank()])
    return ""


def test_each_element_that_a_rank_holds_is_filled_once(tmp_path: Path) -> None:
    """The pieces cross the borders of the ranks' parts; the damage is in the part of rank 1 alone."""
    whole = torch.arange(12.0).reshape(6, 2)
    for name, cuts in {"good": [(0, 2), (2, 5), (5, 6)], "bad": [(0, 2), (2, 5), (4, 5), (5, 6)]}.items():
        files = {f"{a}{b}.safetensors": {"w": (whole[a:b].clone(), (a, 0))} for a, b in cuts}
        write_files(tmp_path / name, files)
    assert get_pool(2).run(part_of_each_rank, tmp_path / "good") == ["", ""]
    for said in get_pool(2).run(part_of_each_rank, tmp_path / "bad"):
        assert said == f"rank 1: {tmp_path / 'bad'}: w[4:5, 0:2] is stored more than once"


# The index


def slices_of_a_mesh(run: Path) -> list[str]:
    """Save a tensor that lies on the dp axis of a mesh of dp 1 x tp 2: both ranks hold it whole, each on its slice."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    norm = distribute_tensor(torch.arange(5.0), mesh["dp"], (Shard(0),), src_data_rank=None)
    cut = distribute_tensor(torch.arange(6.0), mesh["tp"], (Shard(0),), src_data_rank=None)
    store, model = CheckpointStore(run, keep=1), {"norm": norm, "cut": cut}
    store.save(1, model=model, optim={}, state={})
    got = {key: torch.full_like(tensor, math.nan) for key, tensor in model.items()}
    load_tensors(store.path(1) / "model", got)
    assert all(torch.equal(local_of(got[key]), local_of(model[key])) for key in model)
    return [piece.file.name for piece in pieces_of(store.path(1) / "model")["norm"]]


def test_what_all_slices_of_a_mesh_hold_is_saved_once(tmp_path: Path) -> None:
    assert get_pool(2).run(slices_of_a_mesh, tmp_path) == [["00000-of-00002.safetensors"]] * 2


def save_indexed(run: Path) -> list[str]:
    """Save tensors of every kind on two ranks without reading a header; return the files that rank 0 then opens."""
    mesh = init_device_mesh("cpu", (2,))
    whole = {
        "rows": torch.arange(12.0).reshape(6, 2),
        "packed": torch.arange(16.0).reshape(8, 2),
        "norm": torch.ones(3),
    }
    whole |= {"scalar": torch.tensor(3.0), "few": torch.ones(1, 2), "cube": torch.arange(24.0).reshape(2, 4, 3)}
    cuts = {"rows": Shard(0), "packed": strided(0, 2), "norm": R, "scalar": R, "few": Shard(0), "cube": Shard(1)}
    tensors = {k: distribute_tensor(v, mesh, (cuts[k],), src_data_rank=None) for k, v in whole.items()}
    opened: list[str] = []

    def reading(file: Path, name: str = "") -> Any:
        opened.append(file.name)
        return pieces_in(file, name)

    store = CheckpointStore(run, keep=1)
    with mock.patch("ndtrain.storage.pieces.pieces_in", reading):
        store.save(1, model=tensors, optim={"m": tensors["rows"]}, state={})
        assert not opened
        own = DTensor.from_local(torch.full((3, 2), math.nan), mesh, [Shard(0)])
        load_tensors(store.path(1) / "model", {"rows": own})
    assert torch.equal(own.to_local(), whole["rows"].chunk(2)[dist.get_rank()])
    return opened


def test_the_index_is_that_of_the_headers_and_a_reader_opens_only_its_files(tmp_path: Path) -> None:
    opened = get_pool(2).run(save_indexed, tmp_path)
    assert opened == [["00000-of-00002.safetensors"], ["00001-of-00002.safetensors"]]
    step = CheckpointStore(tmp_path, keep=1).path(1)
    for part in ("model", "optim"):
        files = sorted((step / part).glob("*.safetensors"))
        wanted = pieces_of_files(files, range(len(files)), "here")
        found = pieces_of(step / part)
        assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in wanted.items()}
    plain = {"rows": torch.full((6, 2), math.nan), "cube": torch.full((2, 4, 3), math.nan)}
    plain |= {"packed": torch.full((8, 2), math.nan), "scalar": torch.tensor(math.nan)}
    load_plain_dcp(step / "model", plain)  # which does not take the index for weights
    ours = {key: torch.full_like(value, math.nan) for key, value in plain.items()}
    load_tensors(step / "model", ours)
    assert all(torch.equal(ours[key], plain[key]) for key in plain) and not plain["cube"].isnan().any()


def test_an_empty_tensor_has_no_pieces_and_is_no_gap(tmp_path: Path) -> None:
    store, model = CheckpointStore(tmp_path, keep=1), {"none": torch.zeros(0, 3), "w": torch.ones(2)}
    path = store.save(1, model=model, optim={"none": torch.zeros(0, 3)}, state={})
    assert path is not None and check(path)["tensors"]["model"]["none"]["shape"] == [0, 3]
    for part in ("model", "optim"):
        assert "none" not in checkpoint_tensors(pieces_of(path / part), path)
        load_tensors(path / part, {"none": torch.zeros(0, 3)})
    load_tensors(path / "model", {key: torch.zeros_like(value) for key, value in model.items()}, all_of_it=True)
    with pytest.raises(DamagedError, match="none is missing"):
        load_tensors(path / "model", {"none": torch.zeros(1, 3)})


def test_a_checkpoint_without_an_index_is_read_by_its_headers(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    for part in ("model", "optim"):
        (path / part / "pieces.index").unlink()
    forged(path, lambda m: [m["files"].pop(f"{part}/pieces.index") for part in ("model", "optim")])
    assert CheckpointStore(tmp_path, keep=1).find("auto", verify=True) == (path, [])
    got = {key: torch.full_like(value, math.nan) for key, value in tensors_of(1).items()}
    load_tensors(path / "model", got, all_of_it=True)
    assert all(torch.equal(got[key], value) for key, value in tensors_of(1).items())


def test_files_of_the_same_size_that_are_swapped_are_refused_without_hashes(tmp_path: Path) -> None:
    """Their sizes are those of the manifest; only the headers tell that one is in the place of the other."""
    write_pieces(tmp_path / "model", [((0, 0), (2, 2)), ((2, 0), (2, 2))])
    step = step_with(tmp_path, indexed=True)
    a, b = sorted((step / "model").glob("*.safetensors"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    said = r"model/00000-of-00009\.safetensors: its header and pieces\.index differ in w"
    for read in (check, check_together, lambda step: load_tensors(step / "model", {"w": torch.zeros(4, 2)})):
        with pytest.raises(DamagedError, match=said):
            read(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__setitem__((0, 1), t[0, 1] + 8), "its header and pieces.index differ in w"),
        (lambda t: t.__setitem__((0, 2), 1), "w[0:1, 0:2] is in no file"),
        (lambda t: t.__setitem__((0, 2), -1), "pieces.index is damaged"),
        (lambda t: t.__setitem__((0, 4), 1 << 62), "pieces.index is damaged"),
        (lambda t: t.__setitem__((0, 0), 2), "pieces.index is damaged"),
        (lambda t: t.__setitem__((0, 0), 1), "its header and pieces.index differ in w"),
    ],
)
def test_an_index_with_another_hash_or_of_other_pieces_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_pieces(tmp_path / "model", [((0, 0), (2, 2)), ((2, 0), (2, 2))])
    step = step_with(tmp_path, indexed=True)
    index = step / "model" / "pieces.index"
    stored = {key: Pieces(p.dtype, p.files, p.table.copy()) for key, p in pieces_of(step / "model").items()}
    change(stored["w"].table)
    write_index(step / "model", stored)
    with pytest.raises(DamagedError, match=r"model/pieces\.index was altered"):
        load_tensors(step / "model", {"w": torch.zeros(4, 2)})
    forged(step, lambda m: m["files"]["model/pieces.index"].update(xxh3_128=hash_of(index.read_bytes())))
    for read in (check, lambda step: load_tensors(step / "model", {"w": torch.zeros(4, 2)})):
        with pytest.raises(DamagedError, match=re.escape(message)):
            read(step)


def test_an_index_of_other_files_than_the_manifest_is_refused(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / TENSOR_FILE).rename(path / "model" / "other.safetensors")
    forged(path, lambda m: m["files"].update({"model/other.safetensors": m["files"].pop(TENSOR_FILE)}))
    with pytest.raises(DamagedError, match=r"pieces\.index is damaged .*its files are not those of the manifest"):
        check(path)


def test_a_checkpoint_of_512_files_is_planned_in_seconds(tmp_path: Path) -> None:
    """A comparison of each piece with all others of its key takes three minutes here."""
    ranks, keys = 512, 300
    step = write_checkpoint(tmp_path / "step", ranks, keys)
    started = time.process_time()
    by_headers = pieces_of(step / "model")
    with_index(step, by_headers)
    check(step)
    by_index = pieces_of(step / "model")
    wanted = {key_of(i): torch.full((ranks, 2), math.nan) for i in range(keys)}
    plan = plan_held(wanted, by_index, "here")
    assert time.process_time() - started < 30
    assert len(plan) == ranks and sum(map(len, plan.values())) == ranks * keys
    assert by_index.keys() == by_headers.keys() == wanted.keys()
    assert all(np.array_equal(by_index[key].table, by_headers[key].table) for key in wanted)
    file = step / f"model/00400-of-{ranks:05d}.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[400, 0]", b"[401, 0]", 1))  # a second of row 401, none of 400
    with pytest.raises(DamagedError, match=r"00400-of-00512\.safetensors: its header and pieces\.index differ"):
        check(step)


# Failures and crashes


def failing_rank(run: Path) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    store = CheckpointStore(run, keep=1)
    whole = {"w": distribute_tensor(torch.ones(8, 4), mesh, (Shard(0), R), src_data_rank=None)}
    old = store.save(1, model=whole, optim=whole, state={"step": 1})
    assert old is not None
    import ndtrain.checkpoint.tensors as module

    real = module._write_file

    def full_disk(path: Path, entries: Any) -> Any:
        if path.name.startswith("00002") and path.parent.name == "optim":
            raise OSError(28, "No space left on device", str(path))
        return real(path, entries)

    both = {"w": distribute_tensor(torch.ones(8, 4), mesh, (Shard(0), Shard(1)), src_data_rank=None)}
    module._write_file = full_disk
    try:
        store.save(2, model=both, optim=both, state={"step": 2})
    except NdtrainError as error:
        message = str(error)
    finally:
        module._write_file = real
    dist.barrier()
    assert [p.name for p in store.root.iterdir()] == [old.name]
    assert store.find("auto") == (old, [])
    dist.barrier()
    if dist.get_rank() == 0:
        (old / "train_state.json").unlink()
    dist.barrier()
    for resume in ("auto", old):
        with pytest.raises(DamagedError, match=r"train_state\.json is missing"):
            store.find(resume)
    assert store.save(2, model=both, optim=both, state={"step": 2}) == store.path(2)
    dist.barrier()
    found, messages = store.find("auto")
    assert found == store.path(2)
    assert messages == []
    return message


def in_the_background(run: Path, fails: bool) -> str:
    """Weights change while a slow writer saves them; the older checkpoint stays until the new one is complete."""
    mesh = init_device_mesh("cpu", (2,))
    store = CheckpointStore(run, keep=1, background=True)
    weights = {"w": distribute_tensor(torch.ones(8, 4), mesh, (Shard(0),), src_data_rank=None)}
    assert store.save(1, model=weights, optim={}, state={"step": 1}) is None and store.in_flight
    assert store.settle() == store.path(1) and not store.in_flight
    import ndtrain.checkpoint.tensors as module

    real, go_on, message = module._write_file, threading.Event(), ""

    def slow(path: Path, entries: Any) -> Any:
        go_on.wait(60)
        if fails and dist.get_rank() == 1:
            raise OSError(28, "No space left on device", str(path))
        return real(path, entries)

    with mock.patch.object(module, "_write_file", slow):
        store.save(2, model=weights, optim={}, state={"step": 2})
        weights["w"].to_local().zero_()
        with pytest.raises(RuntimeError, match="a save is in flight"):
            store.save(3, model=weights, optim={}, state={"step": 3})
        assert not store.written and check(store.path(1)) and not store.path(2).exists()
        go_on.set()
        try:
            store.settle()
        except NdtrainError as error:
            message = str(error)
    dist.barrier()
    left = store.path(1 if fails else 2)
    assert [p.name for p in store.root.iterdir()] == [left.name]
    got = {"w": torch.zeros(8, 4)}
    load_tensors(left / "model", got)
    assert got["w"].eq(1).all() and store.find("auto", verify=True) == (left, [])
    return message


@pytest.mark.parametrize("fails", [False, True])
def test_a_background_save_has_the_weights_of_its_start(tmp_path: Path, fails: bool) -> None:
    for message in get_pool(2).run(in_the_background, tmp_path, fails):
        assert ("rank 1: OSError: [Errno 28]" in message and "older checkpoints are kept" in message) is fails


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    old = save_step(tmp_path, 1)
    with (
        mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=1_048_576)),
        pytest.raises(NdtrainError, match=r"needs 1,05\d,\d\d\d bytes, but only 1,048,576 are free"),
    ):
        save_step(tmp_path, 2)
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_a_failing_rank_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    for message in get_pool(4).run(failing_rank, tmp_path):
        assert "rank 2" in message
        assert "No space left on device" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, GeneratorExit])
def test_a_failure_in_publishing_leaves_no_partial_checkpoint(tmp_path: Path, error: type[BaseException]) -> None:
    old = save_step(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=2)

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("{")
        raise error("stop")

    for step in (1, 2):
        with pytest.raises((NdtrainError, error), match="stop"):
            store.save(step, model=tensors_of(1), optim={}, state={}, extra_files=fail)
        assert [p.name for p in store.root.iterdir()] == [old.name]
        check(old)


def test_leftovers_of_a_crash_are_removed_or_restored(tmp_path: Path) -> None:
    old = save_step(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=2)
    shutil.copytree(old, store.root / ".tmp-step-00000002")
    shutil.copytree(old, store.root / ".del-step-00000003")
    old.rename(store.root / ".old-step-00000001")  # killed between the two renames
    assert store.find("auto") == (old, [])
    assert [p.name for p in store.root.iterdir()] == [old.name]
    (store.root / ".tmp-step-00000002" / "model").mkdir(parents=True)
    assert store.newest_valid() == (old, [])
    new = save_step(tmp_path, 2)
    check(new)
    assert sorted(p.name for p in store.root.iterdir()) == [old.name, new.name]


# The optimizer


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10, bias=False)
        self.norm = nn.LayerNorm(6)
        self.few = nn.Linear(6, 3)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        out: Tensor = self.head(hidden).sum() + self.few(hidden).square().sum()
        return out


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return state_tensors(model, optimizer, OPTIMIZERS["adamw"])


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, *, step: int) -> None:
    load_tensors(directory, optimizer_tensors(model, optimizer), all_of_it=True)
    set_step(model, optimizer, step)


def make(size: int | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    if size is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def optimizer_round(directory: Path, size: int | None) -> None:
    model, optimizer = make(size)
    for _ in range(3):
        model(torch.arange(12.0).reshape(2, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = optimizer_tensors(model, optimizer)
    names = {"embed.weight", "norm.weight", "norm.bias", "few.weight", "few.bias"}
    assert set(tensors) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names}
    save_tensors(directory, tensors)
    fresh_model, fresh = make(size)
    fresh_model.load_state_dict(model.state_dict())
    model(torch.ones(2, 6)).backward()
    fresh_model(torch.ones(2, 6)).backward()  # loading with live gradients
    restore_optimizer(fresh_model, fresh, directory, step=3)
    optimizer.step()
    fresh.step()
    for a, b in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(local_of(a), local_of(b))
    for state in fresh.state.values():
        assert state["step"].item() == 4
        assert state["step"].dtype == torch.float32


def test_a_restored_optimizer_continues_like_an_uninterrupted_one(tmp_path: Path) -> None:
    optimizer_round(tmp_path / "one", None)
    get_pool(4).run(optimizer_round, tmp_path / "four", 4)
    one, four = make(None), make(None)
    restore_optimizer(*one, tmp_path / "one", step=3)
    restore_optimizer(*four, tmp_path / "four", step=3)
    for key, value in optimizer_tensors(*one).items():
        # FSDP averages the gradients of equal ranks: the same values but for rounding
        torch.testing.assert_close(optimizer_tensors(*four)[key], value)


def test_optimizer_without_a_parameter_is_refused() -> None:
    model = Tied()
    with pytest.raises(NdtrainError, match=r"norm\.weight|few"):
        optimizer_tensors(model, torch.optim.AdamW([model.embed.weight]))


# The pool


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("rank error")
    return dist.get_rank()


def sleep() -> None:
    import time

    time.sleep(60)


def test_pool_reports_and_recovers() -> None:
    pool = get_pool(2)
    assert pool.run(fail_on, -1) == [0, 1]
    with pytest.raises(RanksFailed, match="rank 1: Traceback"):
        pool.run(fail_on, 1)
    with pytest.raises(RanksFailed, match="no answer"):
        pool.run(sleep, timeout=0.5)
    assert pool.run(fail_on, -1) == [0, 1]
