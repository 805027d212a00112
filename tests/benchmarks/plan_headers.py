"""Planning the read of a checkpoint of many ranks: seconds and memory, by its index, by its headers, and by all pairs.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_headers.py [--ranks 1000] [--keys 1000] [--dir DIR]

Writes a checkpoint with the headers of that many ranks and as good as no values. Each row of the tables runs in a new
process, which reports its peak memory, imports included. "All pairs" is how ndtrain read headers before it had
tables of pieces: each piece was compared with all earlier ones of its key; it runs at sizes that it can take.
"""

import argparse
import gc
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.checkpoint import check  # noqa: E402
from ndtrain.checkpoint.index import check_headers, tables_of, write_index  # noqa: E402
from ndtrain.checkpoint.manifest import check_files, write_manifest  # noqa: E402
from ndtrain.checkpoint.tensors import check_coverage, pieces_of, rows_of  # noqa: E402
from ndtrain.storage.headers import Target, header_of  # noqa: E402
from ndtrain.storage.pieces import pieces_in, pieces_of_files, plan_held  # noqa: E402
from ndtrain.storage.table import Piece, Pieces  # noqa: E402

COLUMNS = 2


def key_of(i: int) -> str:
    return f"model.layers.{i // 9}.self_attn.projection_{i % 9}.weight"


def write_checkpoint(directory: Path, ranks: int, keys: int) -> Path:
    """Write a checkpoint of `keys` tensors `[ranks, 2]`, of which each rank has saved a row; without an index."""
    (directory / "model").mkdir(parents=True)
    targets = {key_of(i): Target((1, COLUMNS), torch.float32) for i in range(keys)}
    for rank in range(ranks):
        sharding = {key: {"saved_offsets": [rank, 0]} for key in targets}
        info = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
        header, _ = header_of(targets, info)
        values = bytes(sum(target.nbytes for target in targets.values()))
        (directory / f"model/{rank:05d}-of-{ranks:05d}.safetensors").write_bytes(header + values)
    (directory / "train_state.json").write_text("{}")
    write_manifest(directory, {"model": {key: {"shape": [ranks, COLUMNS], "dtype": "F32"} for key in targets}}, {})
    return directory


def with_index(directory: Path, stored: Mapping[str, Pieces]) -> Path:
    """Add the index of the pieces `stored` to a checkpoint, and to its manifest."""
    listed = json.loads((directory / "manifest.json").read_text())["tensors"]
    (directory / "manifest.json").unlink()
    write_index(directory / "model", stored)
    write_manifest(directory, listed, {})
    return directory


def rows_written(ranks: int, keys: int) -> list[torch.Tensor]:
    """What rank 0 gathers at the save of such a checkpoint."""
    listed = {key_of(i): {"shape": [ranks, COLUMNS]} for i in range(keys)}
    own = {"file": {key: (torch.empty(1, COLUMNS), (0, 0)) for key in listed}}
    rows = rows_of(own, listed)
    found = []
    for rank in range(ranks):
        found.append(rows.clone())
        found[-1][:, 3] = rank
    return found


def naive(directory: Path, keys: int) -> None:
    """Compare each piece with all earlier ones of its key, count the values, look at each piece for each part."""
    stored: dict[str, list[Piece]] = defaultdict(list)
    for file in sorted((directory / "model").glob("*.safetensors")):
        for key, piece in pieces_in(file).items():
            if all((piece.offsets, piece.sizes) != (p.offsets, p.sizes) for p in stored[key]):
                stored[key].append(piece)
    for pieces in stored.values():
        assert sum(p.sizes[0] * p.sizes[1] for p in pieces) == COLUMNS * len(pieces)
    assert len(stored) == keys
    for pieces in stored.values():
        assert len([p for p in pieces if max(p.offsets[0], 0) < min(p.offsets[0] + p.sizes[0], 1)]) == 1


def plan(directory: Path, ranks: int, keys: int, *, whole: bool) -> None:
    """Plan what one process reads that holds everything, or a row of each tensor."""
    stored = pieces_of(directory / "model")
    if whole:
        memory = torch.empty(ranks, COLUMNS)
        found = plan_held(dict.fromkeys(map(key_of, range(keys)), memory), stored, "here")
        assert len(found) == ranks and sum(map(len, found.values())) == ranks * keys
    else:
        # a rank's own part, without a process group: the pieces that meet its box
        for pieces in stored.values():
            assert ((pieces.low[:, 0] < 1) & (pieces.high[:, 0] > 0)).sum() == 1


def one_rank(directory: Path, ranks: int, keys: int) -> None:
    """What each rank does at a resume on as many: check its share of headers, plan, check what it opens."""
    stored = pieces_of(directory / "model")
    check_headers(stored, directory / "model", lambda number, file: number == 0)
    plan(directory, ranks, keys, whole=False)
    check_headers(stored, directory / "model", lambda number, file: number == 1)


