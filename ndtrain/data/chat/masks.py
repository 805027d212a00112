"""Rows of conversations -> token ids and which of them carry loss.

The whole rendering is encoded once. A token carries loss if it has a character of what is trained: of what the template
marks by {% generation %}, if it has marks; otherwise of the turns (`turns`) of the roles to train on. So a token that
holds characters of a prompt and of its reply carries loss, as it does in TRL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ndtrain.data.chat.control import control_text
from ndtrain.data.chat.conversation import (
    ANY,
    REASONING,
    ROLES,
    Conversation,
    Message,
    TextPair,
    conversation_of,
    has_tools,
)
from ndtrain.data.chat.forms import Form, form_of
from ndtrain.data.chat.spots import named, spotted
from ndtrain.data.chat.template import OWN, ChatTemplate
from ndtrain.data.chat.turns import Turns
from ndtrain.data.row import BoolArray, Encoded, IntArray, RowError, SkippedRow
from ndtrain.data.shapes import Shape
from ndtrain.errors import RecipeError, first_line, keeps_its_name
from ndtrain.hf.chat import Renderer, engine, unmarked
from ndtrain.hf.special_tokens import added_tokens, can_parse

if TYPE_CHECKING:
    from ndtrain.hf.tokenizer import HubTokenizer

# Of what rows become; a change of it makes the caches of earlier versions useless.
_VERSION = 2


class _Endless(RowError):
    """A turn does not end with a token that the model could write to end it."""


class _Trained(NamedTuple):
    """A span of the characters of a rendering that carry loss; the message whose turn it is, None of a mark's."""

    start: int
    end: int
    message: int | None = None


