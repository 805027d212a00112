"""Modules that are not from transformers: grouped 3-D weights, empty parameters, extra states, weights that their
module cuts."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from ndtrain.convert import convert
from ndtrain.errors import DamagedError, PlanError
from ndtrain.hf import extra_states
from ndtrain.mesh import MeshSizes, build_mesh
from ndtrain.parallel import parallelize
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import Recipe, load_recipe
from tests import foreign, tiny
from tests.matrix import worker
from tests.ranks import get_pool
from tests.test_plan_applied import check, fake_world

MLP = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Save a random foreign model with a reference run of plain torch in one process."""
    root = tmp_path_factory.mktemp("foreign")
    made = worker.build("foreign", foreign.CONFIG, str(root))
    # Bytes that transformers would hand to a module that unpickles them
    file = Path(made["path"]) / "model.safetensors"
    bytes_of_a_pickle = torch.tensor(list(pickle.dumps(99)), dtype=torch.uint8)
    tensors = {k: bytes_of_a_pickle.clone() if "opaque" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return {**made, "corpus": str(tiny.write_corpus(root / "corpus"))}


def recipe_of(path: Path, saved: dict[str, Any], mesh: dict[str, int], **more: Any) -> Path:
    return tiny.recipe_file(
        path,
        model={"name": saved["path"]},
        corpus=Path(saved["corpus"]),
        run_dir=path.parent / "run",
        mesh=mesh,
        steps=4,
        batch_ranks=mesh.get("dp_shard", 1),
        **{"data": {"packing": False}, **more},
    )


# ---- the plan


def planned(tmp_path: Path, sizes: MeshSizes) -> tuple[Recipe, Any, Plan]:
    from ndtrain.hf.model import meta_model

    path = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "foreign", "config": foreign.CONFIG},
        corpus=tmp_path,
        run_dir=tmp_path / "run",
        data={"packing": False},
    )
    recipe = load_recipe(path)
    model = meta_model(recipe)
    return recipe, model, make_plan(model, sizes, recipe)


@pytest.mark.parametrize(
    ("sizes", "rank"), [(MeshSizes(1, 2), 1), (MeshSizes(1, 2, 1, 2), 2), (MeshSizes(2, 8, 1, 4), 63)]
)
def test_parallelize_does_what_the_plan_says(tmp_path: Path, sizes: MeshSizes, rank: int) -> None:
    recipe, model, plan = planned(tmp_path, sizes)
    with fake_world(rank, sizes.world_size):
        parallelize(model, plan, build_mesh(sizes, "cpu"), recipe=recipe)
        check(model, plan, rank)


def test_a_weight_that_is_already_a_dtensor_is_refused(tmp_path: Path) -> None:
    recipe, model, _ = planned(tmp_path, MeshSizes())
    with fake_world(0, 2):
        model.get_submodule(f"{MLP}.own").set_device_mesh(tp_mesh=build_mesh(MeshSizes(1, 1, 1, 2), "cpu").tp)
        with pytest.raises(PlanError, match=rf"{MLP}\.own\.up is already a DTensor.*base_model_tp_plan"):
            make_plan(model, MeshSizes(1, 1, 1, 2), recipe)


def test_a_module_that_cuts_its_weights_differently_than_declared_is_refused(tmp_path: Path) -> None:
    sizes = MeshSizes(1, 1, 1, 2)
    recipe, model, plan = planned(tmp_path, sizes)
    own = model.get_submodule(f"{MLP}.own")
    own.set_device_mesh = lambda tp_mesh: None
    with fake_world(0, 2), pytest.raises(PlanError, match=rf"set_device_mesh of {MLP}\.own lays out up .*colwise"):
        parallelize(model, plan, build_mesh(sizes, "cpu"), recipe=recipe)


def test_a_scalar_parameter_is_refused(tmp_path: Path) -> None:
    recipe, model, _ = planned(tmp_path, MeshSizes())
    model.get_submodule(f"{MLP}.opaque").gain = nn.Parameter(torch.ones((), device="meta"))
    with pytest.raises(PlanError, match=rf"{MLP}\.opaque\.gain is a scalar"):
        make_plan(model, MeshSizes(1, 2), recipe)


# ---- training


def cell(model: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    """Run a cell of the matrix on ranks that have imported this module and so know the model type."""
    return worker.cell(model, mesh, more)


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [({"dp_shard": 2}, "rank0"), ({"dp_shard": 2, "tp": 2}, "sharded")],
    ids=["dp_shard2", "dp_shard2-tp2"],
)
def test_every_gradient_and_parameter_equals_that_of_one_process(
    saved: dict[str, Any], mesh: dict[str, int], mode: str
) -> None:
    model = {k: v for k, v in saved.items() if k != "corpus"}
    found = get_pool(math.prod(mesh.values())).run(cell, model, mesh, {"load": {"mode": mode}}, timeout=300)
    assert [answer["status"] for answer in found] == ["agrees"] * len(found), found[0]
    assert max(answer["worst"] for answer in found) < 1e-4


def run(path: str, stop: int) -> dict[str, Any]:
    """Train on a pool up to step `stop`; return whole parameters and moments, notes, and extra states."""
    from tests.trainers import Said, trainer_of

    told = Said()
    foreign.Opaque.unpickled = 0
    trainer = trainer_of(path, said=told)
    trainer.prepare()
    losses = []
    while trainer.step < stop:
        losses.append(trainer.train_step().loss)
    tensors = dict(trainer.engine.model.named_parameters()) | trainer.engine.optimizer_tensors()
    return {
        "losses": losses,
        "whole": {name: worker.whole(tensor.detach())[0].numpy() for name, tensor in tensors.items()},
        "states": {
            name: extra_states.from_json(v) for name, v in extra_states.states(trainer.engine.model).items() if v
        },
        "unpickled": foreign.Opaque.unpickled,
        "said": [line for line in told.said if "extra state" in line],
    }


