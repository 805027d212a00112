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


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """Set the timeout of `groups` from their next collective on."""
    from ndtrain.torch_compat import set_pg_timeout

    for group in groups:
        set_pg_timeout(timeout, group)
