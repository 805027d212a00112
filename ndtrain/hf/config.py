"""Load the Hugging Face config of a recipe."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ndtrain.errors import DamagedError, RecipeError, first_line
from ndtrain.hf.compat import causal_lm_class
from ndtrain.hf.hub import directory_of
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


ALLOW = "set model.trust_remote_code = true"


class Untrusted(RecipeError):
    """The model comes with code of its own, which the user has not allowed to run."""


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the model's config with the recipe's overrides. Raises `RecipeError` if it cannot be loaded or made."""
    section = recipe.model
    overrides = copy.deepcopy(dict(section.config))
    what = f'model.type = "{section.type}"' if section.type else f'model.name = "{section.name}"'
    if section.type is not None:
        try:
            base = transformers.AutoConfig.for_model(section.type)
        except Exception as error:
            raise RecipeError(f"cannot load the config of {what}: {first_line(error)}") from error
    else:
        directory = Path(directory_of(str(section.name), section.revision))
        base = read_config(directory, what, trust_remote_code=section.trust_remote_code)
    _check_keys(base, overrides)
    if not overrides:
        return base
    try:
        if section.type is not None:
            return transformers.AutoConfig.for_model(section.type, **overrides)
        return type(base).from_dict(_overridden(base, overrides))
    except Exception as error:
        raise RecipeError(f"[model.config] makes the config of {what} invalid: {first_line(error)}") from error


def read_config(at: Path, what: str, *, trust_remote_code: bool, allow: str = ALLOW) -> PreTrainedConfig:
    """Return the config in a directory or file; errors begin with `what`, and `allow` says what trusts its code.

    Raises `DamagedError` for a file that is not JSON, `RecipeError` if there is none or transformers cannot use it.
    """
    if at.is_file() and at.suffix != ".json":
        raise RecipeError(f"{what} is a file; give the directory of a model")
    file = at / "config.json" if at.is_dir() else at
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = (at / "adapter_config.json").is_file()
        hint = "it is an adapter; give its base model" if adapter else "give the directory of a model"
        raise RecipeError(f"{what}: {at} has no config.json; {hint}") from None
    except (ValueError, OSError) as error:
        raise DamagedError(f"{what}: {file} cannot be read ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise DamagedError(f"{what}: {file} is not a JSON object")
    kind, known = values.get("model_type"), list(transformers.CONFIG_MAPPING)
    if own_code(values, "AutoConfig") and kind not in known and not trust_remote_code:
        raise untrusted(what, at, allow)
    if not own_code(values, "AutoConfig") and kind is None:
        raise RecipeError(f"{what}: {file} has no model_type, so it is not a model of transformers")
    if not own_code(values, "AutoConfig") and kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        meant = f'did you mean "{near[0]}"?' if near else "upgrade transformers, or choose another model"
        version = transformers.__version__
        raise RecipeError(
            f'{what}: {file} has model_type "{kind}", which transformers {version} does not have; {meant}'
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(at), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RecipeError(f"cannot load the config of {what}: {first_line(error)}") from error


def own_code(config: Any, auto_class: str) -> bool:
    """Return whether a config, an object or its dict, names code beside the weights for a class of transformers."""
    found = config.get("auto_map") if isinstance(config, dict) else getattr(config, "auto_map", None)
    return isinstance(found, dict) and auto_class in found


def untrusted(what: str, at: object, allow: str = ALLOW) -> Untrusted:
    """Return the refusal to run the code in `at` that comes with a model; `allow` says what allows it."""
    where = "it" if str(at) in what else str(at)
    return Untrusted(
        f"{what}: {where} comes with Python code of its own, which runs only if you allow it: read it, then {allow}"
    )


# Older keys that transformers still accepts as parts of `rope_parameters`.
_OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def _check_keys(base: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    known = {*base.to_dict(), *base.attribute_map, *_OLD_KEYS}
    for key in overrides:
        if key not in known and not _reads(base, key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise RecipeError(f'[model.config] has no key "{key}" for model type "{base.model_type}"{hint}')


def _reads(config: PreTrainedConfig, key: str) -> bool:
    """Return whether the model's source contains the word `key`: some keys have no default in the config class."""
    kind = causal_lm_class(config)
    if kind is None:
        return False
    source = inspect.getsource(sys.modules[kind.__module__])
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def _overridden(base: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `base` as a dict with `overrides` applied: tables are merged, `layer_types` is cut to fewer layers."""
    values = base.to_dict()
    for key, value in overrides.items():
        key = base.attribute_map.get(key, key)
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    layers, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if isinstance(layers, int) and isinstance(kinds, list) and "layer_types" not in overrides:
        values["layer_types"] = kinds[:layers]
    return values
