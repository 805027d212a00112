"""A stopped or dead rank ends the run within the limit and is named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ndtrain.recipe import RunSection
from ndtrain.runs.phases import STEP
from ndtrain.runs.watch import Progress, Watch
from tests.ranks import get_pool
from tests.test_stop_signals import ENV, lines_of, make_recipe, wait_for, workers


def test_a_stopped_rank_ends_the_run_within_the_limit_and_is_named(tmp_path: Path) -> None:
    limit = 6
    recipe, run = make_recipe(tmp_path, steps=1_000_000), tmp_path / "run"
    command = [sys.executable, "-m", "ndtrain", "run", str(recipe), "--set", f"run.step_timeout_s={limit}"]
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ranks = {}
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(lines_of(run)) > 2, process)
        ranks = workers(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        began = time.monotonic()
        wait_for(lambda: 0 not in workers(process.pid), process)
        took = time.monotonic() - began
        os.kill(ranks[1], signal.SIGKILL)  # torch's launcher would do so after half a minute
        _, err = process.communicate(timeout=100)
    finally:
        for pid in (process.pid, *ranks.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    last = lines_of(run)[-1]["step"]
    message = f"no progress for {limit} s (run.step_timeout_s); rank 1 is stopped, dead or cut off."
    assert any(f"ndtrain: error: step {n}: {message}" in err for n in (last + 1, last + 2)), err
    assert process.returncode not in (0, 75) and took < 3 * limit, (process.returncode, took)


def test_the_rank_that_is_behind_is_named() -> None:
    class ThreeRanks(Watch):
        reads = 0
        rank_2_writes = rank_2_is_here = True

        def _read_progress(self) -> dict[int, Progress]:
            self.reads += 1
            found = {
                0: Progress(self.reads, 7, 20),
                1: Progress(self.reads, 6, 18),
                2: Progress(self.reads if self.rank_2_writes else 1, 7, 20),
            }
            return {rank: progress for rank, progress in found.items() if rank != 2 or self.rank_2_is_here}

        def _left(self, number: int) -> bool:
            return False

    watch = ThreeRanks(RunSection(dir="run", start_timeout_s=0.01))
    watch.step, watch.phase, watch._world_size = 7, STEP, 3
    assert watch._blame() == ("rank 1 is behind, at step 6", False)
    watch.rank_2_writes = False
    assert watch._blame() == ("rank 2 is stopped, dead or cut off", True)
    watch.rank_2_is_here = False
    assert watch._blame() == ("rank 2 is missing", False)


def printed(folder: str) -> str:
    """Return what this rank prints when the last of four ranks writes nothing more and the others see it is gone."""
    import io
    from datetime import timedelta
    from unittest import mock

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from ndtrain.runs.limits import set_timeouts
    from ndtrain.torch_compat import process_groups

    watch, output = Watch(RunSection(dir=folder)), io.StringIO()
    watch.start(_get_default_store(), dist.get_rank(), dist.get_world_size())
    watch.beat(5)
    dist.barrier()
    try:
        if dist.get_rank() == 3:
            watch._write_progress()
            watch._ended.set()
        dist.barrier()  # no rank looks before the last has written for the last time
        if dist.get_rank() != 3:
            time.sleep(0.3 * dist.get_rank())
            stderr, exits = mock.patch("sys.stderr", output), mock.patch("os._exit", side_effect=SystemExit)
            with stderr, exits, pytest.raises(SystemExit):
                watch.end("a collective failed")
        dist.barrier()
    finally:
        watch.stop()
        set_timeouts(timedelta(seconds=300), process_groups())
    return output.getvalue()


def test_one_rank_reports_and_does_not_blame_ranks_that_end_too(tmp_path: Path) -> None:
    reports = [text for text in get_pool(4).run(printed, str(tmp_path)) if text]
    assert len(reports) == 1, reports
    blame = "rank 3 is stopped, dead or cut off"
    assert f"step 5: a collective failed; {blame}. The run ends; no checkpoint is complete" in reports[0]
