"""Tokenizing text into a cache: bytes per second against `datasets.map(num_proc=…)`, and the memory of both.

    python tests/benchmarks/tokenize_speed.py [--megabytes 200] [--processes 2] [--rounds 3]

Needs `datasets`. The text is Python source of installed packages, as JSON lines of one file each; the tokenizer is a
byte-level BPE of 32,000 tokens, trained on a part of it. Both sides run in new processes, in turns, read the same file
and end with the tokens on disk; imports are not counted, the start of worker processes is. The tokens are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class Result(NamedTuple):
    """Seconds and CPU seconds from after the imports to tokens on disk, and the most memory of all processes."""

    seconds: float
    tokens: int
    cpu_seconds: float
    memory_mb: int


def write_text(file: Path, megabytes: int) -> None:
    """Write rows of source files, again from the first one until they are enough."""
    sources = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    written, rounds = 0, 0
    with file.open("w", encoding="utf-8") as rows:
        while written < megabytes << 20:
            for source in sources:
                text = f"# {rounds}\n{source.read_text(encoding='utf-8', errors='ignore')}"
                written += rows.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if written >= megabytes << 20:
                    break
            rounds += 1


def train_tokenizer(file: Path, directory: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["</s>"], show_progress=False)
    with file.open(encoding="utf-8") as rows:
        part = [json.loads(row)["text"] for _, row in zip(range(800), rows, strict=False)]
    tokenizer.train_from_iterator(part, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


def ours(file: Path, tokenizer: str, out: Path, processes: int) -> tuple[float, int, float]:
    """Return seconds, tokens, and the CPU seconds of the imports, which neither side counts."""
    import transformers

    from ndtrain.data.cache import build_cache
    from ndtrain.data.text import TextEncoder
    from ndtrain.hf.tokenizer import HubTokenizer
    from ndtrain.hf.tokenizer_key import tokenizer_key

    inner = transformers.AutoTokenizer.from_pretrained(tokenizer)
    started, imports = time.perf_counter(), time.process_time()
    encoder = TextEncoder(HubTokenizer(inner, key=tokenizer_key(inner)))
    corpus = build_cache([file], encoder, cache_dir=out, workers=processes)
    return time.perf_counter() - started, corpus.n_tokens, imports


def theirs(file: Path, tokenizer: str, out: Path, processes: int) -> tuple[float, int, float]:
    import datasets
    import pyarrow.compute
    import transformers

    inner = transformers.AutoTokenizer.from_pretrained(tokenizer)
    started, imports = time.perf_counter(), time.process_time()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        how = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        found = inner(batch["text"], **how)["input_ids"]  # text that spells "</s>" is text on both sides
        return {"input_ids": [[*ids, inner.eos_token_id] for ids in found]}

    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(out))
    done = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    seconds = time.perf_counter() - started
    lengths = pyarrow.compute.list_value_length(done.data.column("input_ids"))
    return seconds, pyarrow.compute.sum(lengths).as_py(), imports


def one(side: str, file: Path, tokenizer: str, processes: int) -> None:
    """Run one side and print what it returns."""
    with tempfile.TemporaryDirectory() as out:
        print(json.dumps({"ours": ours, "theirs": theirs}[side](file, tokenizer, Path(out), processes)))


def use_of(session: int) -> tuple[int, dict[int, float]]:
    """Return the memory that all processes of a session have for themselves, in MB, and the CPU seconds of each.

    Pages that forked processes share are counted once.
    """
    total, seconds = 0, {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            if os.getsid(int(process.name)) == session:
                times = (process / "stat").read_text().rpartition(")")[2].split()
                seconds[int(process.name)] = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
                total += int((process / "smaps_rollup").read_text().split("Pss_Anon:")[1].split()[0])
    return total >> 10, seconds


def measured(command: list[str]) -> Result:
    """Run a side and watch its processes."""
    peak, used = 0, {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as run:
        while run.poll() is None:
            memory, seconds = use_of(run.pid)
            peak, used = max(peak, memory), used | seconds
            time.sleep(0.1)
        output = run.communicate()[0]
    wall, tokens, imports = json.loads(output.splitlines()[-1])
    return Result(wall, tokens, sum(used.values()) - imports, peak)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--megabytes", type=int, default=200)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        side, file, tokenizer = options.one
        one(side, Path(file), tokenizer, options.processes)
        return
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = Path(folder, "text.jsonl"), Path(folder, "tokenizer")
        write_text(file, options.megabytes)
        train_tokenizer(file, tokenizer)
        found: dict[str, list[Result]] = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            for side, results in found.items():
                command = [sys.executable, __file__, "--processes", str(options.processes), "--one", side]
                results.append(measured([*command, str(file), str(tokenizer)]))
        size = file.stat().st_size / (1 << 20)
    (our_tokens,), (their_tokens,) = ({result.tokens for result in results} for results in found.values())
    assert our_tokens == their_tokens, f"{our_tokens:,} tokens, theirs {their_tokens:,}"
    print("| side | MB/s | CPU s | most memory, MB |\n| --- | --- | --- | --- |")
    speeds, cpu = [], []
    for results, name in zip(found.values(), ("ndtrain", f"datasets.map, num_proc={options.processes}"), strict=True):
        speeds.append(size / statistics.median(result.seconds for result in results))
        cpu.append(statistics.median(result.cpu_seconds for result in results))
        print(f"| {name} | {speeds[-1]:.2f} | {cpu[-1]:.1f} | {max(result.memory_mb for result in results):,} |")
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(*found.values(), strict=True)]
    print(
        f"\n{size:.0f} MB, {our_tokens:,} tokens on both sides; ratio of the medians {speeds[0] / speeds[1]:.2f}, "
        f"by CPU seconds {cpu[1] / cpu[0]:.2f}; of each round {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )


if __name__ == "__main__":
    main()
