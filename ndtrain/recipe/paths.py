"""The paths and URLs in a recipe: `~` and `$VAR` are expanded, and secrets in a URL are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ndtrain.recipe.data import SHARED
from ndtrain.recipe.problems import Key, Problem, dotted, index
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
    for at, table in _tables(document):
        if not isinstance(table.get(at[-1]), str):
            continue
        key = at[-1]
        try:
            table[key] = expanded(table[key])
        except KeyError as error:
            yield at, f"{dotted(at)} needs the environment variable {error.args[0]}, not set"
            continue
        if reason := secret_in(table[key]):
            yield at, f"{dotted(at)} {reason}"


def _tables(document: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yield each key of a path, and the table that may have it."""
    for section, key in PATHS:
        table = document.get(section)
        if not isinstance(table, dict):
            continue
        yield (section, key), table
        sources = table.get("sources") if key == "path" else None
        for number, source in enumerate(sources if isinstance(sources, list) else ()):
            if isinstance(source, dict):
                yield (section, "sources", index(number), key), source
