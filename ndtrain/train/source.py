"""Start a new run from the weights of an ndtrain checkpoint: `model.name` is its directory, or that of its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ndtrain.checkpoint import CheckpointStore, check, load_tensors
from ndtrain.checkpoint.manifest import read_manifest
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.load import load_weights, model_tensors, unused
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import on_rank0
from ndtrain.runs.process import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_checkpoint(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe, with a run directory in `model.name` replaced by its newest valid checkpoint, and notes.

    Config and tokenizer are then found as in any directory. Raises `DamagedError` if no checkpoint is valid.
    """
    name = recipe.model.name or ""
    path = Path(name)
    if "://" in name:
        raise RecipeError(
            f'model.name = "{name}": a run starts from a local directory or the hub; copy the model first'
        )
    root = path / "checkpoints"
    if recipe.model.name is None or not root.is_dir() or (path / "config.json").exists():
        return recipe, []
    newest, refused = CheckpointStore(path, keep=1).newest_valid()
    if newest is None:
        why = refused[0][1] if refused else "it has none"
        raise DamagedError(f'model.name = "{path}" is a run directory without a valid checkpoint: {why}')
    model = recipe.model.model_copy(update={"name": str(newest)})
    notes = [f"{reason}; using {newest} instead" for _, reason in refused]
    return recipe.model_copy(update={"model": model}), [*notes, f"model.name: using {newest}"]


def load_start(model: PreTrainedModel, plan: Plan, *, recipe: Recipe, runtime: Runtime) -> list[str]:
    """Load weights as `load_weights` does, or from an ndtrain checkpoint; return notes for the user. Collective.

    Of a checkpoint each rank reads its own slices, whatever `load.mode` says. Raises `DamagedError` for one that is
    damaged or lacks a weight of the model.
    """
    directory = Path(recipe.model.name or "")
    if recipe.model.init == "random" or not (directory / "manifest.json").is_file():
        return load_weights(model, plan, recipe=recipe, runtime=runtime)

    on_rank0(lambda: check(directory))
    wanted = model_tensors(model)
    load_tensors(directory / "model", wanted, progress=runtime.watch.advance)
    extra_states.restore(model, extra_states.read(directory))
    return unused(read_manifest(directory)["tensors"]["model"].keys() - wanted.keys())
