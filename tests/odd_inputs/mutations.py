"""Mutations of a saved model: its config and overrides of it, the files of its directory, its tokenizer."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass
class Input:
    """A model's directory, and how a user runs it: `overrides` of its config by --set, and the text."""

    path: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    text: str = "The quick brown fox jumps over the lazy dog, and does it again and again.\n"
    attn: str = "sdpa"

    def json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        file = self.path / name
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values, indent=1))

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def save(self, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
        kept = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(kept, self.path / name, metadata={"format": "pt"})

    def index(self, files: dict[str, str]) -> None:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files})
        (self.path / "model.safetensors.index.json").write_text(text)


Mutation = Callable[[random.Random, Input], None]
MUTATIONS: dict[str, tuple[str, Mutation]] = {}


def mutation(area: str) -> Callable[[Mutation], Mutation]:
    def register(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__.replace("_", " ")] = (area, function)
        return function

    return register


# ---- config

OVERRIDES: list[dict[str, Any]] = [
    {"rope_theta": 50.0},
    {"rope_theta": 500},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 77.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    {"partial_rotary_factor": 0.5},
    {"rotary_pct": 0.5},
    {"num_hidden_layers": 1},
    {"n_layer": 1},
    {"rms_norm_eps": 1e-2},
    {"layer_norm_eps": 1e-2},
    {"layer_norm_epsilon": 1e-2},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"hidden_act": "relu"},
    {"activation_function": "relu"},
    {"attention_bias": True},
    {"sliding_window": 4},
    {"use_sliding_window": True},
    {"max_position_embeddings": 64},
    {"n_positions": 64},
    {"vocab_size": 300},
    {"head_dim": 8},
    {"num_experts_per_tok": 1},
    {"norm_topk_prob": True},
    {"final_logit_softcapping": 5.0},
    {"attn_logit_softcapping": 5.0},
    {"query_pre_attn_scalar": 4},
    {"scale_attn_weights": False},
    {"pretraining_tp": 2},
    {"torch_dtype": "bfloat16"},
    {"dtype": "bfloat16"},
    {"initializer_range": 0.5},
    {"intermediate_size": 32},
    {"num_key_value_heads": 2},
    {"layer_types": ["full_attention", "full_attention"]},
    {"no_such_key": 1},
    {"is_decoder": False},
    {"rope_interleaved": True},
    {"mlp_bias": True},
]


@mutation("config")
def an_override(rng: random.Random, given: Input) -> None:
    given.overrides.update(rng.choice(OVERRIDES))


@mutation("config")
def two_overrides(rng: random.Random, given: Input) -> None:
    for one in rng.sample(OVERRIDES, 2):
        given.overrides.update(one)


@mutation("config")
def a_key_in_config_json(rng: random.Random, given: Input) -> None:
    given.json("config.json", lambda config: config.update(rng.choice(OVERRIDES)))


@mutation("config")
def a_key_in_config_json_and_an_override(rng: random.Random, given: Input) -> None:
    given.json("config.json", lambda config: config.update(rng.choice(OVERRIDES)))
    given.overrides.update(rng.choice(OVERRIDES))


@mutation("config")
def a_key_dropped(rng: random.Random, given: Input) -> None:
    given.json("config.json", lambda config: config.pop(rng.choice(sorted(config))))


@mutation("config")
def a_null(rng: random.Random, given: Input) -> None:
    given.json("config.json", lambda config: config.update({rng.choice(sorted(config)): None}))


@mutation("config")
def a_number_as_text(rng: random.Random, given: Input) -> None:
    def change(config: dict[str, Any]) -> None:
        key = rng.choice([k for k, v in config.items() if type(v) in (int, float)])
        config[key] = str(config[key])

    given.json("config.json", change)


@mutation("config")
def old_rope_keys(rng: random.Random, given: Input) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config["rope_theta"] = rng.choice([50.0, 1000, 1e6])
        if rng.random() < 0.5:
            config["rope_scaling"] = rng.choice(
                [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, None]
            )

    given.json("config.json", change)
    if rng.random() < 0.5:
        given.overrides.update(rng.choice(OVERRIDES[:8]))


@mutation("config")
def other_architectures(rng: random.Random, given: Input) -> None:
    value = rng.choice([None, [], ["NoSuchModel"], ["LlamaForSequenceClassification"]])
    given.json("config.json", lambda config: config.update(architectures=value))


@mutation("config")
def a_model_type_that_is_not_there(rng: random.Random, given: Input) -> None:
    value = rng.choice([None, "", "no_such_type", "bert", "llama"])
    given.json("config.json", lambda config: config.update(model_type=value))


@mutation("config")
def config_json_damaged(rng: random.Random, given: Input) -> None:
    file = given.path / "config.json"
    how = rng.randrange(4)
    if how == 0:
        file.unlink()
    elif how == 1:
        file.write_bytes(file.read_bytes()[: rng.randrange(200)])
    elif how == 2:
        file.write_text("[]")
    else:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


# ---- the directory


