"""Ids and masks of conversations are those that TRL makes of them."""

from __future__ import annotations

import datetime
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ndtrain.data.chat import ChatEncoder, chat_template
from tests.chat.conversations import ROWS, TOKENIZERS
from tests.chat.tokenizers import tokenizer_of

HERE = Path(__file__).parent / "chat"
TRL: dict[str, Any] = json.loads((HERE / "trl.json").read_text())
CASES = [(family, name) for name, (_, families) in ROWS.items() for family in families]
CHAT = [(family, name) for family, name in CASES if "messages" in ROWS[name][0]]


@cache
def encoder_of(family: str) -> ChatEncoder:
    template = chat_template(str(HERE / "trl" / f"{family}.jinja"), None, date=datetime.date(2025, 1, 1))
    return ChatEncoder(tokenizer_of(TOKENIZERS[family]), template)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_and_masks_are_those_of_trl(family: str, name: str) -> None:
    made = encoder_of(family).encode(ROWS[name][0])
    assert made.loss is not None
    assert made.ids.tolist() == TRL[family][name]["ids"]
    assert "".join("1" if carries else "0" for carries in made.loss) == TRL[family][name]["loss"]
