"""Exchange errors and JSON values between ranks outside the training step. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ndtrain.runs.process import Runtime, rank, world_size

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

# The longest error message that a rank sends to the others.
MESSAGE_BYTES = 4000


def rank0_first(runtime: Runtime, work: Callable[[], object]) -> None:
    """Run `work` on rank 0 while the others wait, then on one rank of every node that needs it.

    `work` must be idempotent and cheap when its result exists: it runs on local rank 0 of every node after
    rank 0 is done, so that nodes without a shared file system get their own copy. An error of one rank is raised on
    every rank.
    """
    together(work if runtime.rank == 0 else None)
    together(work if runtime.local_rank == 0 and runtime.rank != 0 else None)


def on_rank0(work: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on rank 0 alone; its error is raised on every rank."""
    together(work if rank() == 0 else None, group)


def of_rank0(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and return its JSON value on every rank; its error is raised on every rank."""
    found: list[Any] = []
    on_rank0(lambda: found.append(work()))
    return broadcast_json(found)[0]


def together(work: Callable[[], object] | None, group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on every rank that passes it; if it fails on one, all ranks raise. Also a barrier.

    A rank that raised alone would leave the others waiting in the next collective. An `NdtrainError` keeps its class,
    and so its exit code, on all ranks; an `OSError` becomes an `NdtrainError`. Any other error is raised as it is on
    the rank that failed, and as an `NdtrainError` with its message on the others. Those have the failed rank's number
    as `rank`. The message is sent as bytes.
    """
    import torch
    import torch.distributed as dist

    from ndtrain import errors

    failure: BaseException | None = None
    try:
        if work is not None:
            work()
    except OSError as error:
        failure = errors.NdtrainError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    except BaseException as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    kinds = [errors.NdtrainError, errors.RecipeError, errors.PlanError, errors.DamagedError, errors.Stopped]
    kind = next((i for i, k in reversed([*enumerate(kinds)]) if isinstance(failure, k)), 0)
    reason = str(failure) if isinstance(failure, errors.NdtrainError) else f"{type(failure).__name__}: {failure}"
    # A recipe or plan error is the same on every rank, so the rank is not named.
    prefix = "" if kinds[kind] in (errors.RecipeError, errors.PlanError) else f"rank {rank()}: "
    text = b"" if failure is None else f"{prefix}{reason}".encode()[:MESSAGE_BYTES]
    mine = torch.zeros(MESSAGE_BYTES + 1, dtype=torch.uint8)
    mine[0] = kind
    mine[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine, group=group)
    if failure is not None and not isinstance(failure, errors.NdtrainError):
        raise failure
    for number, theirs in enumerate(everyone):
        if message := bytes(theirs[1:].tolist()).rstrip(b"\0").decode(errors="replace"):
            shared = kinds[int(theirs[0])](message)
            shared.rank = number
            raise shared from failure


def broadcast_json(value: Any) -> Any:
    """Return rank 0's JSON value on every rank; sent as bytes, since `broadcast_object_list` unpickles."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return value
    data = json.dumps(value).encode() if rank() == 0 else b""
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0)
    payload = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == 0:
        payload = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(payload, 0)
    return json.loads(bytes(payload.tolist()))


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's JSON value, in rank order, on every rank; sent as bytes."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    data = json.dumps(value).encode()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    mine = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(everyone, mine, group=group)
    return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(everyone, lengths, strict=True)]


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return every rank's int64 `rows` `[n, width]`, n of its own, in rank order on rank 0; an empty list elsewhere."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return [rows]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(rows)]), group=group)
    mine = rows.new_zeros(max(int(n) for n in lengths), rows.shape[1])
    mine[: len(rows)] = rows
    everyone = [torch.empty_like(mine) for _ in lengths] if rank() == 0 else []
    dist.gather(mine, everyone or None, group=group)
    return [theirs[: int(n)] for theirs, n in zip(everyone, lengths, strict=False)]
