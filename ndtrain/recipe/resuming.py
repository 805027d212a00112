"""Which keys of a recipe a resume may change: freely, where `checkpoint.allow` names them, or never."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

_SAMPLES = "the position in the data is a number of samples, and each sample would be another one"
# Keys whose change no resume can let pass -> the reason.
NEVER: dict[str, str] = {
    "data.seq_len": _SAMPLES,
    "data.packing": _SAMPLES,
    "data.too_long": _SAMPLES,
    "data.format": _SAMPLES,
    "data.documents": _SAMPLES,
    "data.token_dtype": _SAMPLES,
    "data.window": _SAMPLES,
    "model.type": "another model type has other weights",
    "optim.name": "the saved state is that of another optimizer",
}
# Keys of a config that give tensors their shapes, in transformers' usual names. A resume compares all shapes anyway.
_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "model_type",
)
NEVER |= {f"model.config.{key}": "the checkpoint's tensors have other shapes" for key in _SHAPES}

# What a change of these sections or keys leaves as it was: what is trained, and on what. All others change it.
_FREE = (
    *("mesh", "fsdp", "tp", "ep", "cp", "load", "optim", "schedule", "checkpoint", "log", "run", "train", "eval"),
    *("model.attn", "model.experts", "model.dtype", "model.trust_remote_code", "data.workers", "data.stop"),
)
_NOT_FREE = ("train.seed", *NEVER)


def rule_of(key: str) -> Literal["free", "allow", "never"]:
    """Return whether a resume may change the dotted `key`: freely, where it is allowed, or never."""
    if key in NEVER:
        return "never"
    return "free" if covers(_FREE, key) and key not in _NOT_FREE else "allow"


def covers(entries: Sequence[str], key: str) -> bool:
    """Return whether one of `entries` is the dotted `key` or a table around it."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in entries)
