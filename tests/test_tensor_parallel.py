"""Tensor parallelism works on plain tensors, and sums the gradient of an input once for all layers that share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ndtrain.mesh import MeshSizes
from ndtrain.parallel import exchange
from ndtrain.torch_compat import TorchDispatchMode
from tests import proofs
from tests.ranks import get_pool
from tests.test_plan import plan_for
from tests.test_plan import recipe_for as meta_recipe
from tests.test_train import recipe_for, world  # noqa: F401

WHOLE = {"tp": {"sequence_parallel": False}}


class Dispatched(TorchDispatchMode):  # type: ignore[misc]
    """Notes the operations that get a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(path: str) -> tuple[int, list[str]]:
    """The parameters that are DTensors, and what is done with DTensors in forward, backward, clipping and update."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    trainer.train_step()
    with Dispatched() as mode:
        trainer.train_step()
    return sum(isinstance(p, DTensor) for p in trainer.engine.model.parameters()), mode.found


@pytest.mark.parametrize("more", [{}, WHOLE], ids=["sequence parallel", "whole sequences"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "phi3", "mixtral", "deepseek_v3"])
def test_no_dtensor_is_dispatched_in_a_step(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    more: dict[str, Any],
) -> None:
    recipe = recipe_for(world, tmp_path, kind, "tp2", steps=3, **more)
    count, found = get_pool(2).run(dispatched, str(recipe), timeout=200)[0]
    assert count and not found


def test_layers_that_share_their_input_are_planned_together(tmp_path: Path) -> None:
    _, plan = plan_for(meta_recipe(tmp_path, "qwen3", **WHOLE), MeshSizes(1, 1, 1, 2))
    first = {region.name: region.columns for region in plan.tp_shared if ".layers.0." in region.name}
    assert first == {
        f"model.layers.0.{name}": tuple(f"model.layers.0.{name}.{leaf}" for leaf in leaves)
        for name, leaves in {
            "self_attn": ("k_proj", "q_proj", "v_proj"),
            "mlp": ("gate_proj", "up_proj"),
        }.items()
    }


def test_layers_of_which_one_gets_something_else_are_not_planned_together(tmp_path: Path) -> None:
    """Attention over another sequence gives its keys and values that one."""
    _, plan = plan_for(meta_recipe(tmp_path, "bart", data={"packing": False}, **WHOLE), MeshSizes(1, 1, 1, 2))
    assert not [region for region in plan.tp_shared if "attn" in region.name]


def exchanged(rows: int, length: int, width: int) -> bool:
    """Whether what is gathered again is what was, and gradients are right, where the ranks do not divide."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    torch.manual_seed(0)
    whole, weights = torch.randn(2, rows, length, width)
    right = []
    for partial in (False, True):
        x = whole.clone().requires_grad_()
        part = exchange.ScatterRows.apply(x / ranks if partial else x, group, partial)
        again = exchange.GatherRows.apply(part, rows, length, group, partial)
        (again * (weights / ranks if partial else weights)).sum().backward()
        right += [torch.allclose(again, whole), torch.allclose(x.grad * (ranks if partial else 1), weights)]
        right.append(part.shape == (1, -(-rows * length // ranks), width))
    x = whole.clone().requires_grad_()
    again = exchange.GatherFeatures.apply(exchange.SplitFeatures.apply(x, group), width, group)
    (again * weights).sum().backward()
    return all([*right, torch.equal(again, whole), torch.equal(x.grad, weights)])


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 5, 7), (3, 3, 1)])
def test_what_is_split_and_gathered_is_as_before_with_its_gradient(shape: tuple[int, ...]) -> None:
    assert all(get_pool(2).run(exchanged, *shape, timeout=60))
