"""How long the ranks wait for one another, phase by phase."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

# Tokenizing or reading a large model may keep the other ranks waiting for hours; finding each other may not.
WAIT_TIMEOUT = timedelta(days=30)


STEP_TIMEOUT = timedelta(minutes=30)


def process_groups() -> list[dist.ProcessGroup]:
    """Every process group that this rank is in (private in torch 2.13)."""
    import torch.distributed as dist

    return list(dist.distributed_c10d._world.pg_map)


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """The longest wait of `groups` from their next collective on (private in torch 2.13)."""
    import torch.distributed as dist

    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
