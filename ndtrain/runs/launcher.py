"""Start one local worker process for each rank, through torch's elastic launcher."""

import contextlib
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndtrain.errors import DamagedError, PlanError, RecipeError
from ndtrain.runs.environment import RUN_ID
from ndtrain.runs.reports import ranks_are
from ndtrain.runs.stop_signals import handle_all, nothing_to_save

if TYPE_CHECKING:
    from ndtrain.recipe import Recipe


def local_world_size(recipe: "Recipe") -> int:
    """Return how many ranks the mesh needs on this machine; `dp_shard = -1` takes all its GPUs, or is 1 without any."""
    least = recipe.mesh.least_ranks
    if recipe.mesh.dp_shard > 0:
        return least
    import torch

    return least * max(1, torch.cuda.device_count() // least)


def launch_workers(ranks: int, arguments: list[str]) -> int:
    """Start `ranks` local workers with torch's elastic launcher and return the exit code of the run.

    Raises `Stopped` where a stop signal comes before the workers handle it.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The workers print their own errors; the launcher's banner would bury them.
    logging.disable(logging.ERROR)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"{RUN_ID}{uuid.uuid4()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the machine's own host name may not resolve
        max_restarts=0,
        signals_to_handle="SIGQUIT",
    )
    launch: Any = elastic_launch(config, sys.executable)
    forwarded: list[int] = []

    def forward_signal(number: int, frame: Any) -> None:
        """Send the signal to the workers, whose exit codes then count; torch's launcher would kill them first."""
        forwarded.append(number)
        workers = children(os.getpid())
        if not workers and len(forwarded) == 1:  # at a later signal they may have ended already, as asked
            raise nothing_to_save(number)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                # A terminal sends Ctrl-C to its whole process group; torch starts workers outside it (torch 2.13).
                if number != signal.SIGINT or os.getpgid(worker) != os.getpgrp():
                    os.kill(worker, number)

    signal.set_wakeup_fd(-1)  # the workers answer Ctrl-C
    handle_all(forward_signal)
    try:
        launch("-m", "ndtrain", *arguments)
    except ChildFailedError as error:
        failures = [(failure.timestamp, failure.exitcode) for failure in error.failures.values()]
        # A forwarded signal kills a worker that does not handle it yet; one that does knows more.
        own = [failure for failure in failures if -failure[1] not in forwarded]
        if not own:
            raise nothing_to_save(forwarded[0]) from None
        code = exit_code_of(own)
        killed = [rank for rank, failure in error.failures.items() if code == 128 - failure.exitcode > 128]
        if killed:
            reason = f"{ranks_are(sorted(killed))} dead, killed by {signal.Signals(code - 128).name}"
            print(f"ndtrain: error: {reason}", file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def children(parent: int) -> list[int]:
    """Return the process ids of the children of process `parent` (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The process name, in parentheses, may hold spaces; the state and the parent follow it.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def exit_code_of(failures: list[tuple[int, int]]) -> int:
    """Return the exit code of the worker whose failure explains the others, from each one's `(time, exit code)`.

    A worker that names its reason comes before one that died, or was told to stop, because its peers were gone; so does
    one that has reported, by exit code 1, that a peer died.
    """
    named = {error.exit_code for error in (RecipeError, PlanError, DamagedError)}
    reported = any(code == 1 for _, code in failures)
    _, code = min(failures, key=lambda failure: (failure[1] not in named, reported and failure[1] < 0, failure[0]))
    return code if code >= 0 else 128 - code
