"""How long the ranks wait for one another, phase by phase."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

# Tokenizing or reading a large model may keep the other ranks waiting for hours; finding each other may not.
WAIT_TIMEOUT = timedelta(days=30)
STEP_TIMEOUT = timedelta(minutes=30)


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """Set the longest wait of `groups`, from their next collective on."""
    from ndtrain.torch_compat import set_pg_timeout

    for group in groups:
        set_pg_timeout(timeout, group)
