"""Fine-tuning on conversations: useful tokens per second, packed against padded.

    OMP_NUM_THREADS=1 python tests/benchmarks/packed_sft.py [--seq 1024] [--rounds 7]

The conversations are made of the documented functions of installed packages: asked for by signature and docstring,
answered by source; the methods of a class are the turns of one conversation. So their lengths are those of real code
and its documentation. All sides see the same conversations (those longer than `--seq` are left out) with loss on the
replies, in float32 on one process, in segments that alternate, so that other load on the machine meets all alike:

    best_fit       ndtrain, data.packing = "best_fit": whole conversations share rows of `--seq`
    false          ndtrain, data.packing = false: one conversation a row, padded to `--seq`
    Trainer        transformers' Trainer, DataCollatorForSeq2Seq: a batch is padded to its longest conversation

A segment is some optimizer steps, from loading to update. "Tokens" are all that are not padding; "targets" those of
them that carry loss.
"""

import argparse
import ast
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.runs.process import start  # noqa: E402
from ndtrain.train import Trainer  # noqa: E402
from tests.tiny import recipe_text  # noqa: E402
from tests.trainers import trainer_of  # noqa: E402

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
VOCAB, LR, IGNORE, TURNS = 8192, 3e-4, -100, 6


class Segment(NamedTuple):
    """What some steps took, and what they saw: tokens, those that carry loss, and positions."""

    seconds: float
    tokens: int
    targets: int
    positions: int


# ---- the conversations


def conversations() -> Iterator[list[dict[str, str]]]:
    """Yield the messages of each conversation that can be made of the installed packages, in the order of the files."""
    for file in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        try:
            source = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = source.splitlines()
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            turns = [turn for function in inner if (turn := asked(function, lines))]
            if turns and not any(mark in message["content"] for turn in turns for message in turn for mark in MARKS):
                yield [message for turn in turns[:TURNS] for message in turn]


def asked(node: ast.stmt, lines: list[str]) -> list[dict[str, str]]:
    """Return a question and its answer; none of what is no documented function."""
    if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)) or len(node.body) < 2:
        return []
    signature = f"{node.name}({ast.unparse(node.args)})"
    body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
    question, answer = f"Write the function {signature}.\n\n{docstring}", f"def {signature}:\n{body}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(file: Path, count: int) -> None:
    found = random.Random(0).sample(list(conversations()), count)
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in found), encoding="utf-8")


def save_model(folder: Path, file: Path, options: argparse.Namespace) -> None:
    """Save a random Qwen3 and a byte-level BPE of the conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=MARKS, show_progress=False)
    tokenizer.train_from_iterator(file.read_text(encoding="utf-8").splitlines()[:1000], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=MARKS.index("<|im_end|>"),
        pad_token_id=MARKS.index("<|pad|>"),
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# ---- the sides


def ndtrain_trainer(folder: Path, packing: str | bool, *, rows: int, options: argparse.Namespace) -> Trainer:
    name = f"packing-{packing}"
    text = recipe_text(
        model={"name": str(folder / "model")},
        fsdp={"param_dtype": "float32"},
        data={
            "path": str(folder / "rows.jsonl"),
            "seq_len": options.seq,
            "packing": packing,
            "chat_template": "chatml",
            "too_long": "drop",
            "on_bad_row": "skip",
        },
        optim={"lr": LR, "weight_decay": 0.0, "max_grad_norm": 1.0},
        schedule={"kind": "constant"},
        train={"steps": 10**6, "global_batch_size": rows, "micro_batch_size": rows},
        checkpoint={"every": 0, "resume": "never"},
        run={"dir": str(folder / name)},
    )
    (folder / f"{name}.toml").write_text(text)
    trainer = trainer_of(str(folder / f"{name}.toml"))
    trainer.prepare()
    return trainer


def ndtrain_segment(trainer: Trainer, steps: int) -> Segment:
    cursor, started = trainer.cursor, time.perf_counter()
    for _ in range(steps):
        trainer.advance()
    seconds = time.perf_counter() - started
    tokens = targets = positions = 0
    for step in range(steps):
        for batch in trainer.batches.load(cursor + step * trainer.recipe.train.global_batch_size):
            tokens += int((batch["input_ids"] != trainer.batches.samples.pad_id).sum())
            targets += int((batch["labels"] != IGNORE).sum())
            positions += batch["labels"].numel()
    return Segment(seconds, tokens, targets, positions)


class Conversations(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The documents that ndtrain has prepared, without those that are longer than a row."""

    def __init__(self, trainer: Trainer, seq_len: int) -> None:
        self.corpus = trainer.batches.samples.corpus
        bounds = [self.corpus.bounds(index) for index in range(self.corpus.n_docs)]
        self.all = [stop - start for start, stop in bounds]
        self.kept = [(start, stop) for start, stop in bounds if stop - start <= seq_len]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.corpus.tokens(*self.kept[index])
        labels = np.where(self.corpus.loss(*self.kept[index]), ids, IGNORE)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}


