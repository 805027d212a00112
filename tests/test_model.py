"""A recipe's config and meta model: overrides take effect or are refused; tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ndtrain.errors import RecipeError
from ndtrain.hf.config import load_config
from ndtrain.hf.model import meta_model
from ndtrain.hf.positions import fix_frequencies
from ndtrain.hf.tokenizer import HubTokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.plan import make_plan
from ndtrain.recipe import Recipe, load_recipe
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("qwen3", tmp_path_factory.mktemp("model"))


def recipe_for(tmp_path: Path, **model: Any) -> Recipe:
    path = tiny.recipe_file(tmp_path / "recipe.toml", model=model, corpus=tmp_path, run_dir=tmp_path / "run")
    return load_recipe(path)


def test_a_shallower_model_keeps_its_first_layers_and_can_be_saved(tmp_path: Path, saved: Path) -> None:
    assert len(json.loads((saved / "config.json").read_text())["layer_types"]) == 2
    model = meta_model(recipe_for(tmp_path, name=str(saved), config={"num_hidden_layers": 1}))
    assert len(model.model.layers) == 1
    model.export_config.save_pretrained(tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").layer_types == ["full_attention"]


def test_a_model_without_weights_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(RecipeError, match="has no weights, because a size in it is 0; change it"):
        meta_model(recipe_for(tmp_path, name=str(saved), config={"hidden_size": 0}))


@pytest.mark.parametrize("block_size", [2, 16])
def test_block_sparse_attention_is_what_rows_of_this_length_get_or_refused(tmp_path: Path, block_size: int) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {**sizes, "vocab_size": 259, "is_decoder": True, "num_random_blocks": 1, "block_size": block_size}
    recipe = recipe_for(tmp_path, type="big_bird", attn="eager", config=config)
    if recipe.data.seq_len > 7 * block_size:
        with pytest.raises(RecipeError, match=r"sees later tokens.*attention_type = \"original_full\""):
            meta_model(recipe)
        return
    model = meta_model(recipe)
    assert not any("BlockSparse" in type(module).__name__ for module in model.modules())
    assert model.base_model.attention_type == "original_full", "so that its forward replaces nothing"


def test_tables_of_model_config_are_merged_into_the_config(tmp_path: Path, saved: Path) -> None:
    config = load_config(recipe_for(tmp_path, name=str(saved), config={"rope_parameters": {"rope_theta": 500.0}}))
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}


def test_an_override_that_no_model_can_be_built_with_is_named(tmp_path: Path, saved: Path) -> None:
    config = {"hidden_act": "sulu", "rms_norm_eps": 1e-5}
    words = r'^model.config.hidden_act = "sulu": .*did you mean "silu".*transformers knows gelu, .*xielu'
    for source in ({"name": str(saved)}, {"type": "qwen3"}):
        with pytest.raises(RecipeError, match=words):
            meta_model(recipe_for(tmp_path, **source, config=config))
    wrong = r"^model.config.pad_token_id = 500: a \"qwen3\" model cannot be built"
    with pytest.raises(RecipeError, match=wrong):
        meta_model(recipe_for(tmp_path, name=str(saved), config={"pad_token_id": 500, "rms_norm_eps": 1e-5}))


def test_a_key_of_config_json_with_an_unknown_name_is_named(tmp_path: Path, saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_act": "sulu"}))
    with pytest.raises(RecipeError, match=r'^a "qwen3" model cannot be built: hidden_act = "sulu" is not known'):
        meta_model(recipe_for(tmp_path, name=str(tmp_path)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("source", ["type", "name"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_sze": 128}, ['no key "hidden_sze"', 'did you mean "hidden_size"?']),
        ({"to_dict": 1}, ['no key "to_dict"']),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"hidden_size": 0}, []),
        ({"num_attention_heads": 0}, []),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
    ],
)
def test_a_wrong_override_is_refused(
    tmp_path: Path, saved: Path, source: str, config: dict[str, Any], words: list[str]
) -> None:
    if source == "name":
        recipe = recipe_for(tmp_path, name=str(saved), config=config)
    else:
        recipe = recipe_for(tmp_path, type="qwen3", config={**tiny.CONFIGS["qwen3"], **config})
    with pytest.raises(RecipeError) as caught:
        make_plan(meta_model(recipe), MeshSizes(), recipe)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(":")
    for word in words:
        assert word in message


def test_config_keys_that_only_the_model_code_reads_are_accepted(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, type="qwen3_moe", config=tiny.CONFIGS["qwen3_moe"])
    assert "head_dim" not in transformers.AutoConfig.for_model("qwen3_moe").to_dict()
    assert load_config(recipe).head_dim == 16


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
def test_documents_begin_with_the_begin_token_only_if_the_tokenizer_adds_it(template: str) -> None:
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "[UNK]": 4}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    ours = HubTokenizer(plain, key="test")
    begin = [] if ours.bos_id is None else [ours.bos_id]
    assert begin + ours.encode_bytes(b"a b").tolist() == plain.encode("a b")


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "original_max_position_embeddings": 16,
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
        "short_factor": [1.0] * 8,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_fixed_frequencies_of_a_short_part_equal_those_of_the_whole_sequence(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    config = transformers.LlamaConfig(**{**tiny.CONFIGS["llama_dynamic"], "rope_parameters": rope})
    x, whole = torch.zeros(1), torch.arange(64)[None]
    plain, fixed = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)
    fix_frequencies(fixed, 64)
    want = plain(x, whole)[0]
    assert torch.equal(fixed(x, whole[:, :8])[0], want[:, :8])
    assert not torch.equal(plain(x, whole[:, :8])[0], want[:, :8])
