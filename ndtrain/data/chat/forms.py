"""Find out what a chat template can be given, by rendering short conversations with it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ndtrain.data.chat.conversation import REASONING, Accepts
from ndtrain.errors import RecipeError, first_line, keeps_its_name
from ndtrain.hf.chat import Renderer, is_marked

_KEY, _VALUE = "probe-key", "probe-value"
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "probe"}}},
    },
}
_REPLY = {"role": "assistant", "content": "probe-reply"}


class Form(NamedTuple):
    """A template's text, whether it marks what is generated, what it takes, and whether it knows of thinking.

    `prompts` says whether it has a generation prompt, `switch` whether the variable enable_thinking chooses another.
    """

    text: str
    marked: bool
    accepts: Accepts
    reasons: bool
    prompts: bool
    switch: bool

    def reads(self, variable: str) -> bool:
        """Return whether the template has a variable of this name."""
        return re.search(rf"\b{re.escape(variable)}\b", self.text) is not None


def form_of(renderer: Renderer, text: str, name: str) -> Form:
    """Return what a template is like. Raises `RecipeError` if it is not valid."""
    try:
        renderer.render(text, [{"role": "user", "content": "?"}, _REPLY])
    except Exception as error:
        if keeps_its_name(error):
            raise
        if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
            line = getattr(error, "lineno", None)
            raise RecipeError(f"the chat template ({name}), line {line}: {first_line(error)}") from error
    asked = [{"role": "user", "content": "probe-a"}]
    alone, plain = _rendered(renderer, text, asked), _rendered(renderer, text, [*asked, _REPLY])
    parts = [{"type": "text", "text": "probe-a"}, {"type": "text", "text": "probe-b"}]
    reply = {**_REPLY, "content": [{"type": "text", "text": _REPLY["content"]}]}
    listed = _rendered(renderer, text, [{"role": "user", "content": parts}, reply])
    # A list that is written as Python writes it has names of keys.
    takes_parts = all(part["text"] in listed for part in parts) and _keys(listed) == _keys(plain)
    accepts = Accepts(
        string="probe-a" in plain or not takes_parts, parts=takes_parts, arguments=_arguments(renderer, text)
    )
    return Form(
        text=text,
        marked=is_marked(text),
        accepts=accepts,
        reasons=any(re.search(rf"\b{name}\b", text) for name in REASONING),
        prompts=alone == "" or _rendered(renderer, text, asked, prompt=True) != alone,
        switch="enable_thinking" in text,
    )


def _arguments(renderer: Renderer, text: str) -> str:
    """Return "object" or "string": in which form the arguments of a tool call come out as they are."""
    for form, given in (("object", {_KEY: _VALUE}), ("string", f'{{"{_KEY}": "{_VALUE}"}}')):
        call = {"type": "function", "id": "probe0123", "function": {"name": "probe", "arguments": given}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        out = _rendered(renderer, text, messages, [_TOOL]).replace(_rendered(renderer, text, messages[:1], [_TOOL]), "")
        written_as_python, written_twice = f"'{_KEY}'" in out, f'\\"{_KEY}' in out
        if _KEY in out and _VALUE in out and not written_as_python and not written_twice:
            return form
    return "object"


def _rendered(
    renderer: Renderer, text: str, messages: list[dict[str, Any]], tools: Any = None, *, prompt: bool = False
) -> str:
    """Return a rendering, "" if the template refuses it."""
    try:
        return renderer.render(text, messages, tools=tools, prompt=prompt)
    except Exception as error:
        if keeps_its_name(error):
            raise
        return ""


def _keys(text: str) -> int:
    return text.count("'type'") + text.count('"type"')
