"""Timeouts of the ranks' collectives in each phase of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

# One rank may tokenize or read a large model for hours while the others wait.
WAIT_TIMEOUT = timedelta(days=30)

# The ranks must find each other within this time.
STEP_TIMEOUT = timedelta(minutes=30)


def process_groups() -> list[dist.ProcessGroup]:
    """Return every process group that this rank is in (private API in torch 2.13)."""
    import torch.distributed as dist

    return list(dist.distributed_c10d._world.pg_map)


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """Set the timeout of `groups` from their next collective on (private API in torch 2.13)."""
    import torch.distributed as dist

    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
