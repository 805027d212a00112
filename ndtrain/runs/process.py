"""Process group, rank and device: decided here and nowhere else. torch is imported inside the functions."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# Tokenizing or reading a large model may keep the other ranks waiting for hours; finding each other may not.
WAIT_TIMEOUT = timedelta(days=30)
STEP_TIMEOUT = timedelta(minutes=30)
CONNECT_TIMEOUT = timedelta(minutes=2)
# Room for the message with which a rank tells the others why it failed.
MESSAGE_BYTES = 4000


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
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else None


def under_torchrun() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def start() -> Iterator[Runtime]:
    """Join the process group that torchrun describes (or one of a single rank) and leave it at the end."""
    import torch
    import torch.distributed as dist

    rank, local_rank, world_size = 0, 0, 1
    if under_torchrun():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # gloo beside NCCL carries the collectives on host tensors: checkpoints, waiting, the recipe's checks.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    store: Any = _launcher_store(rank, world_size) if under_torchrun() else dist.HashStore()
    dist.init_process_group(backend, timeout=STEP_TIMEOUT, store=store, rank=rank, world_size=world_size)
    set_timeouts(WAIT_TIMEOUT, process_groups())
    try:
        yield Runtime(rank=rank, local_rank=local_rank, world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def _launcher_store(rank: int, world_size: int) -> Any:
    """The store through which the ranks find each other; of this attempt alone.

    torchrun's store outlives the workers that it starts again (torch 2.13), and what the last ones left there,
    addresses of processes that are gone, would be taken for these ones'. Counts of restarts do not tell attempts apart:
    they differ between nodes. So rank 0 answers each rank by the name that it chose for itself this time. Raises
    `NdtrainError` where a rank does not come.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from ndtrain.errors import NdtrainError

    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # The launcher's store is there before its workers are: where it does not answer, the launcher has died.
    timeout = CONNECT_TIMEOUT if of_launcher else STEP_TIMEOUT
    try:
        store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise NdtrainError(f"nothing answers at {where} within {timeout}, where the ranks are to meet") from error
    if not of_launcher:
        return store
    store.set_timeout(STEP_TIMEOUT)
    own = uuid.uuid4().hex
    store.set(f"ndtrain/hello/{rank}", own)
    attempt, answered = own, dict.fromkeys(range(world_size), "")
    end = time.monotonic() + STEP_TIMEOUT.total_seconds()
    while True:
        if rank == 0:
            for number, name in enumerate(store.multi_get([f"ndtrain/hello/{n}" for n in range(world_size)])):
                if answered[number] != name.decode():
                    answered[number] = name.decode()
                    store.set(f"ndtrain/welcome/{number}", f"{answered[number]} {own}")
        elif store.check([f"ndtrain/welcome/{rank}"]):
            name, attempt = store.get(f"ndtrain/welcome/{rank}").decode().split()
            if name == own:
                store.set(f"ndtrain/{attempt}/here/{rank}", "")
                break
        if rank == 0 and store.check([f"ndtrain/{own}/here/{n}" for n in range(1, world_size)]):
            break
        if time.monotonic() > end:
            raise NdtrainError(f"the {world_size} ranks have not found each other in {STEP_TIMEOUT}")
        time.sleep(0.02)
    return dist.PrefixStore(f"ndtrain/{attempt}", store)


def process_groups() -> list[dist.ProcessGroup]:
    """Every process group that this rank is in (private in torch 2.13)."""
    import torch.distributed as dist

    return list(dist.distributed_c10d._world.pg_map)


def set_timeouts(timeout: timedelta, groups: list[dist.ProcessGroup]) -> None:
    """The longest wait of `groups` from their next collective on (private in torch 2.13)."""
    import torch.distributed as dist

    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank0_first(runtime: Runtime, work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait without a deadline, then on one rank of every node that needs it.

    `work` must be idempotent and cheap when its result is already there: it runs on local rank 0 of every node after
    rank 0 is done, so that nodes without a shared file system get their own copy. An error of one rank is raised on
    every rank.
    """
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    try:
        together(work if runtime.rank == 0 else None, group)
        together(work if runtime.local_rank == 0 and runtime.rank != 0 else None, group)
    finally:
        dist.destroy_process_group(group)


def on_rank0(work: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on rank 0 alone; its error is raised on every rank."""
    together(work if rank() == 0 else None, group)


def of_rank0(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, a JSON value, on every rank; its error is raised on every rank."""
    found: list[Any] = []
    on_rank0(lambda: found.append(work()))
    return broadcast_json(found)[0]


def together(work: Callable[[], object] | None, group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on every rank that has any; where one failed, all raise. Also a barrier.

    A rank that left alone would leave the others in the next collective. An `NdtrainError` keeps its class and with it
    its exit code; a failure of the file system becomes an `NdtrainError`. What the failing rank alone knows is raised
    there as it is, and as an `NdtrainError` with its message elsewhere. The message travels as bytes, never pickled.
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
    kind = next((i for i, k in enumerate(kinds) if type(failure) is k), 0)
    words = str(failure) if isinstance(failure, errors.NdtrainError) else f"{type(failure).__name__}: {failure}"
    # Every rank refuses a recipe or a plan for one reason: whose rank does not matter.
    where = "" if kinds[kind] in (errors.RecipeError, errors.PlanError) else f"rank {rank()}: "
    text = b"" if failure is None else f"{where}{words}".encode()[:MESSAGE_BYTES]
    mine = torch.zeros(MESSAGE_BYTES + 1, dtype=torch.uint8)
    mine[0] = kind
    mine[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine, group=group)
    if failure is not None and not isinstance(failure, errors.NdtrainError):
        raise failure
    for theirs in everyone:
        if message := bytes(theirs[1:].tolist()).rstrip(b"\0").decode(errors="replace"):
            raise kinds[int(theirs[0])](message) from failure


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank; as bytes, since `broadcast_object_list` unpickles."""
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
    """Every rank's JSON value on every rank, in their order; as bytes."""
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


def random_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from `parts`, the same in every process."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