@mutation("directory")
def a_stale_index_with_shards(rng: random.Random, given: Input) -> None:
    old = {key: value + 0.5 for key, value in given.tensors().items()}
    keys = sorted(old)
    half = rng.randrange(1, len(keys))
    parts = {"model-00001-of-00002.safetensors": keys[:half], "model-00002-of-00002.safetensors": keys[half:]}
    for name, held in parts.items():
        given.save({key: old[key] for key in held}, name)
    given.index({key: name for name, held in parts.items() for key in held})


def _in_shards(rng: random.Random, given: Input) -> dict[str, str]:
    tensors = given.tensors()
    files = {key: f"model-0000{rng.randrange(1, 4)}-of-00003.safetensors" for key in tensors}
    for name in set(files.values()):
        given.save({key: tensors[key] for key in files if files[key] == name}, name)
    (given.path / "model.safetensors").unlink()
    given.index(files)
    return files


@mutation("directory")
def in_shards(rng: random.Random, given: Input) -> None:
    _in_shards(rng, given)


@mutation("directory")
def a_shard_that_is_missing(rng: random.Random, given: Input) -> None:
    (given.path / rng.choice(sorted(set(_in_shards(rng, given).values())))).unlink()


@mutation("directory")
def an_index_without_a_key(rng: random.Random, given: Input) -> None:
    files = _in_shards(rng, given)
    files.pop(rng.choice(sorted(files)))
    given.index(files)


@mutation("directory")
def an_index_that_names_another_shard(rng: random.Random, given: Input) -> None:
    files = _in_shards(rng, given)
    key = rng.choice(sorted(files))
    files[key] = rng.choice(sorted(set(files.values())))
    given.index(files)


@mutation("directory")
def an_index_that_leaves_the_directory(rng: random.Random, given: Input) -> None:
    files = _in_shards(rng, given)
    name = sorted(set(files.values()))[0]
    (given.path / name).rename(given.path.parent / f"{given.path.name}-{name}")
    given.index({k: f"../{given.path.name}-{name}" if v == name else v for k, v in files.items()})


@mutation("directory")
def a_second_copy_in_bin(rng: random.Random, given: Input) -> None:
    torch.save({key: value + 0.5 for key, value in given.tensors().items()}, given.path / "pytorch_model.bin")


@mutation("directory")
def bin_alone(rng: random.Random, given: Input) -> None:
    torch.save(given.tensors(), given.path / "pytorch_model.bin")
    (given.path / "model.safetensors").unlink()


@mutation("directory")
def another_name(rng: random.Random, given: Input) -> None:
    names = ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "Model.safetensors"]
    (given.path / "model.safetensors").rename(given.path / rng.choice(names))


@mutation("directory")
def more_safetensors_beside(rng: random.Random, given: Input) -> None:
    given.save({key: value + 0.5 for key, value in given.tensors().items()}, "consolidated.safetensors")


@mutation("directory")
def a_linked_file(rng: random.Random, given: Input) -> None:
    file = given.path / rng.choice(["model.safetensors", "config.json", "tokenizer.json"])
    moved = given.path.parent / f"{given.path.name}-{file.name}"
    file.rename(moved)
    file.symlink_to(moved)
    if rng.random() < 0.4:
        moved.unlink()


@mutation("directory")
def a_hard_link(rng: random.Random, given: Input) -> None:
    os.link(given.path / "model.safetensors", given.path / "model-00001-of-00001.safetensors")


@mutation("directory")
def an_empty_or_cut_file(rng: random.Random, given: Input) -> None:
    file = given.path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 8, 100, len(data) // 2, len(data) - 1])])


@mutation("directory")
def a_pointer_of_git_lfs(rng: random.Random, given: Input) -> None:
    (given.path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 123456\n"
    )


