"""`optim.name = "muon"`: the same on every mesh as torch.optim.Muon and AdamW on whole matrices in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ndtrain import data
from ndtrain.console.plan import plan_report
from ndtrain.engine.muon import Cut, Part, Piece, orthogonalized, plan_buckets
from ndtrain.errors import RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer
from ndtrain.layout import local_part
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe, load_recipe
from ndtrain.train import cache_root
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.test_plan import plan_for
from tests.test_plan import recipe_for as meta_recipe
from tests.test_train import RING, model_dir, recipe_for, trained, world  # noqa: F401

OPTIM: dict[str, Any] = {"name": "muon", "lr": 0.01, "weight_decay": 0.1}
MESHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("llama", "1", {}),
    "fully sharded": ("llama", "dp_shard2", {}),
    "replicas": ("llama", "dp_replicate2-dp_shard2", {}),
    "two axes": ("llama", "dp_shard2-tp2", {}),
    "fused layers": ("phi3", "dp_shard2-tp2", {}),
    "ring": ("llama", "cp2", RING),
    "experts": ("qwen3_moe", "ep2", {}),
    "experts on two axes": ("qwen3_moe", "dp_shard2-tp2-ep4", {}),
    "the other rate": ("llama", "dp_shard2", {"optim": {"adjust_lr": "original", "momentum": 0.8, "lr": 0.05}}),
}


class Stacks(torch.optim.Optimizer):
    """torch.optim.Muon, which gets each matrix of a stack of them as a parameter."""

    def __init__(self, params: list[nn.Parameter], **more: Any) -> None:
        super().__init__(params, {"lr": 1.0})
        self.params = params
        self.parts = [nn.Parameter(part) for param in params for part in of_stack(param.detach())]
        self.inner = torch.optim.Muon(self.parts, **more)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        grads = (grad for param in self.params for grad in of_stack(param.grad))
        for part, grad in zip(self.parts, grads, strict=True):
            part.grad = grad
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()


def of_stack(tensor: Any) -> list[torch.Tensor]:
    return list(tensor) if tensor.ndim == 3 else [tensor]


def reference(folder: Path, recipe: Recipe) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain loop with torch's optimizers."""
    corpus = data.build_cache(
        data.find_files(recipe.data.path), data.TextEncoder(ByteTokenizer()), cache_dir=cache_root() / "data"
    )
    samples = data.open_samples(corpus, recipe.data.seq_len, packing=recipe.data.packing, pad_id=258)
    order = data.Order(len(samples), seed=recipe.train.seed, shuffle=True)
    attn = tiny.plain_attention(recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attn)
    model.train()
    section = recipe.optim
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in ends]
    muon = Stacks(
        matrices,
        weight_decay=section.weight_decay,
        momentum=section.momentum or 0.95,
        adjust_lr_fn=section.adjust_lr or "match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) in ends], "weight_decay": section.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=tuple(section.betas),
        eps=section.eps,
    )
    total, warm, low = recipe.train.steps or 0, recipe.schedule.warmup_steps or 0, recipe.schedule.min_lr_ratio
    results = []
    for step in range(total):
        rows = [samples[int(i)] for i in order.sample_ids(step * 8, 8)]
        batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
        logits = model(input_ids=batch["input_ids"], use_cache=False, position_ids=batch["position_ids"]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), section.max_grad_norm)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (total - warm), dtype=torch.float64)))
        share = (step + 1) / warm if step < warm else low + (1 - low) * float(cosine)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = section.lr * share
            optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("case", MESHES)
