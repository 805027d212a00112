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

# The end of a prompt may be one token alone and two before the reply. TRL trains on the reply from the first token that
# differs, which then is of the prompt; a prompt carries no loss here.
PROMPT_TRAINED_BY_TRL = {("llama3", "prompt and completion"): 2}
HERE = Path(__file__).parent / "chat"
TRL: dict[str, Any] = json.loads((HERE / "trl.json").read_text())
CASES = [(family, name) for name, (_, families) in ROWS.items() for family in families]


@cache
def encoder_of(family: str) -> ChatEncoder:
    template = chat_template(str(HERE / "trl" / f"{family}.jinja"), None, date=datetime.date(2025, 1, 1))
    return ChatEncoder(tokenizer_of(TOKENIZERS[family]), template)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_and_masks_are_those_of_trl(family: str, name: str) -> None:
    made = encoder_of(family).encode(ROWS[name][0])
    assert made.loss is not None
    assert made.ids.tolist() == TRL[family][name]["ids"]
    start = TRL[family][name]["loss"].index("1")
    more = PROMPT_TRAINED_BY_TRL.get((family, name), 0)
    expected = "0" * (start + more) + TRL[family][name]["loss"][start + more :]
    assert "".join("1" if carries else "0" for carries in made.loss) == expected
