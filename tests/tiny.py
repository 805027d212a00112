"""Tiny models saved as a user would have them, and recipes for them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

from ndtrain.recipe import Recipe

COMMON: dict[str, Any] = {"vocab_size": 261, "max_position_embeddings": 128}
DENSE = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "tie_word_embeddings": False},
    "qwen3": {**DENSE, "tie_word_embeddings": False},
    "gemma3_text": {**DENSE, "sliding_window": 8, "tie_word_embeddings": True},
    "xglm": {**COMMON, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "dropout": 0.0},
    "gpt2": {
        **COMMON,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
    },
    "gemma3_capped": {**DENSE, "sliding_window": 8, "tie_word_embeddings": True, "final_logit_softcapping": 2.0},
    "qwen3_moe": {
        **DENSE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "qwen3_moe_normed": {
        **DENSE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "qwen3_moe_six": {
        **DENSE,
        "hidden_size": 62,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 31,
        "tie_word_embeddings": False,
    },
    "qwen3_gqa": {**DENSE, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama_two_heads": {**DENSE, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "llama_dynamic": {
        **DENSE,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "gpt_oss": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt_oss_biased": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_moe_few": {
        **DENSE,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "phi3": {**{k: v for k, v in DENSE.items() if k != "head_dim"}, "tie_word_embeddings": False},
    "gemma2": {**DENSE, "sliding_window": 8, "query_pre_attn_scalar": 16},
}

# Configs of every model type, for those of which one test needs one.
MATRIX: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "matrix" / "configs.json").read_text())
VARIANTS = {
    "gemma3_capped": "gemma3_text",
    "qwen3_gqa": "qwen3",
    "llama_two_heads": "llama",
    "llama_dynamic": "llama",
    "qwen3_moe_few": "qwen3_moe",
    "qwen3_moe_normed": "qwen3_moe",
    "qwen3_moe_six": "qwen3_moe",
    "gpt_oss_biased": "gpt_oss",
}


def save_model(kind: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of `kind`; norms and biases too, so that a lost one shows."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(VARIANTS.get(kind, kind), **(CONFIGS.get(kind) or MATRIX[kind]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
        for name, param in model.named_parameters():
            if kind == "gpt_oss_biased" and name.endswith("router.bias"):
                param[:2] += 100  # no token goes to the others
    path = directory / kind
    model.to(dtype).save_pretrained(path)
    return path


def plain_attention(recipe: Recipe) -> str:
    """What plain transformers takes where a recipe names an attention."""
    return "sdpa" if recipe.model.attn == "auto" else recipe.model.attn


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a plain optimizer: the HF Trainer's two, and fewer than two dims exempt too."""
    from transformers.trainer import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        groups.setdefault(weight_decay if name in decayed and param.dim() >= 2 else 0.0, []).append(param)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]


def write_corpus(directory: Path) -> Path:
    """Real text of ragged lengths: a few documents of this package's own dependencies."""

    directory.mkdir(parents=True, exist_ok=True)
    import textwrap as source

    text = Path(source.__file__).read_text(encoding="utf-8")
    cuts = [0, 40, 53, 300, 1100, 1107, 2500, 2900, 4200, 6000, 8000, 9000]
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        (directory / f"{i:02}.txt").write_text(text[a:b], encoding="utf-8")
    return directory


def recipe_text(**sections: dict[str, Any]) -> str:
    """TOML of a recipe from keyword sections."""
    import tomli_w

    return tomli_w.dumps(sections)


def recipe_file(
    path: Path,
    *,
    model: dict[str, Any],
    corpus: Path,
    run_dir: Path,
    mesh: dict[str, int] | None = None,
    steps: int = 8,
    accumulation: int = 1,
    batch_ranks: int = 1,
    **more: dict[str, Any],
) -> Path:
    """A recipe of 8 sequences a step for fp32 parity runs, written to `path`."""
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "mesh": mesh or {},
        "fsdp": {"param_dtype": "float32"},
        "data": {"path": str(corpus), "seq_len": 32, "tokenizer": "bytes"},
        "optim": {"lr": 3e-3, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "train": {
            "steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": max(1, 8 // (batch_ranks * accumulation)),
            "seed": 3,
        },
        "checkpoint": {"every": 0, "resume": "never"},
        "run": {"dir": str(run_dir)},
    }
    for name, section in more.items():
        sections[name] = {**sections.get(name, {}), **section}
    path.write_text(recipe_text(**sections), encoding="utf-8")
    return path


def forged(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Give a checkpoint a manifest of other content, with the right hash."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    text = json.dumps(manifest | {"xxh3_128": "0" * 32}).encode()
    file.write_bytes(text.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(text).encode(), 1))