@mutation("directory")
def a_tensor_dropped(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    tensors.pop(rng.choice(sorted(tensors)))
    given.save(tensors)


@mutation("directory")
def a_tensor_too_many(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    name = rng.choice(["model.layers.9.mlp.up_proj.weight", "score.weight", "model.rotary_emb.inv_freq", "x"])
    given.save({**tensors, name: torch.ones(3)})


@mutation("directory")
def a_tensor_of_another_shape(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    key = rng.choice(sorted(tensors))
    tensors[key] = rng.choice([tensors[key][1:], tensors[key][None], tensors[key].flatten()])
    given.save(tensors)


@mutation("directory")
def tensors_of_another_dtype(rng: random.Random, given: Input) -> None:
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float64])
    tensors = given.tensors()
    some = rng.sample(sorted(tensors), rng.randrange(1, len(tensors) + 1))
    given.save({key: value.to(dtype) if key in some else value for key, value in tensors.items()})


@mutation("directory")
def integers_for_a_weight(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    key = rng.choice(sorted(tensors))
    given.save({**tensors, key: (tensors[key] * 10).to(torch.int8)})


@mutation("directory")
def not_a_number(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    tensors[rng.choice(sorted(tensors))].view(-1)[0] = float("nan")
    given.save(tensors)


@mutation("directory")
def a_head_beside_a_tied_embedding(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    embedding = next(key for key in tensors if "embed" in key or "wte" in key)
    head = tensors.get("lm_head.weight", tensors[embedding]).clone()
    tensors["lm_head.weight"] = rng.choice([tensors[embedding].clone(), head + 0.5])
    given.save(tensors)
    given.json("config.json", lambda config: config.update(tie_word_embeddings=rng.choice([True, False])))


@mutation("directory")
def keys_without_their_prefix(rng: random.Random, given: Input) -> None:
    tensors = given.tensors()
    old = next(key for key in sorted(tensors) if "." in key).split(".")[0]
    new = rng.choice(["", "module.", "base_model.model."])
    given.save({f"{new}{key.removeprefix(f'{old}.')}" if not new else f"{new}{key}": v for key, v in tensors.items()})


@mutation("directory")
def a_generation_config(rng: random.Random, given: Input) -> None:
    values = rng.choice(
        [
            {"eos_token_id": [257, 258], "temperature": 0.6, "do_sample": True, "top_p": 0.9},
            {"temperature": 0.6, "do_sample": False},
            {"max_length": -1},
            [],
        ]
    )
    (given.path / "generation_config.json").write_text(json.dumps(values))


@mutation("directory")
def a_directory_for_a_file(rng: random.Random, given: Input) -> None:
    file = given.path / rng.choice(["generation_config.json", "model.safetensors", "tokenizer.json"])
    file.unlink(missing_ok=True)
    file.mkdir()


# ---- the tokenizer

QUOTED = "People write <|eos|> and <|bos|>, or <|im_start|>user, in what they publish about chat models.\n"


@mutation("tokenizer")
def special_tokens_in_the_text(rng: random.Random, given: Input) -> None:
    given.text = QUOTED


@mutation("tokenizer")
def a_setting(rng: random.Random, given: Input) -> None:
    given.text = rng.choice([QUOTED, given.text, "  two  spaces , and a comma .\n" * 3])
    setting = rng.choice(
        [
            {"split_special_tokens": True},
            {"split_special_tokens": False},
            {"add_bos_token": True},
            {"add_bos_token": False},
            {"add_eos_token": True},
            {"add_prefix_space": True},
            {"clean_up_tokenization_spaces": True},
            {"model_max_length": 4},
            {"padding_side": "left"},
            {"truncation_side": "left"},
            {"do_lower_case": True},
            {"eos_token": None},
            {"pad_token": None},
            {"eos_token": "a"},
            {"bos_token": "no such token"},
            {"eos_token": "<|new|>"},
            {"tokenizer_class": "NoSuchTokenizer"},
            {"tokenizer_class": "GPT2Tokenizer"},
            {"extra_special_tokens": {"image_token": "<|image|>"}},
            {"additional_special_tokens": ["<|im_start|>"]},
            {"chat_template": "{{ messages }}"},
            {"legacy": False},
        ]
    )
    given.json("tokenizer_config.json", lambda config: config.update(setting))


@mutation("tokenizer")
def an_added_token(rng: random.Random, given: Input) -> None:
    given.text = QUOTED
    flags = {name: rng.random() < 0.5 for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append(
            {"id": rng.choice([259, 260, 300]), "content": rng.choice(["<|im_start|>", " and", "chat"]), **flags}
        )

    given.json("tokenizer.json", change)


@mutation("tokenizer")
def a_normalizer(rng: random.Random, given: Input) -> None:
    given.text = "Ünïcode ﬁ ligatures, ① and ½; CAPITALS too: the text has to be long enough.\n"
    kind = rng.choice(["NFKC", "Lowercase", "NFD", "StripAccents"])
    given.json("tokenizer.json", lambda tokenizer: tokenizer.update(normalizer={"type": kind}))


@mutation("tokenizer")
def a_vocabulary_with_a_gap(rng: random.Random, given: Input) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        token = rng.choice([t for t in vocab if t.isalpha() and t not in "theandTq"])
        vocab.pop(token)

    given.json("tokenizer.json", change)


@mutation("tokenizer")
def a_tokenizer_file_that_is_missing(rng: random.Random, given: Input) -> None:
    (given.path / rng.choice(["tokenizer.json", "tokenizer_config.json"])).unlink()


@mutation("tokenizer")
def truncation_in_the_file(rng: random.Random, given: Input) -> None:
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    given.json("tokenizer.json", lambda tokenizer: tokenizer.update(truncation=cut))


@mutation("tokenizer")
def padding_in_the_file(rng: random.Random, given: Input) -> None:
    padding = {
        "strategy": {"Fixed": 200},
        "direction": rng.choice(["Right", "Left"]),
        "pad_to_multiple_of": None,
        "pad_id": 258,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    given.json("tokenizer.json", lambda tokenizer: tokenizer.update(padding=padding))


@mutation("tokenizer")
def a_tokenizer_larger_than_the_embedding(rng: random.Random, given: Input) -> None:
    given.text = rng.choice([QUOTED, given.text])

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] += [
            {
                "id": 261 + i,
                "content": f"<|more{i}|>",
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            }
            for i in range(rng.choice([1, 40]))
        ]

    given.json("tokenizer.json", change)


def copied(source: Path, target: Path) -> Input:
    shutil.copytree(source, target)
    return Input(target)
