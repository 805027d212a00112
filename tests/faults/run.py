"""Runs of four ranks on dp_shard 2 x tp 2, on one of which a fault happens, and how each of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests import tiny
from tests.test_stop_signals import wait_for, workers

RANKS = 4
# Each phase's limit in seconds. The start of a phase on one rank may be later than on another by as much as a rank of a
# loaded machine falls behind, and a step waits for nothing.
LIMITS = {"rendezvous": 60, "start": 20, "read": 20, "save": 20, "step": 60}
CODES = {"error": 1, "memory": 1, "damaged": 4, "stop": 1, "kill": 1, "sleep": 1}


class End(NamedTuple):
    """How a run ended: its exit code and those of the ranks, its errors, and seconds from the fault to the end."""

    code: int
    ranks: dict[int, int]
    errors: list[str]
    seconds: float
    output: str


def prepare(folder: Path) -> None:
    """Write the model, the data, and a checkpoint to resume from."""
    tiny.save_model("qwen3", folder)
    tiny.write_corpus(folder / "corpus")
    command = [sys.executable, "-m", "ndtrain", "run", str(_recipe(folder, folder / "resumed", steps=1))]
    subprocess.run([*command, "--set", "mesh.dp_shard=1", "--set", "mesh.tp=1"], check=True, stdout=subprocess.DEVNULL)


def _recipe(folder: Path, run: Path, *, steps: int) -> Path:
    return tiny.recipe_file(
        folder / f"{run.name}.toml",
        model={"name": str(folder / "qwen3")},
        corpus=folder / "corpus",
        run_dir=run,
        batch_ranks=2,
        steps=steps,
        mesh={"dp_shard": 2, "tp": 2},
        load={"mode": "sharded"},
        schedule={"warmup_steps": 0},
        checkpoint={"every": 1, "resume": "auto", "on_error": "stop", "async": False},
        eval={"path": str(folder / "corpus"), "every": 2},
        run={f"{key}_timeout_s": seconds for key, seconds in LIMITS.items()},
    )


def disturbed(folder: Path, phase: str, fault: str, *, rank: int, torchrun: bool = False) -> End:
    """Run with a fault of `rank` in `phase`; return how it ended. No process is left afterwards."""
    name = re.sub(r"\W+", "-", f"{phase} {fault} {rank}{' torchrun' * torchrun}")
    run = folder / name
    if phase == "reading the checkpoint":
        shutil.copytree(folder / "resumed", run)
    recipe, file = _recipe(folder, run, steps=3), folder / f"{name}.fault"
    start = [sys.executable, "-m", *(["torch.distributed.run", "--nproc-per-node", str(RANKS), "-m"] * torchrun)]
    command = [*start, "tests.faults.worker", phase, fault, str(rank), str(file), "run", str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NDTRAIN_CACHE": str(folder / f"{name}-cache")}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    known: dict[int, int] = {}
    try:
        wait_for(lambda: known.update(workers(process.pid)) or file.exists(), process, seconds=240)
        began = time.monotonic()
        # torch's launcher ends a stopped worker half a minute after the others.
        left = {rank} if fault == "stop" else set()
        wait_for(lambda: process.poll() is not None or not set(workers(process.pid)) - left, seconds=240)
        seconds = time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        for pid in (*known.values(), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not [pid for pid in known.values() if Path(f"/proc/{pid}").exists()]
    codes = file.with_suffix(".codes")
    ranks = {int(n): code for n, code in json.loads(codes.read_text()).items()} if codes.exists() else {}
    errors = [line for line in output.splitlines() if line.startswith("ndtrain: ") and " note: " not in line]
    return End(
        process.returncode,
        ranks,
        [line for line in errors if "starting" not in line and "loading" not in line],
        seconds,
        output,
    )


def limit_of(phase: str) -> float:
    """Return the limit of a phase in seconds."""
    from ndtrain.runs import phases

    found = [p for p in vars(phases).values() if isinstance(p, phases.Phase) and p.name == phase]
    return LIMITS[found[0].key.removesuffix("_timeout_s")]


def check_end(end: End, phase: str, fault: str, *, rank: int, torchrun: bool = False) -> None:
    """Assert that all ranks ended in time, with one message that names the phase and the rank, and the right code."""
    assert len(end.errors) == 1, end.output
    assert phase in end.errors[0] and f"rank {rank}" in end.errors[0], end.errors
    assert end.seconds < limit_of(phase) + 15, end
    assert end.code == (1 if torchrun else CODES[fault]), end
    if not torchrun:
        others = {n: code for n, code in end.ranks.items() if n != rank}
        assert others == {n: CODES[fault] for n in range(RANKS) if n != rank}, end
