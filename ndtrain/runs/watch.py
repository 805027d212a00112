"""Ends a run whose step does not move, and names the rank that is to blame.

Every rank has a thread that tells the store how far its rank is. A process that is stopped or dead tells nothing more,
one that waits elsewhere is behind the others; and whatever the collectives' backend does in its own way of failing, the
thread ends the process within the limit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from ndtrain.runs.limits import STEP_TIMEOUT, set_timeouts
from ndtrain.runs.messages import together
from ndtrain.runs.process import rank, world_size
from ndtrain.torch_compat import default_store, process_groups

# How often a rank tells where it is; ten times within the limit at least, and at most 1,000 ranks each second.
INTERVAL_S = 2.0
RANKS_PER_SECOND = 1000
# How long the store may take to answer.
STORE_S = 5.0
# The slowest saves that a short limit for steps must not end.
SAVE_S = STEP_TIMEOUT.total_seconds()


class Place(NamedTuple):
    """Where a rank is: how often it has told so, its step, and how many forwards and backwards it has made."""

    told: int
    step: int
    beats: int


class Watch:
    """Of one rank. `beat` says that it moves; `start` makes the thread that watches it."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.step = self.beats = 0
        self._interval_s = min(INTERVAL_S, limit_s / 10)
        self._deadline = float("inf")
        self._told = 0
        self._store: Any = None
        self._groups: list[dist.ProcessGroup] = []
        self._ended = threading.Event()
        self._ending = threading.Lock()

    @property
    def on(self) -> bool:
        return self._store is not None

    def start(self) -> None:
        """Watch from now on, where there are other ranks to wait for; every rank calls it."""
        if world_size() == 1:
            return
        # A connection of its own, which no waiting collective holds.
        store: Any = default_store()
        self._store = dist.PrefixStore("ndtrain/watch", store.clone())
        self._interval_s = max(self._interval_s, world_size() / RANKS_PER_SECOND)
        # Groups that are made later, for saving in the background, have limits of their own.
        self._groups = process_groups()
        self._set_timeouts(self.limit_s)
        self._tell()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        together(None)  # now every rank's place is in the store

    def stop(self) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """The rank works at `step` and has come further."""
        self.step, self.beats = step, self.beats + 1
        self._deadline = time.monotonic() + self.limit_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, and up to the next beat, the rank may take as long as a save takes."""
        limit = max(self.limit_s, SAVE_S)
        self._deadline = time.monotonic() + limit
        if self.on:
            self._set_timeouts(limit)
        yield
        self._deadline = time.monotonic() + limit
        if self.on:
            self._set_timeouts(self.limit_s)

    def _set_timeouts(self, limit_s: float) -> None:
        # Behind the thread's, so that the message comes from where the rank is known.
        set_timeouts(timedelta(seconds=limit_s + 4 * self._interval_s + 5), self._groups)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._tell()
            except RuntimeError:
                if time.monotonic() < self._deadline:
                    continue  # the store may come back
            if time.monotonic() >= self._deadline:
                self._deadline = float("inf")
                reason = f"nothing has moved for {self.limit_s:g} s (run.step_timeout_s)"
                # Not in this thread: a rank that tells nothing while it ends would be blamed by another.
                threading.Thread(target=self.end, args=(reason,), daemon=True).start()

    def _tell(self) -> None:
        self._told += 1
        self._store.set(str(rank()), f"{self._told} {self.step} {self.beats}")

    def _places(self) -> list[Place]:
        values = self._store.multi_get([str(number) for number in range(world_size())])
        return [Place(*map(int, value.split())) for value in values]

    def end(self, reason: str) -> NoReturn:
        """Say on one rank why the run cannot go on and which rank is to blame, and end this process with exit 1."""
        self._ending.acquire()  # for good: who comes second waits for the first to end the process
        try:
            mine = _within(STORE_S, lambda: self._store.add("reporters", 1)) == 1
        except (RuntimeError, TimeoutError):
            mine = True
        if mine:
            blamed = self._blame()
            sys.stdout.flush()
            print(
                f"ndtrain: error: step {self.step}: {reason}; {blamed}. The run ends; resuming goes on from the newest "
                "checkpoint",
                file=sys.stderr,
                flush=True,
            )
        # Who leaves first has the launcher end the others, and nothing would be said. Asked again and again, since the
        # thread would have to be silent while one long question is open.
        end = time.monotonic() + 4 * STORE_S + 3 * self._interval_s
        with suppress(RuntimeError, TimeoutError):
            if mine:
                _within(STORE_S, lambda: self._store.set("reported", "1"))
            while not _within(STORE_S, lambda: self._store.check(["reported"])) and time.monotonic() < end:
                time.sleep(0.1)
        os._exit(1)

    def _blame(self) -> str:
        """Which rank is to blame, as far as can be known, in words."""
        try:
            before = _within(STORE_S, self._places)
            time.sleep(2.5 * self._interval_s)
            after = _within(STORE_S, self._places)
        except (RuntimeError, TimeoutError):
            return "the ranks' store does not answer, so the rank (or the launcher) that keeps it is stopped or dead"
        others = [number for number in range(len(after)) if number != rank()]
        silent = [number for number in others if after[number].told == before[number].told]
        if silent:
            return f"{_ranks(silent)} stopped, dead or cut off"
        far = max(place[1:] for place in after)
        behind = [number for number, place in enumerate(after) if place[1:] < far]
        if behind:
            return f"{_ranks(behind)} behind, at step {min(after[number].step for number in behind)}"
        return "every rank answers and is as far as the others: the limit is too short, or the network is to blame"


def lost_peer(error: BaseException) -> bool:
    """Whether a collective has failed, as it does where another rank is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown} is" if len(numbers) == 1 else f"ranks {shown} are"


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; `TimeoutError` if it takes longer: a store whose process is stopped never does."""
    results: list[Any] = []
    errors: list[RuntimeError] = []

    def run() -> None:
        try:
            results.append(work())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
