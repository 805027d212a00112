"""What a checkpoint has beside its tensors, and whether a run may go on from it."""

from __future__ import annotations

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
    """Write config, generation config, tokenizer and what modules keep of their own beside the tensors."""
    if states:
        (directory / extra_states.FILE).write_text(json.dumps(states))
    cast("PreTrainedConfig", model.export_config).save_pretrained(directory)
    if model.can_generate():
        # A generation config that its own library would refuse to save must not lose the checkpoint.
        with suppress(ValueError):
            cast(Any, model.generation_config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def config_difference(saved: Path, own: PreTrainedConfig) -> str | None:
    """The first key in which the config of a checkpoint differs from `own`, in words; None where all agree."""
    try:
        before = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{saved}: {error}") from error
    now = json.loads(own.to_json_string())
    for key in sorted((before.keys() | now.keys()) - {"transformers_version", "_name_or_path", "architectures"}):
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)}, is {now.get(key)}"
    return None


def check_run_dir(run_dir: Path, newest: int | None, state: Mapping[str, Any] | None, resume: str) -> None:
    """Refuse to train beside later checkpoints of another attempt: the next resume would take those."""
    if resume == "auto":
        return  # the newest that is whole was taken: later ones are damaged, and are written again
    if newest is not None and newest > (state["step"] if state is not None else -1):
        raise RecipeError(
            f"{run_dir} already has a checkpoint of step {newest}, from which the next resume would go on; "
            'move its checkpoints away, choose another run.dir, or set checkpoint.resume = "auto"'
        )


def check_state(
    state: Mapping[str, Any], found: Path, recipe: Recipe, *, data: str, config: PreTrainedConfig
) -> list[str]:
    """Refuse to go on from `found` with other data (a fingerprint) or another model; what differs and may."""
    for key, kind in {"step": int, "samples": int, "data": str, "seed": int}.items():
        if type(state.get(key)) is not kind:
            raise DamagedError(f"{found}/train_state.json has no {key}")
    if state["data"] != data or state["seed"] != recipe.train.seed:
        raise RecipeError(
            f"{found} was trained on other data, seq_len, packing or train.seed than this recipe says; restore "
            "them, or start anew with another run.dir"
        )
    if differs := config_difference(found / "config.json", config):
        raise RecipeError(
            f"{found} holds another model than this recipe describes: {differs}; restore it in [model], or start "
            "anew with another run.dir"
        )
    now = recipe.schedule.model_dump()
    return ["the schedule is another than the checkpoint's"] if state.get("schedule", now) != now else []


def versions() -> dict[str, str]:
    return {"ndtrain": ndtrain.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
