"""Models of many families, saved by `save_pretrained` and as checkpoints in pieces, for the tests of convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ndtrain.checkpoint.manifest import write_manifest
from ndtrain.checkpoint.tensors import _write_file, listing
from ndtrain.hf import extra_states
from ndtrain.hf.model import kept_in_fp32
from ndtrain.hf.weight_names import model_tensors
from tests import tiny

FAMILIES = (
    "bloom", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma3_text", "glm4_moe", "gpt2", "gpt_neox",
    "gpt_oss", "granitemoe", "jamba", "llama", "mamba2", "minimax", "mixtral", "olmoe", "opt", "phi3", "phimoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a random model of `kind` in which no two values are equal."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(
        tiny.VARIANTS.get(kind, kind), **(tiny.CONFIGS.get(kind) or tiny.MATRIX[kind])
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    kept = kept_in_fp32(model, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not (kept is not None and kept.search(name)):
            tensor.data = tensor.data.to(dtype)
    return model


def save_checkpoint(
    model: Any,
    directory: Path,
    *,
    ranks: int = 2,
    config: dict[str, Any] | None = None,
    states: dict[str, Any] | None = None,
    only_rows: bool = False,
) -> Path:
    """Save `model` as training on `ranks` ranks would: each tensor in float32, split along one of its dims."""
    files: list[dict[str, tuple[Tensor, tuple[int, ...]]]] = [{} for _ in range(ranks)]
    tensors = {}
    for number, (key, value) in enumerate(model_tensors(model).items()):
        tensor = value.detach().float() if value.is_floating_point() else value.detach()
        tensors[key] = tensor
        dim = 0 if only_rows else number % max(1, tensor.ndim)
        start = 0
        for rank, part in enumerate(tensor.chunk(ranks, dim) if tensor.ndim else [tensor]):
            if part.numel():
                files[rank][key] = (part.contiguous(), tuple(start if d == dim else 0 for d in range(tensor.ndim)))
                start += part.shape[dim] if tensor.ndim else 0
    (directory / "model").mkdir(parents=True)
    for rank, entries in enumerate(files):
        _write_file(directory / "model" / f"{rank:05d}-of-{ranks:05d}.safetensors", entries)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if states is not None:
        (directory / extra_states.FILE).write_text(json.dumps(states))
    (directory / "train_state.json").write_text(json.dumps({"step": 1}))
    write_manifest(directory, {"model": listing(tensors), "optim": {}}, {})
    return directory
