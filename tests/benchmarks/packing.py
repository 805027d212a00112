"""Rows of whole documents: CPU time to place them, how full the rows are, and the start of a run on 1e9 documents.

    OMP_NUM_THREADS=1 python tests/benchmarks/packing.py [--documents 10000000] [--naive 1000000] [--seq-len 4096]

"One at a time" is best-fit decreasing as textbooks have it, with the rows' room in a sorted list. Lengths are drawn
from a log-normal distribution: half of the documents have fewer than 400 tokens, some have tens of thousands. The start
is that of a new process on a prepared cache, from after the imports to the first batch; its files are sparse, so that
they need no space.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.data.batches import GlobalBatches  # noqa: E402
from ndtrain.data.cache import open_part  # noqa: E402
from ndtrain.data.corpus import Corpus, Part  # noqa: E402
from ndtrain.data.index import build_index  # noqa: E402
from ndtrain.data.order import Order  # noqa: E402
from ndtrain.data.preparation import FORMAT_VERSION  # noqa: E402
from ndtrain.data.samples import Concatenated, open_samples  # noqa: E402


def memory() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
            fills.append(f"{samples._tokens / (len(samples) * seq_len):.2%}")
        long = samples.index.too_long / corpus.n_docs
        print(f"| {seq_len:,} | {' | '.join(fills)} | {long:.2%} |", flush=True)


def starting(documents: int) -> None:
    tokens = 500 * documents
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for name, size in (("tokens.bin", 2 * tokens), ("docs.bin", 8 * (documents + 1))):
            with (path / name).open("wb") as file:
                file.truncate(size)
        with (path / "docs.bin").open("r+b") as file:
            file.seek(-8, 2)
            file.write(np.int64(tokens).tobytes())
        meta = {"version": FORMAT_VERSION, "key": "key", "dtype": "uint16", "tokens": tokens, "documents": documents}
        stamp = (path / "docs.bin").stat().st_mtime_ns
        (path / "meta.json").write_text(json.dumps({**meta, "largest": 1, "odd": {}, "docs_mtime": stamp}))
        found = subprocess.run(
            [sys.executable, __file__, "--start", folder], capture_output=True, check=True, text=True
        )
    print(f"\nStart on {documents:,} documents, `concat`, with shuffling: {found.stdout.strip()}")


def start(path: Path) -> None:
    before, started = memory(), time.perf_counter()
    samples = Concatenated(Corpus([open_part(path)], "key"), 4096, pad_id=0)
    order = Order(len(samples), seed=0, shuffle=True)
    batches = GlobalBatches(samples, order, global_batch_size=32, micro_batch_size=4, batch_rank=0, batch_ranks=1)
    batches.load(7 * len(samples) + 12345)
    print(f"{time.perf_counter() - started:.3f} s, {memory() - before:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--naive", type=int, default=1_000_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start)
        return
    placing(options.documents, options.naive, options.seq_len)
    filling(options.naive)
    starting(10**9)


if __name__ == "__main__":
    main()
