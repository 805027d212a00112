"""The paths and URLs in a recipe: `~` and `$VAR` are expanded, and secrets in a URL are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ndtrain.recipe.problems import Key, Problem, dotted
from ndtrain.recipe.schema import SHARED
from ndtrain.storage.urls import expanded, secret_in

PATHS: tuple[Key, ...] = (
    ("model", "name"),
    ("data", "path"),
    ("data", "tokenizer"),
    ("checkpoint", "resume"),
    ("run", "dir"),
)
PATHS += tuple(("eval", key) for section, key in PATHS if section == "data" and key in SHARED)


def expand_paths(document: dict[str, Any]) -> Iterator[Problem]:
    """Expand the paths of a recipe's tables in place; yield what cannot be used."""
    for section, key in PATHS:
        table = document.get(section)
        if not isinstance(table, dict) or not isinstance(table.get(key), str):
            continue
        try:
            table[key] = expanded(table[key])
        except KeyError as error:
            yield (section, key), f"{dotted((section, key))} needs the environment variable {error.args[0]}, not set"
            continue
        if reason := secret_in(table[key]):
            yield (section, key), f"{dotted((section, key))} {reason}"
