"""`train.compile`: the same training as without it on every mesh, no graph broken, and none compiled after step 2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ndtrain.recipe import load_recipe
from tests import proofs
from tests.ranks import RanksFailed, get_pool
from tests.test_train import recipe_for, world  # noqa: F401

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("gemma3_text", "1", {}),
    "fully sharded, recomputed": ("llama", "dp_shard2", {"train": {"activation_checkpointing": "full"}}),
    "fully sharded, partly recomputed": ("llama", "dp_shard2", {"train": {"activation_checkpointing": "selective"}}),
    "sequence parallel": ("llama", "tp2", {}),
    "tensor parallel": ("qwen3", "tp2", {"tp": {"sequence_parallel": False}}),
    "ring": ("qwen3", "cp2", {"cp": {"kind": "ring"}}),
    "ulysses": ("qwen3", "cp2", {"cp": {"kind": "ulysses"}}),
    "experts of each rank": ("qwen3_moe", "dp_shard2", {}),
    "experts over ranks": ("qwen3_moe", "ep2", {}),
    "experts, recomputed": ("qwen3_moe_normed", "dp_shard2", {"train": {"activation_checkpointing": "full"}}),
}


def trained(path: str, compiles: bool) -> dict[str, Any]:
    """Loss and norm of each step, what was said, and what dynamo has counted after the second and the last step."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    from tests.trainers import Said, trainer_of

    torch._dynamo.reset()
    counters.clear()
    said = Said()
    trainer = trainer_of(path, [f"train.compile={str(compiles).lower()}", f"run.dir={path}-{compiles}"], said=said)
    with proofs.remembered():
        trainer.prepare()
    counts = []
    steps = []
    while trainer.step < trainer.steps:
        steps.append(trainer.train_step())
        counts.append(counters["stats"]["unique_graphs"])
    found = [(step.loss, step.grad_norm) for step in steps]
    return {"steps": found, "said": said.said, "graphs": counts, "breaks": list(counters["graph_break"])}


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_same(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    case: str,
) -> None:
    kind, mesh, more = CASES[case]
    # Rows of one document alone have no mask, and so a graph of their own: here all have several.
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "A text. " * (number % 3)}) + "\n" for number in range(120)))
    recipe = recipe_for(world, tmp_path, kind, mesh, steps=4, data={"path": str(texts)}, **more)
    ranks = load_recipe(recipe).mesh.least_ranks
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "inductor")}):
        eager, compiled = (get_pool(ranks).run(trained, str(recipe), on, timeout=300)[0] for on in (False, True))
    assert compiled["steps"] == [pytest.approx(pair, rel=2e-5) for pair in eager["steps"]]
    assert eager["graphs"][-1] == 0 < compiled["graphs"][0]
    assert compiled["graphs"][1] == compiled["graphs"][-1], "nothing is compiled after the second step"
    (line,) = [line for line in compiled["said"] if "train.compile" in line]
    if mesh == "cp2":
        assert "attention" in line
    else:
        assert not compiled["breaks"], compiled["breaks"]
        assert ("eager" in line) == (mesh == "ep2")


def without_a_compiler(path: str) -> None:
    from tests.trainers import trainer_of

    with mock.patch("torch.compile", side_effect=RuntimeError("no C++ compiler")), proofs.remembered():
        trainer_of(path, ["train.compile=true"]).prepare()


def test_a_machine_that_cannot_compile_is_told_so(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    recipe = recipe_for(world, tmp_path, "llama", "1", steps=3)
    with pytest.raises(RanksFailed, match=r"RecipeError: train\.compile = true: .* \(.*no C\+\+ compiler\); mend that"):
        get_pool(1).run(without_a_compiler, str(recipe), timeout=100)
