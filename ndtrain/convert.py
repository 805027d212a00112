"""A DCP checkpoint of ndtrain to the directory that `save_pretrained` would have written. One process, no group."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ndtrain import extra_state
from ndtrain.checkpoint import CheckpointStore, check, load_tensors
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.model import kept_in_fp32, tie, tied_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


def convert(checkpoint: Path, out: Path, *, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Write `checkpoint` (a step directory, or a run directory: its newest) as Hugging Face safetensors to `out`.

    Key names, tied weights, config and tokenizer are as `save_pretrained` writes them; the dtype is the config's
    unless given. `out` appears whole or not at all. Raises `RecipeError` for wrong arguments and `DamagedError` for a
    checkpoint that is not complete.
    """
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", max_shard_size):
        raise RecipeError(f'--max-shard-size "{max_shard_size}" is no size like 5GB')
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f'--dtype "{dtype}" must be one of {", ".join(DTYPES)}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} already exists and is not an empty directory; choose another")
    source = _step_directory(checkpoint)
    check(source)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"{out} cannot be made: {error.strerror}; choose another") from error
    try:
        model = _read(source, dtype)
        extra_state.restore(model, extra_state.read(source))
        # transformers can save a state that is one tensor, and no other
        tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor) and not v.is_meta}
        model.save_pretrained(part, state_dict=tensors, max_shard_size=max_shard_size)
        for file in source.iterdir():
            # config and generation config are written by save_pretrained itself
            if file.is_file() and file.name not in (
                "config.json",
                "train_state.json",
                "manifest.json",
                extra_state.FILE,
            ):
                shutil.copy2(file, part / file.name)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise NdtrainError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(source: Path, dtype: str | None) -> PreTrainedModel:
    """The model of a checkpoint with its weights, in `dtype` or the config's."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        # read first: building the model writes its own dtype into the config
        target = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise DamagedError(f"{source}/config.json names no model: {str(error).splitlines()[0]}") from error
    kept = kept_in_fp32(model, target)
    aliases = tied_keys(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, meta in model.state_dict().items():
        if name in aliases or extra_state.is_extra(name):
            continue
        full = torch.empty(meta.shape, dtype=meta.dtype)
        load_tensors(source / "model", {name: full})
        high = kept is not None and kept.search(name)
        tensors[name] = full.to(target) if full.is_floating_point() and not high else full
    model.load_state_dict(tensors, assign=True, strict=False)
    tie(model)
    model.config.dtype = target
    return model


def _step_directory(path: Path) -> Path:
    if (path / "manifest.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        found, _ = CheckpointStore(path, keep=1).newest_valid()
        if found is None:
            raise DamagedError(f"{path} has no complete checkpoint")
        return found
    if not path.exists():
        raise RecipeError(f"{path} does not exist; give a directory like RUN_DIR/checkpoints/step-00000100")
    raise DamagedError(f"{path} is no ndtrain checkpoint: it has no manifest.json")
