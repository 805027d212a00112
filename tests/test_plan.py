"""Plans hold the right units and styles, and refuse the rest. test_plan_applied.py tests that they are carried out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.errors import PlanError
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import Recipe, load_recipe
from tests import tiny

GPT2_DROPOUT = {"summary_first_dropout": 0.0}
EXTRA: dict[str, dict[str, Any]] = {
    "cohere": {**tiny.DENSE, "tie_word_embeddings": True},
    "granite": {**tiny.DENSE, "tie_word_embeddings": True},
    "falcon": {"vocab_size": 261, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"vocab_size": 261, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "deepseek_v3": {"num_hidden_layers": 2, "first_k_dense_replace": 1},  # else of the released shape
    "mamba": {"vocab_size": 261, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4},
}


def recipe_for(tmp_path: Path, kind: str, config: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    base = copy.deepcopy(tiny.CONFIGS.get(kind) or EXTRA.get(kind) or tiny.MATRIX[kind])
    eager = {"attn": "eager"} if kind in ("gemma2", "mamba", "bloom", "gpt_oss", "prophetnet", "git") else {}
    path = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": kind, "config": {**base, **(config or {})}, **eager},
        corpus=tmp_path,
        run_dir=tmp_path / "run",
        **sections,
    )
    return load_recipe(path)


def plan_for(recipe: Recipe, sizes: MeshSizes) -> tuple[transformers.PreTrainedModel, Plan]:
    model = meta_model(recipe)
    return model, make_plan(model, sizes, recipe)


@pytest.mark.parametrize(
    "sizes", [MeshSizes(1, 3, 1, 4), MeshSizes(2, 2, 1, 2), MeshSizes(1, 16, 1, 2), MeshSizes(1, 7)]
)
def test_the_boxes_of_all_ranks_cover_every_parameter_once(tmp_path: Path, sizes: MeshSizes) -> None:
    _, plan = plan_for(recipe_for(tmp_path, "qwen3"), sizes)
    for param in plan.params:
        if "tp" in param.axes and all(not p.is_shard() or p.dim != 0 for p in param.placements[-1:]):
            copies = sizes.dp_replicate * (sizes.tp if param.placements[-1].is_replicate() else 1)
        else:
            copies = sizes.dp_replicate * (1 if "tp" in param.axes else sizes.tp)
        count = torch.zeros(param.shape, dtype=torch.int32)
        for rank in range(sizes.world_size):
            for box in param.boxes(sizes, rank):
                count[box.inside] += 1
        assert bool((count == copies).all()), param.fqn


def test_tp_coverage_counts_what_is_cut(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "llama")
    assert plan_for(recipe, MeshSizes(1, 4))[1].tp_coverage == 0
    model, plan = plan_for(recipe, MeshSizes(1, 2, 1, 2))
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert plan.tp_coverage == pytest.approx(1 - norms / plan.numel)
    assert plan.numel == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_tied_weights_are_gathered_in_one_unit(tmp_path: Path, kind: str) -> None:
    _, plan = plan_for(recipe_for(tmp_path, kind), MeshSizes(1, 2))
    (alias,), (source,) = plan.tied.keys(), plan.tied.values()
    owners = [u for u in plan.units for m in u.modules if f"{m}.weight" in (alias, source)]
    assert len(owners) == 2 and owners[0] is owners[1]
    assert not owners[0].reshard
    assert [p.fqn for p in plan.params if p.fqn in (alias, source)] == [source]


def test_weights_tied_by_three_modules_belong_to_the_root_unit(tmp_path: Path) -> None:
    _, plan = plan_for(recipe_for(tmp_path, "prophetnet", **NO_PACKING), MeshSizes(1, 2))
    assert {p.unit for p in plan.params if "word_embeddings" in p.fqn or p.fqn.startswith("lm_head")} == {"root"}


def test_an_untied_embedding_is_a_unit_of_its_own_and_the_head_shares_one_with_the_norm(tmp_path: Path) -> None:
    _, plan = plan_for(recipe_for(tmp_path, "llama"), MeshSizes(1, 2))
    assert [u.modules for u in plan.units] == [
        ("model.layers.0",),
        ("model.layers.1",),
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ]
    assert [u.reshard for u in plan.units] == [True, True, True, False]
    assert plan.blocks == ("model.layers.0", "model.layers.1")
    units = {u.name for u in plan.units} | {"root"}
    assert {p.unit for p in plan.params} <= units


def test_gradients_of_q_and_k_norms_are_summed_by_ndtrain_not_by_the_hook_of_transformers(tmp_path: Path) -> None:
    _, plan = plan_for(recipe_for(tmp_path, "qwen3"), MeshSizes(1, 1, 1, 2))
    assert len(plan.tp_summed) == 4
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in plan.tp_summed)
    assert not any("norm" in name for name in plan.tp_rules)


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        ("llama", {}, "lm_head"),
        ("qwen3", {}, "lm_head"),
        ("gpt2", {}, "lm_head"),
        ("qwen3_moe", {}, "lm_head"),
        ("gemma3_text", {}, "lm_head"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, None),
        ("gemma2", {}, None),
        ("cohere", {}, None),
        ("granite", {}, None),
    ],
)
def test_plan_names_the_head_only_if_the_model_returns_its_output_unchanged(
    tmp_path: Path, kind: str, config: dict[str, Any], head: str | None
) -> None:
    _, plan = plan_for(recipe_for(tmp_path, kind, config), MeshSizes())
    assert plan.head == head
    assert any("logits are held" in note for note in plan.notes) == (head is None)


TP2 = MeshSizes(1, 1, 1, 2)
NO_PACKING = {"data": {"packing": False}}
REFUSALS: dict[str, tuple[str, dict[str, Any], MeshSizes, dict[str, Any], list[str]]] = {
    "an unknown style": (
        "llama",
        {},
        TP2,
        {"tp": {"plan": {"model.layers.*.mlp.up_proj": "colwide"}}},
        ['tp.plan."model.layers.*.mlp.up_proj" = "colwide"', "rowwise"],
    ),
    "a pattern that matches nothing": (
        "llama",
        {},
        TP2,
        {"tp": {"plan": {"model.layers.*.mlp.upproj": "colwise"}}},
        ["matches nothing in llama", "did you mean model.layers.*.mlp.up_proj?"],
    ),
    "a style for the wrong module": (
        "llama",
        {},
        TP2,
        {"tp": {"plan": {"model.layers.*.input_layernorm": "colwise"}}},
        ["llama with [tp.plan]", "model.layers.0.input_layernorm", "not a linear layer"],
    ),
    "[ep.plan] names a module without styles for its parameters": (
        "qwen3_moe",
        {},
        MeshSizes(1, 2, 1, 1, 2),
        {"ep": {"plan": {"model.layers.0.mlp": "ep_dispatch_experts"}}},
        ["model.layers.0.mlp.gate.weight has no style in the expert-parallel plan"],
    ),
    "an expert pattern that matches nothing": (
        "qwen3_moe",
        {},
        MeshSizes(1, 2, 1, 1, 2),
        {"ep": {"plan": {"experts": "grouped_gemm"}}},
        ['ep.plan."experts" matches nothing in qwen3_moe'],
    ),
    "ep of a dense model": ("llama", {}, MeshSizes(1, 2, 1, 1, 2), {}, ["llama declares no experts", "mesh.ep = 1"]),
    "more ep ranks than experts": (
        "qwen3_moe",
        {},
        MeshSizes(1, 8, 1, 1, 8),
        {},
        ["mesh.ep = 8", "4 experts of qwen3_moe"],
    ),
    "cp of a state space model": (
        "mamba",
        {},
        MeshSizes(1, 1, 2, 1),
        NO_PACKING,
        ["mamba under mesh.cp = 2", "mixes along the sequence", "set mesh.cp = 1"],
    ),
    "cp with attention of its own": ("falcon", {}, MeshSizes(1, 1, 2, 1), NO_PACKING, ["AttentionInterface"]),
    "cp without positions": ("bloom", {}, MeshSizes(1, 1, 2, 1), NO_PACKING, ["takes no position_ids"]),
    "ulysses on more ranks than heads": (
        "llama",
        {},
        MeshSizes(1, 1, 8, 1),
        {"cp": {"kind": "ulysses"}},
        ["cp = 8 x tp = 1", "4 attention heads of llama", 'set cp.kind = "ring"'],
    ),
    "ring with attention dropout": (
        "llama",
        {"attention_dropout": 0.1},
        MeshSizes(1, 1, 2, 1),
        {"cp": {"kind": "ring"}},
        ["llama has attention_dropout = 0.1", 'set cp.kind = "ulysses"'],
    ),
    "ring with an indexer": (
        "deepseek_v32",
        {},
        MeshSizes(1, 1, 2, 1),
        {"cp": {"kind": "ring"}, "data": {"packing": False}},
        ["ring cannot compute DeepseekV32Attention, which selects the keys", 'set cp.kind = "ulysses"'],
    ),
    "cp of a model that contains models": (
        "blt",
        {},
        MeshSizes(1, 1, 2, 1),
        {"data": {"packing": False}},
        ["blt under mesh.cp = 2", "BltLocalEncoder", "work on sequences of their own"],
    ),
    "AttentionInterface used only by the vision tower": (
        "git",
        {},
        MeshSizes(1, 1, 2, 1),
        {"data": {"packing": False}},
        ["git does not take its attention from transformers' AttentionInterface"],
    ),
    "more tokens than positions after the padding id": (
        "camembert",
        {},
        MeshSizes(1, 2, 1, 1),
        {"data": {"packing": False, "seq_len": 128}},
        ["data.seq_len = 128 exceeds the 127 learned positions of camembert"],
    ),
    "neither kind of cp": (
        "llama",
        {"attention_dropout": 0.1},
        MeshSizes(1, 1, 8, 1),
        {},
        ["4 attention heads of llama", "attention_dropout = 0.1", "set mesh.cp = 1"],
    ),
    "learned positions, padded under cp": (
        "gpt2",
        {"n_positions": 127, "max_position_embeddings": 127},
        MeshSizes(1, 1, 4, 1),
        {"data": {"seq_len": 127}},
        ["data.seq_len = 127 (padded to 128 for mesh.cp = 4)", "127 learned positions of gpt2"],
    ),
    "attention heads": (
        "llama",
        {},
        MeshSizes(1, 1, 1, 3),
        {},
        ["mesh.tp = 3", "4 attention heads of llama", "tp may be 1, 2 or 4"],
    ),
    "too many": ("qwen3", {}, MeshSizes(1, 1, 1, 8), {}, ["mesh.tp = 8", "4 attention heads of qwen3", "1, 2 or 4"]),
    "kv heads": (
        "llama",
        {"num_key_value_heads": 2},
        MeshSizes(1, 1, 1, 4),
        {},
        ["mesh.tp = 4", "2 key-value heads", "1 or 2"],
    ),
    "one kv head": (
        "gemma3_text",
        {"num_key_value_heads": 1},
        TP2,
        {},
        ["mesh.tp = 2", "1 key-value heads", "tp may be 1"],
    ),
    "jitter": (
        "mixtral",
        {"router_jitter_noise": 0.1},
        TP2,
        {},
        ["router_jitter_noise = 0.1", "model.config.router_jitter_noise = 0.0"],
    ),
    "packing with a state space model": (
        "mamba",
        {},
        MeshSizes(),
        {"data": {"packing": True}},
        ["mamba", "mixes along the sequence", "data.packing = false"],
    ),
    "another router loss": (
        "doge",
        {"output_router_logits": True},
        MeshSizes(),
        {},
        ["doge has an auxiliary loss that differs", "model.config.output_router_logits = false"],
    ),
    "no router loss": (
        "glm4_moe",
        {"output_router_logits": True},
        MeshSizes(),
        {},
        ["glm4_moe records its router's logits but has no auxiliary loss", "output_router_logits = false"],
    ),
    "no router": (
        "qwen3_moe",
        {"output_router_logits": True, "mlp_only_layers": [0, 1]},
        MeshSizes(),
        {},
        ["qwen3_moe of this config has no router", "output_router_logits = false"],
    ),
    "positions": (
        "gpt2",
        {},
        MeshSizes(),
        {"data": {"seq_len": 256}},
        ["data.seq_len = 256", "128 learned positions of gpt2"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_models_that_cannot_be_trained_correctly_are_refused_with_the_way_out(tmp_path: Path, case: str) -> None:
    kind, config, sizes, sections, words = REFUSALS[case]
    recipe = recipe_for(tmp_path, kind, config, **sections)
    model = meta_model(recipe)
    with pytest.raises(PlanError) as caught:
        make_plan(model, sizes, recipe)
    for word in words:
        assert word in str(caught.value)


# Styles of the first block's layers, for models that declare no plan or an unusable one.
DERIVED: dict[str, tuple[dict[str, str], str]] = {
    "gpt2": (
        {
            "transformer.h.0.attn.c_attn": "conv1d_colwise_gather_output",  # fused, and its source names full sizes
            "transformer.h.0.attn.c_proj": "conv1d_colwise_gather_output",
            "transformer.h.0.mlp.c_fc": "conv1d_colwise",
            "transformer.h.0.mlp.c_proj": "conv1d_rowwise",
            "transformer.wte": "embedding_rowwise",
            "lm_head": "colwise_gather_output",
        },
        "declares no tensor-parallel plan",
    ),
    "bert": (
        {
            "bert.encoder.layer.0.attention.self.query": "colwise",
            "bert.encoder.layer.0.attention.output.dense": "rowwise",
            "bert.encoder.layer.0.intermediate.dense": "colwise",
            "bert.encoder.layer.0.output.dense": "rowwise",
        },
        "declares no tensor-parallel plan",
    ),
    "opt": (
        {
            "model.decoder.layers.0.self_attn.q_proj": "colwise_gather_output",
            "model.decoder.layers.0.fc1": "colwise",
            "model.decoder.layers.0.fc2": "rowwise",
        },
        "declares no tensor-parallel plan",
    ),
    # A norm over all features between the two layers of its MLP
    "bitnet": ({"model.layers.0.mlp.down_proj": "colwise_gather_output"}, "declares no tensor-parallel plan"),
    "gpt_oss": ({"model.layers.0.self_attn.o_proj": "colwise_gather_output"}, "leaves every block replicated"),
    "doge": ({"model.layers.0.mlp.up_proj": "colwise"}, "has model.layers.0.self_attn.A among its cut layers"),
}


@pytest.mark.parametrize("kind", DERIVED)
def test_a_plan_is_derived_if_the_model_declares_no_usable_one(tmp_path: Path, kind: str) -> None:
    styles, reason = DERIVED[kind]
    config = GPT2_DROPOUT if kind == "gpt2" else {}
    _, plan = plan_for(recipe_for(tmp_path, kind, config, **NO_PACKING), TP2)
    assert {name: plan.tp_rules[name] for name in styles} == styles
    assert any(f"{kind} {reason}" in note and "derived from its structure" in note for note in plan.notes)


def test_styles_of_the_recipe_replace_those_of_the_model(tmp_path: Path) -> None:
    over = {"model.layers.*.mlp.up_proj": "colwise_gather_output", "model.layers.1.self_attn.o_proj": "replicate"}
    model = meta_model(recipe_for(tmp_path, "llama"))
    _, plan = plan_for(recipe_for(tmp_path, "llama", tp={"plan": over}), TP2)
    before = make_plan(model, TP2, recipe_for(tmp_path, "llama"))
    changed = {p.fqn: p.style for p, q in zip(plan.params, before.params, strict=True) if p.style != q.style}
    assert changed == {
        "model.layers.0.mlp.up_proj.weight": "colwise_gather_output",
        "model.layers.1.mlp.up_proj.weight": "colwise_gather_output",
        "model.layers.1.self_attn.o_proj.weight": "replicate",
    }


def test_gradients_of_a_learned_activation_are_summed_over_tp(tmp_path: Path) -> None:
    _, plan = plan_for(recipe_for(tmp_path, "apertus", **NO_PACKING), TP2)
    assert {"model.layers.0.mlp.act_fn.alpha_p", "model.layers.0.mlp.act_fn.alpha_n"} <= set(plan.tp_summed)


def test_norms_of_heads_that_a_plan_leaves_out_are_summed(tmp_path: Path) -> None:
    model, _ = plan_for(recipe_for(tmp_path, "glm4_moe", **NO_PACKING), TP2)
    assert not any("_norm" in name for name in model.config.base_model_tp_plan)
    config = tiny.MATRIX["glm4_moe"] | {"use_qk_norm": True, "head_dim": 16}
    _, plan = plan_for(recipe_for(tmp_path, "glm4_moe", config, **NO_PACKING), TP2)
    norms = {f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(2) for n in "qk"}
    assert set(plan.tp_summed) == norms


@pytest.mark.parametrize(
    ("config", "cp", "kind", "words"),
    [
        ({}, 2, "ulysses", "attention sends 0.50 x the bytes that it would with ring"),
        ({"num_key_value_heads": 1}, 2, "ring", "attention sends 0.67 x the bytes that it would with ulysses"),
        (
            {},
            8,
            "ring",
            "ulysses needs whole heads on each rank, but mesh.cp = 8 x tp = 1 does not divide the 4 attention",
        ),
        ({"attention_dropout": 0.1}, 2, "ulysses", "ring does not support dropout of attention weights"),
    ],
)
def test_auto_chooses_the_kind_of_cp_and_notes_the_reason(
    tmp_path: Path, config: dict[str, Any], cp: int, kind: str, words: str
) -> None:
    plan = plan_for(recipe_for(tmp_path, "llama", config), MeshSizes(1, 1, cp, 1))[1]
    assert plan.cp == kind
    (note,) = (n for n in plan.notes if n.startswith("cp.kind"))
    assert note.startswith(f"cp.kind = {kind}: ") and words in note
    plan = plan_for(recipe_for(tmp_path, "llama", config, cp={"kind": kind}), MeshSizes(1, 1, cp, 1))[1]
    assert plan.cp == kind and not any("cp.kind" in n for n in plan.notes)


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "sections"),
    [
        ("llama", {"attention_dropout": 0.1}, MeshSizes(1, 2), {}),
        ("llama", {"attention_dropout": 0.1}, TP2, {}),
        ("llama", {"num_key_value_heads": 2}, TP2, {}),
        ("llama", {}, TP2, {"data": {"seq_len": 256}}),
        ("gpt2", {}, MeshSizes(1, 2), {"data": {"seq_len": 128}}),
        ("mamba", {}, MeshSizes(1, 2), {"data": {"packing": False}}),
        ("phi3", {}, MeshSizes(1, 2), {}),
    ],
)
def test_models_that_can_be_trained_are_not_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], sizes: MeshSizes, sections: dict[str, Any]
) -> None:
    _, plan = plan_for(recipe_for(tmp_path, kind, config, **sections), sizes)
    assert plan.model_type == kind
