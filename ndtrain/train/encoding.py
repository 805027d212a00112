"""Choose what turns the rows of a run's data into tokens."""

from __future__ import annotations

import datetime

from ndtrain.data.chat import ChatEncoder, ChatTemplate, chat_template
from ndtrain.data.row import Encoder
from ndtrain.data.text import TextEncoder
from ndtrain.errors import RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.recipe import Recipe

# What templates that ask for today's date get. It is part of what rows are, so it stays as it is.
DATE = datetime.date(2025, 1, 1)


def encoder_of(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> Encoder:
    """Return the encoder of data whose format is known, text or chat. Raises `RecipeError` if there is none for it."""
    data, skips = recipe.data, recipe.data.on_bad_row == "skip"
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


def save_templates(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> None:
    """Let the tokenizer that checkpoints hold have the chat template that rows are rendered with, if there is one."""
    if recipe.data.format == "chat" and (sources := template_of(recipe, tokenizer).sources):
        _with_templates(tokenizer).inner.chat_template = sources["default"] if len(sources) == 1 else dict(sources)


def _with_templates(tokenizer: ByteTokenizer | HubTokenizer) -> HubTokenizer:
    if isinstance(tokenizer, ByteTokenizer):
        raise RecipeError(
            'data.tokenizer = "bytes" has no tokens for the turns of a conversation; chat rows need the tokenizer of a '
            "model"
        )
    return tokenizer
