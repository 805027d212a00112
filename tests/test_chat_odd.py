"""Odd conversations are trained on rightly, or refused with the reason."""

from __future__ import annotations

import datetime
from functools import cache
from pathlib import Path

import pytest

from ndtrain.data.chat import BUILT_IN, ChatEncoder, chat_template
from ndtrain.data.row import RowError
from tests.chat.odd import ODD, TOKENIZERS, Odd
from tests.chat.runs import trained
from tests.chat.tokenizers import tokenizer_of

STOCK = Path(__file__).parent / "chat" / "stock"


@cache
def encoder_of(name: str, **given: str) -> ChatEncoder:
    template = chat_template(
        name if name in BUILT_IN else str(STOCK / f"{name}.jinja"), None, date=datetime.date(2025, 1, 1)
    )
    return ChatEncoder(tokenizer_of(TOKENIZERS[name]), template, **given)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{odd.template}, {odd.name}")
def test_an_odd_conversation_is_trained_on_rightly_or_refused(odd: Odd) -> None:
    encoder = encoder_of(odd.template)
    if isinstance(odd.expected, str):
        with pytest.raises(RowError) as refused:
            encoder.encode(odd.fields)
        assert odd.expected in str(refused.value)
    else:
        assert trained(encoder.encode(odd.fields), TOKENIZERS[odd.template]) == odd.expected
