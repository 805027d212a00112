"""Find the turns of a conversation in its rendering by a template without marks, by rendering the messages before them.

A turn begins where the messages before it, rendered with the generation prompt, end: there the model takes over. It
ends where the messages up to it, rendered alone, end. Neither rendering need be the beginning of the whole one, since
templates drop earlier thinking or move the system message; then what it has after its last string (`spots`) must follow
the same string in the whole rendering. Places are those of the spotted rendering.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ndtrain.data.chat.conversation import Conversation, Message
from ndtrain.data.chat.spots import Places, Spotted, named
from ndtrain.data.row import RowError

# render(messages, prompt=..., thinking=...): `thinking` is False for the prompt of a reply without thinking.
RenderPrefix = Callable[..., str]
_THINKING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
# An empty block of thinking, of which the prompt may have the beginning. One of the message itself has a spot inside.
_EMPTY = re.compile(r"\s*(?:<think>)?\s*</think>\s*")


class Turns:
    """Finds turns in the rendering of one conversation.

    `switch` says whether the template has another prompt for a reply without thinking; `special` finds special tokens.
    """

    def __init__(
        self,
        conversation: Conversation,
        spotted: Spotted,
        places: Places,
        *,
        render: RenderPrefix,
        switch: bool,
        special: re.Pattern[str],
    ):
        self.conversation, self.spotted, self.places, self.render = conversation, spotted, places, render
        self.switch, self.special = switch, special
        self._known: dict[str, int] = {}

    def reply(self, index: int) -> tuple[int, int]:
        """Return the span of what the model writes in an assistant's turn, its end token included.

        An empty block of thinking that the template puts before the reply is not of it. Raises `RowError` where the
        template renders the turn in another way than the messages before it lead to.
        """
        return self._checked(index, self._once(index - 1, index, self._start))

    def other(self, index: int) -> tuple[int, int]:
        """Return the span of another role's strings, with the end of the turn; empty if it has none."""
        start = self.places.first.get(index)
        if start is None:
            return 0, 0
        if self.spotted.middle:
            raise RowError(f"{named(self.conversation, index)}: the chat template does not show where its text begins")
        return self._checked(index, start)

    def _checked(self, index: int, start: int) -> tuple[int, int]:
        end = self._once(index, index + 1, self._end)
        first, last = self.places.first.get(index, start), self.places.last.get(index, start)
        if not start <= first <= last < end or self.places.messages_in(start, end) - {index}:
            raise RowError(f"{named(self.conversation, index)} is not rendered as one turn by the chat template")
        return start, end

    def _once(self, before: int, after: int, find: Callable[[int], int]) -> int:
        """Return the place that `find` finds in the border between two messages.

        It is asked once for each text between two messages: the same text between the same kinds of messages is
        divided in the same place, and a long conversation has few of them.
        """
        turn = after if find == self._start else before
        border = self.places.between(before, after) if before >= 0 else None
        if border is None:
            return find(turn)
        kinds = [sorted(self.conversation.messages[index]) for index in (before, after)]
        roles = [self.conversation.messages[index]["role"] for index in (before, after)]
        key = repr((find.__name__, border, kinds, roles))
        if key not in self._known:
            self._known[key] = find(turn) - self.places.last[before]
        return self.places.last[before] + self._known[key]

    def _start(self, index: int) -> int:
        """Return where the generation prompt for a turn ends: the longest of the template's that the turn has."""
        before = self.spotted.messages[:index]
        try:
            prompt = self.render(before, prompt=True)
        except RowError as error:
            raise RowError(f"what leads to {named(self.conversation, index)} is not a conversation: {error}") from error
        start = self._after(prompt)
        if start is None and self.switch:
            start = self._after(self.render(before, prompt=True, thinking=True))
        if start is None and (block := _THINKING.search(prompt)):  # which the turn was rendered without
            start = self._after(prompt[: block.start()])
        if start is None:
            raise RowError(
                f"{named(self.conversation, index)} does not begin with the chat template's generation prompt, so that "
                "its start cannot be told"
            )
        if (empty := _EMPTY.match(self.places.text, start)) is None:
            return start
        without = self._after(self.render(before, prompt=True, thinking=False)) if self.switch else None
        return without if without is not None and start < without <= empty.end() else empty.end()

    def _end(self, index: int) -> int:
        """Return where a turn ends: as one that ends the conversation, or else as one that is replied to."""
        upto = self.spotted.messages[: index + 1]
        least = self.places.last.get(index, -1)
        alone = self.render(upto)
        for find in (
            lambda: self._after(alone),
            lambda: self._after(self._replied_to(upto)),
            lambda: self._close(alone),
        ):
            end = find()
            if end is not None and end > least:
                return end
        raise RowError(
            f"{named(self.conversation, index)} is not rendered as the chat template renders it when nothing follows, "
            "so that its end cannot be told"
        )

    def _replied_to(self, messages: list[Message]) -> str:
        """Return messages as rendered before a reply, without the prompt for it, which is what a user's one adds."""
        asked = [{"role": "user", "content": "?"}]
        added = self.render(asked, prompt=True).removeprefix(self.render(asked))
        return self.render(messages, prompt=True).removesuffix(added)

    def _close(self, alone: str) -> int | None:
        """Return where a turn ends whose rendering `alone` has more after it, as Phi's has the end of the text.

        That is after the last special token that both renderings have in the same place.
        """
        rest, at = self._last(alone)
        ends = [at + found.end() for found in self.special.finditer(rest)]
        return max((end for end in ends if self.places.text.startswith(rest[: end - at], at)), default=None)

    def _after(self, part: str) -> int | None:
        """Return where the rendering of the first messages ends in that of all; None if it has another end there."""
        rest, at = self._last(part)
        return at + len(rest) if self.places.text.startswith(rest, at) else None

    def _last(self, part: str) -> tuple[str, int]:
        """Return what a rendering of the first messages has from its last string on, and where that string is in all.

        All of it and 0 if it begins the whole one, or if that string is not in it, or twice.
        """
        whole = self.places.text
        if not whole.startswith(part) and (places := self.spotted.places(part)):
            rest = part[places[-1] :]
            if whole.count(rest[0]) == 1:
                return rest, whole.index(rest[0])
        return part, 0
