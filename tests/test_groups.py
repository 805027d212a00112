"""`[[optim.groups]]`: rates and decay of their own, and frozen parameters, on every mesh as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ndtrain.errors import PlanError, RecipeError
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import load_recipe
from tests import proofs
from tests.ranks import RanksFailed, get_pool
from tests.test_plan import plan_for
from tests.test_plan import recipe_for as meta_recipe
from tests.test_train import RING, model_dir, recipe_for, reference, trained, world  # noqa: F401

GROUPS: list[dict[str, Any]] = [
    {"match": ["model.embed_tokens", "model.layers.0.self_attn.*_proj"], "frozen": True},
    {"match": ["model.layers.*.mlp"], "lr": 0.02, "weight_decay": 0.5},
    {"match": ["model.layers.*.*layernorm.weight", "model.norm"], "weight_decay": 0.3},
]
DECAY = 0.1


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """The groups above, for torch."""
    groups: list[dict[str, Any]] = []
    for name, param in model.named_parameters():
        first_attention = name.startswith("model.layers.0.self_attn") and "_proj" in name
        if name == "model.embed_tokens.weight" or first_attention:
            param.requires_grad_(False)
            continue
        group: dict[str, Any] = {"params": [param], "weight_decay": DECAY if param.dim() > 1 else 0.0}
        if ".mlp." in name:
            group |= {"peak": 0.02, "weight_decay": 0.5}
        elif "layernorm" in name or name == "model.norm.weight":
            group["weight_decay"] = 0.3
        groups.append(group)
    return groups


MESHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("llama", "1", {}),
    "fully sharded": ("llama", "dp_shard2", {}),
    "replicas": ("llama", "dp_replicate2-dp_shard2", {}),
    "sequence parallel": ("llama", "dp_shard2-tp2", {}),
    "tensor parallel, recomputed": (
        *("llama", "tp2"),
        {"tp": {"sequence_parallel": False}, "train": {"activation_checkpointing": "full"}},
    ),
    "ring": ("llama", "cp2", RING),
    "experts": ("qwen3_moe", "ep2", {}),
}


@pytest.mark.parametrize("case", MESHES)
def test_groups_train_like_those_of_torch(world: dict[str, Any], tmp_path: Path, case: str) -> None:  # noqa: F811
    kind, mesh, more = MESHES[case]
    optim = {"groups": GROUPS, "weight_decay": DECAY}
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=4, optim=optim, **more)
    result = get_pool(load_recipe(recipe).mesh.least_ranks).run(trained, str(recipe), [], timeout=200)[0]
    want = reference(model_dir(world, kind), recipe, grouped=grouped)
    usual = reference(model_dir(world, kind), recipe)
    assert want[-1][0] != pytest.approx(usual[-1][0], rel=1e-3), "the groups change something"
    for ours, theirs in zip(result["metrics"], want, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx(theirs, rel=1e-4)


def frozen_after(path: str, steps: int) -> tuple[bool, set[str], set[str], float]:
    """Whether frozen parameters are as before some steps, those without gradients, those with state, and the loss."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    named = dict(trainer.engine.model.named_parameters())
    before = {fqn: named[fqn].detach().clone() for fqn in trainer.plan.frozen}
    while trainer.step < steps:
        trainer.train_step()
    same = all(torch.equal(local(named[fqn]), local(value)) for fqn, value in before.items())
    trainer.saving.store.settle()
    state = {name.partition(".")[2] for name in trainer.engine.optimizer_tensors()}
    assert trainer.last is not None
    return same, {fqn for fqn, param in named.items() if not param.requires_grad}, state, trainer.last.loss


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_what_is_frozen_stays_and_has_no_state_through_a_resume_on_another_mesh(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    more: dict[str, Any] = {"optim": {"groups": GROUPS}, "steps": 4, "checkpoint": {"every": 2, "resume": "auto"}}
    (tmp_path / "whole").mkdir()
    whole = recipe_for(world, tmp_path / "whole", "llama", "1", **more)
    same, frozen, state, loss = get_pool(1).run(frozen_after, str(whole), 4, timeout=200)[0]
    assert same and len(frozen) == 5 and not frozen & state and state
    recipe = recipe_for(world, tmp_path, "llama", "tp2", **more)
    get_pool(2).run(frozen_after, str(recipe), 2, timeout=200)
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", **more)
    assert get_pool(2).run(frozen_after, str(recipe), 4, timeout=200)[0][3] == pytest.approx(loss, rel=1e-5)


def test_a_resume_that_trains_other_parameters_is_refused(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    goes_on: dict[str, Any] = {"checkpoint": {"resume": "auto"}, "steps": 4}
    recipe = recipe_for(world, tmp_path, "llama", "1", **goes_on, optim={"groups": GROUPS})
    get_pool(1).run(trained, str(recipe), [], timeout=200)
    recipe = recipe_for(world, tmp_path, "llama", "1", **goes_on, optim={"groups": GROUPS[1:]})
    with pytest.raises(RanksFailed, match=r"RecipeError: .*optim\.groups was .* optimizer state for what was trained"):
        get_pool(1).run(trained, str(recipe), [], timeout=200)
    slower = [GROUPS[0], {**GROUPS[1], "lr": 0.001}]
    recipe = recipe_for(world, tmp_path, "llama", "1", **goes_on, optim={"groups": slower})
    get_pool(1).run(trained, str(recipe), [], timeout=200)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"match": ["model.layer.*.mlp"], "lr": 1.0}],
            r'groups\[0\]\.match: "model.layer.\*.mlp" matches nothing .*did',
        ),
        ([{"match": ["model", "lm_head"], "frozen": True}], "freezes all parameters"),
        ([{"match": ["model"], "lr": 1.0}, {"match": ["model.norm"], "lr": 2.0}], r"groups\[1\]: the groups before it"),
    ],
)
def test_groups_that_say_nothing_are_refused_by_the_plan(tmp_path: Path, groups: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_for(meta_recipe(tmp_path, "llama", optim={"groups": groups}), MeshSizes(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"match": ["a"]}, r"optim\.groups\[0\] changes nothing; give it lr, weight_decay or frozen = true"),
        ({"match": ["a"], "frozen": True, "lr": 1.0}, r"optim\.groups\[0\]\.lr says nothing of frozen parameters"),
        ({"match": [], "lr": 1.0}, r"optim\.groups\[0\]\.match = \[\] must be an array"),
        ({"lr": 1.0}, r"optim\.groups\[0\]\.match is required"),
        ({"match": ["a"], "lrr": 1.0}, r'optim\.groups\[0\] has no key "lrr"; did you mean "lr"\?'),
        ({"match": ["a"], "lr": -1.0}, r"optim\.groups\[0\]\.lr = -1\.0 must be a number of at least 0"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(tmp_path: Path, group: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        meta_recipe(tmp_path, "llama", optim={"groups": [group]})


def test_a_tied_weight_is_matched_by_each_of_its_names(tmp_path: Path) -> None:
    groups = [{"match": ["lm_head"], "lr": 0.5}]
    tied = {"tie_word_embeddings": True}
    _, plan = plan_for(meta_recipe(tmp_path, "qwen3", tied, optim={"groups": groups}), MeshSizes(1, 1, 1, 1))
    assert plan.groups == {"model.embed_tokens.weight": 0}
    two = [{"match": ["model.embed_tokens"], "lr": 0.1}, {"match": ["lm_head", "model.norm"], "lr": 0.5}]
    with pytest.raises(PlanError, match=r"are one tied weight, in optim\.groups\[0\] and \[1\]; name it in one"):
        plan_for(meta_recipe(tmp_path, "qwen3", tied, optim={"groups": two}), MeshSizes(1, 1, 1, 1))
