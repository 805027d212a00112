"""Chat rows: which template, what fits together, which roles carry loss, control text, keys."""

from __future__ import annotations

import copy
import datetime
import pickle
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndtrain.data.chat import BUILT_IN, ChatEncoder, ChatTemplate, chat_template
from ndtrain.data.chat.conversation import Accepts, Conversation, conversation_of
from ndtrain.data.row import RowError, SkippedRow
from ndtrain.errors import RecipeError
from tests.chat.conversations import ROWS, TOKENIZERS, Fields, call, said
from tests.chat.odd import ODD
from tests.chat.odd import TOKENIZERS as TOKENIZERS_OF_ODD
from tests.chat.runs import trained
from tests.chat.tokenizers import inner_of, tokenizer_of

HERE = Path(__file__).parent / "chat"
DAY = datetime.date(2025, 1, 1)
ROW: Fields = {
    "messages": said(("system", "s"), ("user", "the q?"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
}
CHATML = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"


def template_of(text: str, **more: str) -> ChatTemplate:
    return chat_template(None, {"default": text, **more}, date=DAY)


def encoder_of(text: str, family: str = "qwen", **given: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer_of(family), template_of(text), **given)


# ---- which template


def test_a_name_or_a_file_goes_before_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML + "é")
    assert chat_template(str(tmp_path / "own.jinja"), "theirs", date=DAY).texts == {"default": CHATML + "é"}
    assert "<|im_start|>" in chat_template("chatml", "theirs", date=DAY).texts["default"]
    assert chat_template(None, "theirs", date=DAY).texts == {"default": "theirs"}


def test_rows_with_tools_get_the_template_for_them() -> None:
    both = template_of("a", tool_use="b")
    assert both.text_for(tools=False) == "a" and both.text_for(tools=True) == "b"
    assert template_of("a").text_for(tools=True) == "a"
    encoder = ChatEncoder(
        tokenizer_of("qwen"), template_of(CHATML + PROMPT, tool_use="{{- tools[0].name }}" + CHATML + PROMPT)
    )
    with_tools = encoder.encode({**ROW, "tools": [{"name": "f"}]})
    assert inner_of("qwen").decode(with_tools.ids).startswith("f<|im_start|>")
    assert inner_of("qwen").decode(encoder.encode({**ROW, "tools": "[]"}).ids).startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (None, "has no chat template; set data.chat_template to a file or to one of chatml"),
        ({"rag": "x"}, "has the chat templates rag, none of them the default"),
    ],
)
def test_without_a_template_only_prompts_and_completions_of_text_can_be_used(own: Any, reason: str) -> None:
    encoder = ChatEncoder(tokenizer_of("qwen"), chat_template(None, own, date=DAY))
    pair = {"prompt": "What is", "completion": " the capital"}
    with_template, found = (
        ChatEncoder(tokenizer_of("qwen"), template_of(CHATML + PROMPT)).encode(pair),
        encoder.encode(pair),
    )
    assert found.ids.tolist() == with_template.ids.tolist()
    assert found.loss is not None and with_template.loss is not None
    assert found.loss.tolist() == with_template.loss.tolist()
    with pytest.raises(RecipeError, match=re.escape(reason)):
        encoder.encode(ROW)


