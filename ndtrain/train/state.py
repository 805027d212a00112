"""Save what a checkpoint holds beside its tensors, and check whether a run may resume from it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import ndtrain
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.beside import copied, save_config, take_generation_config
from ndtrain.hf.hub import directory_of
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `origin_of` returns that a checkpoint records beside the recipe.
_IDENTITIES = ("base", "tokenizer", "packages", "template", "content", "files")


def extras(
    model: PreTrainedModel, tokenizer: ByteTokenizer | HubTokenizer, recipe: Recipe
) -> tuple[dict[str, bytes], list[str]]:
    """Return {path: content} of the files beside a checkpoint's tensors, the same in every checkpoint, and notes.

    They are what plain transformers saves of the model that `model.name` stands for: config, generation config, code,
    tokenizer, and the configs of a processor whose tokenizer is trained with. Raises `RecipeError` if they cannot be
    saved.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            at, notes = Path(folder), []
            if recipe.model.name is not None:
                base = Path(directory_of(recipe.model.name, recipe.model.revision))
                notes += take_generation_config(model, base)
                own = recipe.data.tokenizer in (None, recipe.model.name)
                for name, content in copied(base, processor=own).items():
                    (at / name).write_bytes(content)
            notes += save_config(model, at)
            tokenizer.save_pretrained(at)
            return {f.relative_to(at).as_posix(): f.read_bytes() for f in at.rglob("*") if f.is_file()}, notes
    except (OSError, NdtrainError):
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"the model's config or tokenizer cannot be saved: {line}") from error


def state_of_run(sizes: MeshSizes, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what train_state.json says of a run whatever step it is at; `origin` as `origin_of` returns it."""
    return {
        "mesh": asdict(sizes),
        "versions": versions(),
        "recipe": origin.get("recipe"),
        "origin": {key: origin.get(key) for key in _IDENTITIES},
    }


def save_extras(directory: Path, files: Mapping[str, bytes], states: Mapping[str, Any]) -> None:
    """Write the files that `extras` returned and the modules' extra states beside the tensors."""
    for path, content in files.items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_bytes(content)
    if states:
        (directory / extra_states.FILE).write_text(json.dumps(states))


def check_run_dir(run_dir: Path, newest: int | None, state: Mapping[str, Any] | None, resume: str) -> None:
    """Raise `RecipeError` if the directory has later checkpoints of another run: the next resume would use those."""
    if resume == "auto":
        return  # the newest valid one is used: later ones are damaged and will be written again
    if newest is not None and newest > (state["step"] if state is not None else -1):
        raise RecipeError(
            f"{run_dir} already has a checkpoint of step {newest}, which the next resume would use; "
            'move its checkpoints away, choose another run.dir, or set checkpoint.resume = "auto"'
        )


def check_state(state: Mapping[str, Any], found: Path) -> None:
    """Raise `DamagedError` for a key of `found`'s train_state.json that a resume needs and that is missing."""
    kinds = {"step": int, "samples": int, "data": str, "seed": int}
    if "recipe" in state:
        kinds |= {"recipe": dict, "origin": dict}
    for key, kind in kinds.items():
        if type(state.get(key)) is not kind:
            raise DamagedError(f"{found}/train_state.json has no {key}")


def versions() -> dict[str, str]:
    """Return the versions of the packages that made a checkpoint."""
    return {"ndtrain": ndtrain.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
