"""Connect the ranks of one start of a launch through the launcher's store."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ndtrain.runs.limits import MARGIN

CONNECT_TIMEOUT = timedelta(minutes=2)


def launcher_store(rank: int, world_size: int, limit: timedelta, joined: Callable[[Any], None]) -> Any:
    """Return the store through which the ranks find each other, with a prefix that only this start uses.

    torchrun's store outlives the workers that it restarts (torch 2.13), so it still holds the addresses of processes
    that are gone. Restart counts cannot tell starts apart, since they differ between nodes. So each rank writes a
    fresh random name and waits until rank 0 answers that name with its own, which becomes the prefix. `joined` is
    called with the store as soon as this rank has it, while others may still be missing. Raises `NdtrainError` if the
    store or rank 0 does not answer within `limit`.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from ndtrain.errors import NdtrainError

    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # The launcher starts its store before its workers: if it does not answer, the launcher has died.
    timeout = min(CONNECT_TIMEOUT, limit) if agent_store else limit
    try:
        store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise NdtrainError(
            f"no rendezvous server answered at {address} within {_words(timeout)} (MASTER_ADDR, MASTER_PORT)"
        ) from error
    except dist.DistStoreError as error:  # this process serves the store
        raise NdtrainError(f"{_apart(world_size, limit)}: {str(error).splitlines()[0]}") from error
    if not agent_store:
        joined(store)
        return store
    store.set_timeout(limit)
    own = uuid.uuid4().hex
    store.set(f"ndtrain/hello/{rank}", own)
    prefix, answered = own, dict.fromkeys(range(world_size), "")
    if rank == 0:
        joined(dist.PrefixStore(f"ndtrain/{own}", store))
    deadline = time.monotonic() + (limit + MARGIN).total_seconds()  # whoever is joined reports first
    hellos = [f"ndtrain/hello/{n}" for n in range(world_size)]
    while True:
        if rank == 0:
            for number, name in enumerate(store.multi_get(hellos) if store.check(hellos) else ()):
                if answered[number] != name.decode():
                    answered[number] = name.decode()
                    store.set(f"ndtrain/welcome/{number}", f"{answered[number]} {own}")
        elif store.check([f"ndtrain/welcome/{rank}"]):
            name, prefix = store.get(f"ndtrain/welcome/{rank}").decode().split()
            if name == own:
                joined(dist.PrefixStore(f"ndtrain/{prefix}", store))
                store.set(f"ndtrain/{prefix}/here/{rank}", "")
                break
        if rank == 0 and store.check([f"ndtrain/{own}/here/{n}" for n in range(1, world_size)]):
            break
        if time.monotonic() > deadline:
            raise NdtrainError(
                f"{_apart(world_size, limit)}: rank 0 does not answer; check that the workers of every node are running"
            )
        time.sleep(0.02)
    return dist.PrefixStore(f"ndtrain/{prefix}", store)


def _apart(world_size: int, limit: timedelta) -> str:
    return (
        f"rendezvous: the {world_size} ranks did not find each other within {_words(limit)} (run.rendezvous_timeout_s)"
    )


def _words(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} s"