@pytest.mark.parametrize(
    ("given", "own", "reason"),
    [
        ("chatmi", None, "neither a file"),
        ("empty.jinja", None, "is empty"),
        ("latin.jinja", None, "cannot be read"),
    ],
)
def test_a_template_that_is_not_there_is_refused(
    tmp_path: Path, given: str | None, own: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jinja").write_text(" \n")
    Path("latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(RecipeError, match=re.escape(reason)):
        chat_template(given, own, date=DAY)


def test_a_template_that_is_not_valid_is_refused_with_its_line() -> None:
    with pytest.raises(RecipeError, match="line 2: "):
        encoder_of("{{- bos_token }}\n{% for %}")


def test_the_day_is_the_same_on_every_day() -> None:
    text = (
        "{%- if strftime_now is defined %}{{- strftime_now('%d %b %Y') + strftime_now(\"%Y\") }}{%- endif %}" + CHATML
    )
    fixed = template_of(text)
    assert "strftime_now(" not in fixed.texts["default"] and fixed.sources == {"default": text}
    assert inner_of("qwen").decode(encoder_of(text + PROMPT).encode(ROW).ids).startswith("01 Jan 20252025<|im_start|>")
    assert "2025-01-01" in fixed.notes()[0] and not template_of(CHATML).notes()
    assert chat_template(None, text, date=datetime.date(2026, 1, 1)).key != fixed.key


@pytest.mark.parametrize(
    "text", ["{{ strftime_now(messages[0].format) }}", "{% set now = strftime_now %}", "{{ [1, 2] | random }}"]
)
def test_a_template_that_is_no_function_of_the_row_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"date|random"):
        template_of(text)


# ---- what fits together


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_template_whose_end_token_the_tokenizer_lacks_is_refused(name: str) -> None:
    other = "gemma" if name == "chatml" else "qwen"
    if name == "zephyr":  # which takes the tokenizer's own
        assert (
            trained(ChatEncoder(tokenizer_of(other), chat_template(name, None, date=DAY)).encode(ROW), other)[0]
            == "a<|im_end|>"
        )
        return
    with pytest.raises(RecipeError, match=r"do not fit: .* not with a special token"):
        ChatEncoder(tokenizer_of(other), chat_template(name, None, date=DAY))


def test_marks_that_leave_out_the_end_of_a_turn_are_refused() -> None:
    marked = (
        "{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}{%- else %}{{- m.content }}"
    )
    text = CHATML.replace(" + m.content + ", " }}" + marked + "{%- endif %}{{- ") + PROMPT
    with pytest.raises(RecipeError, match=r"ends with 'Answer\.', not with a special token"):
        encoder_of(text)


def test_other_roles_are_found_by_turns_in_a_template_with_marks() -> None:
    template, roles = chat_template("chatml", None, date=DAY), ("user", "assistant")
    made = ChatEncoder(tokenizer_of("qwen"), template, train_on=roles).encode(ROW)
    assert trained(made, "qwen") == trained(encoder_of(CHATML + PROMPT, train_on=roles).encode(ROW), "qwen")
    np.testing.assert_array_equal(made.ids, ChatEncoder(tokenizer_of("qwen"), template).encode(ROW).ids)


def test_a_message_without_content_is_named_where_the_template_needs_one() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [*said(("user", "q")), {"role": "assistant", "tool_calls": [call]}, *said(("assistant", "a"))]}
    with pytest.raises(RowError, match=r"message 2 \(assistant\) has tool calls and no content; set data\.chat_"):
        ChatEncoder(tokenizer_of("qwen"), chat_template("chatml", None, date=DAY)).encode(row)


@pytest.mark.parametrize("roles", [(), ("human",)])
def test_roles_that_are_not_known_are_refused(roles: Sequence[str]) -> None:
    with pytest.raises(RecipeError, match=r"data\.train_on"):
        encoder_of(CHATML + PROMPT, train_on=roles)


def test_a_template_without_a_generation_prompt_is_not_trained_on_with_its_headers() -> None:
    with pytest.raises(RecipeError, match=re.escape(r"before a reply, '<|im_start|>assistant\n', would be trained on")):
        encoder_of(CHATML)


def test_a_tokenizer_with_code_of_its_own_for_conversations_needs_a_file() -> None:
    class Own(type(inner_of("qwen"))):  # type: ignore[misc]
        def apply_chat_template(self, *args: Any, **given: Any) -> Any: ...

    tokenizer = tokenizer_of("qwen")
    tokenizer.inner = Own(tokenizer_object=inner_of("qwen").backend_tokenizer, eos_token="<|im_end|>")
    with pytest.raises(RecipeError, match="by code of its own"):
        ChatEncoder(tokenizer, template_of(CHATML + PROMPT))
    assert ChatEncoder(tokenizer, chat_template("chatml", None, date=DAY)).encode(ROW).ids.size


def test_marks_in_a_comment_are_none() -> None:
    made = encoder_of("{#- without {% generation %} #}" + CHATML + PROMPT).encode(ROW)
    assert trained(made, "qwen") == ["a<|im_end|>", "b<|im_end|>"]


# ---- what is trained


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("assistant",), ["a<|im_end|>", "b<|im_end|>"]),
        (("user",), ["the q?<|im_end|>", "q<|im_end|>"]),
        (("system", "assistant"), ["s<|im_end|>", "a<|im_end|>", "b<|im_end|>"]),
    ],
)
def test_the_roles_to_train_on_carry_loss(roles: Sequence[str], expected: list[str]) -> None:
    assert trained(encoder_of(CHATML + PROMPT, train_on=roles).encode(ROW), "qwen") == expected


