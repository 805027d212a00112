"""Choose the chat template: a file, one of ndtrain's own, or the tokenizer's; and make what it writes depend on the row
alone.

ndtrain's own templates, in `templates/`, mark what the model generates by {% generation %}.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ndtrain.errors import RecipeError

OWN = "the tokenizer's"
_FOLDER = Path(__file__).parent / "templates"
BUILT_IN = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
_TODAY = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?("[^"\\{}]*"|'[^'\\{}]*')\s*\)""")
_ASKS = re.compile(r"\bstrftime_now\b(?!\s+is\s)")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


@dataclass(frozen=True)
class ChatTemplate:
    """The templates that rows are rendered with: "default", and maybe "tool_use" for rows with tools.

    `sources` are the texts to save with a checkpoint. `texts` are the same with the day fixed to `date`. Where there is
    no template, both are empty, and `missing` says so: then only prompts and completions of plain text can be used.
    """

    name: str
    sources: Mapping[str, str]
    texts: Mapping[str, str]
    date: datetime.date
    missing: str = ""

    def text_for(self, *, tools: bool) -> str:
        """Return the template of a row, chosen as transformers does."""
        return self.texts["tool_use" if tools and "tool_use" in self.texts else "default"]

    @property
    def key(self) -> str:
        """Identify what the templates write."""
        return blake2b(repr(sorted(self.texts.items())).encode(), digest_size=16).hexdigest()

    def notes(self) -> list[str]:
        """Return what a reader of the run's output should know."""
        if self.texts == self.sources:
            return []
        return [
            f"the chat template ({self.name}) writes today's date: every row gets {self.date.isoformat()}, so that the "
            "data does not depend on the day"
        ]


def chat_template(given: str | None, own: Any, *, date: datetime.date) -> ChatTemplate:
    """Return the template that `data.chat_template` names, or `own`, the tokenizer's `chat_template`, if it is None.

    Raises `RecipeError` if the one that is named is not there or cannot be read, or its text is not a function of the
    row.
    """
    if given is not None:
        name, sources = _named(given)
    elif isinstance(own, str):
        name, sources = OWN, {"default": own}
    elif isinstance(own, Mapping) and isinstance(own.get("default"), str):
        name, sources = OWN, {key: own[key] for key in ("default", "tool_use") if key in own}
    else:
        has = (
            f"has the chat templates {', '.join(map(str, own))}, none of them the default"
            if own
            else "has no chat template"
        )
        missing = f"data.tokenizer {has}; set data.chat_template to a file or to one of {', '.join(BUILT_IN)}"
        return ChatTemplate(OWN, {}, {}, date, missing)
    return ChatTemplate(name, sources, {key: _fixed(text, name, date) for key, text in sources.items()}, date)


def _named(given: str) -> tuple[str, dict[str, str]]:
    if given in BUILT_IN:
        return given, {"default": (_FOLDER / f"{given}.jinja").read_text(encoding="utf-8")}
    file = Path(given)
    if not file.is_file():
        raise RecipeError(
            f'data.chat_template = "{given}" is neither a file (looked from {Path.cwd()}) nor one of '
            + ", ".join(BUILT_IN)
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f'data.chat_template = "{given}" cannot be read: {error}') from error
    if not text.strip():
        raise RecipeError(f'data.chat_template = "{given}" is empty')
    return given, {"default": text}


def _fixed(text: str, name: str, date: datetime.date) -> str:
    """Return a template with `date` in the place of the day on which it is rendered."""
    fixed = _TODAY.sub(lambda found: repr(date.strftime(found.group(1)[1:-1])), text)
    if _ASKS.search(fixed):
        raise RecipeError(
            f"the chat template ({name}) takes today's date in a way that ndtrain cannot fix, so that its rows would "
            "depend on the day; set data.chat_template to a copy with a fixed date"
        )
    if _RANDOM.search(fixed):
        raise RecipeError(f"the chat template ({name}) draws at random; set data.chat_template to another")
    return fixed
