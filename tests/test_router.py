"""The routers' auxiliary loss equals transformers' for each sequence, on every mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.hf.routers import sequence_ids
from tests import tiny
from tests.matrix import worker
from tests.ranks import get_pool
from tests.test_train import ranks_of, trained

COEFFICIENT = 0.5
MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "dp_shard2": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
    "ep2": {"dp_shard": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Build models, each with a reference run of plain transformers with its own auxiliary loss."""
    folder = str(tmp_path_factory.mktemp("models"))
    return {
        kind: get_pool(1).run(worker.build, kind, tiny.MATRIX[kind], folder, True, timeout=300)[0]
        for kind in ("qwen3_moe", "mixtral")
    }


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_loss_and_every_gradient_equal_those_of_plain_transformers(
    models: dict[str, Any], kind: str, mesh: str
) -> None:
    at_once = {"train": {"micro_batch_size": worker.ROWS // MESHES[mesh].get("dp_shard", 1)}}
    more = at_once if kind == "mixtral" else {}  # else two micro batches
    for found in get_pool(ranks_of(MESHES[mesh])).run(worker.cell, models[kind], MESHES[mesh], more, timeout=300):
        assert found["status"] == "agrees", found


def first_step(model_dir: Path, recipe_path: Path) -> dict[str, float]:
    """Return loss, auxiliary loss and gradient norm of the recipe's first global batch in plain transformers."""
    from ndtrain import data
    from ndtrain.hf.tokenizer import ByteTokenizer
    from ndtrain.recipe import load_recipe
    from ndtrain.train import cache_root

    recipe = load_recipe(recipe_path)
    corpus = data.build_cache(
        data.find_files(recipe.data.path), data.TextEncoder(ByteTokenizer()), cache_dir=cache_root() / "data"
    )
    samples = data.open_samples(corpus, recipe.data.seq_len, packing=recipe.data.packing, pad_id=258)
    order = data.Order(len(samples), seed=recipe.train.seed, shuffle=True)
    rows = [samples[int(i)] for i in order.sample_ids(0, recipe.train.global_batch_size)]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loss, aux, targets = torch.zeros(()), torch.zeros(()), 0
    for row in rows:
        batch = {key: torch.as_tensor(value)[None] for key, value in row.items()}
        real = batch["input_ids"][0] != 258
        inputs = {"input_ids": batch["input_ids"][:, real], "position_ids": batch["position_ids"][:, real]}
        found = model(**inputs, use_cache=False, output_router_logits=True)
        labels = batch["labels"][:, real].flatten()
        loss = loss + torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), labels, reduction="sum")
        aux = aux + found.aux_loss / len(rows)
        targets += int((labels != -100).sum())
    loss = loss / targets
    (loss + COEFFICIENT * aux).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"loss": loss.item(), "aux_loss": aux.item(), "grad_norm": norm.item()}


# (mesh, what the recipe adds): padding, filler rows, documents in one row, blocks that are computed again.
DATA: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "packed, rows that do not divide": ({"dp_shard": 2}, {"train": {"micro_batch_size": 3}}),
    "padded, a sequence that does not divide": (
        {"dp_shard": 2, "cp": 2},
        {"data": {"packing": False, "seq_len": 31}, "train": {"activation_checkpointing": "full"}},
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_padding_and_filler_rows_do_not_change_the_auxiliary_loss(tmp_path: Path, case: str) -> None:
    mesh, more = DATA[case]
    path = tiny.save_model("qwen3_moe", tmp_path)
    config = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"name": str(path), "config": config},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        mesh=mesh,
        steps=1,
        batch_ranks=2,
        **{**more, "schedule": {"warmup_steps": 0}},
    )
    (metrics,) = get_pool(ranks_of(mesh)).run(trained, str(recipe), [], timeout=300)[0]["metrics"]
    want = first_step(path, recipe)
    assert {key: metrics[key] for key in want} == pytest.approx(want, rel=1e-5)


def test_metrics_have_aux_loss_only_if_the_recipe_asks_for_it(tmp_path: Path) -> None:
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "qwen3_moe", "config": tiny.CONFIGS["qwen3_moe"]},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        steps=1,
        schedule={"warmup_steps": 0},
    )
    (metrics,) = get_pool(1).run(trained, str(recipe), [], timeout=300)[0]["metrics"]
    assert "aux_loss" not in metrics and "loss" in metrics


def test_sequence_ids_mark_tokens_after_the_last_target_as_padding() -> None:
    labels = torch.tensor([[5, -100, 7, -100, -100], [-100] * 5, [-100, -100, -100, -100, 9]])
    assert sequence_ids(labels).tolist() == [[0, 0, 0, 0, -100], [-100] * 5, [2] * 5]
