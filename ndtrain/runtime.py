"""Process group, rank and device: decided here and nowhere else. torch is imported inside the functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tokenizing or reading a large model may keep the other ranks waiting for hours; collectives of a step may not.
WAIT_TIMEOUT = timedelta(days=30)
STEP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: its rank, the world size, its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def env_world_size() -> int | None:
    """World size given by torchrun, or None outside it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


@contextmanager
def start() -> Iterator[Runtime]:
    """Join the process group that torchrun describes (or one of a single rank) and leave it at the end."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # gloo beside NCCL carries the collectives on host tensors: checkpoints, waiting, the recipe's checks.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=STEP_TIMEOUT, store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield Runtime(rank=rank, local_rank=local_rank, world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def rank0_first(runtime: Runtime, work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait without a deadline, then on one rank of every node that needs it.

    `work` must be idempotent and cheap when its result is already there: it runs on local rank 0 of every node after
    rank 0 is done, so that nodes without a shared file system get their own copy. An error of rank 0 is raised on
    every rank.
    """
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    try:
        for turn in (runtime.rank == 0, runtime.local_rank == 0 and runtime.rank != 0):
            failure: Exception | None = None
            if turn:
                try:
                    work()
                except Exception as error:
                    failure = error
            raise_together(failure, group)
    finally:
        dist.destroy_process_group(group)


def raise_together(failure: Exception | None, group: object = None) -> None:
    """Raise on every rank if any rank failed: its own error there, the first failing rank's message elsewhere.

    The message travels as bytes, never pickled; an `NdtrainError` keeps its exit code.
    """
    import torch
    import torch.distributed as dist

    from ndtrain import errors

    kinds = [errors.NdtrainError, errors.RecipeError, errors.PlanError, errors.DamagedError, errors.Stopped]
    text = ("" if failure is None else str(failure) or type(failure).__name__).encode()[:4000]
    kind = next((i for i, k in enumerate(kinds) if type(failure) is k), 0)
    mine = torch.zeros(4002, dtype=torch.int32)
    if failure is not None:
        mine[0], mine[1] = len(text), kind
        mine[2 : 2 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).int()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine, group=group)  # type: ignore[arg-type]
    if failure is not None:
        raise failure
    for rank, theirs in enumerate(everyone):
        if length := int(theirs[0]):
            message = bytes(theirs[2 : 2 + length].tolist()).decode(errors="replace")
            kind_class = kinds[int(theirs[1])]
            raise kind_class(message if kind_class is not errors.NdtrainError else f"rank {rank}: {message}")
