"""Load the Hugging Face config of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers

from ndtrain.errors import RecipeError, first_line
from ndtrain.hf.overrides import overridden
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the model's config with the recipe's overrides.

    Raises `RecipeError` if it cannot be loaded or made, or does not hold an override.
    """
    section = recipe.model
    what = f'model.type = "{section.type}"' if section.type else f'model.name = "{section.name}"'
    try:
        if section.type is not None:
            base = transformers.AutoConfig.for_model(section.type)
        else:
            base = transformers.AutoConfig.from_pretrained(
                str(section.name), trust_remote_code=section.trust_remote_code
            )
        if not section.config:
            return base
        # What config.json says, not what transformers made of it: migrated values would hide older keys.
        raw = type(base).get_config_dict(str(section.name))[0] if section.type is None else {}
    except Exception as error:
        raise RecipeError(f"cannot load the config of {what}: {first_line(error)}") from error
    try:
        return overridden(base, raw, section.config)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"[model.config] makes the config of {what} invalid: {first_line(error)}") from error
