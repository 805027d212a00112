"""Stock templates, which have no marks: what is trained on is what was found by hand to be right.

The files in `chat/expected` have whole renderings with what is trained on between ⟦ and ⟧, each checked by hand: the
header of a turn and an empty block of thinking that nobody wrote are the prompt's; all else that the model has to write
is trained on, with the token that ends its turn; the line feed that a template writes after that token is not.
"""

from __future__ import annotations

import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ndtrain.data.chat import ChatEncoder, chat_template
from tests.chat.conversations import WEATHER, Fields, said
from tests.chat.odd import TOKENIZERS
from tests.chat.runs import shown
from tests.chat.tokenizers import tokenizer_of

HERE = Path(__file__).parent / "chat"
PARIS = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ROME = {"type": "function", "id": "call00002", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def using_tools(*calls: dict[str, Any], **reply: Any) -> Fields:
    answers = [{"role": "tool", "content": f"sunny {i}", "tool_call_id": c["id"]} for i, c in enumerate(calls, 1)]
    first = {"role": "assistant", "content": "", "tool_calls": list(calls), **reply}
    return {
        "messages": [*said(("user", "Weather?")), first, *answers, *said(("assistant", "Sunny."))],
        "tools": [WEATHER],
    }


CONVERSATIONS: dict[str, Fields] = {
    "two turns": {
        "messages": said(("user", "Hi!"), ("assistant", "Hello.\n\nYou?"), ("user", " ok "), ("assistant", "Bye "))
    },
    "system": {"messages": said(("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."))},
    "thinking": {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
            {"role": "user", "content": "And 1?"},
            {"role": "assistant", "content": "3", "reasoning_content": "Two and one."},
        ]
    },
    "thinking in the content": {
        "messages": said(
            ("user", "1 + 1?"), ("assistant", "<think>\nOne and one.\n</think>\n\n2"), ("user", "!"), ("assistant", "3")
        )
    },
    "a tool": using_tools(PARIS),
    "two tools at once": using_tools(PARIS, ROME),
    "a tool after thinking": using_tools(PARIS, reasoning_content="I need a tool."),
}
CASES = {
    "llama3_1": ("two turns", "system", "a tool"),
    "qwen3": (
        *("two turns", "system", "thinking", "thinking in the content"),
        *("a tool", "two tools at once", "a tool after thinking"),
    ),
    "gemma3": ("two turns", "system"),
    "mistral": ("two turns", "a tool", "two tools at once"),
    "gptoss": ("two turns", "system", "thinking", "a tool", "a tool after thinking"),
}


@cache
def encoder_of(family: str) -> ChatEncoder:
    template = chat_template(str(HERE / "stock" / f"{family}.jinja"), None, date=datetime.date(2025, 1, 1))
    return ChatEncoder(tokenizer_of(TOKENIZERS[family]), template)


@pytest.mark.parametrize("family", CASES)
def test_what_is_trained_on_is_what_was_found_by_hand(family: str) -> None:
    written = (HERE / "expected" / f"{family}.txt").read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in written.split("----- ")[1:])
    assert tuple(sections) == CASES[family]
    for name, expected in sections.items():
        assert shown(encoder_of(family).encode(CONVERSATIONS[name]), TOKENIZERS[family]) + "\n" == expected, name
