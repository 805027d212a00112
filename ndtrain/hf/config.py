"""Load the Hugging Face config of a recipe."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import transformers

from ndtrain.errors import RecipeError, first_line, keeps_its_name
from ndtrain.hf.compat import causal_lm_class
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the model's config with the recipe's overrides. Raises `RecipeError` if it cannot be loaded or made."""
    section = recipe.model
    overrides = copy.deepcopy(dict(section.config))
    what = f'model.type = "{section.type}"' if section.type else f'model.name = "{section.name}"'
    try:
        if section.type is not None:
            base = transformers.AutoConfig.for_model(section.type)
        else:
            base = transformers.AutoConfig.from_pretrained(
                str(section.name), trust_remote_code=section.trust_remote_code
            )
    except Exception as error:
        if keeps_its_name(error):
            raise
        raise RecipeError(f"cannot load the config of {what}: {first_line(error)}") from error
    _check_keys(base, overrides)
    if not overrides:
        return base
    try:
        if section.type is not None:
            return transformers.AutoConfig.for_model(section.type, **overrides)
        return type(base).from_dict(_overridden(base, overrides))
    except Exception as error:
        if keeps_its_name(error):
            raise
        raise RecipeError(f"[model.config] makes the config of {what} invalid: {first_line(error)}") from error


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
