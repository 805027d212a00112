"""Overrides of a model's config end at what transformers makes of the edited config.json, or are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.errors import RecipeError
from ndtrain.hf.config import load_config
from ndtrain.recipe import load_recipe
from tests import tiny

Values = dict[str, Any]
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
NO_ROPE = {"rope_parameters": None}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}


def _nested(full: float, sliding: float) -> Values:
    tables = {"full_attention": full, "sliding_attention": sliding}
    return {"rope_parameters": {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in tables.items()}}


def _saved(kind: str, tmp_path: Path) -> Values:
    config = transformers.AutoConfig.for_model(kind, **(tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]))
    config.save_pretrained(tmp_path)
    values: Values = json.loads((tmp_path / "config.json").read_text())
    return values


def _write(values: Values, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return directory


def _ours(directory: Path | None, overrides: Values, tmp_path: Path, **model: Any) -> transformers.PreTrainedConfig:
    given = {"config": overrides, **({"name": str(directory)} if directory else {}), **model}
    path = tiny.recipe_file(tmp_path / "recipe.toml", model=given, corpus=tmp_path, run_dir=tmp_path / "run")
    return load_config(load_recipe(path))


def _dict(config: transformers.PreTrainedConfig) -> Values:
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def _loss(config: transformers.PreTrainedConfig) -> float:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(48)[None] * 5 % 250
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


# (model type, changes to the saved config.json, overrides, changes by hand that mean the same)
SAME: dict[str, tuple[str, Values, Values, Values]] = {
    "old theta, old scaling": (
        "llama",
        {**NO_ROPE, "rope_theta": 50.0},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LINEAR},
    ),
    "new theta, old scaling": (
        "llama",
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
        {"rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 50.0, **LINEAR}},
    ),
    "old theta over the new table": (
        "llama",
        {},
        {"rope_theta": 50.0},
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    ),
    "old theta over the old": ("llama", {**NO_ROPE, "rope_theta": 70.0}, {"rope_theta": 50}, {"rope_theta": 50.0}),
    "both": (
        "llama",
        {},
        {"rope_theta": 50.0, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 50.0, **LINEAR}},
    ),
    "new table over the old": (
        "llama",
        {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": YARN},
        {"rope_parameters": LINEAR},
        {"rope_scaling": LINEAR},
    ),
    "one entry of a table": (
        "llama",
        {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": YARN},
        {"rope_scaling": {"factor": 8.0}},
        {"rope_scaling": {**YARN, "factor": 8.0}},
    ),
    "another type keeps nothing of the old": (
        "llama",
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "yarn", "factor": 2.0, "beta_fast": 3.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 50.0, "type": "dynamic", "factor": 4.0}},
    ),
    "nested, theta": ("gemma3_text", KINDS, {"rope_theta": 50.0}, _nested(50.0, 10000.0)),
    "nested, local theta": ("gemma3_text", KINDS, {"rope_local_base_freq": 50.0}, _nested(1e6, 50.0)),
    "nested, scaling": ("gemma3_text", KINDS, {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
    "nested, one part": (
        "gemma3_text",
        KINDS,
        {"rope_parameters": {"sliding_attention": {"rope_theta": 50.0}}},
        _nested(1e6, 50.0),
    ),
    "not nested yet, theta": (
        "gemma3_text",
        {**NO_ROPE, "rope_theta": 80.0, "rope_local_base_freq": 90.0},
        {"rope_theta": 50.0},
        {"rope_theta": 50.0},
    ),
    "pattern of layers": (
        "gemma3_text",
        {"layer_types": None, "_sliding_window_pattern": None},
        {"sliding_window_pattern": 2},
        {"sliding_window_pattern": 2},
    ),
    "rotary_pct": (
        "gpt_neox",
        {},
        {"rotary_pct": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"}},
    ),
    "rotary_pct, old": (
        "gpt_neox",
        {**NO_ROPE, "rotary_pct": 0.25, "rotary_emb_base": 50},
        {"rotary_pct": 0.5},
        {"rotary_pct": 0.5},
    ),
    "longrope": (
        "phi3",
        {**NO_ROPE, "rope_theta": 50.0, "original_max_position_embeddings": 16},
        {"rope_scaling": LONG},
        {"rope_scaling": LONG},
    ),
    "longrope over the new table": (
        "phi3",
        {"original_max_position_embeddings": 16},
        {"rope_scaling": LONG},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **LONG}},
    ),
    "head_dim": ("qwen3_moe", {}, {"head_dim": 32, "rope_theta": 10000.0}, {"head_dim": 32}),
    "alias": ("gpt2", {}, {"num_hidden_layers": 1}, {"n_layer": 1}),
    "alias in config.json": (
        "gpt2",
        {"n_layer": None, "num_hidden_layers": 2},
        {"n_layer": 1},
        {"num_hidden_layers": 1},
    ),
    "integer for a float": (
        "gpt2",
        {},
        {"attn_pdrop": 0, "layer_norm_epsilon": 1},
        {"attn_pdrop": 0.0, "layer_norm_epsilon": 1.0},
    ),
    "old dtype": ("gpt2", {}, {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "yarn": ("deepseek_v3", {**NO_ROPE, "rope_theta": 50.0}, {"rope_scaling": YARN}, {"rope_scaling": YARN}),
    "yarn over the new table": (
        "deepseek_v3",
        {},
        {"rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 10000.0, **YARN}},
    ),
    "another class": (
        "mistral",
        {},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    ),
    "fields of a class": (
        "cohere2_moe",
        {},
        {"rope_theta": 50.0},
        {"rope_theta": 50.0, "rope_parameters": {"rope_theta": 50.0}},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_overrides_end_at_the_config_and_loss_of_the_edited_config_json(tmp_path: Path, case: str) -> None:
    kind, changes, overrides, by_hand = SAME[case]
    values = _saved(kind, tmp_path) | changes
    ours = _ours(_write(values, tmp_path / "base"), overrides, tmp_path)
    plain = transformers.AutoConfig.from_pretrained(_write(values | by_hand, tmp_path / "edited"))
    assert _dict(ours) == _dict(plain)
    before = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    assert _dict(before) != _dict(plain)
    assert _loss(ours) == _loss(plain)
    ours.save_pretrained(tmp_path / "published")
    assert _dict(transformers.AutoConfig.from_pretrained(tmp_path / "published")) == _dict(plain)


@pytest.mark.parametrize("case", ["old theta over the new table", "nested, theta", "longrope over the new table"])
def test_the_loss_tells_the_overrides_apart(tmp_path: Path, case: str) -> None:
    kind, changes, overrides, _ = SAME[case]
    base = _write(_saved(kind, tmp_path) | changes, tmp_path / "base")
    assert _loss(_ours(base, overrides, tmp_path)) != _loss(transformers.AutoConfig.from_pretrained(base))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {"rope_theta": 50.0, "rope_scaling": LINEAR}),
        ("gemma3_text", {"rope_theta": 50.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 2}),
        ("gpt2", {"num_hidden_layers": 1}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("gemma4_text", {"global_head_dim": 24}),  # of layers that a shorter model does not have, and of its own
        ("gemma3n_text", {"intermediate_size": 96}),  # which becomes a list with an entry a layer
        ("dbrx", {}),  # whose part reads a key that its class does not name
        ("gemma4", {}),  # of a part, which the part's own defaults come before
    ],
)
def test_overrides_from_scratch_end_at_the_config_of_its_class(tmp_path: Path, kind: str, overrides: Values) -> None:
    given = {**(tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]), **overrides}
    given.pop("n_layer", None)
    given.pop("rope_parameters", None)
    plain = transformers.AutoConfig.for_model(kind, **copy.deepcopy(given))  # which writes into tables
    assert _dict(_ours(None, given, tmp_path, type=kind)) == _dict(plain)


def test_overrides_inside_a_nested_config_end_at_the_edited_config_json(tmp_path: Path) -> None:
    text = transformers.AutoConfig.for_model("gemma3_text", **tiny.CONFIGS["gemma3_text"])
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    edited = json.loads(json.dumps(values))
    edited["text_config"]["num_hidden_layers"] = 1
    edited["text_config"]["layer_types"] = edited["text_config"]["layer_types"][:1]
    edited["text_config"]["rope_parameters"]["full_attention"]["rope_theta"] = 50.0
    ours = _ours(tmp_path, {"text_config": {"num_hidden_layers": 1, "rope_theta": 50.0}}, tmp_path)
    plain = transformers.AutoConfig.from_pretrained(_write(edited, tmp_path / "edited"))
    assert _dict(ours) == _dict(plain)
    with pytest.raises(RecipeError, match=r"its text_config has; set model.config.text_config.num_hidden_layers"):
        _ours(tmp_path, {"num_hidden_layers": 1}, tmp_path)


# (model type, changes to the saved config.json, overrides, words of the refusal)
REFUSED: dict[str, tuple[str, Values, Values, str]] = {
    "shadowed": ("gemma3_text", {}, {"sliding_window_pattern": 2}, "layer_types, which comes first; set that"),
    "contradiction": (
        "llama",
        {},
        {"rope_theta": 50.0, "rope_parameters": {"rope_theta": 60.0}},
        "rope_parameters.* becomes .*rope_theta': 50.0",
    ),
    "a factor without a type": ("llama", {}, {"rope_scaling": {"factor": 4.0}}, "scales nothing; set its rope_type"),
    "a factor without a type, nested": (
        "gemma3_text",
        KINDS,
        {"rope_parameters": {"full_attention": {"factor": 4.0}}},
        "scales nothing; set its rope_type",
    ),
    "a flat table for nested ones": (
        "gemma4_text",
        {},
        {"rope_scaling": LINEAR},
        "makes transformers lose full_attention.partial_rotary_factor = 0.25",
    ),
    "not a key of this class": ("gpt_neox", {}, {"rope_theta": 50.0}, "rope_theta = 50.0 has no effect"),
    "no rope at all": ("gpt2", {}, {"rope_scaling": LINEAR}, 'no key "rope_scaling"'),
    "of the generation config": ("gpt2", {}, {"temperature": 0.5}, 'no key "temperature"'),
    "another model": ("gpt2", {}, {"model_type": "llama"}, 'cannot change the model type "gpt2"'),
    "renamed by transformers": (
        "qwen3",
        {},
        {"layer_types": ["attention", "attention"]},
        "layer_types = .*attention.* becomes .*full_attention",
    ),
    "wrong kind": ("qwen3", {}, {"hidden_size": 64.5}, "makes the config of .* invalid: .*hidden_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_override_that_the_config_would_not_hold_is_refused(tmp_path: Path, case: str) -> None:
    kind, changes, overrides, words = REFUSED[case]
    base = _write(_saved(kind, tmp_path) | changes, tmp_path / "base")
    with pytest.raises(RecipeError, match=words):
        _ours(base, overrides, tmp_path)
