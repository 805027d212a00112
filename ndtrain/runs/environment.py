"""What the environment of this process says of the launch that it belongs to."""

from __future__ import annotations

import os

# Begins the id of a launch by `ndtrain run`, which torch gives to its workers.
RUN_ID = "ndtrain-"


def env_world_size() -> int | None:
    """Return the world size that torchrun gave, or None outside torchrun."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else None


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def speaks_for_all() -> bool:
    """Return whether this process prints what all ranks have to say: rank 0, or a process outside a launch."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def started_by_run() -> bool:
    """Return whether `ndtrain run` started this process as one of its workers, after it has printed its notes."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID)
