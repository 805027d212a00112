"""Dropout under tp, cp and dp drops the elements that one process with the same masks would drop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from ndtrain.parallel.dropout import random_numbers_of
from tests import tiny
from tests.ranks import get_pool
from tests.test_train import ranks_of, trained

ATTENTION, RESIDUAL = 0.4, 0.3
DROPOUT = {"attention_dropout": ATTENTION, "resid_pdrop": RESIDUAL, "embd_pdrop": RESIDUAL}
LAYERS = 2


def register_attention(name: str, drop: Any) -> None:
    """Register a causal attention function that drops weights `[B, H, S, S]` by `drop(weights, rate)`."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        size, groups = query.shape[2], query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.mT * kwargs["scaling"]).masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
        weights = scores.softmax(dim=-1)
        if dropout:
            weights = drop(weights, dropout)
        return (weights @ value).transpose(1, 2), None

    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def recorded(path: str) -> dict[str, Any]:
    """Return the first step's metrics on this rank and its masks of attention and residual dropout in drawing order."""
    from ndtrain.train import Trainer

    seen: dict[str, list[Tensor]] = {"attention": [], "residual": []}

    def draw(weights: Tensor, rate: float) -> Tensor:
        dropped = F.dropout(weights, rate)
        seen["attention"].append((dropped != 0).float() / (1 - rate))
        return dropped

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["residual"].append((output != 0).float() / (1 - RESIDUAL))

    register_attention("recorded_of_the_test", draw)
    first = Trainer.optimize

    def watched(self: Trainer) -> Any:
        for masks in seen.values():
            masks.clear()  # the checks at the start have drawn some
        for module in self.engine.model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(record)
        return first(self)

    Trainer.optimize = watched  # type: ignore[method-assign]
    try:
        metrics = trained(path, ["model.attn=recorded_of_the_test"], proves=True)["metrics"]
    finally:
        Trainer.optimize = first  # type: ignore[method-assign]
    return {"metrics": metrics, **seen}


def replayed(model_dir: Path, recipe_path: Path, attention: list[Tensor], residual: list[Tensor]) -> dict[str, float]:
    """Return loss and gradient norm of the first global batch in plain transformers with these masks."""
    from ndtrain import data
    from ndtrain.hf.tokenizer import ByteTokenizer
    from ndtrain.recipe import load_recipe
    from ndtrain.train import cache_root

    recipe = load_recipe(recipe_path)
    corpus = data.build_cache(
        data.find_files(recipe.data.path), data.TextEncoder(ByteTokenizer()), cache_dir=cache_root() / "data"
    )
    samples = data.open_samples(corpus, recipe.data.seq_len, packing=False, pad_id=258)
    order = data.Order(len(samples), seed=recipe.train.seed, shuffle=True)
    rows = [samples[int(i)] for i in order.sample_ids(0, 8)]
    ids, labels = (torch.stack([torch.as_tensor(r[key]) for r in rows]) for key in ("input_ids", "labels"))
    masks, others = iter(attention), iter(residual)
    register_attention("replayed_of_the_test", lambda weights, rate: weights * next(masks))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        attn_implementation="replayed_of_the_test",
        **DROPOUT,
    ).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x: x * next(others)  # type: ignore[method-assign]
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"loss": loss.item(), "grad_norm": norm.item()}


