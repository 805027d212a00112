"""Three steps, a stop, another mesh and three more steps give the same losses as six steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import get_pool
from tests.test_train import ALL_MESHES, model_dir, ranks_of, trained, world  # noqa: F401


def start(world: dict[str, Any], folder: Path, *, mesh: str, steps: int, kind: str, **model: Any) -> dict[str, Any]:  # noqa: F811
    sizes = ALL_MESHES[mesh]
    recipe = tiny.recipe_file(
        folder / f"{mesh}-{steps}.toml",
        model={"name": str(model_dir(world, kind)), **model},
        corpus=world["corpus"],
        run_dir=folder / "run",
        mesh=sizes,
        steps=6,
        batch_ranks=sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        checkpoint={"every": 3, "resume": "auto"},
    )
    return get_pool(ranks_of(sizes)).run(trained, str(recipe), [], steps, timeout=300)[0]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen3", "dp_shard2-tp2", "tp4"),
        ("qwen3", "dp_shard4", "1"),
        ("gemma3_text", "dp_replicate2-dp_shard2", "dp_shard2-tp2"),
        ("qwen3_moe", "dp_shard2-tp2-ep4", "dp_shard2"),
        ("qwen3_moe", "ep2", "dp_shard2-tp2"),
        ("phi3", "dp_shard2-tp2", "cp2"),
        ("llama_two_heads", "cp2", "cp4"),  # ulysses, then a ring
    ],
)
def test_resume_on_another_mesh_continues_loss_rate_and_sample_order(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    first: str,
    second: str,
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = start(world, tmp_path / "whole", mesh=first, steps=6, kind=kind)
    begun = start(world, tmp_path / "cut", mesh=first, steps=3, kind=kind)
    ended = start(world, tmp_path / "cut", mesh=second, steps=6, kind=kind)
    assert [m["step"] for m in ended["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert begun["ids"] + ended["ids"] == whole["ids"]
    assert [m["lr"] for m in ended["metrics"]] == [m["lr"] for m in whole["metrics"]]
    for ours, theirs in zip(ended["metrics"], whole["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_resume_draws_the_dropout_that_the_run_would_have_drawn(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    dropout = {"config": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}}
    runs = {}
    for name, steps in (("whole", [6]), ("cut", [3, 6])):
        (tmp_path / name).mkdir()
        for stop in steps:
            runs[name] = start(world, tmp_path / name, mesh="dp_shard2", steps=stop, kind="gpt2", **dropout)
    losses = {name: [m["loss"] for m in run["metrics"]] for name, run in runs.items()}
    assert losses["cut"] == pytest.approx(losses["whole"], rel=1e-6)
    (tmp_path / "dry").mkdir()
    dry = start(world, tmp_path / "dry", mesh="dp_shard2", steps=1, kind="gpt2")
    assert dry["metrics"][0]["loss"] != pytest.approx(losses["whole"][0], rel=1e-4)


@pytest.mark.parametrize("config", [{"n_layer": 1}, {"layer_norm_epsilon": 0.5}])
def test_resume_with_another_model_is_refused(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    config: dict[str, Any],
) -> None:
    start(world, tmp_path, mesh="1", steps=3, kind="gpt2")
    with pytest.raises(
        AssertionError, match=f"holds another model than this recipe describes: {next(iter(config))} was"
    ):
        start(world, tmp_path, mesh="1", steps=6, kind="gpt2", config=config)


def test_resume_with_other_data_is_refused(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    start(world, tmp_path, mesh="1", steps=3, kind="gpt2")
    recipe = tiny.recipe_file(
        tmp_path / "other.toml",
        model={"name": str(model_dir(world, "gpt2"))},
        corpus=world["corpus"],
        run_dir=tmp_path / "run",
        checkpoint={"resume": "auto"},
        data={"seq_len": 16},
    )
    with pytest.raises(AssertionError, match="was trained on other data"):
        get_pool(1).run(trained, str(recipe), [], timeout=100)
