"""Problems found in a recipe: the key to point at, and a sentence about it."""

from __future__ import annotations

import json
from typing import Any

# The names from the section inwards: ("tp", "plan", "a.b").
Key = tuple[str, ...]
Problem = tuple[Key, str]


class RulesBroken(ValueError):
    """Raised by validators for rules that span several keys, with one problem for each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


def dotted(key: Key) -> str:
    """Return the key as TOML spells it: `tp.plan."a.b"` for `("tp", "plan", "a.b")`."""
    return ".".join(
        name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else show(name) for name in key
    )


def show(value: Any) -> str:
    """Return the value as TOML spells it, on one line and cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
