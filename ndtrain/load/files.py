"""Name the files to load, and write the errors and notes on what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ndtrain.errors import DamagedError, RecipeError, first_line, keeps_its_name
from ndtrain.hf import extra_states
from ndtrain.hf.at_fault import overrides_at_fault
from ndtrain.hf.files import SINGLE, ModelFiles, model_files
from ndtrain.hf.hub import directory_of
from ndtrain.hf.model import meta_model
from ndtrain.hf.weight_names import model_tensors
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
        what = f'the weights of model.name = "{recipe.model.name}"'
        if "weights_only" in str(error):  # torch's advice is to run what the file holds
            raise DamagedError(
                f"{what} cannot be read: {_torch_files(recipe)} is damaged, or holds other objects than tensors, whose "
                "code is never run; get the model as safetensors, or, if you trust its author, convert it yourself "
                "(torch.load with weights_only=False, then safetensors.torch.save_file)"
            ) from error
        raise DamagedError(f"{what} cannot be read: {first_line(error)}") from error


def _torch_files(recipe: Recipe) -> str:
    """Return the name of the file, or of the index of the files, that torch reads."""
    files = model_files(Path(directory_of(str(recipe.model.name), recipe.model.revision)))
    return files.main if files is not None else "a file"


def check_report(missing: Any, mismatched: Any, recipe: Recipe) -> None:
    """Raise `DamagedError` if weights are missing or, as (name, saved shape, model's shape), mismatched."""
    missing = sorted(key for key in missing if not extra_states.is_extra(key))
    mismatched = sorted((str(name), tuple(saved), tuple(shape)) for name, saved, shape in mismatched)
    refuse_overrides(dict.fromkeys(missing) | {name: saved for name, saved, _ in mismatched}, recipe)
    if missing:
        lacks = "1 weight of the model:" if len(missing) == 1 else f"{len(missing)} weights of the model; the first is"
        raise DamagedError(
            f'model.name = "{recipe.model.name}" lacks {lacks} {missing[0]}; complete its files, or set '
            'model.init = "random"'
        )
    if mismatched:
        raise DamagedError(
            f'model.name = "{recipe.model.name}" has weights whose shapes differ from its config; the first is '
            f"(name, saved shape, shape by the config) = {mismatched[0]}"
        )


def refuse_overrides(misfits: Mapping[str, tuple[int, ...] | None], recipe: Recipe) -> None:
    """Raise `RecipeError` if overrides of the config are why saved weights do not fit the model.

    `misfits` are {FQN: saved shape, or None for one that is missing}; the first is looked into.
    """
    if not misfits or not recipe.model.config:
        return
    name, saved = next(iter(misfits.items()))
    now = _shape(name, recipe)
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": {}})})
    if _shape(name, plain) != saved:
        return  # the weights do not fit their own config
    wrong = " and ".join(overrides_at_fault(recipe, lambda other: _shape(name, other) not in (now, _UNKNOWN)))
    would = f"is saved as {saved}, and would be {now}" if saved else "is not among them"
    raise RecipeError(
        f'{wrong}: the weights of model.name = "{recipe.model.name}" do not fit ({name} {would}); leave it out, or set '
        'model.init = "random" to train from scratch'
    )


_UNKNOWN = (-1,)


def _shape(name: str, recipe: Recipe) -> tuple[int, ...] | None:
    """Return the shape of a weight in the recipe's model, None if it has no such weight; _UNKNOWN without a model."""
    try:
        tensors = model_tensors(meta_model(recipe))
    except RecipeError:
        return _UNKNOWN
    return tuple(tensors[name].shape) if name in tensors else None


def refuse_nan(tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Raise `DamagedError` naming a tensor whose part on this rank contains NaN, as it does if it was never set."""
    for name, tensor in tensors.items():
        if has_nan(local_part(tensor)):
            raise DamagedError(f"{recipe.model.name}: {name} contains NaN")
