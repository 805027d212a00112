"""`train.activation_checkpointing`: the same training by each choice, and nothing computed again that is to be kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from ndtrain.errors import RecipeError
from ndtrain.recipe import load_recipe
from ndtrain.torch_compat import TorchDispatchMode, flash_for_cpu, in_backward, packet_of
from tests import proofs
from tests.ranks import RanksFailed, get_pool
from tests.test_estimate import MODELS, estimated
from tests.test_estimate import recipe_for as dry_recipe
from tests.test_train import RING, recipe_for, world  # noqa: F401

KINDS: list[Any] = ["full", "selective", "offload", {"every": 2}]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("gemma3_text", "1", {}),
    "fully sharded": ("llama", "dp_shard2", {}),
    "sequence parallel": ("llama", "tp2", {}),
    "tensor parallel": ("qwen3", "tp2", {"tp": {"sequence_parallel": False}}),
    "ring": ("qwen3", "cp2", RING),
    "ulysses": ("qwen3", "cp2", {"cp": {"kind": "ulysses"}}),
    "experts": ("qwen3_moe", "ep2", {}),
    "experts under tp": ("qwen3_moe", "dp_shard2-tp2-ep4", {}),
    "experts whose weights change in place": ("qwen3_moe_normed", "ep2", {}),
}


class Seen(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations that only a forward pass has, where they run; and what ranks exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = packet_of(func)
        self.counts["backward" if in_backward() else "forward"][str(packet)] += 1
        return func(*args, **(kwargs or {}))


def steps(path: str, wanted: Any) -> dict[str, Any]:
    """Loss and norm of each step, and the operations of the last one."""
    from tests.trainers import trainer_of

    name = toml(wanted)
    trainer = trainer_of(path, [f"run.dir={path}-{name}", f"train.activation_checkpointing={name}"])
    with proofs.remembered():
        trainer.prepare()
    found = [trainer.train_step() for _ in range(trainer.steps - 1)]
    with Seen() as seen:
        found.append(trainer.train_step())
    return {"steps": [(s.loss, s.grad_norm) for s in found], "counts": seen.counts}


def toml(wanted: Any) -> str:
    return "{every=2}" if isinstance(wanted, dict) else str(wanted)


@pytest.mark.parametrize("case", CASES)
def test_every_choice_trains_alike(world: dict[str, Any], tmp_path: Path, case: str) -> None:  # noqa: F811
    kind, mesh, more = CASES[case]
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=3, **more)
    ranks = load_recipe(recipe, []).mesh.least_ranks
    pool = get_pool(ranks)
    found = {toml(wanted): pool.run(steps, str(recipe), wanted, timeout=200)[0] for wanted in ["none", *KINDS]}
    for wanted in map(toml, KINDS):
        for ours, theirs in zip(found[wanted]["steps"], found["none"]["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-6), wanted
    again = {wanted: recomputed(found["none"]["counts"], one["counts"]) for wanted, one in found.items()}
    attention = {"full": 4, "offload": 4, "selective": 0, "{every=2}": 2}  # of two layers, in two micro batches
    assert {wanted: again[wanted]["attention"] > 0 for wanted in attention} == {w: n > 0 for w, n in attention.items()}
    assert again["selective"]["products"] == 0
    assert again["full"]["products"] == 2 * again["{every=2}"]["products"] > 0
    assert not any(one["choices"] for one in again.values())


@pytest.mark.parametrize("mesh", ["1", "ep2"])
def test_a_model_that_changes_what_is_kept_is_refused_before_its_weights_are_read(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    mesh: str,
) -> None:
    recipe = recipe_for(world, tmp_path, "gpt_oss_biased", mesh, data={"packing": False}, model={"attn": "eager"})
    ranks = load_recipe(recipe).mesh.least_ranks
    message = r'PlanError: gpt_oss changes results of matrix products in place, .*"selective" keeps; set it to "full"'
    with pytest.raises(RanksFailed, match=message):
        get_pool(ranks).run(steps, str(recipe), "selective", timeout=200)


def compiled_steps(path: str, budget: float) -> tuple[list[tuple[float, float]], int]:
    """Loss and norm of each step, and the bytes that a forward pass of compiled blocks keeps."""
    import torch._dynamo

    from tests.trainers import trainer_of

    torch._dynamo.reset()
    choices = [f"train.activation_checkpointing={{budget={budget}}}", "train.compile=true"]
    trainer = trainer_of(path, [f"run.dir={path}-{budget}", *choices])
    with proofs.remembered():
        trainer.prepare()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    found = []
    while trainer.step < trainer.steps:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(trainer.train_step())
    return [(step.loss, step.grad_norm) for step in found], sum(kept.values())


def test_the_compiler_keeps_to_its_budget(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    recipe = recipe_for(world, tmp_path, "llama", "1", steps=3)
    found = {budget: get_pool(1).run(compiled_steps, str(recipe), budget, timeout=300)[0] for budget in (1.0, 0.2)}
    for ours, theirs in zip(found[0.2][0], found[1.0][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found[0.2][1] < 0.8 * found[1.0][1]


def recomputed(none: dict[str, Counter[str]], one: dict[str, Counter[str]]) -> dict[str, int]:
    """How much more of its kinds the backward passes of `one` compute than those of `none`."""
    more = {name: n - none["backward"][name] for name, n in one["backward"].items()}
    products = {"aten.mm", "aten.addmm", "aten.bmm", "aten._grouped_mm", "transformers.grouped_mm_fallback"}
    attention = {str(flash_for_cpu), *(str(p) for p in flop_registry if "attention" in str(p) and "back" not in str(p))}
    return {
        "products": sum(max(0, n) for name, n in more.items() if name in products),
        "attention": sum(n for name, n in more.items() if name in attention),
        "choices": sum(n for name, n in more.items() if name == "aten.topk"),
    }


def test_memory_falls_by_each_choice_and_the_dry_step_knows_it(tmp_path: Path) -> None:
    found = {toml(kind): dry(tmp_path, kind) for kind in ["none", *KINDS]}
    kept = {kind: peak["activations"] for kind, (peak, _) in found.items()}
    assert kept["none"] > kept["{every=2}"] > kept["full"] > kept["offload"]
    assert kept["none"] > kept["selective"] > kept["full"]
    flops = {kind: n for kind, (_, n) in found.items()}
    assert flops["none"] == flops["selective"] < flops["{every=2}"] < flops["full"] == flops["offload"]


def dry(folder: Path, wanted: Any) -> tuple[dict[str, int], int]:
    """Memory by kind at the most, and FLOPs of a step of a Llama of 8 layers that does nothing but attend."""
    model = MODELS["llama"] | {"num_hidden_layers": 8, "vocab_size": 64}
    recipe = dry_recipe(folder, "llama", {}, model, data={"seq_len": 256}, train={"activation_checkpointing": wanted})
    found = estimated(recipe, 1)
    return max((peak for peak in found.peaks.values()), key=lambda peak: peak["activations"]), found.flops


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{ every = 0 }", r"activation_checkpointing = .* must be .*\{ every = a whole number of at least 1 \}"),
        ("{ every = 2, budget = 0.5 }", r"activation_checkpointing = .* must be "),
        ("{}", r"activation_checkpointing = .* must be "),
        ("{ budget = 0.5 }", r"\{ budget = 0.5 \} needs the compiler; set train.compile = true"),
        ("some", r'activation_checkpointing = "some" must be one of "none", "full", "selective", "offload" or'),
    ],
)
def test_choices_that_do_not_exist_are_refused(tmp_path: Path, value: str, message: str) -> None:
    recipe = dry_recipe(tmp_path, "llama", {}, {})
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.toml", [f"train.activation_checkpointing={value}"])
    with pytest.raises(RecipeError, match=r"does not go with train\.compile"):
        load_recipe(tmp_path / "recipe.toml", ["train.activation_checkpointing=offload", "train.compile=true"])
    assert recipe
