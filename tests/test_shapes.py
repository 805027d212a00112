"""A row's fields say what it is: text, chat or tokens; what cannot be told is refused with the fields there are."""

from __future__ import annotations

from typing import Any

import pytest

from ndtrain.data.row import RowError
from ndtrain.data.shapes import REQUIRED, fields_of, names_of, shape_of, text_of
from ndtrain.recipe.data import COLUMNS, DataSection


def test_the_fields_of_all_formats_can_be_named() -> None:
    formats = DataSection.model_json_schema()["properties"]["format"]["enum"]
    assert [*COLUMNS, "tokens"] == list(REQUIRED) == formats[1:]
    for shape, groups in REQUIRED.items():
        assert {name for group in groups for name in group} <= set(names_of(shape))


@pytest.mark.parametrize(
    ("fields", "columns", "shape"),
    [
        ("id text url", {}, "text"),
        ("messages tools", {}, "chat"),
        ("conversations", {}, "chat"),
        ("prompt completion", {}, "chat"),
        ("input_ids labels", {}, "tokens"),
        ("text prompt", {}, "text"),  # a prompt alone is no chat
        ("content title", {"text": "content"}, "text"),
        ("body messages", {"text": "body"}, "text"),
        ("text dialog", {"messages": "dialog"}, "chat"),
        ("text messages functions", {"tools": "functions"}, "chat"),
        ("question answer", {"prompt": "question", "completion": "answer"}, "chat"),
        ("prompt answer", {"completion": "answer"}, "chat"),
    ],
)
def test_fields_give_a_shape(fields: str, columns: dict[str, str], shape: str) -> None:
    assert shape_of(fields.split(), columns) == shape
    assert shape_of(fields.split(), columns, shape) == shape


@pytest.mark.parametrize(
    ("fields", "columns", "format", "said"),
    [
        (
            "id url",
            {},
            "auto",
            'no "text" or "messages" or "conversations" or "prompt" and "completion" or "input_ids"',
        ),
        ("id url", {}, "auto", 'its fields are "id", "url"'),
        ("text", {}, "chat", 'no "messages" or'),
        ("text", {"text": "content"}, "auto", 'a row has no "content": its fields are "text"'),
        ("conversations", {"messages": "dialog"}, "auto", 'a row has no "dialog": its fields are "conversations"'),
        ("text messages", {}, "auto", 'a row is text and chat at once: its fields are "text", "messages"; set'),
        ("", {}, "text", "its fields are none"),
        (" ".join("abcdefghijklmnop"), {}, "text", '"l", and 4 others'),
    ],
)
def test_what_fields_do_not_tell_is_refused(fields: str, columns: dict[str, str], format: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        shape_of(fields.split(), columns, format)
    assert said in str(caught.value)


def test_a_rows_fields_get_our_names_and_null_is_none_of_them() -> None:
    row = {"question": "q", "answer": "a", "prompt": "x", "tools": None, "id": 1}
    columns = {"prompt": "question", "completion": "answer"}
    assert fields_of(row, "chat", columns) == {"prompt": "q", "completion": "a"}
    assert fields_of({"messages": [], "text": "x"}, "chat", {}) == {"messages": []}
    for bad, said in (({**row, "answer": None}, '"answer" is null'), ({"question": 1}, 'no "question" and "answer"')):
        with pytest.raises(RowError, match=said):
            fields_of(bad, "chat", columns)


@pytest.mark.parametrize(("text", "said"), [(1, "a number"), ([], "an array"), ({}, "an object"), (True, "true or")])
def test_a_text_must_be_a_string(text: Any, said: str) -> None:
    with pytest.raises(RowError, match=f"its text is {said}"):
        text_of({"text": text})
    assert text_of({"text": ""}) == ""
