"""Timeouts of the ranks' collectives in each phase of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

# One rank may tokenize, read or write for hours while the others wait: the watch ends them if nothing moves any more.
WAIT_TIMEOUT = timedelta(days=30)
# A collective's own limit ends later than the watch's by at least this.
MARGIN = timedelta(seconds=30)


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """Set the timeout of `groups` from their next collective on."""
    from ndtrain.torch_compat import set_pg_timeout

    for group in groups:
        set_pg_timeout(timeout, group)
