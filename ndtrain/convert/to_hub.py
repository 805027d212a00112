"""Writes stored tensors of a model as the directory that `save_pretrained` would have written, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ndtrain.convert.shards import ShardWriter
from ndtrain.convert.stream import Progress, Stream
from ndtrain.convert.weights import to_hub
from ndtrain.errors import DamagedError, first_line
from ndtrain.hf import extra_states
from ndtrain.hf.beside import save_config, take_generation_config
from ndtrain.hf.compat import ignored_on_save, is_causal_lm
from ndtrain.hf.config import Untrusted, own_code, read_config, untrusted
from ndtrain.hf.files import INDEX
from ndtrain.hf.model import built, kept_in_fp32, tied_keys
from ndtrain.storage.headers import DTYPE_NAMES, Target
from ndtrain.storage.stored import Stored
from ndtrain.torch_compat import storage_key

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ALLOW = "add --trust-remote-code"


def meta_model_of(
    config_at: Path, dtype: str | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, torch.dtype, list[str]]:
    """Return the model that a config file or directory describes, float32 on meta, the dtype to publish, and notes.

    `model.export_config` is the config to publish. Raises `DamagedError` if no causal LM can be built, `RecipeError` if
    its code is not trusted.
    """
    path = config_at if config_at.is_file() else config_at / "config.json"
    try:
        config = read_config(config_at, str(config_at), trust_remote_code=trust_remote_code, allow=ALLOW)
        if own_code(config, "AutoModelForCausalLM") and not is_causal_lm(config) and not trust_remote_code:
            raise untrusted(str(config_at), config_at, ALLOW)
        target: Any = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
        with torch.device("meta"):
            model = built(config, trust_remote_code=trust_remote_code)
        model.export_config = config
    except Untrusted:
        raise
    except Exception as error:
        raise DamagedError(f"{path} does not describe a causal language model: {first_line(error)}") from error
    notes = take_generation_config(model, config_at) if config_at.is_dir() else []
    return model, target, notes


def match(state: Mapping[str, Tensor], source: Mapping[str, Stored], where: Path) -> None:
    """Raise `DamagedError` unless the stored tensors are exactly those of the model."""
    missing = [key for key, tensor in state.items() if key not in source and tensor.numel()]
    unknown = sorted(source.keys() - state.keys())
    if missing or unknown:
        some = [f"{len(missing)} of the model's {len(state)} tensors missing, first {missing[0]}"] if missing else []
        some += (
            [f"{len(unknown)} of {len(source)} stored tensors not in the model, first {unknown[0]}"] if unknown else []
        )
        raise DamagedError(f"{where} does not match the model: {'; '.join(some)}")
    for key, tensor in state.items():
        if key not in source:
            continue
        found = source[key]
        if found.shape != (tuple(tensor.shape) or (1,)):
            raise DamagedError(f"{where}: {key} has shape {found.shape}, the config says {tuple(tensor.shape)}")
        both_float = found.dtype.is_floating_point and tensor.dtype.is_floating_point and found.dtype.itemsize > 1
        if not both_float and found.dtype != tensor.dtype:
            raise DamagedError(f"{where}: {key} has dtype {found.dtype}, the model has {tensor.dtype}")


def write_hub(
    source: Mapping[str, Stored],
    model: PreTrainedModel,
    out: Path,
    *,
    dtype: torch.dtype,
    states: Mapping[str, Any],
    max_shard_size: int,
    verify: bool,
    progress: Progress | None,
) -> list[str]:
    """Fill the directory `out`, and return notes; `states` are the extra states of modules. Raises `DamagedError`."""
    kept = kept_in_fp32(model, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not (kept is not None and kept.search(name)):
            tensor.data = tensor.data.to(dtype)
    extra_states.restore(model, states)
    notes = _write_config(model, out)

    left_out = {*tied_keys(model), *ignored_on_save(model)}
    # transformers can save an extra state only if it is one tensor.
    whole = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor) and k not in left_out}
    ready = {k: v for k, v in whole.items() if extra_states.is_extra(k) and not v.is_meta}
    state = {k: v for k, v in whole.items() if not extra_states.is_extra(k) or k in ready}
    groups, saved = to_hub(model, state)
    by_name = {group.outputs[0]: ready[group.sources[0]] for group in groups if group.sources[0] in ready}

    def storage(tensor: Tensor) -> object:
        # Parts of one tensor stay in one file, as save_pretrained keeps what shares memory; so do all empty tensors.
        return storage_key(tensor.untyped_storage()) if tensor.untyped_storage().nbytes() else 0

    split = split_state_dict_into_shards_factory(
        saved,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=storage,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    targets = {key: Target(tuple(tensor.shape), tensor.dtype) for key, tensor in saved.items()}
    for key, target in targets.items():
        if target.dtype not in DTYPE_NAMES:
            raise DamagedError(f"{key} has dtype {target.dtype}, which safetensors files cannot hold")
    # Checkpoints store nothing of empty tensors.
    empty = {k: Stored(tuple(v.shape), v.dtype, ()) for k, v in state.items() if not v.numel() and k not in source}
    groups = [group for group in groups if group.sources[0] not in ready]
    stream = Stream({**source, **empty}, groups, targets, model, ready=by_name, progress=progress)
    stream.write(ShardWriter(out, split.filename_to_tensors, targets, lambda keys: {"format": "pt"}))
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if verify:
        stream.verify(out, list(split.filename_to_tensors))
    return notes


def _write_config(model: PreTrainedModel, out: Path) -> list[str]:
    config = cast("PreTrainedConfig", model.export_config)
    parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    for part in (config, *parts):
        if part is config or getattr(part, "dtype", None) is not None:
            part.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    return save_config(model, out)
