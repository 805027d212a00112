"""Problems found in a recipe: the key to point at, and a sentence about it."""

from __future__ import annotations

import json
import re
from typing import Any

# The names from the section inwards: ("tp", "plan", "a.b"). An entry of an array is "[0]".
Key = tuple[str, ...]
Problem = tuple[Key, str]
_BARE, _INDEX = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"\[\d+\]")


class RulesBroken(ValueError):
    """Raised by validators for rules that span several keys, with one problem for each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


def dotted(key: Key) -> str:
    """Return the key as TOML spells it: `tp.plan."a.b"` for `("tp", "plan", "a.b")`.

    An entry of an array is `data.sources[0]`, for `("data", "sources", "[0]")`.
    """
    return "".join(
        name if is_index(name) else "." * (at > 0) + (name if _BARE.fullmatch(name) else show(name))
        for at, name in enumerate(key)
    )


def is_index(name: str) -> bool:
    """Return whether a part of a key stands for an entry of an array."""
    return _INDEX.fullmatch(name) is not None


def index(number: int) -> str:
    """Return the part of a key that stands for entry `number` of an array, from 0 on."""
    return f"[{number}]"


def show(value: Any) -> str:
    """Return the value as TOML spells it, on one line and cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
