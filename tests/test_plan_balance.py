"""The fullest rank holds little more than the mean, or the plan and `inspect` give the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ndtrain.console.inspect import inspect_text
from ndtrain.mesh import MeshSizes
from ndtrain.plan import EVEN
from tests.matrix import balance
from tests.test_plan import plan_for, recipe_for

TYPES = [
    "bloom", "deepseek_v32", "doge", "olmo_hybrid", "gemma3_text", "gpt2", "gpt_oss", "jamba", "llama4_text", "mixtral",
    "phi3", "qwen3_moe", "qwen3_next", "xlstm", "zamba2",
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_mesh_of_the_matrix_is_even_or_gives_the_reason(tmp_path: Path, kind: str) -> None:
    found = balance.plans(kind, balance.CONFIGS[kind], tmp_path)
    assert len(found) >= 3
    for name, plan in found.items():
        assert plan.imbalance >= 1, name
        assert balance.explained(plan), (name, plan.uneven())
        assert (plan.uneven() == ()) == (plan.imbalance <= EVEN), name


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", MeshSizes(1, 3, 1, 4)),
        ("qwen3", MeshSizes(2, 7)),
        ("qwen3_moe", MeshSizes(1, 6, 1, 2, 4)),
        ("phi3", MeshSizes(1, 5, 1, 4)),
        ("gemma3_text", MeshSizes(1, 3, 2, 2)),
    ],
)
def test_rank_0_holds_the_most_and_imbalance_is_its_ratio_to_the_mean(
    tmp_path: Path, kind: str, sizes: MeshSizes
) -> None:
    _, plan = plan_for(recipe_for(tmp_path, kind), sizes)
    held = [plan.rank_numel(rank) for rank in range(sizes.world_size)]
    assert held[0] == max(held)
    assert plan.mean_numel == pytest.approx(sum(held) / len(held))
    assert plan.imbalance == pytest.approx(max(held) * len(held) / sum(held))
    for param in plan.params:
        assert param.local_numel(sizes, 0) == max(param.local_numel(sizes, rank) for rank in range(sizes.world_size))


def text(tmp_path: Path, kind: str, config: dict[str, Any], world_size: int, **sections: Any) -> tuple[str, Any]:
    recipe = recipe_for(tmp_path, kind, config, **sections)
    arguments = {"world_size": world_size, "rank": 0}
    return inspect_text(recipe, **arguments, as_json=False), json.loads(inspect_text(recipe, **arguments, as_json=True))


def test_inspect_names_the_parameters_that_fill_the_largest_rank(tmp_path: Path) -> None:
    # 4 experts and features 96, 64 and 32 over 7 ranks: no dim divides evenly
    shown, report = text(tmp_path, "qwen3_moe", {}, 7)
    (line,) = [line for line in shown.splitlines() if "times the mean" in line]
    assert line.startswith("largest rank holds 1.35 times the mean, because ")
    assert "model.layers.{0-1}.mlp.experts.gate_up_proj has dim 0 = 4 over 7 ranks" in line
    first = report["imbalance"]["because"][0]
    assert report["imbalance"]["ratio"] == pytest.approx(1.35, abs=0.01)
    assert first["dims"] == {"0": 7} and first["shape"][0] == 4
    assert first["fqns"] == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]


def test_inspect_prints_no_reason_if_the_ranks_are_even(tmp_path: Path) -> None:
    shown, report = text(tmp_path, "qwen3_moe", {}, 8)
    assert "times the mean" not in shown
    assert report["imbalance"]["because"] == []
    assert 1 <= report["imbalance"]["ratio"] <= EVEN


def test_inspect_explains_the_imbalance_of_16384_ranks(tmp_path: Path) -> None:
    config = {"num_experts": 128, "hidden_size": 4096, "moe_intermediate_size": 1536, "vocab_size": 151936}
    shown, report = text(tmp_path, "qwen3_moe", config, 16384)
    assert "dim 0 = 128 over 16384 ranks" in shown
    assert report["imbalance"]["ratio"] > 50
    shown, report = text(tmp_path, "qwen3_moe", config, 16384, mesh={"dp_replicate": 16, "dp_shard": 1024})
    assert report["imbalance"]["ratio"] <= EVEN
