"""Fine-tuning on conversations: the same on every mesh, packed or not, and only on what is to carry loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.chat.tokenizers import inner_of
from tests.ranks import RanksFailed, get_pool
from tests.test_evaluation import evaluated_only
from tests.test_source import notes_of_start
from tests.test_train import trained

ASKED = ["What is it?", "Say it again.", "And a longer one, please, with more words?"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations(count: int = 24) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": ASKED[(number + turn) % 3]})
            turns.append({"role": "assistant", "content": f"Answer {number}.{turn}" + " and so on" * (number % 4)})
        rows.append({"messages": turns})
    return rows


def recipe_of(tmp_path: Path, rows: list[dict[str, Any]], *, name: str = "recipe", **more: dict[str, Any]) -> Path:
    tokenizer = tmp_path / "tokenizer"
    inner_of("qwen").save_pretrained(tokenizer)
    data = tmp_path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {**tiny.CONFIGS["llama"], "vocab_size": 512}
    sections: dict[str, Any] = {
        "model": {"type": "llama", "config": vocabulary},
        **more,
        "data": {"seq_len": 256, "tokenizer": str(tokenizer), "chat_template": "chatml", **more.get("data", {})},
    }
    where = {"corpus": data, "run_dir": tmp_path / f"{name}-run", "steps": 3}
    return tiny.recipe_file(tmp_path / f"{name}.toml", **{**where, **sections})


def losses(recipe: Path, ranks: int = 1, *overrides: str) -> list[tuple[float, float]]:
    found = get_pool(ranks).run(trained, str(recipe), list(overrides), timeout=150)[0]["metrics"]
    return [(m["loss"], m["grad_norm"]) for m in found]


def test_chat_trains_alike_on_every_mesh(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, conversations())
    alone = losses(recipe)
    assert len(alone) == 3
    for number, mesh in enumerate(({"dp_shard": 2, "cp": 2}, {"dp_shard": 2, "tp": 2}, {"dp_shard": 1, "tp": 2})):
        sizes = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
        again = losses(
            recipe, math.prod(mesh.values()), *sizes, f"run.dir={tmp_path}/run{number}", "train.micro_batch_size=2"
        )
        assert again == [pytest.approx(pair, rel=1e-4) for pair in alone]


def test_the_loss_is_the_mean_over_the_replies(tmp_path: Path) -> None:
    rows = conversations(8)
    model = tmp_path / "model"
    config = transformers.LlamaConfig(**{**tiny.CONFIGS["llama"], "vocab_size": 512})
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).float().eval()
    plain.save_pretrained(model)
    tokenizer = inner_of("qwen")
    total, count = 0.0, 0
    for row in rows:
        text, spans = "", []
        for message in row["messages"]:
            head = f"<|im_start|>{message['role']}\n"
            body = f"{message['content']}<|im_end|>"
            if message["role"] == "assistant":
                spans.append((len(text) + len(head), len(text) + len(head) + len(body)))
            text += f"{head}{body}\n"
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(found["input_ids"])
        mine = torch.tensor([any(a < end and b > start for start, end in spans) for a, b in found["offset_mapping"]])
        with torch.no_grad():
            logits = plain(ids[None]).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[mine[1:]]
        total, count = total + float(each.sum()), count + len(each)
    settings: dict[str, Any] = {"train": {"steps": 1}, "schedule": {"warmup_steps": 0}}
    for packing in (True, False):
        recipe = recipe_of(
            tmp_path, rows, name=f"one-{packing}", model={"name": str(model)}, data={"packing": packing}, **settings
        )
        # Packed, all rows fit into one sample.
        one = ["train.global_batch_size=1", "train.micro_batch_size=1", "data.seq_len=2048"]
        loss, _ = losses(recipe, 1, *(one if packing else []))[0]
        assert loss == pytest.approx(total / count, rel=1e-5)
        # The same rows held out.
        said = get_pool(2).run(evaluated_only, str(recipe), [f"eval.path={tmp_path}/one-{packing}.jsonl"], timeout=150)[
            0
        ]
        assert any(f"eval loss {total / count:.4f} " in line and f"({count} tokens)" in line for line in said)


def test_rows_that_cannot_be_used_are_named_or_counted(tmp_path: Path) -> None:
    rows = [*conversations(6), {"messages": [{"role": "user", "content": "no reply"}]}]
    recipe = recipe_of(tmp_path, rows)
    with pytest.raises(RanksFailed, match=r"recipe\.jsonl, line 7: no token carries loss"):
        get_pool(1).run(notes_of_start, str(recipe), [])
    notes = get_pool(1).run(notes_of_start, str(recipe), ["data.on_bad_row=skip"])[0]
    assert any("rows that are left out: 1 of 7, first" in note and "line 7; no token carries" in note for note in notes)
    with pytest.raises(RanksFailed, match=r"data\.seq_len = 8: 6 of the 6 documents of data\.path are longer"):
        get_pool(1).run(notes_of_start, str(recipe), ["data.on_bad_row=skip", "data.seq_len=8"])


def test_a_checkpoint_has_the_template_and_a_resume_asks_what_carries_loss(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, conversations(), checkpoint={"every": 0, "resume": "auto"})
    losses(recipe)
    (saved,) = (tmp_path / "recipe-run" / "checkpoints").iterdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert "<|im_start|>" in tokenizer.chat_template and "generation" in tokenizer.chat_template
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    own = [f"data.chat_template={template}", "train.steps=4"]
    with pytest.raises(RanksFailed, match=r"data\.chat_template was .* is now") as refused:
        losses(recipe, 1, *own)
    assert "this version of ndtrain" not in str(refused.value)
    assert len(losses(recipe, 1, *own, 'checkpoint.allow=["data.chat_template"]')) == 4
    template.write_text(TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    own[1] = "train.steps=5"
    with pytest.raises(RanksFailed, match=r"data\.chat_template differs \(the template has another text\)") as refused:
        losses(recipe, 1, *own)
    assert "data.path" not in str(refused.value)
    assert len(losses(recipe, 1, *own, 'checkpoint.allow=["data.chat_template"]')) == 5


def test_a_name_of_an_optional_field_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = conversations(6)
    recipe = recipe_of(tmp_path, [*rows[:5], {**rows[5], "instruction": "Be brief."}])
    refused = r'data\.columns\.system = "instructions": no row has such a field'
    with pytest.raises(RanksFailed, match=refused):
        get_pool(2).run(notes_of_start, str(recipe), ['data.columns={system="instructions"}'])
    named = 'data.columns={system="instruction"}'
    for start in ("tokenizes", "maps what is cached"):
        assert get_pool(2).run(notes_of_start, str(recipe), [named]), start
    # Held-out rows need not have what the training data has, only what their own keys name.
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps(rows[0]) + "\n")
    notes = get_pool(2).run(notes_of_start, str(recipe), [named, f"eval.path={held_out}"])[0]
    assert any(note.startswith("held-out documents: 1;") for note in notes)
    with pytest.raises(RanksFailed, match=refused.replace("data", "eval")):
        get_pool(2).run(
            notes_of_start,
            str(recipe),
            [named, f"eval.path={held_out}", 'eval.columns={system="instructions"}'],
        )


def test_notes_of_a_table_give_no_advice_that_is_for_texts_or_was_taken(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, conversations(1))
    (tmp_path / "table.csv").write_text("prompt,completion\nq,a\nq,<|im_end|>\n")
    given = [f"data.path={tmp_path}/table.csv", "data.on_control_text=skip"]
    notes = [note for note in get_pool(1).run(notes_of_start, str(recipe), given)[0] if "table.csv" in note]
    assert [note.partition("line 3; ")[2] for note in notes] == ['the completion spells the special token "<|im_end|>"']