def test_a_run_is_saved_resumed_on_another_mesh_and_converted(saved: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = {"every": 2, "resume": "auto"}
    first = recipe_of(tmp_path / "first.toml", saved, {"dp_shard": 2, "tp": 2}, checkpoint=checkpoint)
    begun = get_pool(4).run(run, str(first), 2, timeout=300)
    second = recipe_of(tmp_path / "second.toml", saved, {"dp_shard": 2}, checkpoint=checkpoint)
    resumed = get_pool(2).run(run, str(second), 2, timeout=300)

    # Parameters and both moments are equal bit for bit. Empty parameters have no moments and are not stored.
    step = tmp_path / "run/checkpoints/step-00000002"
    stored = {key for file in step.glob("*/*.safetensors") for key in load_file(file)}
    for name, value in begun[0]["whole"].items():
        assert (value == resumed[0]["whole"][name]).all(), name
        assert (name in stored) == (value.size > 0), name
    empty = {name for name, value in begun[0]["whole"].items() if not value.size}
    assert empty == {f"model.layers.{i}.mlp.grouped.{name}" for i in (0, 1) for name in ("bias", "unused")}

    # States that are data are kept on every rank; states that are bytes are left out with one note.
    states = json.loads((step / extra_states.FILE).read_text())
    assert set(states) == {f"model.layers.{i}.mlp.grouped" for i in (0, 1)}
    assert {answer["unpickled"] for answer in (*begun, *resumed)} == {0}
    for answer in resumed:
        for name, state in begun[0]["states"].items():
            assert state.tolist() == answer["states"][name].tolist() == [2.0, 0.25]
    at_load, at_save = begun[0]["said"]
    assert f"{MLP}.opaque and of 1 more module is bytes" in at_load and "not read from the weights" in at_load
    assert f"{MLP}.opaque and of 1 more module is bytes" in at_save and "not saved" in at_save
    assert resumed[0]["said"] == []

    # The resumed run continues like one without interruption.
    more = get_pool(2).run(run, str(second), 4, timeout=300)[0]
    assert len(more["losses"]) == 2
    assert more["states"][f"{MLP}.grouped"].tolist() == [4.0, 0.0625]

    convert(tmp_path / "run", tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, param in model.named_parameters():
        assert (param.detach().numpy() == more["whole"][name]).all(), name
    assert model.get_submodule(f"{MLP}.grouped").state == [4.0, 0.0625]
    assert foreign.Opaque.unpickled == 0


# ---- extra states


class Holder(nn.Module):
    def __init__(self, state: Any):
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


DATA = {
    "history": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "scale": torch.tensor(3.0),
    "mask": torch.tensor([True, False]),
    "none": torch.empty(0, 2),
    "recipe": "delayed",
    "margin": (0, None, 2.5),
    "nested": [{"count": 7, "on": True}],
}


def test_an_extra_state_that_is_data_is_restored_unchanged() -> None:
    model, other = nn.Sequential(Holder(DATA), nn.Linear(2, 2)), nn.Sequential(Holder(None), nn.Linear(2, 2))
    stored, left_out = extra_states.shared_states(model)
    assert set(stored) == {"0"} and left_out == []
    extra_states.restore(other, json.loads(json.dumps(stored)))
    got = other[0].get_extra_state()
    assert list(got) == list(DATA)
    for key, value in DATA.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype and torch.equal(got[key], value)
        else:
            assert got[key] == value and type(got[key]) is type(value)


@pytest.mark.parametrize(
    "state",
    [b"bytes", torch.tensor([128], dtype=torch.uint8), {"in": [b""]}, {1: 2}, object(), torch.ones(2, device="meta")],
    ids=["bytes", "tensor of bytes", "bytes inside", "keys", "object", "meta"],
)
def test_an_extra_state_that_is_not_data_is_left_out(state: Any) -> None:
    assert extra_states.shared_states(nn.Sequential(Holder(state))) == ({}, ["0"])


def test_an_empty_extra_state_is_skipped_without_a_note() -> None:
    model = nn.Sequential(Holder(None), Holder(torch.empty(0, dtype=torch.uint8)))
    assert extra_states.shared_states(model) == ({}, [])


def differing() -> tuple[dict[str, Any], list[str]]:
    import torch.distributed as dist

    same, other = Holder({"step": 3}), Holder({"rank": dist.get_rank()})
    return extra_states.shared_states(nn.Sequential(same, other))


def test_an_extra_state_that_differs_between_ranks_is_left_out() -> None:
    assert get_pool(2).run(differing) == [({"0": {"dict": {"step": 3}}}, ["1"])] * 2


@pytest.mark.parametrize(
    "stored",
    [
        {"1": 3},
        {"9": 3},
        {"0": {"tensor": "gAAA", "dtype": "uint8", "shape": [3]}},
        {"0": {"tensor": "gAAA", "dtype": "load", "shape": [3]}},
        {"0": {"tensor": "gAAA", "dtype": "float32", "shape": [3]}},
        {"0": {"other": 1}},
    ],
    ids=["no state there", "no module there", "bytes", "no dtype", "too short", "unknown"],
)
def test_a_damaged_extra_state_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match="extra state of"):
        extra_states.restore(nn.Sequential(Holder(None), nn.Linear(2, 2)), stored)
