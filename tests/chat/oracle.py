"""Write what TRL makes of the conversations: python -m tests.chat.oracle, in an environment with trl 1.16 and datasets.

Each row goes through `SFTTrainer`'s own preparation, with TRL's training template of the family, to `trl.json`. It also
compares `trl/` and `stock/` with the templates that come with TRL, on all conversations of the tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def main() -> int:
    import trl

    templates = Path(trl.__file__).parent / "chat_templates"
    written: dict[str, Any] = {"trl": trl.__version__}
    for family in TOKENIZERS:
        template = (templates / f"{family}_training.jinja").read_text(encoding="utf-8")
        rows = {name: fields for name, (fields, families) in ROWS.items() if family in families}
        written[family] = {name: made_by_trl(family, fields, template) for name, fields in rows.items()}
    (HERE / "trl.json").write_text(json.dumps(written, indent=None).replace('}, "', '},\n"') + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
