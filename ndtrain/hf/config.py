"""Load the Hugging Face config of a recipe."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ndtrain.errors import DamagedError, RecipeError, first_line
from ndtrain.hf.hub import directory_of
from ndtrain.hf.overrides import overridden
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


ALLOW = "set model.trust_remote_code = true"


class Untrusted(RecipeError):
    """The model comes with code of its own, which the user has not allowed to run."""


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the model's config with the recipe's overrides.

    Raises `RecipeError` if it cannot be loaded or made, or does not hold an override.
    """
    section = recipe.model
    what = f'model.type = "{section.type}"' if section.type else f'model.name = "{section.name}"'
    if section.type is not None:
        try:
            base = transformers.AutoConfig.for_model(section.type)
        except Exception as error:
            raise RecipeError(f"cannot load the config of {what}: {first_line(error)}") from error
        raw = {}
    else:
        directory = Path(directory_of(str(section.name), section.revision))
        base = read_config(directory, what, trust_remote_code=section.trust_remote_code)
        # What config.json says, not what transformers made of it: migrated values would hide older keys.
        raw = type(base).get_config_dict(str(directory))[0]
    if not section.config:
        return base
    try:
        return overridden(base, raw, section.config)
    except RecipeError:
        raise
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
