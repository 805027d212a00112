"""What is wrong in a recipe: the path of the key to point at, and a sentence about it."""

from __future__ import annotations

import json
from typing import Any

Path = tuple[str, ...]


Problem = tuple[Path, str]


class RulesBroken(ValueError):
    """Sections that are each well formed break these rules."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


def dotted(path: Path) -> str:
    """`("tp", "plan", "a.b")` as TOML spells it: `tp.plan."a.b"`."""
    return ".".join(
        key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else show(key) for key in path
    )


def show(value: Any) -> str:
    """A value as TOML spells it, on one line and cut to a length that a message can bear."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