def save(directory: Path, ranks: int, keys: int) -> None:
    """What rank 0 does at a save: the index from what the ranks wrote, then sizes and coverage."""
    names = [[f"{rank:05d}-of-{ranks:05d}.safetensors"] for rank in range(ranks)]
    listed = {key_of(i): {"shape": [ranks, COLUMNS], "dtype": "F32"} for i in range(keys)}
    write_index(directory, tables_of(rows_written(ranks, keys), names, listed, directory))


def coverage(directory: Path) -> None:
    manifest = check_files(directory)
    check_coverage(directory / "model", manifest["tensors"]["model"])


def headers(directory: Path) -> None:
    files = sorted((directory / "model").glob("*.safetensors"))
    for pieces in pieces_of_files(files, range(len(files)), "here").values():
        assert pieces.flaw(pieces.shape) is None


def work_of(case: str, directory: Path, ranks: int, keys: int) -> Callable[[], object]:
    return {
        "all pairs": lambda: naive(directory, keys),
        "headers": lambda: headers(directory),
        "index": lambda: coverage(directory),
        "save": lambda: save(directory / "out", ranks, keys),
        "rank": lambda: one_rank(directory, ranks, keys),
        "whole": lambda: plan(directory, ranks, keys, whole=True),
        "check": lambda: check(directory),
    }[case]


def measured(case: str, directory: Path, ranks: int, keys: int) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the work, and peak MB, of a new process."""
    command = [sys.executable, __file__, "--case", case, "--dir", str(directory)]
    found = subprocess.run(
        [*command, "--ranks", str(ranks), "--keys", str(keys)], capture_output=True, text=True, check=True
    )
    seconds, cpu, memory = json.loads(found.stdout)
    return seconds, cpu, memory


def run_case(case: str, directory: Path, ranks: int, keys: int) -> None:
    work = work_of(case, directory, ranks, keys)
    gc.freeze()  # as the command does after its imports: the collector would walk torch again and again
    started, used = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    print(json.dumps([seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))


def _both_ways(path: Path) -> tuple[float, float]:
    """Seconds until each of these ranks has the index, read by each or by rank 0 and sent."""
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    path.read_bytes()
    dist.barrier()
    each = time.perf_counter() - started
    started = time.perf_counter()
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    if dist.get_rank() == 0:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    dist.broadcast(data, 0)
    dist.barrier()
    return each, time.perf_counter() - started


def compare(folder: Path, ranks: int, keys: int) -> None:
    print(
        "\n| ranks x keys | all pairs, CPU s | headers, CPU s | index, CPU s | all pairs over headers |\n|" + "---|" * 5
    )
    for few in (64, 128, 256):
        small = write_checkpoint(folder / f"{few}", few, 100)
        cpu = {case: measured(case, small, few, 100)[1] for case in ("all pairs", "headers")}
        cpu["index"] = measured("index", with_index(small, pieces_of(small / "model")), few, 100)[1]
        values = " | ".join(f"{cpu[case]:.2f}" for case in ("all pairs", "headers", "index"))
        print(f"| {few} x 100 | {values} | {cpu['all pairs'] / cpu['headers']:.1f} |", flush=True)
    large = write_checkpoint(folder / "large", ranks, keys)
    print(f"\n{ranks:,} ranks x {keys:,} keys\n\n| | seconds | CPU seconds | memory, MB |\n|---|---|---|---|")

    def row(name: str, case: str) -> None:
        seconds, cpu, memory = measured(case, large, ranks, keys)
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} | {memory:,.0f} |", flush=True)

    row("headers of all files and coverage, no index", "headers")
    with_index(large, pieces_of(large / "model"))
    (large / "out").mkdir()
    row("save, rank 0: index from what the ranks wrote", "save")
    shutil.rmtree(large / "out")
    row("resume, rank 0: sizes, hash of the index, coverage", "index")
    row(f"resume, each of {ranks:,} ranks: index, two headers, plan", "rank")
    row("one process that holds everything: index, plan", "whole")
    row("`check`: sizes, coverage, all headers", "check")
    index = large / "model" / "pieces.index"
    from tests.ranks import get_pool

    each, sent = map(max, zip(*get_pool(4).run(_both_ways, index), strict=True))
    print(
        f"\nIndex of {index.stat().st_size / 1e6:.0f} MB, 4 ranks of this machine: each reads it {each:.2f} s, "
        f"rank 0 reads and sends it {sent:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--dir", type=Path, help="Where to write; by default the temporary directory.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.dir, options.ranks, options.keys)
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        compare(Path(folder), options.ranks, options.keys)


if __name__ == "__main__":
    main()
