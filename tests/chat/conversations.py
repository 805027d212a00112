"""Conversations that TRL's templates take, by name; with the families whose templates can render them."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]
PLAIN = ("llama3", "phi3", "gemma3", "qwen2_5", "qwen3")
QWEN = ("qwen2_5", "qwen3")
# The tokenizer for each template of TRL's.
TOKENIZERS = {"llama3": "llama3", "phi3": "phi3", "gemma3": "gemma", "qwen2_5": "qwen", "qwen3": "qwen"}


def said(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which city."}},
            "required": ["city"],
        },
    },
}

ROWS: dict[str, tuple[Fields, tuple[str, ...]]] = {
    "one turn": (
        {"messages": said(("user", "What is the capital of France?"), ("assistant", "Paris."))},
        PLAIN,
    ),
    "system and two turns": (
        {
            "messages": said(
                ("system", "You are a tool.\nBe short."),
                ("user", "Hello there!"),
                ("assistant", "Hello. the\n\nthe end"),
                ("user", "What is the content?\n"),
                ("assistant", "the name of the system\n"),
            )
        },
        PLAIN,
    ),
    "unicode": (
        {
            "messages": said(
                ("user", "Ça va? e\u0301 日本語 🙂\u200d👧"),
                ("assistant", "🇫🇷 été naïve 한국어 नमस्ते ½ \u00a0x"),
                ("user", "ok"),
                ("assistant", "日本"),
            )
        },
        PLAIN,
    ),
    "white space around": (
        {
            "messages": said(
                ("user", "  \n What?  "), ("assistant", "\n\n  the  answer \n\n"), ("user", "x"), ("assistant", " y")
            )
        },
        PLAIN,
    ),
    "ends with the user": (
        {"messages": said(("user", "a"), ("assistant", "b"), ("user", "the question?"))},
        PLAIN,
    ),
    "empty reply": (
        {"messages": said(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))},
        PLAIN,
    ),
    "code": (
        {
            "messages": said(
                ("user", "Write f"),
                ("assistant", '```python\ndef f(x):\n\treturn {"a": x ** 2}  # <b>&amp;</b>\n```\n'),
            )
        },
        PLAIN,
    ),
    "long": (
        {
            "messages": said(
                *(
                    (role, f"{role} {i}: " + "the capital is Paris. " * i)
                    for i in range(1, 9)
                    for role in ("user", "assistant")
                )
            )
        },
        PLAIN,
    ),
    "thinking": (
        {
            "messages": said(
                ("user", "a"),
                ("assistant", "<think>\nthe a\n</think>\n\nthe b"),
                ("user", "c"),
                ("assistant", "<think>\nthe c\n</think>\n\nthe d"),
            )
        },
        ("qwen3",),
    ),
    "thinking apart": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "the b", "reasoning_content": "the\nthought"},
            ]
        },
        ("qwen3",),
    ),
    "a tool call": (
        {
            "messages": [
                {"role": "user", "content": "Weather in Paris?"},
                {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Paris")]},
                {"role": "tool", "content": '{"sky": "grey"}'},
                {"role": "assistant", "content": "It is grey."},
            ],
            "tools": [WEATHER],
        },
        QWEN,
    ),
    "two tool calls at once": (
        {
            "messages": [
                {"role": "system", "content": "Use tools."},
                {"role": "user", "content": "Paris and Rome?"},
                {
                    "role": "assistant",
                    "content": "I ask.",
                    "tool_calls": [call("weather", city="Paris"), call("weather", city="Rome")],
                },
                {"role": "tool", "content": "grey"},
                {"role": "tool", "content": "blue"},
                {"role": "assistant", "content": "Grey, and blue."},
            ],
            "tools": [WEATHER],
        },
        QWEN,
    ),
    "prompt and completion": (
        {
            "prompt": said(
                ("user", "What is the name?"),
            ),
            "completion": said(
                ("assistant", "the name"),
            ),
        },
        ("llama3", "gemma3", "phi3"),
    ),
    "prompt and completion of text": (
        {"prompt": "What is the capital of France? It is", "completion": " Paris."},
        ("llama3", "qwen2_5"),
    ),
}
