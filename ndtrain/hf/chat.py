"""Chat templates at work: messages -> text, with the places of the template's own marks, and text -> tokens."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from ndtrain.hf.compat import render_jinja_template

IntArray = npt.NDArray[np.int64]
Span = tuple[int, int]
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")


def is_marked(template: str) -> bool:
    """Return whether a template marks what the model generates, by {% generation %}."""
    return _GENERATION.search(_COMMENT.sub("", template)) is not None


def unmarked(template: str) -> str:
    """Return a template that writes the same and marks nothing."""
    return _MARK.sub(lambda tag: f"{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}", template)


def engine() -> str:
    """Return the versions of what renders templates: another one may give other text."""
    return f"transformers {version('transformers')} jinja2 {version('jinja2')}"


class Renderer:
    """Renders chat templates for one tokenizer, as transformers' `apply_chat_template` does, and encodes the text.

    `has_offsets` says whether `encode` tells where tokens lie, `overridden` whether the tokenizer renders otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.inner = tokenizer
        self.has_offsets = bool(tokenizer.is_fast)
        self.overridden = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        self._special = dict(tokenizer.special_tokens_map)

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """Return the text of `messages`, with the generation prompt if `prompt`. Raises what the template raises."""
        texts, _ = self._render(template, messages, tools, variables, prompt=prompt, marks=False)
        return str(texts[0])

    def render_marked(
        self,
        template: str,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text of `messages` and the spans of its characters that the template marks as generated."""
        texts, spans = self._render(template, messages, tools, variables, prompt=False, marks=True)
        return str(texts[0]), [(start, end) for start, end in spans[0] if start < end]

    def _render(
        self, template: str, messages: Any, tools: Any, variables: Any, *, prompt: bool, marks: bool
    ) -> tuple[list[str], list[list[Span]]]:
        return render_jinja_template(  # type: ignore[no-any-return]
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **{**self._special, **(variables or {})},
        )

    def encode(self, text: str) -> tuple[IntArray, IntArray]:
        """Return the ids `[n]` of rendered text, which has its marks, and the characters of each, `[n, 2]`.

        `[0, 2]` of a tokenizer without offsets. Special tokens that the text spells become those tokens.
        """
        given = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
        if not self.has_offsets:
            ids = self.inner.encode(text, **given)
            return np.asarray(list(ids), dtype=np.int64), np.empty((0, 2), dtype=np.int64)
        found = self.inner(text, return_offsets_mapping=True, return_attention_mask=False, **given)
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        return ids, np.asarray(found["offset_mapping"], dtype=np.int64).reshape(len(ids), 2)
