"""The sections of a recipe by name, and messages about the keys that [data] and [eval] share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import NoneType
from typing import get_args

from ndtrain.recipe.data import OF_SOURCE, SHARED, SourceSection
from ndtrain.recipe.schema import OptimGroup, Recipe, Section

# Key of an array of tables -> what each of them is.
ENTRIES: dict[str, type[Section]] = {"sources": SourceSection, "groups": OptimGroup}


def sections() -> dict[str, type[Section]]:
    """Return the model of each section of a recipe, by name."""
    models = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: next(m for m in (*get_args(model), model) if m is not NoneType) for name, model in models.items()}


def of_held_out(message: str) -> str:
    """Return a message about [data] in which the keys that [eval] has too are [eval]'s."""
    return _moved(message, SHARED, "eval")


def of_source(message: str, number: int) -> str:
    """Return a message about [data] in which the keys that a source has too are those of source `number`, from 0 on."""
    return _moved(message, OF_SOURCE, f"data.sources[{number}]")


def _moved(message: str, keys: Sequence[str], table: str) -> str:
    return re.sub(rf"(?<![\w./-])data\.(?=({'|'.join(keys)})\b)", f"{table}.", message)
