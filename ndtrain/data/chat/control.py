"""Find text of a row that spells a special token, which a rendering would turn into that token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ndtrain.data.chat.conversation import Conversation, TextPair
from ndtrain.data.chat.spots import named


def control_text(given: Conversation | TextPair, spelled: Callable[[str], str]) -> tuple[str, str]:
    """Return where in a row a special token is spelled, and the token; ("", "") if none is.

    `spelled(text)` returns the first special token that a text spells, or "". Keys of objects are text too.
    """
    for where, value in _parts(given):
        for text in _strings(value):
            if special := spelled(text):
                return where, special
    return "", ""


def _parts(given: Conversation | TextPair) -> Iterator[tuple[str, Any]]:
    if isinstance(given, TextPair):
        yield from (("the prompt", given.prompt), ("the completion", given.completion))
        return
    for index, message in enumerate(given.messages):
        yield named(given, index), message
    yield from (("tools", given.tools), ("chat_template_kwargs", given.variables))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
