"""Attention by documents: packed rows give what their documents give alone, without a mask; or masks are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers

from ndtrain.data.batches import documents_of
from ndtrain.parallel.documents import AttentionByDocuments, _is_relative
from tests import tiny
from tests.ranks import get_pool
from tests.test_train import recipe_for, trained, world  # noqa: F401

LENGTHS = ([3, 9, 12, 8], [17, 1, 14])
KINDS = ("llama", "qwen3_gqa", "gemma3_text", "gpt2", "gpt_neox", "phi3", "opt", "deepseek_v3", "qwen3_moe")


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    options = tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]
    config = transformers.AutoConfig.for_model(tiny.VARIANTS.get(kind, kind), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    return model.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_what_their_documents_give_alone(kind: str) -> None:
    model = model_of(kind)
    size = sum(LENGTHS[0])
    ids = torch.randint(3, 250, (len(LENGTHS), size))
    weights = torch.randn(len(LENGTHS), size, 1)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    alone = torch.zeros(len(LENGTHS), size, model.config.get_text_config().vocab_size)
    for row, lengths in enumerate(LENGTHS):
        for first, end in zip(np.cumsum([0, *lengths]), np.cumsum(lengths), strict=False):
            part = model(input_ids=ids[row : row + 1, first:end], use_cache=False).logits
            (part * weights[row : row + 1, first:end]).sum().backward()
            alone[row, first:end] = part[0].detach()
    expected = gradients(model)
    masks: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    by_documents = AttentionByDocuments(model)
    documents = torch.from_numpy(documents_of(positions.numpy()))
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", recorded), by_documents.given(documents):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        (packed * weights).sum().backward()
    assert masks and all(mask is None or mask.shape[-1] < size for mask in masks), "no mask of a whole row"
    assert kind == "gemma3_text" or masks.count(None) == len(masks)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    # Outside, and for rows of one document, all is as before.
    one = torch.arange(size)[None]
    whole = model(input_ids=ids[:1], position_ids=one, use_cache=False).logits
    with by_documents.given(torch.from_numpy(documents_of(one.numpy()))):
        torch.testing.assert_close(model(input_ids=ids[:1], position_ids=one, use_cache=False).logits, whole)


def kept(path: str, breaks: bool) -> tuple[bool, list[str]]:
    """Whether attention by documents is kept by the proof, and what was said."""
    from ndtrain.parallel import documents
    from tests.trainers import Said, trainer_of

    said = Said()
    # A document that begins one token late.
    bounds = documents.document_bounds
    wrong = lambda found: [[0, *(first + 1 for first in row[1:])] for row in bounds(found)]  # noqa: E731
    with mock.patch.object(documents, "document_bounds", wrong if breaks else bounds):
        trainer = trainer_of(path, said=said)
        trainer.prepare()
        trainer.train_step()
    return trainer.engine.documents.enabled, said.said  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "breaks"), [("llama", False), ("llama", True), ("falcon", False), ("gpt_oss", False)])
def test_the_proof_keeps_it_only_where_it_computes_the_same(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    breaks: bool,
) -> None:
    recipe = recipe_for(world, tmp_path, kind, "tp2", steps=3)
    enabled, said = get_pool(2).run(kept, str(recipe), breaks, timeout=200)[0]
    assert enabled == (kind != "falcon" and not breaks), "falcon has attention of its own"
    assert any("attention works under masks" in line for line in said) != enabled
    # Remembered: a second start proves nothing and has the same.
    assert get_pool(2).run(kept, str(recipe), False, timeout=200)[0][0] == enabled


def test_recomputed_blocks_keep_documents_apart_in_the_backward_pass(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "qwen3", "1", steps=3)
    runs = []
    for number, overrides in enumerate((["model.attn=sdpa"], ["train.activation_checkpointing=full"])):
        more = [*overrides, f"run.dir={tmp_path}/{number}"]
        found = get_pool(1).run(trained, str(recipe), more, timeout=100)[0]["metrics"]
        runs.append([(line["loss"], line["grad_norm"]) for line in found])
    assert runs[1] == [pytest.approx(pair, rel=1e-5) for pair in runs[0]]


def trained_at_once(path: str, overrides: list[str]) -> dict[str, Any]:
    """A run in which one function takes all documents, as on CUDA, where it is a kernel that is proved."""
    with (
        mock.patch("ndtrain.engine.engine.attention_by_documents", lambda model, *_, **__: at_once(model)),
        mock.patch("ndtrain.parallel.fused.prove", lambda *_: "one kernel"),
    ):
        return trained(path, overrides, proves=True)


def at_once(model: Any) -> AttentionByDocuments:
    return AttentionByDocuments(model, fused=True)


def kept_at_once(path: str) -> tuple[bool, list[str], float]:
    """Whether one kernel for all documents is kept where it fails, what was said, and the loss of a step."""
    from tests.trainers import Said, trainer_of

    said = Said()
    with (
        mock.patch("ndtrain.engine.engine.attention_by_documents", lambda model, *_, **__: at_once(model)),
        mock.patch("ndtrain.parallel.fused.prove", lambda *_: "one kernel"),
        mock.patch("ndtrain.parallel.fused.by_scores", side_effect=RuntimeError("no kernel for this card")),
    ):
        trainer = trainer_of(path, said=said)
        trainer.prepare()
        made = trainer.train_step()
    return trainer.engine.documents.enabled, said.said, made.loss  # type: ignore[union-attr]


def test_a_kernel_that_fails_leaves_the_masks(world: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", steps=3)
    enabled, said, loss = get_pool(2).run(kept_at_once, str(recipe), timeout=200)[0]
    assert not enabled and any(
        "attention works under masks, since" in line and "for this card" in line for line in said
    )
    found = get_pool(2).run(trained, str(recipe), [f"run.dir={tmp_path}/other", "model.attn=sdpa"], timeout=100)
    assert loss == pytest.approx(found[0]["metrics"][0]["loss"], rel=1e-5)


# gpt_oss makes masks that keep no documents apart, so that only attention by documents packs it.
@pytest.mark.parametrize("kind", ["gpt_oss", "gemma3_text"])
def test_documents_are_apart_whatever_attends(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    runs: list[list[Any]] = []
    for name, mesh, train, overrides in (
        ("one by one", "1", trained, []),
        ("at once", "1", trained_at_once, []),
        ("ring", "cp2", trained, ["cp.kind=ring"]),
        ("ulysses", "cp2", trained, ["cp.kind=ulysses"]),
        ("ulysses at once", "cp2", trained_at_once, ["cp.kind=ulysses"]),
    ):
        recipe = recipe_for(world, tmp_path, kind, mesh, steps=3)
        more = [*overrides, f"run.dir={tmp_path}/{name}"]
        found = get_pool(1 if mesh == "1" else 2).run(train, str(recipe), more, timeout=100)[0]["metrics"]
        runs.append([pytest.approx((line["loss"], line["grad_norm"]), rel=1e-4) for line in found])
    assert all([pair.expected for pair in run] == runs[0] for run in runs[1:])


@pytest.mark.parametrize(("kind", "relative"), [("llama4_text", False), ("deepseek_v32", False), ("gemma3_text", True)])
def test_masks_that_depend_on_places_are_not_cut(kind: str, relative: bool) -> None:
    assert _is_relative(model_of(kind)) == relative


def test_a_model_without_sdpa_gets_eager_attention_unasked(tmp_path: Path) -> None:
    from ndtrain.hf.compat import attention_name
    from ndtrain.hf.model import meta_model
    from ndtrain.recipe import load_recipe

    for kind, found in (("gpt_oss", "eager"), ("llama", "sdpa")):
        recipe = tiny.recipe_file(
            tmp_path / "recipe.toml",
            model={"type": kind, "config": tiny.CONFIGS[kind]},
            corpus=tmp_path,
            run_dir=tmp_path / "run",
        )
        assert attention_name(meta_model(load_recipe(recipe)).config) == found
