"""`fsdp.accumulate`: gradients are reduced after each micro batch or once, and are the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ndtrain.engine.accumulate import accumulates_locally
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import load_recipe
from ndtrain.torch_compat import TorchDispatchMode, packet_of
from tests import proofs
from tests.ranks import get_pool
from tests.test_plan import plan_for
from tests.test_plan import recipe_for as meta_recipe
from tests.test_train import RING, expected, recipe_for, world  # noqa: F401

MESHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fully sharded": ("llama", "dp_shard2", {}),
    "replicas": ("llama", "dp_replicate2-dp_shard2", {}),
    "two axes": ("qwen3", "dp_shard2-tp2", {}),
    "ring": ("llama", "cp2", RING),
    "experts": ("qwen3_moe", "ep2", {}),
    "experts, cut over efsdp": ("qwen3_moe", "ep2-efsdp2", {}),
    "in bfloat16": ("llama", "dp_shard2", {"fsdp": {"param_dtype": "bfloat16"}}),
    "recomputed": ("llama", "dp_shard2", {"train": {"activation_checkpointing": "full"}}),
}


class Sent(TorchDispatchMode):  # type: ignore[misc]
    """Counts what ranks exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[packet_of(func).__name__] += 1
        return func(*args, **(kwargs or {}))


def steps(path: str, how: str) -> tuple[list[tuple[float, float]], int]:
    """Loss and norm of each step, and how often the last one reduces gradients to shards."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path, [f"run.dir={path}-{how}", f"fsdp.accumulate={how}"])
    with proofs.remembered():
        trainer.prepare()
    found = [trainer.train_step() for _ in range(trainer.steps - 1)]
    with Sent() as sent:
        found.append(trainer.train_step())
    reduced = sum(n for name, n in sent.found.items() if "reduce_scatter" in name)
    return [(step.loss, step.grad_norm) for step in found], reduced


@pytest.mark.parametrize("case", MESHES)
def test_gradients_are_the_same_and_reduced_once(world: dict[str, Any], tmp_path: Path, case: str) -> None:  # noqa: F811
    kind, mesh, more = MESHES[case]
    tp = {"tp": {"sequence_parallel": False}}  # which reduces activations
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=4, **tp, **more)
    pool = get_pool(load_recipe(recipe).mesh.least_ranks)
    sharded, local = (pool.run(steps, str(recipe), how, timeout=200)[0] for how in ("sharded", "local"))
    rel = 1e-4 if case != "in bfloat16" else 1e-2
    for ours, other, theirs in zip(local[0], sharded[0], expected(world, kind, recipe), strict=True):
        assert ours == pytest.approx(other, rel=rel) and ours == pytest.approx(theirs, rel=rel)
    assert sharded[1] == 2 * local[1] > 0


def test_a_device_with_room_adds_up_whole_gradients(tmp_path: Path) -> None:
    micro: dict[str, Any] = {"train": {"global_batch_size": 8, "micro_batch_size": 1}}
    sizes = MeshSizes(1, 4, 1, 2)

    def decided(memory: float | None, how: str = "auto", **train: int) -> bool:
        recipe = meta_recipe(tmp_path, "llama", fsdp={"accumulate": how}, train=micro["train"] | train)
        _, plan = plan_for(recipe, sizes)
        return accumulates_locally(recipe, plan, memory)

    _, plan = plan_for(meta_recipe(tmp_path, "llama", **micro), sizes)
    states, whole = 16 * plan.rank_numel(0), 4 * plan.numel / 2  # all matrices are cut over tp
    assert decided(2.1 * (states + whole)) and not decided(2 * states + whole)
    assert not decided(None) and not decided(1e18, "sharded") and decided(None, "local")
    assert not decided(1e18, micro_batch_size=2), "one micro batch has nothing to add"
