"""Memory and time of loading weights on a rank that is not rank 0: ndtrain's modes, transformers' and torch's.

    OMP_NUM_THREADS=1 python tests/benchmarks/load_memory.py

Every case runs in processes of its own. Memory is the growth of the rank's RssAnon + RssShmem (private and shared
memory, without pages of mapped files) over what it was before the weights got memory, sampled every millisecond in a
round of its own. The growth of VmHWM, which counts the mapped file too and is exact, is printed beside it. Times are
set against two processes that read half of the same files each into memory that is new to them: the median of the
ratios of the rounds, in which nothing is sampled.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CASES = {
    "read": "two processes that read half of the file each",
    "read-checkpoint": "the same of the checkpoint's files",
    "ndtrain-rank0": 'ndtrain `load.mode = "rank0"`',
    "ndtrain-sharded": 'ndtrain `load.mode = "sharded"`',
    "ndtrain-checkpoint": "ndtrain, from its own checkpoint",
    "transformers": "transformers `from_pretrained(distributed_config=...)`",
    "torch": "torch `set_model_state_dict(..., broadcast_from_rank0=True)`",
}
SLACK = 150e6


def status() -> dict[str, int]:
    """Bytes of /proc/self/status by key."""
    text = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


class Peak:
    """Seconds, and where it is watched growth of memory, between entering and leaving."""

    def __init__(self, watch: bool) -> None:
        self._watched = watch

    def __enter__(self) -> "Peak":
        dist.barrier()  # who starts early would count the wait for the others
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status()
        self._own, self._all = before["RssAnon"] + before["RssShmem"], before["VmRSS"]
        self._top, self._stop = self._own, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._watched:
            self._thread.start()
        self._begin = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            now = status()
            self._top = max(self._top, now["RssAnon"] + now["RssShmem"])

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self._stop.set()
        if self._watched:
            self._thread.join()
        after = status()
        self.own = max(self._top, after["RssAnon"] + after["RssShmem"]) - self._own
        self.all = after["VmHWM"] - self._all


def worker(case: str, model_dir: Path, out: Path, *, watch: bool) -> None:
    """One rank of one case; rank 1 writes what it saw."""
    import torch
    import transformers

    from ndtrain.runs.process import start

    transformers.logging.set_verbosity_error()
    with start() as runtime:
        params: list[Any] = []
        if case.startswith("read"):
            folder = model_dir if case == "read" else model_dir / "checkpoint" / "model"
            with Peak(watch) as peak:
                for file in sorted(folder.glob("*.safetensors")):
                    half = file.stat().st_size // runtime.world_size
                    into = memoryview(bytearray(half))
                    with file.open("rb", buffering=0) as stream:
                        stream.seek(runtime.rank * half)
                        while into:
                            into = into[stream.readinto(into) :]
        elif case.startswith("ndtrain"):
            from ndtrain.hf.model import meta_model
            from ndtrain.load import materialize
            from ndtrain.mesh import build_mesh
            from ndtrain.parallel import parallelize
            from ndtrain.plan import make_plan
            from ndtrain.recipe import load_recipe
            from ndtrain.train import sizes_for
            from ndtrain.train.source import load_start
            from tests.tiny import recipe_text

            text = recipe_text(
                model={"name": str(model_dir / "checkpoint" if case == "ndtrain-checkpoint" else model_dir)},
                load={"mode": "rank0" if case == "ndtrain-rank0" else "sharded"},
                data={"path": ".", "seq_len": 32, "tokenizer": "bytes"},
                optim={"lr": 1e-3},
                train={"steps": 1},
                run={"dir": "run"},
            )
            path = out.with_suffix(f".{runtime.rank}.toml")
            path.write_text(text)
            recipe = load_recipe(path, [])
            model = meta_model(recipe)
            plan = make_plan(model, sizes_for(recipe, runtime.world_size), recipe)
            parallelize(model, plan, build_mesh(plan.sizes, runtime.device.type), recipe=recipe)
            with Peak(watch) as peak:
                materialize(model, runtime, recipe=recipe)
                load_start(model, plan, recipe=recipe, runtime=runtime)
            params = list(model.parameters())
        elif case == "transformers":
            from transformers.distributed import DistributedConfig

            config = DistributedConfig(fsdp_size=runtime.world_size)
            with Peak(watch) as peak:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    model_dir, dtype=torch.float32, distributed_config=config
                )
                for param in model.parameters():
                    param.to_local().isnan().any()  # the shards are views of the mapped file until they are read
            params = list(model.parameters())
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
            from torch.distributed.fsdp import fully_shard

            with torch.device("meta"):
                config = transformers.AutoConfig.from_pretrained(model_dir)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            with Peak(watch) as peak:
                whole: dict[str, Any] = {}
                if runtime.is_main:
                    whole = transformers.AutoModelForCausalLM.from_pretrained(
                        model_dir, dtype=torch.float32
                    ).state_dict()
                model.to_empty(device="cpu")
                set_model_state_dict(model, whole, options=options)
            params = list(model.parameters())
        own = 0
        for param in params:
            assert param.device.type == "cpu"
            own += param.to_local().nbytes
        if runtime.rank == 1:
            largest = max((p.numel() * 4 for p in params), default=0)
            row = {"own": peak.own, "all": peak.all, "shards": own, "largest": largest, "seconds": peak.seconds}
            out.write_text(json.dumps(row))
        dist.barrier()


def save_model(path: Path, layers: int) -> None:
    """A random Llama of about 1.5 GB in float32 at 10 layers, and a checkpoint of it."""
    import torch
    import transformers

    from tests.convert_cases import save_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    save_checkpoint(model, path / "checkpoint", only_rows=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case, model_dir, out, watch = options.worker
        return worker(case, Path(model_dir), Path(out), watch=watch == "watch")
    memory: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {case: [] for case in options.cases}
    with tempfile.TemporaryDirectory() as folder:
        model_dir, out = Path(folder) / "model", Path(folder) / "row.json"
        save_model(model_dir, options.layers)
        for round_ in range(1 + options.rounds):
            for case in options.cases:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                command += [__file__, "--worker", case, str(model_dir), str(out)]
                command.append("time" if round_ else "watch")
                done = subprocess.run(
                    command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ}
                )
                if done.returncode:
                    sys.exit(f"{case} failed:\n{done.stderr[-4000:]}")
                row = json.loads(out.read_text())
                if round_:
                    seconds[case].append(row["seconds"])
                else:
                    memory[case] = row
    first = max(memory.values(), key=lambda row: row["shards"])
    limit = first["shards"] + first["largest"] + SLACK
    print(
        f"Shards of rank 1 {first['shards'] / 1e6:.0f} MB, largest tensor {first['largest'] / 1e6:.0f} MB, "
        f"limit (shards + one tensor + {SLACK / 1e6:.0f} MB) {limit / 1e6:.0f} MB.\n"
        f"Seconds and ratios: medians of {options.rounds} rounds.\n"
    )
    print("| loader | peak growth, MB | of the limit | with mapped files, MB | seconds | x reading | least / least |")
    print("|---|---|---|---|---|---|---|")
    for case, seen in seconds.items():
        base = seconds.get(f"read{'-checkpoint' * case.endswith('-checkpoint')}", [float("nan")] * options.rounds)
        own, mapped = memory[case]["own"], memory[case]["all"]
        ratios = [value / read for value, read in zip(seen, base, strict=True)]
        least = min(seen) / min(base)
        numbers = f"{own / 1e6:.0f} | {own / limit:.2f} | {mapped / 1e6:.0f} | {median(seen):.2f}"
        print(f"| {CASES[case]} | {numbers} | {median(ratios):.2f} | {least:.2f} |")


if __name__ == "__main__":
    main()