def test_muon_on_a_mesh_is_torchs_on_whole_matrices(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    case: str,
) -> None:
    kind, mesh, more = MESHES[case]
    optim = OPTIM | more.get("optim", {})
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=5, **{**more, "optim": optim})
    result = get_pool(load_recipe(recipe).mesh.least_ranks).run(trained, str(recipe), [], timeout=200)[0]
    want = reference(model_dir(world, kind), load_recipe(recipe))
    for ours, theirs in zip(result["metrics"], want, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx(theirs, rel=1e-3)


def test_a_run_goes_on_alike_on_other_meshes(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    more: dict[str, Any] = {"optim": OPTIM, "steps": 6, "checkpoint": {"every": 2, "resume": "auto"}}
    (tmp_path / "whole").mkdir()
    whole = recipe_for(world, tmp_path / "whole", "qwen3_moe", "1", **more)
    want = get_pool(1).run(trained, str(whole), [], timeout=200)[0]["metrics"]
    for mesh, stop in (("dp_shard2-tp2", 2), ("1", 4), ("ep2", None)):
        recipe = recipe_for(world, tmp_path, "qwen3_moe", mesh, **more)
        found = get_pool(load_recipe(recipe).mesh.least_ranks).run(trained, str(recipe), [], stop, timeout=200)[0]
    for ours, theirs in zip(found["metrics"], want, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-3)


def skipped(path: str) -> tuple[bool, set[str], dict[str, int]]:
    """Whether a step that is to be skipped changes nothing, the names of the state's tensors, and their bytes."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    trainer.train_step()
    engine = trainer.engine
    held = {**dict(engine.model.named_parameters()), **engine.optimizer_tensors()}
    before = {name: local_part(tensor).clone() for name, tensor in held.items()}
    for param in engine.model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    engine.update(1, skip=torch.ones(()))
    same = all(torch.equal(local_part(tensor), before[name]) for name, tensor in held.items())
    state = {name: local_part(tensor).nbytes for name, tensor in engine.optimizer_tensors().items()}
    return same, {name.partition(".")[0] for name in state}, state


def test_a_step_that_is_skipped_changes_nothing_and_state_is_as_inspect_says(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", steps=3, optim=OPTIM)
    for rank, (same, names, state) in enumerate(get_pool(2).run(skipped, str(recipe), timeout=200)):
        assert same and names == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        read = load_recipe(recipe)
        _, plan = plan_for(read, MeshSizes(1, 2, 1, 1))
        report = plan_report(plan, read, rank=rank, ranks_per_node=8)
        assert report["bytes"]["rank"]["optimizer"] == sum(state.values())
        assert not any("embed" in name or "lm_head" in name for name in state if name.startswith("momentum"))


@pytest.mark.parametrize("mesh", [MeshSizes(1, 8, 1, 1), MeshSizes(2, 2, 1, 2), MeshSizes(1, 2, 1, 2, ep=4)])
def test_matrices_are_spread_evenly_and_each_part_goes_and_comes_once(tmp_path: Path, mesh: MeshSizes) -> None:
    config = {"num_hidden_layers": 8, "num_experts": 8}
    recipe = meta_recipe(tmp_path, "qwen3_moe", config, optim=OPTIM)
    _, plan = plan_for(recipe, mesh)
    params = [param for param in plan.params if param.fqn in plan.matrices]
    cuts, ranks = [Cut(param, mesh) for param in params], mesh.world_size
    limit = 1 << 13
    of_rank = [plan_buckets(cuts, rank=rank, ranks=ranks, limit=limit) for rank in range(ranks)]
    assert len(of_rank[0]) > 3
    for buckets in zip(*of_rank, strict=True):
        held = [sum(2 * a * b for a, b in bucket.shapes) for bucket in buckets]
        largest = max(2 * cut.shape[0] * cut.shape[1] for number in buckets[0].params for cut in [cuts[number]])
        assert max(held) <= limit + largest
        for source, here in enumerate(buckets):
            for target, there in enumerate(buckets):
                assert route(here.given[target]) == route(there.taken[source])
                assert route(here.returned[target]) == route(there.received[source])
    load = [sum(a * b for bucket in buckets for a, b in bucket.shapes) for buckets in of_rank]
    assert sum(load) == sum(param.numel for param in params)
    assert max(load) < 1.5 * min(load)


def route(parts: list[Part]) -> list[tuple[int, Piece]]:
    return [(part.param, part.piece) for part in parts]


def test_matrices_with_singular_values_near_one_come_out() -> None:
    torch.manual_seed(0)
    for shape in ((3, 40, 20), (2, 16, 64)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape).bfloat16()).float())
        assert values.min() > 0.5 and values.max() < 1.3


def test_keys_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    for key, value in (("momentum", 0.9), ("adjust_lr", "original")):
        with pytest.raises(RecipeError, match=rf'optim\.{key} = .* is for optim\.name = "muon"; leave it out'):
            meta_recipe(tmp_path, "llama", optim={key: value})
