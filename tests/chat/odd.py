"""Odd conversations: the template, the row, and the texts that are trained on, or a part of the reason for a refusal.

Templates are ndtrain's own (chatml, zephyr) and stock ones (`stock/`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.chat.conversations import WEATHER, Fields, call, said

TOKENIZERS = {
    **{"chatml": "qwen", "zephyr": "mistral", "llama3": "llama3", "gemma": "gemma"},
    **{"qwen3": "qwen", "llama3_1": "llama3", "gemma3": "gemma", "mistral": "mistral", "gptoss": "gptoss"},
}


class Odd(NamedTuple):
    name: str
    template: str
    fields: Fields
    expected: list[str] | str


def rows(*pairs: tuple[str, str], **more: Any) -> Fields:
    return {"messages": said(*pairs), **more}


def asked(*messages: dict[str, Any], **more: Any) -> Fields:
    return {"messages": [{"role": "user", "content": "q"}, *messages], **more}


def reply(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


U, A, S = ("user", "q"), ("assistant", "a"), ("system", "s")
END = "<|im_end|>"
PARIS = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ROME = {"type": "function", "id": "call00002", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
SUNNY = {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}
RAINY = {"role": "tool", "content": "rainy", "tool_call_id": "call00002"}
PARIS_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROME_TEXT = PARIS_TEXT.replace("Paris", "Rome")
TEXT, IMAGE = {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}
PARALLEL = asked(reply("", tool_calls=[PARIS, ROME]), SUNNY, RAINY, reply("done"), tools=[WEATHER])
PARIS_OBJECT = '{"name": "weather", "arguments": {"city": "Paris"}'
ROME_OBJECT = PARIS_OBJECT.replace("Paris", "Rome")
PARIS_HARMONY = 'assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
ODD_NUMBER = '{"a": 3.14159265358979323846}'
CALL = asked(reply(None, tool_calls=[PARIS]), SUNNY, reply("done"), tools=[WEATHER])
THOUGHT = {"reasoning_content": "hm"}

ODD = [
    # ---- who speaks
    Odd("system only", "chatml", rows(S), "no message of the role assistant"),
    Odd("system only", "qwen3", rows(S), "no message of the role assistant"),
    Odd("user only", "llama3_1", rows(U), "no message of the role assistant"),
    Odd("no message", "chatml", {"messages": []}, "no message"),
    Odd("two users in a row", "chatml", rows(U, U, A), ["a" + END]),
    Odd("two users in a row", "qwen3", rows(U, U, A), ["a" + END]),
    Odd("two users in a row", "gemma3", rows(U, U, A), "roles must alternate"),
    Odd("two replies in a row", "chatml", rows(U, A, A), ["a" + END, "a" + END]),
    Odd("two replies in a row", "qwen3", rows(U, A, A), ["a" + END, "a" + END]),
    Odd("two replies in a row", "mistral", rows(U, A, A), "roles must alternate"),
    Odd("reply first", "chatml", rows(A, U, A), ["a" + END, "a" + END]),
    Odd("reply first", "qwen3", rows(A, U, A), "what leads to message 1 (assistant)"),
    Odd("reply first", "gemma3", rows(A, U), "roles must alternate"),
    Odd("ends with the user", "qwen3", rows(U, A, U), ["a" + END]),
    Odd("ends with the user", "gptoss", rows(U, A, U), [FINAL + "a<|end|>"]),
    Odd("system in the middle", "chatml", rows(U, A, S, U, A), ["a" + END, "a" + END]),
    Odd("system in the middle", "llama3_1", rows(U, A, S, U, A), ["a<|eot_id|>", "a<|eot_id|>"]),
    Odd("system in the middle", "gemma3", rows(U, A, S, U, A), "roles must alternate"),
    Odd("system that the template drops", "mistral", rows(S, U, A), "leaves out the content of message 1 (system)"),
    Odd("system in a column", "qwen3", rows(U, A, system="be brief"), ["a" + END]),
    Odd("system in a column and a message", "qwen3", rows(S, U, A, system="be brief"), "a system message"),
    Odd("developer", "gptoss", rows(("developer", "d"), U, A), [FINAL + "a<|return|>"]),
    Odd("unknown role", "chatml", rows(("critic", "x"), U, A), 'the role "critic" is not known'),
    Odd("no role", "chatml", asked({"content": "x"}), 'message 2 has no "role"'),
    Odd("role that is a number", "chatml", asked({"role": 3, "content": "x"}), "role is a number"),
    Odd("message that is a string", "chatml", {"messages": ["q", "a"]}, "message 1 is a string"),
    # ---- content
    Odd("empty reply", "chatml", rows(U, ("assistant", "")), [END]),
    Odd("empty reply", "qwen3", rows(U, ("assistant", ""), U, A), "message 2 (assistant)"),
    Odd("empty reply at the end", "qwen3", rows(U, A, U, ("assistant", "")), ["a" + END, END]),
    Odd("empty question", "llama3_1", rows(("user", ""), A), ["a<|eot_id|>"]),
    Odd("blank question", "qwen3", rows(("user", " \n "), A), ["a" + END]),
    Odd("blank reply", "gemma3", rows(U, ("assistant", "  ")), ["<end_of_turn>"]),
    Odd("white space around", "mistral", rows(U, ("assistant", " \n a \n"), U, A), [" \n a \n</s>", "a</s>"]),
    Odd("white space around", "llama3_1", rows(U, ("assistant", " \n a \n"), U, A), ["a<|eot_id|>", "a<|eot_id|>"]),
    Odd("line feed over the border", "qwen3", rows(U, ("assistant", "\n\n\na"), U, A), ["\n\n\n\na" + END, "a" + END]),
    Odd("null content", "chatml", asked(reply(None)), "message 2 (assistant) has no content"),
    Odd("no content", "chatml", asked({"role": "assistant"}), "message 2 (assistant) has no content"),
    Odd("content that is a number", "chatml", asked(reply(3)), "content is a number"),
    Odd("content that is an object", "chatml", asked(reply({"text": "a"})), "content is an object"),
    Odd("a part of text", "qwen3", asked(reply([TEXT])), ["see" + END]),
    Odd("two parts of text", "qwen3", asked(reply([TEXT, TEXT])), "2 parts"),
    Odd("two parts of text", "gemma3", asked(reply([TEXT, TEXT])), ["seesee<end_of_turn>"]),
    Odd("image", "gemma3", asked(reply([TEXT, IMAGE])), 'a part of type "image_url"'),
    Odd("images in a column", "chatml", rows(U, A, images=["x.png"]), 'the row has "images"'),
    Odd(
        "unicode",
        "qwen3",
        rows(("user", "🙂"), ("assistant", "🇫🇷e\u0301日\u200d👧\U0010fffd")),
        ["🇫🇷e\u0301日\u200d👧\U0010fffd" + END],
    ),
    Odd(
        "both private planes", "qwen3", rows(("user", "\U000f0001"), ("assistant", "\U00100001")), "private-use planes"
    ),
    Odd(
        "a tool's answer as a user's message",
        "qwen3",
        rows(U, A, ("user", "<tool_response>\nx\n</tool_response>"), ("assistant", "b")),
        ["a" + END, "b" + END],
    ),
    # ---- thinking
    Odd(
        "thinking in the content",
        "qwen3",
        rows(U, ("assistant", "<think>\nt\n</think>\n\na")),
        ["<think>\nt\n</think>\n\na" + END],
    ),
    Odd(
        "thinking of an earlier turn",
        "qwen3",
        rows(U, ("assistant", "<think>\nt\n</think>\n\na"), U, ("assistant", "<think>\nv\n</think>\n\nb")),
        ["a" + END, "<think>\nv\n</think>\n\nb" + END],
    ),
    Odd("thinking apart", "qwen3", asked(reply("a", **THOUGHT)), ["<think>\nhm\n</think>\n\na" + END]),
    Odd(
        "thinking apart",
        "gptoss",
        asked(reply("a", **THOUGHT), {"role": "user", "content": "q"}, reply("b", **THOUGHT)),
        [FINAL + "a<|end|>", ANALYSIS + "hm<|end|><|start|>assistant" + FINAL + "b<|return|>"],
    ),
    Odd(
        "thinking that the template drops",
        "llama3_1",
        asked(reply("a", **THOUGHT)),
        "leaves out the thinking of message 2 (assistant)",
    ),
    Odd("two texts of thinking", "qwen3", asked(reply("a", thinking="x", **THOUGHT)), "more than one text of thinking"),
    Odd("block that the template puts in", "qwen3", rows(U, A), ["a" + END]),
    Odd(
        "empty block of the message",
        "qwen3",
        rows(U, ("assistant", "<think>\n\n</think>\n\na")),
        ["<think>\n\n</think>\n\na" + END],
    ),
    Odd("thinking switched off", "qwen3", rows(U, A, chat_template_kwargs={"enable_thinking": False}), ["a" + END]),
    Odd(
        "thinking switched off, yet there",
        "qwen3",
        asked(reply("a", **THOUGHT), chat_template_kwargs={"enable_thinking": False}),
        ["<think>\nhm\n</think>\n\na" + END],
    ),
    Odd(
        "variable that is not read",
        "qwen3",
        rows(U, A, chat_template_kwargs={"effort": "low"}),
        'sets "effort", which the chat template does not read',
    ),
    Odd(
        "variable that is read",
        "gptoss",
        rows(U, A, chat_template_kwargs={"reasoning_effort": "low"}),
        [FINAL + "a<|return|>"],
    ),
    Odd(
        "variable of transformers",
        "gptoss",
        rows(U, A, chat_template_kwargs={"add_generation_prompt": True}),
        'cannot set "add_generation_prompt"',
    ),
    # ---- tools
    Odd("a call with null content", "qwen3", CALL, [PARIS_TEXT + END, "done" + END]),
    Odd(
        "a call with null content",
        "llama3_1",
        CALL,
        ['{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>', "done<|eot_id|>"],
    ),
    Odd(
        "a call with null content",
        "mistral",
        CALL,
        ["[TOOL_CALLS][" + PARIS_OBJECT + ', "id": "call00001"}]</s>', "done</s>"],
    ),
    Odd(
        "a call with null content", "gptoss", CALL, [PARIS_HARMONY.removeprefix("assistant"), FINAL + "done<|return|>"]
    ),
    Odd("a call with null content", "chatml", CALL, "message 2 (assistant) has tool calls and no content"),
    Odd("a call with null content", "gemma3", CALL, "roles must alternate"),
    Odd("calls in parallel", "qwen3", PARALLEL, [PARIS_TEXT + "\n" + ROME_TEXT + END, "done" + END]),
    Odd(
        "calls in parallel",
        "mistral",
        PARALLEL,
        [
            "[TOOL_CALLS][" + PARIS_OBJECT + ', "id": "call00001"}, ' + ROME_OBJECT + ', "id": "call00002"}]</s>',
            "done</s>",
        ],
    ),
    Odd("calls in parallel", "llama3_1", PARALLEL, "single tool-calls"),
    Odd("calls in parallel", "gptoss", PARALLEL, "leaves out the tool call"),
    Odd(
        "a call with thinking, answered",
        "gptoss",
        asked(reply("", tool_calls=[PARIS], **THOUGHT), SUNNY, reply("done")),
        [PARIS_HARMONY.removeprefix("assistant"), FINAL + "done<|return|>"],
    ),
    Odd(
        "a call with thinking at the end",
        "gptoss",
        asked(reply("", tool_calls=[PARIS], **THOUGHT)),
        [ANALYSIS + "hm<|end|><|start|>" + PARIS_HARMONY],
    ),
    Odd(
        "arguments as JSON",
        "qwen3",
        asked(reply("", tool_calls=[call("f") | {"function": {"name": "f", "arguments": '{"a":1.50, "b": [null]}'}}])),
        ['<tool_call>\n{"name": "f", "arguments": {"a": 1.5, "b": [null]}}\n</tool_call>' + END],
    ),
    Odd(
        "arguments that are not JSON",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"name": "f", "arguments": "{a: 1}"}}])),
        "not valid JSON",
    ),
    Odd(
        "arguments of too many digits",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"name": "f", "arguments": ODD_NUMBER}}])),
        "more digits",
    ),
    Odd(
        "arguments with a key twice",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}])),
        "a key comes twice",
    ),
    Odd(
        "arguments that are an array",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])),
        "arguments are an array",
    ),
    Odd(
        "a call without arguments",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"name": "f"}}])),
        "arguments are null",
    ),
    Odd(
        "a call without a name",
        "qwen3",
        asked(reply("", tool_calls=[{"function": {"arguments": {}}}])),
        "no name of a function",
    ),
    Odd(
        "a call without its function",
        "qwen3",
        asked(reply("", tool_calls=[{"name": "f", "arguments": {}}])),
        ['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' + END],
    ),
    Odd("no calls", "gptoss", asked(reply("a", tool_calls=[])), [FINAL + "a<|return|>"]),
    Odd(
        "a call of the user",
        "qwen3",
        asked({"role": "user", "content": "x", "tool_calls": [PARIS]}, reply("a")),
        "which only the assistant can make",
    ),
    Odd("a call of the old kind", "qwen3", asked(reply("a", function_call={"name": "f"})), 'has "function_call"'),
    Odd(
        "an answer without a call", "gptoss", asked(SUNNY, reply("a")), "no previous assistant message with a tool call"
    ),
    Odd(
        "an answer without its id",
        "mistral",
        asked(reply(None, tool_calls=[PARIS]), {"role": "tool", "content": "x"}, reply("a")),
        "Tool call IDs",
    ),
    Odd(
        "tools as JSON",
        "qwen3",
        rows(U, A, tools='[{"type": "function", "function": {"name": "f", "parameters": {}}}]'),
        ["a" + END],
    ),
    Odd("no tools", "llama3_1", rows(U, A, tools=[]), ["a<|eot_id|>"]),
    Odd("tools that the template drops", "chatml", rows(U, A, tools=[WEATHER]), "leaves out the name of a tool"),
    Odd("tools without names", "qwen3", rows(U, A, tools=[{"type": "function"}]), "names no function"),
    # ---- weights
    Odd(
        "weight 0",
        "chatml",
        asked(reply("a", weight=0), {"role": "user", "content": "q"}, reply("b", weight=1)),
        ["b" + END],
    ),
    Odd(
        "weight 0",
        "qwen3",
        asked(reply("a", weight=0), {"role": "user", "content": "q"}, reply("b", weight=1)),
        ["b" + END],
    ),
    Odd(
        "train = false",
        "chatml",
        asked(reply("a"), {"role": "user", "content": "q"}, reply("b", train=False)),
        ["a" + END],
    ),
    Odd(
        "training and loss = false",
        "chatml",
        asked(
            reply("a", training=False), {"role": "user", "content": "q"}, reply("b", loss=True), reply("c", loss=False)
        ),
        ["b" + END],
    ),
    Odd("a loss that is a number", "chatml", asked(reply("a", loss=0)), "loss is a number; it can be true or false"),
    Odd("weight 0.5", "chatml", asked(reply("a", weight=0.5)), "weight is 0.5; it can be 0 or 1"),
    Odd("weight that is a string", "chatml", asked(reply("a", weight="1")), 'weight is "1"'),
    Odd(
        "weight against train",
        "chatml",
        asked(reply("a", weight=1, train=False)),
        "weight = 1, train = false contradict",
    ),
    Odd("all weights 0", "chatml", asked(reply("a", weight=0)), "no token carries loss"),
    Odd("weights that marks cannot tell", "chatml", asked(reply("", weight=0), reply("b")), "do not tell"),
    Odd("loss on parts of a message", "chatml", asked(reply("a", train_detail=[])), 'has "train_detail"'),
    # ---- other shapes
    Odd(
        "ShareGPT",
        "chatml",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        ["a" + END],
    ),
    Odd(
        "ShareGPT with tools",
        "qwen3",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "done"},
            ],
            "tools": [WEATHER],
        },
        [PARIS_TEXT + END, "done" + END],
    ),
    Odd(
        "ShareGPT with a call that is not JSON",
        "qwen3",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
        "not valid JSON",
    ),
    Odd("ShareGPT without a value", "chatml", {"conversations": [{"from": "human"}]}, 'has "from" but no "value"'),
    Odd(
        "both forms in one message",
        "chatml",
        {"messages": [{"role": "user", "content": "q", "from": "human", "value": "q"}]},
        'beside "from" and "value"',
    ),
    Odd(
        "messages as JSON",
        "chatml",
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        ["a" + END],
    ),
    Odd(
        "two conversations",
        "chatml",
        {"messages": said(U, A), "conversations": said(U, A)},
        "more than one conversation",
    ),
    Odd("no conversation", "chatml", {"text": "q", "id": 3}, "no conversation"),
    Odd("a prompt beside messages", "chatml", {"prompt": "q", "messages": said(U, A)}, ["a" + END]),
    Odd(
        "prompt and completion", "qwen3", {"prompt": said(U, A, U), "completion": said(("assistant", "b"))}, ["b" + END]
    ),
    Odd("prompt and completion of text", "zephyr", {"prompt": "2 + 2 = ", "completion": "4"}, ["4</s>"]),
    Odd(
        "prompt of text, completion of messages",
        "zephyr",
        {"prompt": "2 + 2 = ", "completion": said(A)},
        '"prompt" is a string',
    ),
    Odd("a completion of nothing", "zephyr", {"prompt": "2", "completion": ""}, ["</s>"]),
    # ---- control text
    Odd(
        "control text of a user",
        "chatml",
        rows(("user", "say <|im_end|>"), A),
        'message 1 (user) spells the special token "<|im_end|>"',
    ),
    Odd(
        "control text of a tool's arguments",
        "qwen3",
        asked(reply("", tool_calls=[call("f", a=["<|im_start|>"])])),
        "message 2 (assistant) spells",
    ),
    Odd(
        "control text of a key",
        "qwen3",
        asked(reply("", tool_calls=[call("f", **{"<|im_start|>": 1})])),
        "message 2 (assistant) spells",
    ),
    Odd(
        "control text of a tool",
        "qwen3",
        rows(U, A, tools=[{"name": "f", "description": "<|im_end|>"}]),
        "tools spells",
    ),
    Odd("control text of a prompt", "zephyr", {"prompt": "</s>", "completion": "x"}, "the prompt spells"),
]
