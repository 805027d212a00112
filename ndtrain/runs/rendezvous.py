"""How the ranks of one attempt find each other through the launcher's store."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ndtrain.runs.limits import STEP_TIMEOUT

if TYPE_CHECKING:
    pass

CONNECT_TIMEOUT = timedelta(minutes=2)


def launcher_store(rank: int, world_size: int) -> Any:
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
