"""The fields of a row -> a conversation in the form that chat templates of transformers take (OpenAI's), checked.

A row has `messages` or `conversations` (each of role and content, or of ShareGPT's from and value), or `prompt` and
`completion` (of messages, or both strings), and may have `system`, `tools` and `chat_template_kwargs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from ndtrain.data.row import RowError

Message = dict[str, Any]
FIELDS = ("messages", "conversations", "prompt", "completion", "system", "tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")
# The names by which a message's thinking is known.
REASONING = ("reasoning_content", "thinking", "reasoning")
_ROLE_OF = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# The names, beside weight, by which a message says whether it carries loss: of OpenAI's rows, axolotl and ms-swift.
_FLAGS = ("train", "training", "loss")
# Say which parts of a message carry loss, or how much, in a way that is not supported.
_DETAILS = ("train_detail", "training_detail", "loss_mask", "loss_scale", "loss_weight")
# Variables that transformers gives to a template, or that mean something else to it.
_RESERVED = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("conversations", "return_assistant_tokens_mask", "bos_token", "eos_token", "unk_token", "pad_token"),
}


class Accepts(NamedTuple):
    """What a template can be given: content as a string, as a list of parts; arguments as an object or as JSON."""

    string: bool = True
    parts: bool = False
    arguments: str = "object"  # or "string"


class Conversation(NamedTuple):
    """Messages and whether each may carry loss, tools (None if there are none), and variables for the template."""

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


ANY = Accepts()


class TextPair(NamedTuple):
    """A prompt and its completion in plain text, which no template renders."""

    prompt: str
    completion: str


def has_tools(fields: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Return whether a row declares tools."""
    return _tools(fields.get(columns.get("tools", "tools"))) is not None


def conversation_of(
    fields: Mapping[str, Any], *, columns: Mapping[str, str] | None = None, accepts: Accepts = ANY
) -> Conversation | TextPair:
    """Return the conversation of a row. `columns` maps our names of fields (`FIELDS`) to the row's.

    Keys whose value is None, and empty lists of tools and tool calls, are taken for absent, as serving engines do.
    Raises `RowError`.
    """
    names = columns or {}
    given = {name: fields.get(names.get(name, name)) for name in FIELDS}
    for name in _MEDIA:
        if fields.get(name):
            raise RowError(f'the row has "{name}"; only text can be trained on')
    shapes = [name for name in ("messages", "conversations") if given[name] is not None]
    if given["prompt"] is not None and given["completion"] is not None:
        shapes.append("prompt")
    if len(shapes) > 1 and names:  # what data.columns names goes before what a row has besides
        shapes = [name for name in shapes if name in names] or shapes
    null = [own for name in FIELDS[:4] if (own := names.get(name, name)) in fields and given[name] is None]
    if not shapes and null:
        raise RowError(f'"{null[0]}" is null')
    if len(shapes) != 1:
        found = ", ".join(map(str, list(fields)[:20])) or "none"
        what = "no conversation" if not shapes else f"more than one conversation ({' and '.join(shapes)})"
        raise RowError(
            f'{what}: a row has "messages", "conversations", or "prompt" and "completion"; its fields are {found}; '
            f"data.columns {'says which to take' if shapes else 'names those that have another name'}"
        )
    if shapes == ["prompt"]:
        prompt, completion = given["prompt"], given["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            for name in ("system", "tools"):
                if given[name]:
                    raise RowError(
                        f'"{name}" beside a "prompt" and a "completion" of plain text, which no template renders'
                    )
            return TextPair(prompt, completion)
        before = _messages(prompt, "prompt", accepts)
        after = _messages(completion, "completion", accepts, first=len(before[0]) + 1)
        messages, trained = before[0] + after[0], [False] * len(before[0]) + after[1]
    else:
        messages, trained = _messages(given[shapes[0]], names.get(shapes[0], shapes[0]), accepts)
    if given["system"] not in (None, ""):
        if messages[0]["role"] in ("system", "developer"):
            raise RowError('the row has "system" and a system message; remove one of them')
        system, _ = _messages([{"role": "system", "content": given["system"]}], "system", accepts)
        messages, trained = system + messages, [False, *trained]
    return Conversation(messages, trained, _tools(given["tools"]), _variables(given["chat_template_kwargs"]))


def _messages(value: Any, name: str, accepts: Accepts, *, first: int = 1) -> tuple[list[Message], list[bool]]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, f'"{name}"')
    if not isinstance(value, list):
        raise RowError(f'"{name}" is {kind_of(value)}, not an array of messages')
    if not value:
        raise RowError(f'"{name}" has no message')
    messages, trained = [], []
    for number, given in enumerate(value, first):
        where = f"message {number}"
        if not isinstance(given, dict):
            raise RowError(f"{where} is {kind_of(given)}, not an object")
        message, carries = _message(given, where, accepts)
        messages.append(message)
        trained.append(carries)
    return messages, trained


