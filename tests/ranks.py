"""Pools of gloo worker processes that stay alive over many test cases: starting torch takes seconds."""

import atexit
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import proofs

ROOT = Path(__file__).resolve().parent.parent
_CASES = 60  # then fresh workers: every process group leaves threads behind
_GRACE_S = 10  # for the other ranks to fail too, after one has


class RanksFailed(AssertionError):
    """At least one rank raised, died or ran out of time; the message has every traceback."""


def _share_device() -> None:
    """Have all gloo groups of this process use one device: the thread of each wakes up a hundred times a second."""
    from torch.distributed import ProcessGroupGloo

    make, device = ProcessGroupGloo.__init__, ProcessGroupGloo.create_default_device()

    def sharing(self: Any, store: Any, rank: int, size: int, timeout: timedelta, **more: Any) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = [device], timeout, 2
        for name, value in more.items():  # torch 2.14 has `enable_reconfigure`
            setattr(options, name, value)
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = sharing  # type: ignore[method-assign,assignment]


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """A worker: takes (function, arguments), answers (True, result) or (False, traceback), until the pipe
    closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_device()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            os._exit(0)  # no shutdown of gloo: the other ranks are going as well
        try:
            answer = (True, fn(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`size` gloo ranks. A case is a module-level function, sent by its name, and picklable arguments."""

    def __init__(self, size: int, *, cases: int = _CASES) -> None:
        self.size = size
        self._limit = cases
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""
        self._cases = 0

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ndtrain-ranks-")
        # Workers are forked from a server that has imported everything, and has no threads yet.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        wanted = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            proofs.VARIABLE: proofs.folder(),
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)  # read when the server starts
        try:
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                args = (rank, self.size, f"{self._folder}/store", theirs)
                worker = context.Process(target=_serve, args=args, daemon=True)
                worker.start()
                theirs.close()
                self._workers.append(worker)
                self._pipes.append(ours)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """fn(*args) on every rank; the results by rank. RanksFailed otherwise, and the next case has new
        workers."""
        if self._cases >= self._limit:
            self.close()
            self._cases = 0
        self._cases += 1
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        end = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), f"no answer ({timeout} s)"))
                break
            for item in ready:
                assert isinstance(item, Connection)
                rank = waiting.pop(item)
                try:
                    good, value = item.recv()
                except (EOFError, OSError):
                    good, value = False, "the process died"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + _GRACE_S)
        if failures:
            self.close()  # the process group may be out of step
            raise RanksFailed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def kill(self, ranks: Iterable[int]) -> None:
        """SIGKILL to some workers, from another thread than `run`'s."""
        workers = list(self._workers)
        for rank in ranks:
            if rank < len(workers):
                workers[rank].kill()

    def close(self) -> None:
        """Ends the workers; a later run starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._workers, self._pipes = [], []


_pools: dict[int, RankPool] = {}


def get_pool(size: int) -> RankPool:
    """The shared pool of `size` ranks; started at its first case, ended with this process."""
    if size not in _pools:
        _pools[size] = RankPool(size)
        atexit.register(_pools[size].close)
    return _pools[size]
