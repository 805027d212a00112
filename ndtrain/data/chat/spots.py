"""Find where the strings of a conversation come out in its rendering, by rendering them with characters put in.

The characters are of a private-use plane that the row does not use. A rendering that is the plain one once they are
taken out shows where each string lies, and which ones the template leaves out.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from ndtrain.data.chat.conversation import REASONING, Conversation, Message
from ndtrain.data.row import RowError

# Planes 16 and 15. Fonts with icons use the latter.
_PLANES = (0x100000, 0xF0000)
_SIZE = 0xFFFE
_BEGINNING = "beginning of the content"
_THINK = re.compile(r"\s*(?:<think>\s*)?")


class Spot(NamedTuple):
    """A place in a string of a conversation: of which message (-1 for tools), in what, and whether it must come out."""

    message: int
    what: str
    needed: bool


class Spotted:
    """A conversation with a character of its own at each of `spots`, at both ends of each string or in its middle."""

    def __init__(self, conversation: Conversation, *, plane: int, middle: bool):
        self.first, self.middle = plane, middle
        self.spots: list[Spot] = []
        self._pattern = re.compile(f"[{chr(plane)}-{chr(plane + _SIZE - 1)}]")
        last = len(conversation.messages) - 1
        self.messages = [self._message(m, i, last=i == last) for i, m in enumerate(conversation.messages)]
        self.tools = conversation.tools and [self._tool(tool) for tool in conversation.tools]

    def plain(self, text: str) -> str:
        """Return a rendering without the characters that were put in."""
        return self._pattern.sub("", text)

    def found(self, text: str) -> list[tuple[int, Spot]]:
        """Return the spots that a rendering has, with their places, in its order.

        Of a string that comes again, such as a tool's name before what the tool says, the first place alone.
        """
        first: dict[str, int] = {}
        for match in self._pattern.finditer(text):
            first.setdefault(match.group(), match.start())
        return [(place, self.spot(character)) for character, place in first.items()]

    def spot(self, character: str) -> Spot:
        return self.spots[ord(character) - self.first]

    def places(self, text: str) -> list[int]:
        """Return the places of all characters that were put in."""
        return [match.start() for match in self._pattern.finditer(text)]

    def left_out(self, text: str) -> Spot | None:
        """Return the first spot that a rendering must have and has not; the beginning of a string if it has the end."""
        rendered = {match.group() for match in self._pattern.finditer(text)}
        spots = enumerate(self.spots, self.first)
        missing = [spot for code, spot in spots if spot.needed and chr(code) not in rendered]
        return min(missing, key=lambda spot: (spot.message, spot.what == _BEGINNING), default=None)

    def _message(self, message: Message, index: int, *, last: bool) -> Message:
        message = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = self._content(content, index, last)
        elif content is not None:
            message["content"] = [{**part, "text": self._content(part["text"], index, last)} for part in content]
        thoughts = next((message[name] for name in REASONING if name in message), None)
        if thoughts is not None:  # under all of its names, as one string
            put = self._put(thoughts, Spot(index, "thinking", last), Spot(index, "thinking", last))
            message.update({name: put for name in REASONING if name in message})
        if "tool_calls" in message:
            message["tool_calls"] = [self._call(call, index) for call in message["tool_calls"]]
        return message

    def _content(self, text: str, index: int, last: bool) -> str:
        # Templates drop the thinking of earlier turns.
        begins = last or "</think>" not in text
        return self._put(text, Spot(index, _BEGINNING, begins), Spot(index, "content", True))

    def _call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        name, value = Spot(index, "tool call", True), Spot(index, "tool call's arguments", True)
        return {
            **call,
            "function": {
                **function,
                "name": self._put(function["name"], name, name),
                "arguments": self._values(function["arguments"], value),
            },
        }

    def _values(self, value: Any, spot: Spot) -> Any:
        if isinstance(value, str):
            return self._put(value, spot, spot)
        if isinstance(value, dict):
            return {key: self._values(inner, spot) for key, inner in value.items()}
        return [self._values(inner, spot) for inner in value] if isinstance(value, list) else value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        spot = Spot(-1, "name", True)
        named = tool.get("function", tool)
        marked = {**named, "name": self._put(named["name"], spot, spot)}
        return {**tool, "function": marked} if "function" in tool else marked

    def _put(self, text: str, begin: Spot, end: Spot) -> str:
        """Return a string with its characters, inside the white space at its ends, which templates strip."""
        stop = len(text.rstrip())
        if not stop:
            return text
        start = min(_THINK.match(text).end(), stop)  # type: ignore[union-attr]
        if self.middle:
            at = (start + stop) // 2
            return text[:at] + self._next(end) + text[at:]
        return text[:start] + self._next(begin) + text[start:stop] + self._next(end) + text[stop:]

    def _next(self, spot: Spot) -> str:
        if len(self.spots) == _SIZE:
            raise RowError(f"the conversation has more than {_SIZE // 2:,} strings")
        self.spots.append(spot)
        return chr(self.first + len(self.spots) - 1)


class Places:
    """Where the strings of a spotted conversation lie in its rendering `text`, and its places in the plain one."""

    def __init__(self, spotted: Spotted, text: str):
        self.text = text
        self._found = spotted.found(text)
        self._at = spotted.places(text)
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for place, spot in self._found:
            self.first.setdefault(spot.message, place)
            self.last[spot.message] = place

    def plain(self, place: int) -> int:
        """Return the place in the plain rendering."""
        return place - bisect_left(self._at, place)

    def messages_in(self, start: int, end: int) -> set[int]:
        """Return the messages that have a string in a span of the text."""
        low, high = (bisect_left(self._found, place, key=itemgetter(0)) for place in (start, end))
        return {spot.message for _, spot in self._found[low:high]}

    def between(self, before: int, after: int) -> str | None:
        """Return the text between the strings of two messages; None if one has none, or others lie between them."""
        start, end = self.last.get(before), self.first.get(after)
        if start is None or end is None or not start < end or self.messages_in(start + 1, end):
            return None
        return self.text[start + 1 : end]


def spotted(
    conversation: Conversation, plain: str, render: Callable[[list[Message], Any], str]
) -> tuple[Spotted, Places]:
    """Return the spotted conversation and its rendering.

    Raises `RowError` if no place of the characters leaves the rest of the text as it is, or if a string that the
    template must not leave out is not in it.
    """
    plane = next((p for p in _PLANES if not re.search(f"[{chr(p)}-{chr(p + _SIZE - 1)}]", plain)), None)
    if plane is None:
        raise RowError("the conversation has characters of both private-use planes (U+F0000 and U+100000)")
    for middle in (False, True):
        found = Spotted(conversation, plane=plane, middle=middle)
        try:
            text = render(found.messages, found.tools)
        except RowError:
            continue
        if found.plain(text) == plain:
            if (spot := found.left_out(text)) is not None:
                owner = "a tool" if spot.message < 0 else named(conversation, spot.message)
                raise RowError(f"the chat template leaves out the {spot.what} of {owner}")
            return found, Places(found, text)
    raise RowError("what the chat template writes depends on the text of the messages, so that it cannot be verified")


def named(conversation: Conversation, index: int) -> str:
    """Return a message's number and role, for an error."""
    return f"message {index + 1} ({conversation.messages[index]['role']})"