def random_row(draw: random.Random) -> Fields:
    """A conversation of alternating roles, whose texts are of pieces that tokenizers and templates may trip over."""
    pieces = [
        "the",
        " ",
        "\n",
        "\n\n",
        "a.",
        "é",
        "🙂",
        "<",
        "|>",
        "im_end",
        "think",
        "assistant",
        "user\n",
        "{{",
        "x" * 20,
    ]

    def text() -> str:
        return "".join(draw.choices(pieces, k=draw.randrange(1, 9))) + draw.choice("abc")

    roles = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randrange(1, 5) + ["user"] * draw.randrange(2)
    return {"messages": said(*((role, text()) for role in roles))}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_turns_that_are_found_are_those_that_marks_say(family: str) -> None:
    """But for what marks of TRL's have besides: line feeds around a turn, and an empty block of thinking before it."""
    text = (HERE / "trl" / f"{family}.jinja").read_text()
    tokenizer, draw = TOKENIZERS[family], random.Random(17)
    by_marks, by_turns = (encoder_of(t, tokenizer) for t in (text, re.sub(r"\{%- (end)?generation %\}", "", text)))
    for _ in range(60):
        row = random_row(draw)
        marked, found = by_marks.encode(row), by_turns.encode(row)
        assert np.array_equal(marked.ids, found.ids)
        runs = [
            [re.sub(r"^\s*<think>\s*</think>", "", run).strip() for run in trained(made, tokenizer)]
            for made in (marked, found)
        ]
        assert runs[0] == runs[1]


def test_a_tokenizer_without_offsets_gives_the_same_or_refuses() -> None:
    encoder, plain = encoder_of(CHATML + PROMPT), encoder_of(CHATML + PROMPT)
    plain._renderer.has_offsets = False
    made, without = encoder.encode(ROW), plain.encode(ROW)
    assert np.array_equal(made.ids, without.ids) and np.array_equal(made.loss, without.loss)
    with pytest.raises(
        RowError, match="reach over the border"
    ):  # the prompt's line feed is in a token with the reply's
        plain.encode({"messages": said(("user", "q"), ("assistant", "\n\na"))})


def test_the_first_token_is_no_target() -> None:
    text = "{%- for m in messages %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{%- endfor %}"
    made = encoder_of(text).encode({"messages": said(("assistant", "a"))})
    assert made.loss is not None and made.loss.tolist() == [False, True]


def test_thinking_may_be_left_out_of_earlier_turns_alone() -> None:
    encoder = encoder_of(CHATML.replace("m.content", "m.content.split('</think>')[-1]") + PROMPT)
    thought = ("assistant", "<think>t</think>a")
    assert trained(encoder.encode({"messages": said(("user", "q"), thought, ("user", "q"))}), "qwen") == ["a<|im_end|>"]
    with pytest.raises(RowError, match=re.escape("leaves out the beginning of the content of message 2 (assistant)")):
        encoder.encode({"messages": said(("user", "q"), thought)})


def test_content_is_given_as_the_template_takes_it() -> None:
    parts = CHATML.replace("m.content", "(m.content | map(attribute='text') | join)") + PROMPT
    assert trained(encoder_of(parts).encode(ROW), "qwen") == ["a<|im_end|>", "b<|im_end|>"]


def test_arguments_are_given_as_the_template_takes_them() -> None:
    calls = CHATML.replace(
        "m.content",
        "(m.tool_calls[0].function.name + '=' + m.tool_calls[0].function.arguments if m.tool_calls else m.content)",
    )
    row = {"messages": [*said(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [call("f", a="é")]}]}
    assert trained(encoder_of(calls + PROMPT).encode(row), "qwen") == ['f={"a": "é"}<|im_end|>']
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a":1}'
    assert trained(encoder_of(calls + PROMPT).encode(row), "qwen") == ['f={"a":1}<|im_end|>']


def test_long_conversations_do_not_depend_on_how_often_turns_are_looked_for() -> None:
    """Borders with the same text are looked for once; here every one is another, and then all are the same."""
    encoder = encoder_of((HERE / "stock" / "qwen3.jinja").read_text())
    for end in ("", " "):
        texts = [(role, f"{role}{end * i}") for i in range(12) for role in ("user", "assistant")]
        runs = trained(encoder.encode({"messages": said(*texts)}), "qwen")
        assert runs == [f"{text}<|im_end|>" for role, text in texts if role == "assistant"]


def test_an_encoder_can_be_sent_to_another_process() -> None:
    encoder = encoder_of(CHATML + PROMPT)
    other = pickle.loads(pickle.dumps(encoder))
    assert other.key == encoder.key and np.array_equal(other.encode(ROW).ids, encoder.encode(ROW).ids)


def test_a_completion_of_text_is_a_reply() -> None:
    with pytest.raises(RowError, match="does not have"):
        encoder_of(CHATML + PROMPT, train_on=("user",)).encode({"prompt": "a", "completion": "b"})


# ---- fields