# Each tp rank has a part of Phi's heads, but all of Phi-3's.
CASES: dict[str, tuple[str, dict[str, int], int]] = {  # model, mesh, residual dropouts in a forward
    "tp2": ("phi", {"dp_shard": 1, "cp": 1, "tp": 2}, 1 + 2 * LAYERS),
    "tp2, heads on every rank": ("phi3", {"dp_shard": 1, "cp": 1, "tp": 2}, 2 * LAYERS),
    "dp_shard2-tp2": ("phi", {"dp_shard": 2, "cp": 1, "tp": 2}, 1 + 2 * LAYERS),
    "cp2-tp2": ("phi", {"dp_shard": 1, "cp": 2, "tp": 2}, 1 + 2 * LAYERS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_dropout_equals_that_of_one_process_with_the_ranks_masks(tmp_path: Path, case: str) -> None:
    kind, sizes, residuals = CASES[case]
    path = tiny.save_model(kind, tmp_path)
    recompute = case == "tp2"
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"name": str(path), "config": DROPOUT},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        mesh=sizes,
        steps=1,
        batch_ranks=sizes["dp_shard"],
        schedule={"warmup_steps": 0},
        data={"packing": False},
        train={"activation_checkpointing": "full" if recompute else "none"},
    )
    ranks = get_pool(ranks_of(sizes)).run(recorded, str(recipe), timeout=300)
    dps, cps = range(sizes["dp_shard"]), range(sizes["cp"])

    def masks(kind: str, call: int, dp: int, cp: int, tp: int) -> Tensor:
        drawn: Tensor = ranks[(dp * len(cps) + cp) * 2 + tp][kind][call]
        return drawn

    for rank in ranks:
        drawn = rank["attention"]
        assert len(drawn) == LAYERS * (1 + recompute)
        # Recomputation starts with the last block.
        assert all(torch.equal(drawn[i], drawn[-1 - i]) for i in range(LAYERS) if recompute)
    attention, residual = [], []
    for layer in range(LAYERS):
        if kind == "phi3":
            assert torch.equal(*(masks("attention", layer, 0, 0, tp) for tp in (0, 1)))
        tps = (0, 1) if kind == "phi" else (0,)
        heads = [torch.cat([masks("attention", layer, dp, cp, tp) for tp in tps for cp in cps], dim=1) for dp in dps]
        attention.append(torch.cat(heads))
        rows = attention[-1].flatten(2).flatten(0, 1)
        assert len(rows.unique(dim=0)) == len(rows) == 8 * 4, "two heads or two rows drop the same"
    for call in range(residuals):
        for dp in dps:
            for cp in cps:
                assert torch.equal(*(masks("residual", call, dp, cp, tp) for tp in (0, 1)))
        parts = [torch.cat([masks("residual", call, dp, cp, 0) for cp in cps], dim=1) for dp in dps]
        residual.append(torch.cat(parts))
        tokens = residual[-1].flatten(0, 1)
        assert len(tokens.unique(dim=0)) == len(tokens) == 8 * 32, "two tokens drop the same"
    (metrics,) = ranks[0]["metrics"]
    want = replayed(path, recipe, attention, residual)
    assert {key: metrics[key] for key in want} == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("kind", "attn"), [("llama", "sdpa"), ("starcoder2", "eager")])
def test_training_with_dropout_runs_where_each_rank_has_its_own_heads(tmp_path: Path, kind: str, attn: str) -> None:
    base = tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]
    losses = []
    for rate in (0.3, 0.0):
        rates = {key: rate for key in ("attention_dropout", "residual_dropout") if kind == "starcoder2" or "att" in key}
        recipe = tiny.recipe_file(
            tmp_path / "recipe.toml",
            model={"type": kind, "attn": attn, "config": {**base, **rates}},
            corpus=tiny.write_corpus(tmp_path / "corpus"),
            run_dir=tmp_path / f"run-{rate}",
            mesh={"dp_shard": 1, "tp": 2},
            steps=1,
            schedule={"warmup_steps": 0},
        )
        losses.append(get_pool(2).run(trained, str(recipe), [], timeout=300)[0]["metrics"][0]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def trained_with_dropout_inside(path: str) -> None:
    """Run `trained` on a model that drops elements of an activation which tp splits."""
    from ndtrain.plan import make

    check = make.refuse.check_dropout

    def spoil(model: Any) -> None:
        check(model)
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.1))

    make.refuse.check_dropout = spoil
    try:
        trained(path, [], proves=True)
    finally:
        make.refuse.check_dropout = check


def test_dropout_outside_attention_of_an_activation_that_tp_splits_is_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama", "config": {**tiny.CONFIGS["llama"], "attention_dropout": 0.1}},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        mesh={"dp_shard": 1, "tp": 2},
    )
    with pytest.raises(AssertionError, match=r"PlanError: llama under mesh\.tp = 2 drops elements of an activation"):
        get_pool(2).run(trained_with_dropout_inside, str(recipe), timeout=300)


def test_random_numbers_of_a_rank_leave_the_shared_ones_unchanged() -> None:
    device, drawn, after = torch.device("cpu"), [], []
    for rank in (0, 1, 1):
        torch.manual_seed(5)
        with random_numbers_of(device, rank):
            drawn.append(torch.rand(8))
        after.append(torch.rand(8))
    assert torch.equal(after[0], after[1])
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
