"""Set up this process's process group, rank and device. torch is imported inside the functions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ndtrain.errors import RecipeError
from ndtrain.runs.environment import under_torchrun
from ndtrain.runs.limits import MARGIN
from ndtrain.runs.phases import RENDEZVOUS
from ndtrain.runs.rendezvous import launcher_store
from ndtrain.runs.watch import Watch
from ndtrain.torch_compat import abort_process_groups

if TYPE_CHECKING:
    import torch

    from ndtrain.recipe import RunSection


def _set_up_cuda() -> None:
    """Choose settings of torch for CUDA in which the environment chooses nothing; call it before CUDA is used.

    Memory whose segments grow is not lost to gaps; collectives do not wait for the products that they run beside.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")


def _idle() -> Watch:
    """Return a watch of default limits that watches nothing, for ranks that no launcher started."""
    from ndtrain.recipe import RunSection

    return Watch(RunSection(dir="."))


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: its rank, the world size, its device, and the watch over all ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    watch: Watch = field(default_factory=_idle, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def start(section: RunSection | None = None) -> Iterator[Runtime]:
    """Join the process group that torchrun describes, or one of a single rank, and leave it at the end.

    `section` has the limits of a run's phases. With several ranks an error of the body is printed once for all of them
    and raised as `Reported`.
    """
    import torch
    import torch.distributed as dist

    rank, local_rank, world_size = 0, 0, 1
    if under_torchrun():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        _set_up_cuda()
        device = torch.device("cuda", _visible_device(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        # Collectives on host tensors use gloo: checkpoints, barriers, the recipe's checks.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    watch = Watch(section) if section is not None else _idle()
    failed = False
    limit = timedelta(seconds=RENDEZVOUS.limit_s(watch.section))
    try:
        with watch.during(RENDEZVOUS):
            store: Any = dist.HashStore()
            if under_torchrun():
                store = launcher_store(rank, world_size, limit, partial(watch.start, rank=rank, world_size=world_size))
            timeout = limit + MARGIN  # the watch, which knows the rank at fault, comes first
            # With its device NCCL connects here, within this phase's limit, and no collective has to guess it.
            dist.init_process_group(
                backend,
                timeout=timeout,
                store=store,
                rank=rank,
                world_size=world_size,
                device_id=device if device.type == "cuda" else None,
            )
        yield Runtime(rank=rank, local_rank=local_rank, world_size=world_size, device=device, watch=watch)
    except BaseException as error:
        failed = True
        if (ends := watch.failed(error)) is error:
            raise
        raise ends from error
    finally:
        watch.stop()
        if dist.is_initialized():
            if failed and device.type == "cuda":
                # Not destroyed: NCCL would first wait for collectives that the other ranks may never join.
                abort_process_groups()
            else:
                dist.destroy_process_group()


def _visible_device(local_rank: int, visible: int) -> int:
    """Return the index, among the `visible` CUDA devices, of the one for this process. Raises `RecipeError`."""
    if local_rank < visible:
        return local_rank
    if visible == 1:  # a launcher such as SLURM may show each process its own device alone
        return 0
    raise RecipeError(
        f"this process has LOCAL_RANK {local_rank}, but sees {visible} CUDA devices; start at most {visible} processes "
        "on this node, or let each see its own device alone (CUDA_VISIBLE_DEVICES)"
    )


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1
