"""The saved weights that a recipe names: their files, and what to say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.compat import cached_file, get_checkpoint_shard_files
from ndtrain.layout import local_part
from ndtrain.recipe import Recipe
from ndtrain.storage.pieces import has_nan


def weight_files(recipe: Recipe) -> list[str]:
    """Paths of the model's safetensors files, from a local directory or through the hub's cache."""
    name = str(recipe.model.name)
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files, _ = get_checkpoint_shard_files(name, index)
        return list(files)
    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise RecipeError(
            f'model.name = "{name}" has no safetensors files; set load.mode = "rank0", or model.init = "random"'
        )
    return [single]


def unused(keys: Iterable[Any]) -> list[str]:
    """What to tell of saved weights that the model does not have."""
    names = sorted(key for key in map(str, keys) if not extra_states.is_extra(key))
    return [f"{len(names)} saved weights are not of this model and left out, the first is {names[0]}"] if names else []


def unreadable(recipe: Recipe, error: Exception) -> Exception:
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    if "no file named" in line:
        return RecipeError(
            f'model.name = "{recipe.model.name}" has no weights (no safetensors files); set model.init = "random"'
        )
    return DamagedError(f'the weights of model.name = "{recipe.model.name}" cannot be read: {line}')


def check_report(missing: Any, mismatched: Any, recipe: Recipe) -> None:
    missing = [key for key in missing if not extra_states.is_extra(key)]
    if missing:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" lacks {len(missing)} weights of the model, the first is '
            f'{sorted(missing)[0]}; complete it, or set model.init = "random"'
        )
    if mismatched:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" has weights of another shape than its config says: '
            f"{sorted(map(str, mismatched))[0]}"
        )


def refuse_nan(tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Raise `DamagedError` naming a tensor of which this rank's part has NaN, or was never set."""
    for name, tensor in tensors.items():
        if has_nan(local_part(tensor)):
            raise DamagedError(f"{recipe.model.name}: {name} has NaN")
