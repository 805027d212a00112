"""Name the files to load, and write the errors and notes on what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ndtrain.errors import DamagedError, RecipeError, first_line, keeps_its_name
from ndtrain.hf import extra_states
from ndtrain.hf.files import SINGLE, ModelFiles, model_files
from ndtrain.hf.hub import directory_of
from ndtrain.layout import local_part
from ndtrain.recipe import Recipe
from ndtrain.storage.pieces import has_nan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def files_to_load(model: PreTrainedModel, recipe: Recipe) -> ModelFiles:
    """Return the files of the weights of `model.name`. Raises `RecipeError` if it has none."""
    directory = directory_of(str(recipe.model.name), recipe.model.revision)
    files = model_files(Path(directory), named=getattr(model.config, "transformers_weights", None))
    if files is None:
        raise RecipeError(
            f'model.name = "{recipe.model.name}" has no weights (neither {SINGLE}, pytorch_model.bin nor an index of '
            'such files); set model.init = "random"'
        )
    return files


def unused(keys: Iterable[Any]) -> list[str]:
    """Return the note on saved weights that the model does not have; [] without any."""
    names = sorted(key for key in map(str, keys) if not extra_states.is_extra(key))
    if len(names) <= 1:
        return [f"1 saved weight is not in this model and is left out: {name}" for name in names]
    return [f"{len(names)} saved weights are not in this model and are left out; the first is {names[0]}"]


@contextmanager
def readable(recipe: Recipe) -> Iterator[None]:
    """Raise what goes wrong inside, while weights are read, as a `DamagedError` that names the model."""
    try:
        yield
    except Exception as error:
        if keeps_its_name(error):
            raise
        raise DamagedError(
            f'the weights of model.name = "{recipe.model.name}" cannot be read: {first_line(error)}'
        ) from error


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
