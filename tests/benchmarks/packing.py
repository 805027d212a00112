"""Rows of whole documents: CPU time to place them, how full the rows are, and the start of a run on 1e9 documents.

    OMP_NUM_THREADS=1 python tests/benchmarks/packing.py [--documents 10000000] [--naive 1000000] [--seq-len 4096]
    OMP_NUM_THREADS=1 python tests/benchmarks/packing.py --parts building starting [--built 100000000]

"One at a time" is best-fit decreasing as textbooks have it, with the rows' room in a sorted list. Lengths are drawn
from a log-normal distribution: half of the documents have fewer than 400 tokens, some have tens of thousands. The start
is that of a new process on a prepared cache, from after the imports to the first batch of 32 rows, shuffled; its files
take 9 GB while it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.data.batches import GlobalBatches  # noqa: E402
from ndtrain.data.cache import build_cache, contents_of  # noqa: E402
from ndtrain.data.corpus import Corpus, Part  # noqa: E402
from ndtrain.data.index import VERSION, build_index, open_index  # noqa: E402
from ndtrain.data.order import Order  # noqa: E402
from ndtrain.data.preparation import FORMAT_VERSION  # noqa: E402
from ndtrain.data.samples import open_samples  # noqa: E402
from ndtrain.data.text import TextEncoder  # noqa: E402
from ndtrain.hf.tokenizer import ByteTokenizer  # noqa: E402

LENGTH, SEQ_LEN = 500, 4096
PARTS = ("placing", "filling", "building", "starting")


def memory() -> float:
    """Return the memory that this process has for itself, in MB."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def corpus_of(documents: int) -> Corpus:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, size=documents).astype(np.int64).clip(2)
    docs = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Corpus([Part("", tokens=np.broadcast_to(np.uint16(1), docs[-1]), docs=docs, largest=1)], "key")


def one_at_a_time(sizes: np.ndarray, capacity: int) -> int:
    """Return the number of rows."""
    rows, rooms = 0, []
    for size in np.sort(sizes)[::-1].tolist():
        at = bisect_left(rooms, size)
        room = rooms.pop(at) if at < len(rooms) else capacity
        rows += at == len(rooms) and room == capacity
        insort(rooms, room - size)
    return rows


def placing(documents: int, naive: int, seq_len: int) -> None:
    print("| documents | one at a time | `best_fit` | memory |\n|---|---|---|---|")
    for number in sorted({naive, documents}):
        corpus = corpus_of(number)
        started = time.process_time()
        index = build_index(corpus.bounds_in_blocks, seq_len, best_fit=True)
        seconds = time.process_time() - started
        tracemalloc.start()
        build_index(corpus.bounds_in_blocks, seq_len, best_fit=True)
        held = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        other = "-"
        if number <= naive:
            sizes = np.concatenate([np.minimum(np.diff(some), seq_len) for some in corpus.bounds_in_blocks()])
            rests = np.concatenate([_rests(np.diff(some), seq_len) for some in corpus.bounds_in_blocks()])
            started = time.process_time()
            rows = one_at_a_time(np.concatenate([sizes, rests]), seq_len)
            other = f"{time.process_time() - started:.1f} s"
            assert rows == len(index), (rows, len(index))
        print(f"| {number:,} | {other} | {seconds:.2f} s | {held:,.0f} MB |", flush=True)


