"""Save what a checkpoint holds beside its tensors, and check whether a run may resume from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers

import ndtrain
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def save_extras(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: ByteTokenizer | HubTokenizer,
    states: Mapping[str, Any] | None = None,
) -> None:
    """Write config, generation config, tokenizer and the modules' extra states beside the tensors."""
    if states:
        (directory / extra_states.FILE).write_text(json.dumps(states))
    # A copy, because saving removes the key transformers_weights, which says where the weights are.
    copy.deepcopy(cast("PreTrainedConfig", model.export_config)).save_pretrained(directory)
    if model.can_generate():
        # A generation config that transformers refuses to save must not lose the checkpoint.
        with suppress(ValueError):
            cast(Any, model.generation_config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def config_difference(saved: Path, own: PreTrainedConfig) -> str | None:
    """Return in words the first key in which a checkpoint's config differs from `own`, or None.

    Raises `DamagedError` if the checkpoint's config cannot be read.
    """
    try:
        before = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{saved} cannot be read ({error})") from error
    now = json.loads(own.to_json_string())
    for key in sorted((before.keys() | now.keys()) - {"transformers_version", "_name_or_path", "architectures"}):
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)}, is now {now.get(key)}"
    return None


def check_run_dir(run_dir: Path, newest: int | None, state: Mapping[str, Any] | None, resume: str) -> None:
    """Raise `RecipeError` if the directory has later checkpoints of another run: the next resume would use those."""
    if resume == "auto":
        return  # the newest valid one is used: later ones are damaged and will be written again
    if newest is not None and newest > (state["step"] if state is not None else -1):
        raise RecipeError(
            f"{run_dir} already has a checkpoint of step {newest}, which the next resume would use; "
            'move its checkpoints away, choose another run.dir, or set checkpoint.resume = "auto"'
        )


def check_state(
    state: Mapping[str, Any], found: Path, recipe: Recipe, *, data: str, config: PreTrainedConfig
) -> list[str]:
    """Check that a run may resume from `found`; return notes on differences that are allowed.

    Raises `RecipeError` if `data`, the fingerprint of the batches, or the model differs, `DamagedError` for a key that
    is missing.
    """
    for key, kind in {"step": int, "samples": int, "data": str, "seed": int}.items():
        if type(state.get(key)) is not kind:
            raise DamagedError(f"{found}/train_state.json has no {key}")
    if state["data"] != data or state["seed"] != recipe.train.seed:
        raise RecipeError(
            f"{found} was trained on other data, or with another tokenizer, data.seq_len, data.packing, data.shuffle "
            "or train.seed, than this recipe; restore them, or choose another run.dir to train anew"
        )
    if differs := config_difference(found / "config.json", config):
        raise RecipeError(
            f"{found} holds another model than this recipe describes: {differs}; restore it in [model], or choose "
            "another run.dir to train anew"
        )
    now = recipe.schedule.model_dump()
    return ["[schedule] differs from the checkpoint's"] if state.get("schedule", now) != now else []


def versions() -> dict[str, str]:
    """Return the versions of the packages that made a checkpoint."""
    return {"ndtrain": ndtrain.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
