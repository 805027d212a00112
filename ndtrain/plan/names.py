"""Names of modules and parameters (FQNs): patterns of them, and which module a name is in."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable


def expression_of(pattern: str) -> re.Pattern[str]:
    """Return a recipe's pattern of FQNs, in which `*` matches any characters but a dot, as a regular expression."""
    return re.compile("".join("[^.]*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)))


def folded(name: str) -> str:
    """Return the pattern of a name and of its like in other layers: `*` for each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Return whether `name` is one of `modules` or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def innermost(name: str, modules: Container[str]) -> str | None:
    """Return the innermost of `modules` that is or contains `name`; None if none does."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None
