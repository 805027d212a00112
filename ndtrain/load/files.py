"""Find the files of the weights that a recipe names, and write the errors and notes on what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.compat import cached_file, get_checkpoint_shard_files
from ndtrain.hf.hub import directory_of
from ndtrain.layout import local_part
from ndtrain.recipe import Recipe
from ndtrain.storage.pieces import has_nan


def weight_files(recipe: Recipe) -> list[str]:
    """Return the paths of the model's safetensors files, in a local directory or in the hub's cache.

    Raises `RecipeError` if there are none.
    """
    name = directory_of(str(recipe.model.name), recipe.model.revision)
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files, _ = get_checkpoint_shard_files(name, index)
        return list(files)
    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise RecipeError(
            f'model.name = "{recipe.model.name}" has no safetensors files; set load.mode = "rank0", or '
            'model.init = "random"'
        )
    return [single]


def unused(keys: Iterable[Any]) -> list[str]:
    """Return the note on saved weights that the model does not have; [] without any."""
    names = sorted(key for key in map(str, keys) if not extra_states.is_extra(key))
    if len(names) <= 1:
        return [f"1 saved weight is not in this model and is left out: {name}" for name in names]
    return [f"{len(names)} saved weights are not in this model and are left out; the first is {names[0]}"]


def unreadable(recipe: Recipe, error: Exception) -> Exception:
    """Return the error to raise for weights that could not be read because of `error`."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    if "no file named" in line:
        return RecipeError(
            f'model.name = "{recipe.model.name}" has no weights (no safetensors files); set model.init = "random"'
        )
    return DamagedError(f'the weights of model.name = "{recipe.model.name}" cannot be read: {line}')


def check_report(missing: Any, mismatched: Any, recipe: Recipe) -> None:
    """Raise `DamagedError` if weights are missing or, as (name, saved shape, model's shape), mismatched."""
    missing = [key for key in missing if not extra_states.is_extra(key)]
    if missing:
        lacks = "1 weight of the model:" if len(missing) == 1 else f"{len(missing)} weights of the model; the first is"
        raise DamagedError(
            f'model.name = "{recipe.model.name}" lacks {lacks} {sorted(missing)[0]}; complete its files, or set '
            'model.init = "random"'
        )
    if mismatched:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" has weights whose shapes differ from its config; the first is '
            f"(name, saved shape, shape by the config) = {sorted(map(str, mismatched))[0]}"
        )


def refuse_nan(tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Raise `DamagedError` naming a tensor whose part on this rank contains NaN, as it does if it was never set."""
    for name, tensor in tensors.items():
        if has_nan(local_part(tensor)):
            raise DamagedError(f"{recipe.model.name}: {name} contains NaN")
