"""Write what TRL makes of the conversations: python -m tests.chat.oracle, in an environment with trl 1.16 and datasets.

Each row goes through `SFTTrainer`'s own preparation, with TRL's training template of the family, to `trl.json`. Then
`trl/` and `stock/` are compared with the templates that come with TRL, on all conversations of the tests. TRL has none
of Mistral's: `--mistral FILE` compares `stock/mistral.jinja` with a file, which was Mistral-Nemo-Instruct-2407's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ndtrain.data.chat import chat_template
from ndtrain.data.chat.conversation import Conversation, conversation_of
from ndtrain.data.row import RowError
from ndtrain.hf.chat import Renderer
from tests.chat import odd
from tests.chat.conversations import ROWS, TOKENIZERS, Fields
from tests.chat.tokenizers import inner_of

HERE = Path(__file__).parent


def made_by_trl(family: str, fields: Fields, template: str) -> dict[str, Any]:
    """Return the ids, and "1" for each that carries loss, of TRL's own preparation of a row."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = inner_of(TOKENIZERS[family])
    tokenizer.chat_template = template
    chat = "messages" in fields
    args = SFTConfig(
        output_dir="unused", assistant_only_loss=chat, max_length=None, report_to="none", use_cpu=True, bf16=False
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=not chat)
    row = Dataset.from_list([fields])
    made = SFTTrainer._prepare_dataset(trainer, row, tokenizer, args, False, None, "test")[0]
    loss = "".join("0" if label == -100 else "1" for label in made["labels"])
    return {"ids": made["input_ids"], "loss": loss}


def conversations() -> Iterator[Conversation]:
    """Yield the tests' conversations that can be read, whatever a template makes of them."""
    for fields in [*(fields for fields, _ in ROWS.values()), *(row.fields for row in odd.ODD)]:
        try:
            given = conversation_of(fields)
        except RowError:
            continue
        if isinstance(given, Conversation):
            yield given


def rendered(renderer: Renderer, template: str, given: Conversation, *, prompt: bool) -> Any:
    """Return what a template makes of a conversation, with its marks; None if it refuses it."""
    given_to = {"tools": given.tools, "variables": given.variables}
    try:
        if prompt:
            return renderer.render(template, given.messages, prompt=True, **given_to)
        return renderer.render_marked(template, given.messages, **given_to)
    except Exception:
        return None


def differences(family: str, ours: Path, theirs: Path) -> list[str]:
    """Return a line for each conversation of which two templates make something else."""
    renderer, lines = Renderer(inner_of(family)), []
    texts = [chat_template(str(file), None, date=date(2025, 1, 1)).texts["default"] for file in (ours, theirs)]
    count = 0
    for number, given in enumerate(conversations()):
        for prompt in (False, True):
            mine, other = (rendered(renderer, text, given, prompt=prompt) for text in texts)
            count += other is not None
            if mine != other:
                lines.append(f"{ours.name}, conversation {number}, prompt {prompt}:\n  {mine!r}\n  {other!r}")
    print(f"{ours.name}: {count} renderings compared with {theirs.name}, {len(lines)} differ")
    return lines


def main() -> int:
    import trl

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mistral", type=Path)
    asked = parser.parse_args()
    templates = Path(trl.__file__).parent / "chat_templates"
    written: dict[str, Any] = {"trl": trl.__version__}
    lines: list[str] = []
    for family, tokenizer in TOKENIZERS.items():
        file = templates / f"{family}_training.jinja"
        rows = {name: fields for name, (fields, families) in ROWS.items() if family in families}
        template = file.read_text(encoding="utf-8")
        written[family] = {name: made_by_trl(family, fields, template) for name, fields in rows.items()}
        lines += differences(tokenizer, HERE / "trl" / f"{family}.jinja", file)
    (HERE / "trl.json").write_text(json.dumps(written, indent=None).replace('}, "', '},\n"') + "\n")
    for stock in sorted((HERE / "stock").glob("*.jinja")):
        theirs = asked.mistral if stock.stem == "mistral" else templates / stock.name
        if theirs is not None:
            lines += differences(odd.TOKENIZERS[stock.stem], stock, theirs)
    print("\n".join(lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
