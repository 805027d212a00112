"""Choose what turns the rows of a run's data into tokens."""

from __future__ import annotations

import datetime

from ndtrain.data.chat import ChatEncoder, ChatTemplate, chat_template
from ndtrain.data.row import Encoder
from ndtrain.data.text import TextEncoder
from ndtrain.errors import RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.recipe import Recipe
from ndtrain.recipe.data import DataSection

# What templates that ask for today's date get. It is part of what rows are, so it stays as it is.
DATE = datetime.date(2025, 1, 1)


def encoder_of(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> Encoder:
    """Return the encoder of data whose format is known, text or chat. Raises `RecipeError` if there is none for it."""
    data, skips = recipe.data, recipe.data.on_bad_row == "skip"
    tokenizer = as_text(tokenizer, data)
    if data.format != "chat":
        return TextEncoder(tokenizer, data.columns, skips=skips)
    return ChatEncoder(
        _with_templates(tokenizer),
        template_of(recipe, tokenizer),
        train_on=data.train_on,
        on_control_text=data.on_control_text,
        columns=data.columns,
        skips=skips,
    )


def template_of(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> ChatTemplate:
    """Return the chat template that rows are rendered with; it may be missing. Raises what `chat_template` raises."""
    return chat_template(recipe.data.chat_template, _with_templates(tokenizer).inner.chat_template, date=DATE)


def as_text(tokenizer: ByteTokenizer | HubTokenizer, data: DataSection) -> ByteTokenizer | HubTokenizer:
    """Return the tokenizer that treats text which spells special tokens as `data.special_tokens` says."""
    return tokenizer.parsing(data.special_tokens == "parse") if isinstance(tokenizer, HubTokenizer) else tokenizer


def template_key(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> str | None:
    """Return the identity of the template's text, None where no row is rendered.

    Raises `RecipeError` if sources have different templates: of them the tokenizer in a checkpoint can have one.
    """
    found = {
        str(number): template_of(part, tokenizer).key
        for number, part in enumerate(recipe.parts())
        if part.data.format == "chat"
    }
    if len(set(found.values())) > 1:
        one, other = next((a, b) for a in found for b in found if found[a] != found[b])
        raise RecipeError(
            f"data.sources[{one}] and data.sources[{other}] are rendered with different chat templates, of which the "
            "tokenizer in a checkpoint can have one; set one data.chat_template"
        )
    return next(iter(found.values()), None)


def save_templates(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> None:
    """Let the tokenizer that checkpoints hold have the chat template that rows are rendered with, if there is one."""
    template_key(recipe, tokenizer)
    chat = next((part for part in recipe.parts() if part.data.format == "chat"), None)
    if chat is not None and (texts := template_of(chat, tokenizer).sources):
        _with_templates(tokenizer).inner.chat_template = texts["default"] if len(texts) == 1 else dict(texts)


def _with_templates(tokenizer: ByteTokenizer | HubTokenizer) -> HubTokenizer:
    if isinstance(tokenizer, ByteTokenizer):
        raise RecipeError(
            'data.tokenizer = "bytes" has no tokens for the turns of a conversation; chat rows need the tokenizer of a '
            "model"
        )
    return tokenizer
