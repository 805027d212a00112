"""Local workers, one for each rank, through torch's own elastic launcher."""

import contextlib
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndtrain.errors import DamagedError, PlanError, RecipeError
from ndtrain.runs.stop_signals import STOP_SIGNALS, nothing_to_save

if TYPE_CHECKING:
    from ndtrain.recipe import Recipe


def local_world_size(recipe: "Recipe") -> int:
    """Ranks that the mesh asks for on this machine; `dp_shard = -1` takes its GPUs, or is 1 without any."""
    mesh = recipe.mesh
    others = mesh.dp_replicate * mesh.cp * mesh.tp
    if mesh.dp_shard > 0:
        return others * mesh.dp_shard
    import torch

    return others * max(1, torch.cuda.device_count() // others)


def launch_workers(ranks: int, arguments: list[str]) -> int:
    """Start `ranks` local workers with torch's elastic launcher; returns the exit code they ended with."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The workers say themselves what went wrong; the launcher's banner would bury it.
    logging.disable(logging.ERROR)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the host's own name need not resolve
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    launch: Any = elastic_launch(config, sys.executable)
    handed_on: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        """To the workers, whose own exit codes then tell; torch's launcher would end with its own and kill them."""
        handed_on.append(number)
        workers = children(os.getpid())
        if not workers and len(handed_on) == 1:  # at a later one they may have ended already, as they were asked to
            raise nothing_to_save(number)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nor may it break the save

    for number in STOP_SIGNALS:
        signal.signal(number, hand_on)
    try:
        launch("-m", "ndtrain", *arguments)
    except ChildFailedError as error:
        code = exit_code_of([(failure.timestamp, failure.exitcode) for failure in error.failures.values()])
        if code in [128 + number for number in handed_on]:
            raise nothing_to_save(handed_on[0]) from None  # it met workers that did not listen yet
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def children(parent: int) -> list[int]:
    """Process ids of the children of process `parent` (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces; after it come the state and the parent.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def exit_code_of(failures: list[tuple[int, int]]) -> int:
    """The exit code that tells most among `(time, exit code)` of the workers that failed.

    A worker that names its reason comes before one that died because its peers were gone, or was asked to stop for it.
    """
    named = {error.exit_code for error in (RecipeError, PlanError, DamagedError)}
    _, code = min(failures, key=lambda failure: (failure[1] not in named, failure[0]))
    return code if code >= 0 else 128 - code