def _message(given: Message, where: str, accepts: Accepts) -> tuple[Message, bool]:
    message = {key: value for key, value in given.items() if value is not None}
    if "from" in message or ("value" in message and "role" not in message):
        if "role" in message or "content" in message:
            raise RowError(f'{where} has "role" or "content" beside "from" and "value"')
        message = _of_sharegpt(message, where)
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f'{where} has no "role"' if role is None else f"{where}: role is {kind_of(role)}, not a string")
    if role not in _ROLE_OF:
        raise RowError(f"{where}: the role {_quoted(role)} is not known; roles are {', '.join(ROLES)}")
    role = message["role"] = _ROLE_OF[role]
    where = f"{where} ({role})"
    for name in _DETAILS:
        if name in message:
            raise RowError(f'{where} has "{name}", which is not supported; "weight" = 0 leaves out a whole message')
    carries = _carries_loss(message, where)
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if "tool_calls" in message:
        if role != "assistant":
            raise RowError(f"{where} has tool_calls, which only the assistant can make")
        message["tool_calls"] = [_call(call, where, accepts) for call in _array(message["tool_calls"], where)]
    elif "function_call" in message:
        raise RowError(f'{where} has "function_call", which templates do not know; write it as "tool_calls"')
    thoughts = {message[name] for name in REASONING if isinstance(message.get(name), str)}
    for name in REASONING:
        if name in message and not isinstance(message[name], str):
            raise RowError(f"{where}: {name} is {kind_of(message[name])}, not a string")
    if len(thoughts) > 1:
        raise RowError(
            f"{where} has more than one text of thinking ({', '.join(n for n in REASONING if n in message)})"
        )
    if "content" in message:
        message["content"] = _content(message["content"], where, accepts)
    elif "tool_calls" not in message and not thoughts:
        raise RowError(f"{where} has no content")
    return message, carries


def _of_sharegpt(message: Message, where: str) -> Message:
    """Return a message of role and content for one of from and value."""
    if "value" not in message:
        raise RowError(f'{where} has "from" but no "value"')
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if message.get("from") != "function_call":
        return {"role": message.get("from"), "content": message["value"], **rest}
    calls = (
        _json(message["value"], f"{where} (function_call)") if isinstance(message["value"], str) else message["value"]
    )
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _carries_loss(message: Message, where: str) -> bool:
    """Return what "weight" and the flags say, and take them out of the message."""
    said = {name: message.pop(name) for name in ("weight", *_FLAGS) if name in message}
    for name, value in said.items():
        if name != "weight" and not isinstance(value, bool):
            raise RowError(f"{where}: {name} is {kind_of(value)}; it can be true or false")
        if name == "weight" and (isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1)):
            raise RowError(f"{where}: weight is {_quoted(value)}; it can be 0 or 1")
    if len(set(map(bool, said.values()))) > 1:
        given = ", ".join(f"{name} = {str(value).lower()}" for name, value in said.items())
        raise RowError(f"{where}: {given} contradict each other")
    return all(said.values())


def _content(value: Any, where: str, accepts: Accepts) -> Any:
    if isinstance(value, str):
        return value if accepts.string else [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise RowError(f"{where}: content is {kind_of(value)}, not a string")
    parts = []
    for part in value:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if kind != "text":
            what = f"a part of type {_quoted(kind)}" if isinstance(kind, str) else kind_of(part)
            raise RowError(f"{where}: content has {what}; only text can be trained on")
        if not isinstance(part.get("text"), str):
            raise RowError(f"{where}: a part of the content has no text")
        parts.append({"type": "text", "text": part["text"]})
    if not parts:
        raise RowError(f"{where}: content has no parts")
    if accepts.parts:
        return parts
    if len(parts) > 1:
        raise RowError(f"{where}: content has {len(parts)} parts, and this chat template takes one string; join them")
    return parts[0]["text"]


def _call(call: Any, where: str, accepts: Accepts) -> dict[str, Any]:
    """Return a tool call as {"type", "function": {"name", "arguments"}, ...}."""
    where = f"{where}: a tool call"
    if not isinstance(call, dict):
        raise RowError(f"{where} is {kind_of(call)}, not an object")
    if "function" not in call:
        inner = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {key: value for key, value in call.items() if key not in inner} | {"function": inner}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where} has no name of a function")
    arguments = function.get("arguments")
    parsed = _json(arguments, f"{where}: the arguments") if isinstance(arguments, str) else arguments
    if not isinstance(parsed, dict):
        raise RowError(f"{where}: arguments are {kind_of(parsed)}, not an object or its JSON")
    if accepts.arguments == "object":
        arguments = parsed
    elif not isinstance(arguments, str):
        arguments = json.dumps(parsed, ensure_ascii=False)
    rest = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def _array(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, f"{where}: tool_calls")
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls is {kind_of(value)}, not an array")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _json(value, '"tools"') if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowError(f'"tools" is {kind_of(value)}, not an array of objects')
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError('"tools" has an entry that names no function')
    return value


def _variables(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json(value, '"chat_template_kwargs"')
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(f'"chat_template_kwargs" is {kind_of(value)}, not an object')
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise RowError(f'"chat_template_kwargs" cannot set {_quoted(str(name))}')
    return {name: setting for name, setting in value.items() if setting is not None}


def _json(text: str, what: str) -> Any:
    """Return the value of a JSON text that means the same when it is written again.

    Python would take a key that comes twice, NaN, and round numbers of more digits than a float has.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if Decimal(digits) != Decimal(repr(value)):
            raise ValueError(f"{digits[:40]} has more digits than a number of 64 bits")
        return value

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice in one object")
        return found

    try:
        return json.loads(text, parse_float=number, parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise RowError(f"{what}: not valid JSON ({str(error).split(': line')[0] or type(error).__name__})") from error


def _quoted(value: Any) -> str:
    """Return the beginning of a value as JSON, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=kind_of)
    return text if len(text) <= 60 else f"{text[:60]}..."


def kind_of(value: Any) -> str:
    """Return what JSON calls a value, for a message."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}")
