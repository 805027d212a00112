"""The sections of a recipe by name, and messages about the keys that [data] and [eval] share."""

from __future__ import annotations

import re
from types import NoneType
from typing import get_args

from ndtrain.recipe.schema import SHARED, Recipe, Section


def sections() -> dict[str, type[Section]]:
    """Return the model of each section of a recipe, by name."""
    models = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: next(m for m in (*get_args(model), model) if m is not NoneType) for name, model in models.items()}


def of_held_out(message: str) -> str:
    """Return a message about [data] in which the keys that [eval] has too are [eval]'s."""
    return re.sub(rf"(?<![\w./-])data\.(?=({'|'.join(SHARED)})\b)", "eval.", message)