class ChatEncoder:
    """Encodes rows of conversations, with the marks of the template and no others.

    `train_on` has the roles that carry loss. `on_control_text` says what is done with a row whose text spells a special
    token: "error" and "skip" raise `RowError` and `SkippedRow`; with "allow" the text becomes that token. `columns`
    maps our names of fields to the rows'. With `skips`, rows that cannot be used are left out. Raises `RecipeError` if
    the template and the tokenizer do not fit.
    """

    shape: Shape = "chat"
    masked = True

    def __init__(
        self,
        tokenizer: HubTokenizer,
        template: ChatTemplate,
        *,
        train_on: Sequence[str] = ("assistant",),
        on_control_text: str = "error",
        columns: Mapping[str, str] | None = None,
        skips: bool = False,
    ):
        if not can_parse(tokenizer.inner):
            raise RecipeError(
                "data.tokenizer encodes all text as plain text, so that it cannot encode the marks of a chat template; "
                "chat rows need a tokenizer with a tokenizer.json"
            )
        if not train_on or set(train_on) - set(ROLES):
            raise RecipeError(f"data.train_on = {list(train_on)}; it takes one or more of {', '.join(ROLES)}")
        self.tokenizer, self.template = tokenizer, template
        self.train_on, self.on_control_text, self.columns = frozenset(train_on), on_control_text, dict(columns or {})
        self.vocab_size, self.skips = tokenizer.vocab_size, skips
        self._renderer = Renderer(tokenizer.inner)
        if self._renderer.overridden and template.name == OWN:
            raise RecipeError(
                "data.tokenizer renders conversations by code of its own, which does not say what is trained on; set "
                "data.chat_template to a file with the same format"
            )
        # Tokens that may end a turn.
        ends = {token.content: id for id, token in added_tokens(tokenizer.inner).items() if not token.content.isspace()}
        ends |= {str(tokenizer.inner.eos_token): tokenizer.eos_id}
        self._ends = np.array(list(ends.values()), np.int64)
        self._special = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))))
        self._forms: dict[str, Form] = {}
        for text in template.texts.values():
            # Marks tell of the assistant alone: for other roles turns are found as in a template without them.
            own = text if self.train_on == {"assistant"} else unmarked(text)
            form = self._forms[text] = form_of(self._renderer, own, template.name)
            self._check(form)

    @property
    def key(self) -> str:
        """Identify what rows become."""
        parts = [_VERSION, self.tokenizer.key, self.template.key, engine(), sorted(self.train_on)]
        parts += [self.on_control_text, sorted(self.columns.items()), self.skips]
        return "chat-" + blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        """Return the tokens of a row, with at least one that carries loss. Raises `RowError`."""
        tools = len(self._forms) > 1 and has_tools(fields, self.columns)
        form = self._forms[self.template.text_for(tools=tools)] if self._forms else None
        given = conversation_of(fields, columns=self.columns, accepts=form.accepts if form else ANY)
        if form is None and isinstance(given, Conversation):
            raise RecipeError(self.template.missing)
        where, special = control_text(given, self.tokenizer.spelled)
        if special and self.on_control_text != "allow":
            spelled = f'{where} spells the special token "{special}"'
            if self.on_control_text == "skip":
                raise SkippedRow(spelled)
            raise RowError(f'{spelled}; remove it, or set data.on_control_text to "skip" or "allow"')
        if isinstance(given, TextPair):
            ids, loss = self._pair(given)
        else:
            assert form is not None
            ids, loss = self._masked(*self._rendered(given, form, self.train_on), given)
        loss[:1] = False  # the first token is predicted from none
        if not loss.any():
            raise RowError(self._targetless(given))
        return Encoded(ids, loss, special)

    def _check(self, form: Form) -> None:
        """Raise `RecipeError` if short conversations show that replies would not be trained on as they are written."""
        messages: list[Message] = [
            {"role": "user", "content": "Question?"},
            {"role": "assistant", "content": "Answer."},
            {"role": "user", "content": "Another?"},
        ]
        for count in (2, 3):
            given = conversation_of({"messages": messages[:count]}, accepts=form.accepts)
            assert isinstance(given, Conversation)
            try:
                text, spans = self._rendered(given, form, roles={"assistant"})
                self._masked(text, spans, given)
                for span in spans:
                    header = text[span.start : span.end].partition("Answer.")[0]
                    if not form.prompts and not form.marked and header.strip():
                        raise RecipeError(
                            f"the chat template ({self.template.name}) has no generation prompt, so that what it "
                            f"writes before a reply, {header!r}, would be trained on; choose one with "
                            "add_generation_prompt"
                        )
                    # White space after the end token may be in the marks.
                    end = span.start + len(text[span.start : span.end].rstrip())
                    self._masked(text, [_Trained(span.start, end, 1)], given)
            except _Endless as error:
                raise RecipeError(
                    f"the chat template ({self.template.name}) and data.tokenizer do not fit: {error}; choose a "
                    "template of this tokenizer's model"
                ) from error
            except RowError:
                continue  # rows tell what is wrong

    def _masked(self, text: str, spans: list[_Trained], given: Conversation) -> tuple[IntArray, BoolArray]:
        """Return the ids of a rendering and which of them carry loss. Raises `_Endless` for a turn that has no end."""
        ids, offsets = self._encoded(text)
        loss = np.zeros(len(ids), dtype=np.bool_)
        for span in spans:
            here = self._tokens_of(text, ids, offsets, span)
            loss |= here
            if span.message is not None and not (len(at := np.flatnonzero(here)) and ids[at[-1]] in self._ends):
                raise _Endless(
                    f"{named(given, span.message)} ends with {text[span.start : span.end][-20:]!r}, not with a special "
                    "token, so that the model would not learn to stop"
                )
        return ids, loss

    def _encoded(self, text: str) -> tuple[IntArray, IntArray]:
        try:
            return self._renderer.encode(text)
        except Exception as error:  # of half a character, or of a vocabulary without an unknown token
            if keeps_its_name(error):
                raise
            raise RowError(f"data.tokenizer cannot encode the text: {first_line(error)}") from error

    def _tokens_of(self, text: str, ids: IntArray, offsets: IntArray, span: _Trained) -> BoolArray:
        """Return which tokens have a character of a span. Raises `RowError` where that cannot be told."""
        if self._renderer.has_offsets:
            return (offsets[:, 1] > span.start) & (offsets[:, 0] < span.end)
        here = np.zeros(len(ids), dtype=np.bool_)
        # Without offsets, a border between tokens is where the text before it has the same tokens alone.
        counts = []
        for place in (span.start, span.end):
            before, _ = self._encoded(text[:place])
            if not np.array_equal(before, ids[: len(before)]):
                raise RowError("tokens reach over the border of a turn, and data.tokenizer does not say where they lie")
            counts.append(len(before))
        here[counts[0] : counts[1]] = True
        return here

    def _pair(self, given: TextPair) -> tuple[IntArray, BoolArray]:
        """Return the tokens of a prompt and its completion in plain text, with the marks that text rows have."""
        if "assistant" not in self.train_on:
            raise RowError('a completion of plain text is a reply, and data.train_on does not have "assistant"')
        text = given.prompt + given.completion
        ids, offsets = self._encoded(text)
        loss = self._tokens_of(text, ids, offsets, _Trained(len(given.prompt), len(text)))
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        head = [] if bos is None or (len(ids) and ids[0] == bos) else [bos]
        tail = [] if len(ids) and ids[-1] == eos else [eos]
        marked = np.concatenate([np.array(head, np.int64), ids, np.array(tail, np.int64)])
        return marked, np.concatenate([np.zeros(len(head), np.bool_), loss, np.ones(len(tail), np.bool_)])

    def _rendered(self, given: Conversation, form: Form, roles: Collection[str]) -> tuple[str, list[_Trained]]:
        """Return the rendering of a conversation and what of it carries loss, where `roles` do."""
        for name in given.variables:
            if not form.reads(name):
                raise RowError(f'"chat_template_kwargs" sets "{name}", which the chat template does not read')
        for index, message in enumerate(given.messages):
            if not form.reasons and any(name in message for name in REASONING):
                raise RowError(f"the chat template leaves out the thinking of {named(given, index)}")
        return self._of_marks(given, form) if form.marked else self._of_turns(given, form, roles)

    def _of_turns(self, given: Conversation, form: Form, roles: Collection[str]) -> tuple[str, list[_Trained]]:
        def render(messages: list[Message], tools: Any, *, prompt: bool = False, thinking: bool | None = None) -> str:
            variables = given.variables if thinking is None else {**given.variables, "enable_thinking": thinking}
            with_prompt = {"tools": tools, "variables": variables, "prompt": prompt}
            return str(_rendering(self._renderer.render, form.text, messages, **with_prompt))

        text = render(given.messages, given.tools)
        spots, places = spotted(given, text, render)
        switch = form.switch and "enable_thinking" not in given.variables
        turns = Turns(
            given,
            spots,
            places,
            render=lambda messages, **how: render(messages, spots.tools, **how),
            switch=switch,
            special=self._special,
        )
        spans = []
        for index, message in enumerate(given.messages):
            if given.trained[index] and message["role"] in roles:
                found = turns.reply(index) if message["role"] == "assistant" else turns.other(index)
                start, end = places.plain(found[0]), places.plain(found[1])
                if start < end:
                    # Without white space after the end token, which the model never writes.
                    spans.append(_Trained(start, start + len(text[start:end].rstrip()), index))
        return text, spans

    def _of_marks(self, given: Conversation, form: Form) -> tuple[str, list[_Trained]]:
        marks: list[list[tuple[int, int]]] = []

        def render(messages: list[Message], tools: Any) -> str:
            text, spans = _rendering(
                self._renderer.render_marked, form.text, messages, tools=tools, variables=given.variables
            )
            marks.append(spans)
            return str(text)

        text = render(given.messages, given.tools)
        _, places = spotted(given, text, render)
        replies = [index for index, message in enumerate(given.messages) if message["role"] == "assistant"]
        if all(given.trained[index] for index in replies):
            return text, [_Trained(*span) for span in marks[0]]
        spans = []
        for start, end in marks[-1]:
            owners = places.messages_in(start, end)
            if len(owners) != 1:
                raise RowError("some messages carry no loss, and the chat template's marks do not tell which they are")
            if given.trained[owners.pop()]:
                spans.append(_Trained(places.plain(start), places.plain(end)))
        return text, spans

    def _targetless(self, given: Conversation | TextPair) -> str:
        if isinstance(given, TextPair):
            return "no token carries loss: prompt and completion have no text"
        roles = " or ".join(role for role in ROLES if role in self.train_on)
        turns = [i for i, message in enumerate(given.messages) if message["role"] in self.train_on]
        if not turns:
            return f"no token carries loss: it has no message of the role {roles}"
        if not any(given.trained[index] for index in turns):
            return (
                f"no token carries loss: each message of the role {roles} is left out by its weight, or is a prompt's"
            )
        return f"no token carries loss: the chat template writes nothing for the role {roles}"


def _rendering(render: Any, text: str, messages: list[Message], **given: Any) -> Any:
    try:
        return render(text, messages, **given)
    except Exception as error:  # a template is code of the model's author
        if keeps_its_name(error):
            raise
        empty = next((i for i, message in enumerate(messages) if message.get("content") is None), None)
        if empty is None or type(error).__name__ not in ("TypeError", "UndefinedError"):
            raise RowError(f"the chat template cannot render it: {first_line(error)}") from error
        what = "has tool calls and no content" if messages[empty].get("tool_calls") else "has no content"
        raise RowError(
            f"the chat template cannot render it: message {empty + 1} ({messages[empty]['role']}) {what}; set "
            'data.chat_template to one that takes such messages, or give it "content": ""'
        ) from error