class Counting(transformers.DataCollatorForSeq2Seq):
    """Pads to the longest row, and counts what is in each batch that it makes."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        counts = ((batch["attention_mask"] == 1).sum(), (batch["labels"][:, 1:] != IGNORE).sum())
        self.made = [*getattr(self, "made", []), (*map(int, counts), batch["labels"].numel())]
        return batch


class Alternate(transformers.TrainerCallback):
    """After each segment of the Trainer's steps runs one of each of the others. The first round is warm-up."""

    def __init__(self, ours: dict[str, Trainer], collator: Counting, steps: int) -> None:
        self.ours, self.collator, self.steps = ours, collator, steps
        self.found: dict[str, list[Segment]] = {name: [] for name in (*ours, "Trainer")}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        seconds = time.perf_counter() - self.since
        made = np.array(self.collator.made[state.global_step - self.steps : state.global_step]).sum(0)
        self.found["Trainer"].append(Segment(seconds, *map(int, made)))
        for name, trainer in self.ours.items():
            self.found[name].append(ndtrain_segment(trainer, self.steps))
        self.since = time.perf_counter()


def compare(folder: Path, options: argparse.Namespace) -> None:
    ours = {
        "best_fit": ndtrain_trainer(folder, "best_fit", rows=options.packed_batch, options=options),
        "false": ndtrain_trainer(folder, False, rows=options.batch, options=options),
    }
    rows = Conversations(ours["false"], options.seq)
    lengths = np.quantile(rows.all, (0.1, 0.5, 0.9, 0.99)).astype(int)
    print(
        f"{len(rows.all):,} conversations of {', '.join(f'{length:,}' for length in lengths)} tokens (10, 50, 90, 99 % "
        f"quantiles), mean {np.mean(rows.all):,.0f}; {len(rows.all) - len(rows):,} longer than {options.seq:,} left out"
    )
    collator = Counting(transformers.AutoTokenizer.from_pretrained(folder / "model"))
    alternate = Alternate(ours, collator, options.steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=options.steps * (options.rounds + 1),
        per_device_train_batch_size=options.batch,
        learning_rate=LR,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[alternate]
    ).train()
    report({name: segments[1:] for name, segments in alternate.found.items()})


def report(found: dict[str, list[Segment]]) -> None:
    print("\n| side | tokens/s | targets/s | positions that hold a token | best_fit over it, tokens/s | each round |")
    print("|---|---|---|---|---|---|")
    speeds = {name: [segment.tokens / segment.seconds for segment in all] for name, all in found.items()}
    for name, segments in found.items():
        ratios = [a / b for a, b in zip(speeds["best_fit"], speeds[name], strict=True)]
        targets = statistics.median(segment.targets / segment.seconds for segment in segments)
        fill = sum(segment.tokens for segment in segments) / sum(segment.positions for segment in segments)
        each = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        print(
            f"| {name} | {statistics.median(speeds[name]):,.0f} | {targets:,.0f} | {fill:.1%} | "
            f"{statistics.median(ratios):.2f} | {each} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 4, "seq": 1024, "batch": 8, "packed-batch": 2, "steps": 3, "rounds": 7}
    for name, default in {**sizes, "conversations": 4000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with start(), tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        os.environ["NDTRAIN_CACHE"] = str(folder / "cache")
        write_rows(folder / "rows.jsonl", options.conversations)
        save_model(folder / "model", folder / "rows.jsonl", options)
        compare(folder, options)


if __name__ == "__main__":
    main()
