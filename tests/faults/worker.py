"""A rank of a run, or the launcher of such ranks, on one of which a fault happens in a phase of the run.

python -m tests.faults.worker PHASE FAULT RANK FILE run RECIPE ...: as a launcher's worker it is that rank, otherwise
it starts the ranks as `ndtrain run` does. The fault writes FILE; the launcher writes the ranks' exit codes beside it.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ndtrain.errors import DamagedError

# The function on whose first call in a phase the fault happens.
FUNCTIONS = {
    "rendezvous": "torch.distributed:init_process_group",
    "tokenizing": "ndtrain.train.inputs:build_cache",
    "building the meshes": "ndtrain.engine.engine:build_mesh",
    "filling the model with noise": "ndtrain.train.setup:fill_with_noise",
    "checking the model on noise": "torch.nn.functional:silu",  # inside a block, between collectives
    "reading the weights": "ndtrain.load:load_sharded",
    "reading the checkpoint": "ndtrain.train.setup:load_tensors",
    "saving": "ndtrain.checkpoint.store:write_files",
}
ERRORS = {
    "error": OSError(errno.EIO, "injected"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "damaged": DamagedError("injected: a file is damaged"),
}


def happen(fault: str, file: Path) -> None:
    """Make the fault of this process."""
    file.write_text(str(os.getpid()))
    if fault in ERRORS:
        raise ERRORS[fault]
    if fault == "sleep":
        time.sleep(600)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])


def main() -> None:
    phase, fault, rank, written, *arguments = sys.argv[1:]
    file = Path(written)
    if os.environ.get("RANK") == rank:
        module, _, name = FUNCTIONS[phase].partition(":")
        owner = importlib.import_module(module)
        right = getattr(owner, name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if not file.exists():
                happen(fault, file)
            return right(*args, **kwargs)

        setattr(owner, name, faulty)
    elif "RANK" not in os.environ:
        launch_faulty(["-m", "tests.faults.worker", phase, fault, rank, written], file.with_suffix(".codes"))
    sys.argv[1:] = arguments
    from ndtrain.cli import main as cli

    cli()


def launch_faulty(worker: list[str], codes: Path) -> None:
    """Have ndtrain's launcher start `worker` in place of `-m ndtrain`, and write {rank: exit code} to `codes`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    right = api.elastic_launch

    def launcher(config: Any, command: str) -> Any:
        launch = right(config, command)

        def start(*arguments: str) -> Any:
            try:
                return launch(*worker, *arguments[2:])
            except ChildFailedError as error:
                codes.write_text(json.dumps({n: failure.exitcode for n, failure in error.failures.items()}))
                raise

        return start

    mock.patch.object(api, "elastic_launch", launcher).start()


if __name__ == "__main__":
    main()
