"""`optim.state_dtype = "bfloat16"`: the optimizer of torch with state that is rounded without bias, on every mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ndtrain.console.plan import plan_report
from ndtrain.engine.rounding import Rounding
from ndtrain.layout import local_part
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import load_recipe
from tests import proofs
from tests.ranks import get_pool
from tests.test_plan import plan_for
from tests.test_train import RING, expected, recipe_for, trained, world  # noqa: F401

MESHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("llama", "1", {}),
    "replicas": ("llama", "dp_replicate2-dp_shard2", {}),
    "two axes": ("llama", "dp_shard2-tp2", {}),
    "ring": ("llama", "cp2", RING),
    "experts": ("qwen3_moe", "ep2", {}),
}


def rounded(values: Tensor, seed: int) -> Tensor:
    param, into = nn.Parameter(values.clone()), torch.empty_like(values, dtype=torch.bfloat16)
    rounding = Rounding(seed)
    rounding.name("weight", param)
    rounding.store(param, [into], [values])
    return into


def test_rounding_is_to_one_of_two_neighbours_and_right_in_the_mean() -> None:
    torch.manual_seed(0)
    values = torch.randn(64) * torch.logspace(-20, 20, 64)
    found = torch.stack([rounded(values, seed).float() for seed in range(2000)])
    step = values.abs() * 2**-7
    assert ((found - values).abs() <= step).all()
    assert ((found.mean(0) - values).abs() < 0.05 * step).all()
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf])
    assert torch.equal(rounded(kept, 1).float(), kept), "what bfloat16 has is not changed"
    for bits in (0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1):
        assert rounded(torch.tensor([bits], dtype=torch.int32).view(torch.float32), 1).isnan().all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("case", MESHES)
def test_losses_are_near_those_of_float32(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    case: str,
    name: str,
) -> None:
    kind, mesh, more = MESHES[case]
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=4, optim={"name": name}, **more)
    pool = get_pool(load_recipe(recipe).mesh.least_ranks)
    low = [f"run.dir={tmp_path}/low", "optim.state_dtype=bfloat16"]
    ours = pool.run(trained, str(recipe), low, timeout=200)[0]["metrics"]
    theirs = pool.run(trained, str(recipe), [], timeout=200)[0]["metrics"]
    for one, other in zip(ours, theirs, strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=5e-3)
    assert ours[-1]["loss"] != theirs[-1]["loss"]


def state_after(path: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """This rank's parts of state and parameters after some steps, and the bytes of the state."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    while trainer.step < steps:
        trainer.train_step()
    trainer.saving.store.settle()
    state = {name: local_part(tensor).clone() for name, tensor in trainer.engine.optimizer_tensors().items()}
    params = {name: local_part(param).clone() for name, param in trainer.engine.model.named_parameters()}
    return state, params, sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_replicas_stay_equal_and_state_takes_the_memory_that_inspect_says(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    optim = {"name": name, "state_dtype": "bfloat16"}
    recipe = recipe_for(world, tmp_path, "llama", "dp_replicate2-dp_shard2", steps=3, optim=optim)
    ranks = get_pool(4).run(state_after, str(recipe), 3, timeout=200)
    for one, other in ((0, 2), (1, 3)):
        for kind in (0, 1):
            assert all(torch.equal(value, ranks[other][kind][key]) for key, value in ranks[one][kind].items())
    read = load_recipe(recipe)
    _, plan = plan_for(read, MeshSizes(2, 2, 1, 1))
    assert plan_report(plan, read, rank=1, ranks_per_node=8)["bytes"]["rank"]["optimizer"] == ranks[1][2]


def test_a_resume_has_the_same_state_and_goes_on_on_another_mesh(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    more: dict[str, Any] = {
        "optim": {"state_dtype": "bfloat16"},
        "steps": 6,
        "checkpoint": {"every": 2, "resume": "auto"},
    }
    (tmp_path / "whole").mkdir()
    whole = recipe_for(world, tmp_path / "whole", "llama", "dp_shard2", **more)
    want = get_pool(2).run(state_after, str(whole), 4, timeout=200)
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", **more)
    get_pool(2).run(trained, str(recipe), [], 2, timeout=200)
    for (ours, _, _), (theirs, _, _) in zip(
        get_pool(2).run(state_after, str(recipe), 4, timeout=200), want, strict=True
    ):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    recipe = recipe_for(world, tmp_path, "llama", "tp2", **more)
    found = get_pool(2).run(trained, str(recipe), [], timeout=200)[0]["metrics"]
    for ours, theirs in zip(found, expected(world, "llama", recipe), strict=False):
        assert ours["loss"] == pytest.approx(theirs[0], rel=5e-3)


@pytest.mark.parametrize(("before", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_resume_may_change_the_dtype(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    before: str,
    now: str,
) -> None:
    more: dict[str, Any] = {"steps": 4, "checkpoint": {"every": 2, "resume": "auto"}}
    recipe = recipe_for(world, tmp_path, "llama", "1", optim={"state_dtype": before}, **more)
    get_pool(1).run(trained, str(recipe), [], 2, timeout=200)
    recipe = recipe_for(world, tmp_path, "llama", "1", optim={"state_dtype": now}, **more)
    state, _, _ = get_pool(1).run(state_after, str(recipe), 3, timeout=200)[0]
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, now)}