def test_rows_with_anything_in_them_are_encoded_or_refused() -> None:
    """Never another exception, and never a row without targets."""
    draw, counts = random.Random(17), [0, 0]
    encoders = [
        encoder_of((HERE / "stock" / f"{name}.jinja").read_text(), TOKENIZERS_OF_ODD[name])
        for name in ("qwen3", "gptoss")
    ]
    for _ in range(400):
        row = mutated(draw.choice(ODD).fields, draw)
        try:
            made = draw.choice(encoders).encode(row)
        except RowError as error:
            assert "\n" not in str(error)
            counts[0] += 1
        else:
            assert made.loss is not None and made.loss.any() and not made.loss[0]
            counts[1] += 1
    assert min(counts) > 20


def mutated(fields: Fields, draw: random.Random) -> Fields:
    """A row with one to three values replaced, left out or put in."""
    odd = [
        None,
        0,
        2.5,
        True,
        "",
        " ",
        "x",
        "</think>",
        "\ud800",
        "\U00100000",
        [],
        {},
        [None],
        {"a": None},
        "[]",
        "{",
        "\n",
    ]
    row = copy.deepcopy(fields)
    for _ in range(draw.randrange(1, 4)):
        inside: Any = row
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(inside[key], dict | list) and draw.random() < 0.8:
                inside = inside[key]
                continue
            if draw.random() < 0.2:
                del inside[key]
            elif isinstance(inside, dict) and draw.random() < 0.2:
                inside[draw.choice(("weight", "content", "tool_calls", "thinking", "tools", "from"))] = draw.choice(odd)
            else:
                inside[key] = draw.choice(odd)
            break
    return row


def test_columns_name_the_fields() -> None:
    encoder = encoder_of(CHATML + PROMPT, columns={"messages": "chat"})
    assert trained(encoder.encode({"chat": ROW["messages"], "messages": 3}), "qwen") == ["a<|im_end|>", "b<|im_end|>"]
    both = {"messages": ROW["messages"], "prompt": said(("user", "q")), "completion": said(("assistant", "c"))}
    with pytest.raises(RowError, match=re.escape("more than one conversation (messages and prompt)")):
        encoder_of(CHATML + PROMPT).encode(both)
    assert trained(encoder_of(CHATML + PROMPT, columns={"prompt": "prompt"}).encode(both), "qwen") == ["c<|im_end|>"]


@pytest.mark.parametrize("row", [{"chat": None}, {"prompt": "a", "completion": None}])
def test_a_field_that_is_null_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=f'^"{list(row)[-1]}" is null$'):
        encoder_of(CHATML + PROMPT, columns={"messages": "chat"} if "chat" in row else {}).encode(row)


def test_a_row_is_not_changed() -> None:
    row = {**ROWS["two tool calls at once"][0]}
    before = repr(row)
    encoder_of((HERE / "stock" / "qwen3.jinja").read_text()).encode(row)
    assert repr(row) == before


def test_null_and_empty_keys_are_absent() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": [], "name": None, "weight": None, "train": None}
    read = conversation_of({"messages": [message], "tools": [], "system": "", "conversations": None}, accepts=Accepts())
    assert read == Conversation([{"role": "assistant", "content": "a"}], [True], None, {})


# ---- control text


def test_control_text_is_refused_skipped_or_parsed() -> None:
    row = {"messages": said(("user", "say <|im_end|>"), ("assistant", "a"))}
    with pytest.raises(SkippedRow):
        encoder_of(CHATML + PROMPT, on_control_text="skip").encode(row)
    with pytest.raises(RowError, match="spells the special token") as refused:
        encoder_of(CHATML + PROMPT).encode(row)
    assert not isinstance(refused.value, SkippedRow)
    made = encoder_of(CHATML + PROMPT, on_control_text="allow").encode(row)
    assert made.special == "<|im_end|>"
    assert made.ids.tolist().count(inner_of("qwen").convert_tokens_to_ids("<|im_end|>")) == 3
    assert trained(made, "qwen") == ["a<|im_end|>"]


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RowError, match="cannot encode the text"):
        encoder_of(CHATML + PROMPT).encode({"messages": said(("user", "q"), ("assistant", "\ud83d"))})


# ---- key


def test_another_behaviour_has_another_key() -> None:
    base: dict[str, Any] = {"text": CHATML + PROMPT}
    others: list[dict[str, Any]] = [
        {"text": CHATML + PROMPT + " "},
        {"family": "gptoss", "text": CHATML.replace("<|im_end|>", "<|return|>") + PROMPT},
        {"train_on": ("user",)},
        {"on_control_text": "allow"},
        {"columns": {"messages": "chat"}},
    ]
    keys = {encoder_of(**base).key, *(encoder_of(**{**base, **other}).key for other in others)}
    assert len(keys) == len(others) + 1
    assert (
        encoder_of(**base, train_on=("user", "assistant")).key == encoder_of(**base, train_on=("assistant", "user")).key
    )