def _rests(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the sizes of all pieces but the first of each document."""
    count = (lengths + seq_len - 2) // seq_len - 1
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + 1
    return np.minimum(np.repeat(lengths, count) - nth * seq_len, seq_len)


def filling(documents: int) -> None:
    print("\n| `seq_len` | `concat` | `best_fit` | `false` | longer than a row |\n|---|---|---|---|---|")
    corpus = corpus_of(documents)
    for seq_len in (1024, 4096, 16384, 131072):
        fills = []
        for packing in ("concat", "best_fit", False):
            samples = open_samples(corpus, seq_len, packing=packing, pad_id=0)
            fills.append(f"{samples.fill:.2%}")
        long = samples.index.too_long / corpus.n_docs
        print(f"| {seq_len:,} | {' | '.join(fills)} | {long:.2%} |", flush=True)


def building(documents: int) -> None:
    """Place documents in rows as a first start on them does: what is stored grows in a file, memory with the rows."""
    print("\n| documents | `packing` | CPU s | most memory, MB | on disk, MB |\n|---|---|---|---|---|")
    for packing in ("best_fit", "false"):
        with tempfile.TemporaryDirectory() as folder:
            found = own_process("--build", packing, folder, str(documents))
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.bin")) / 2**20
        print(f"| {documents:,} | `{packing}` | {found[0]:.1f} | {found[1]:,.0f} | {size:,.0f} |", flush=True)


def build(packing: str, folder: str, documents: str) -> tuple[float, float]:
    """Return the CPU seconds and the memory of placing documents, whose lengths are drawn a block at a time."""
    block = 1 << 20

    def bounds() -> Iterator[np.ndarray]:
        start, rng = 0, np.random.default_rng(0)
        for first in range(0, int(documents), block):
            lengths = rng.lognormal(6, 1.2, size=min(block, int(documents) - first)).astype(np.int64).clip(2)
            yield start + np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            start += int(lengths.sum())

    started, before = time.process_time(), memory()
    for _ in bounds():
        pass
    drawing = time.process_time() - started
    best_fit = packing == "best_fit"
    started, most = time.process_time(), Most()
    with most:
        open_index(bounds, 4096, best_fit=best_fit, drop=False, folder=Path(folder, "rows"), advance=lambda: None)
    return time.process_time() - started - drawing * (3 if best_fit else 2), most.megabytes - before


def starting(documents: int) -> None:
    """Start on documents of 500 tokens each, prepared: 8 fit into a row, so that what is stored is known.

    The array of the pieces' first tokens is that of the documents' bounds under another name, which has one more.
    """
    print("\n| `packing` | documents | rows | seconds | memory, MB |\n|---|---|---|---|---|")
    tokens = LENGTH * documents
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data.jsonl"), Path(folder, "cache")
        data.write_text('{"text": "a"}\n')
        (group,) = contents_of([data], TextEncoder(ByteTokenizer()), cache_dir=cache).groups
        path = cache / group.key
        path.mkdir()
        with (path / "tokens.bin").open("wb") as file:
            file.truncate(2 * tokens)  # sparse
        write_multiples(path / "docs.bin", LENGTH, documents + 1)
        meta = {"version": FORMAT_VERSION, "key": group.key, "dtype": "uint16", "tokens": tokens}
        meta |= {"documents": documents, "docs_mtime": (path / "docs.bin").stat().st_mtime_ns}
        (path / "meta.json").write_text(json.dumps({**meta, "largest": 1, "odd": {}, "digest": "digest"}))
        key = build_cache([data], TextEncoder(ByteTokenizer()), cache_dir=cache).key
        each = SEQ_LEN // LENGTH
        for packing, rows in (("best_fit", documents // each), ("single", documents)):
            index = cache / f"{key}-{packing}-{SEQ_LEN}-{VERSION}"
            index.mkdir()
            os.link(path / "docs.bin", index / "starts.bin")
            lengths = {"starts": documents + 1}
            if packing == "best_fit":
                write_multiples(index / "rows.bin", each, rows + 1)
                lengths["rows"] = rows + 1
            told = {"tokens": tokens, "too_long": 0, "first_too_long": -1, "drop": False, "empty": 0}
            (index / "meta.json").write_text(json.dumps({"version": VERSION, "lengths": lengths, **told}))
        for packing in ("concat", "best_fit", "false"):
            seconds, grown, rows = own_process("--start", packing, folder)
            print(f"| `{packing}` | {documents:,} | {int(rows):,} | {seconds:.3f} | {grown:.1f} |", flush=True)


def write_multiples(path: Path, factor: int, count: int) -> None:
    """Write 0, factor, 2 factor, …, and have the page cache forget them."""
    with path.open("wb") as file:
        for first in range(0, count, 1 << 23):
            (np.arange(first, min(count, first + (1 << 23)), dtype=np.int64) * factor).tofile(file)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(packing: str, folder: str) -> tuple[float, float, int]:
    """Return the seconds to the first batch, how much memory grows by, and the number of rows."""
    before, started = memory(), time.perf_counter()
    encoder = TextEncoder(ByteTokenizer())
    corpus = build_cache([Path(folder, "data.jsonl")], encoder, cache_dir=Path(folder, "cache"))
    prepared = sorted(Path(folder, "cache").iterdir())
    how: Any = False if packing == "false" else packing
    samples = open_samples(corpus, SEQ_LEN, packing=how, too_long="error", pad_id=0, folder=Path(folder, "cache"))
    order = Order(len(samples), seed=0, shuffle=True)
    batches = GlobalBatches(samples, order, global_batch_size=32, micro_batch_size=4, batch_rank=0, batch_ranks=1)
    loaded = batches.load(7 * len(samples) + 12345)
    seconds, grown = time.perf_counter() - started, memory() - before
    assert sorted(Path(folder, "cache").iterdir()) == prepared, "what is prepared was not found"
    full = {"concat": SEQ_LEN, "best_fit": SEQ_LEN // LENGTH * LENGTH, "false": LENGTH}[packing]
    documents = -(-full // LENGTH)
    for batch in loaded:
        targets = (batch["labels"] != -100).sum(1)
        assert ((full - documents - 1 <= targets) & (targets <= full - documents + 1)).all(), targets
    return seconds, grown, len(samples)


class Most:
    """Inside, the most anonymous memory of this process is looked for: mapped files are the page cache's."""

    def __enter__(self) -> None:
        self.megabytes, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.megabytes = max(self.megabytes, memory())

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def own_process(*arguments: str) -> list[float]:
    command = [sys.executable, __file__, *arguments]
    found: list[float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--naive", type=int, default=1_000_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--built", type=int, default=100_000_000)
    parser.add_argument("--prepared", type=int, default=10**9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    for name, count in (("--start", 2), ("--build", 3)):
        parser.add_argument(name, nargs=count, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start or options.build:
        print(json.dumps(start(*options.start) if options.start else build(*options.build)))
        return
    if "placing" in options.parts:
        placing(options.documents, options.naive, options.seq_len)
    if "filling" in options.parts:
        filling(options.naive)
    if "building" in options.parts:
        building(options.built)
    if "starting" in options.parts:
        starting(options.prepared)


if __name__ == "__main__":
    main()
