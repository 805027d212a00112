"""End a run whose step makes no progress, and name the rank at fault.

Every rank has a thread that writes the rank's progress to the store. A process that is stopped or dead writes nothing
more, and one that waits elsewhere falls behind the others. However the collectives' backend fails, the thread ends the
process within the limit.
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

# How often a rank writes its progress: at least ten times within the limit, and at most 1,000 ranks each second.
INTERVAL_S = 2.0
RANKS_PER_SECOND = 1000
# How long the store may take to answer.
STORE_S = 5.0
# A save may take this long even where the limit for steps is shorter.
SAVE_S = STEP_TIMEOUT.total_seconds()


class Progress(NamedTuple):
    """A rank's progress: how often it was written, the rank's step, and its number of forwards and backwards."""

    writes: int
    step: int
    beats: int


class Watch:
    """Watch this rank: call `beat` on progress; `start` launches the watchdog thread."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.step = self.beats = 0
        self._interval_s = min(INTERVAL_S, limit_s / 10)
        self._deadline = float("inf")
        self._writes = 0
        self._store: Any = None
        self._groups: list[dist.ProcessGroup] = []
        self._ended = threading.Event()
        self._ending = threading.Lock()

    @property
    def on(self) -> bool:
        """Whether `start` has launched the thread."""
        return self._store is not None

    def start(self) -> None:
        """Launch the watchdog thread if there are other ranks to wait for; collective."""
        if world_size() == 1:
            return
        # A connection of its own, which no waiting collective blocks.
        store: Any = default_store()
        self._store = dist.PrefixStore("ndtrain/watch", store.clone())
        self._interval_s = max(self._interval_s, world_size() / RANKS_PER_SECOND)
        # Groups made later, for background saves, have timeouts of their own.
        self._groups = process_groups()
        self._set_timeouts(self.limit_s)
        self._write_progress()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        together(None)  # now every rank's progress is in the store

    def stop(self) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Record that the rank works at `step` and has made progress."""
        self.step, self.beats = step, self.beats + 1
        self._deadline = time.monotonic() + self.limit_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Allow the rank the time of a save, inside and up to the next beat."""
        limit = max(self.limit_s, SAVE_S)
        self._deadline = time.monotonic() + limit
        if self.on:
            self._set_timeouts(limit)
        yield
        self._deadline = time.monotonic() + limit
        if self.on:
            self._set_timeouts(self.limit_s)

    def _set_timeouts(self, limit_s: float) -> None:
        # Longer than the thread's limit, so that the thread reports first: it knows the rank at fault.
        set_timeouts(timedelta(seconds=limit_s + 4 * self._interval_s + 5), self._groups)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._write_progress()
            except RuntimeError:
                if time.monotonic() < self._deadline:
                    continue  # the store may come back
            if time.monotonic() >= self._deadline:
                self._deadline = float("inf")
                reason = f"no progress for {self.limit_s:g} s (run.step_timeout_s)"
                # Not in this thread: a rank that writes no progress while it ends would be blamed by another.
                threading.Thread(target=self.end, args=(reason,), daemon=True).start()

    def _write_progress(self) -> None:
        self._writes += 1
        self._store.set(str(rank()), f"{self._writes} {self.step} {self.beats}")

    def _read_progress(self) -> list[Progress]:
        values = self._store.multi_get([str(number) for number in range(world_size())])
        return [Progress(*map(int, value.split())) for value in values]

    def end(self, reason: str) -> NoReturn:
        """Print on one rank why the run cannot go on and which rank is at fault; end this process with exit code 1."""
        self._ending.acquire()  # never released: a second caller waits until the first ends the process
        try:
            reports = _within(STORE_S, lambda: self._store.add("reporters", 1)) == 1
        except (RuntimeError, TimeoutError):
            reports = True
        if reports:
            blamed = self._blame()
            sys.stdout.flush()
            print(
                f"ndtrain: error: step {self.step}: {reason}; {blamed}. The run ends; resume it to continue "
                "from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        # When the first rank exits the launcher ends the others, so all wait for the report. Short requests, since the
        # thread could not write progress while one long request is open.
        deadline = time.monotonic() + 4 * STORE_S + 3 * self._interval_s
        with suppress(RuntimeError, TimeoutError):
            if reports:
                _within(STORE_S, lambda: self._store.set("reported", "1"))
            while not _within(STORE_S, lambda: self._store.check(["reported"])) and time.monotonic() < deadline:
                time.sleep(0.1)
        os._exit(1)

    def _blame(self) -> str:
        """Return in words which rank is at fault, as far as the store shows it."""
        try:
            before = _within(STORE_S, self._read_progress)
            time.sleep(2.5 * self._interval_s)
            after = _within(STORE_S, self._read_progress)
        except (RuntimeError, TimeoutError):
            return "the store of the ranks does not answer: its process (rank 0 or the launcher) is stopped or dead"
        others = [number for number in range(len(after)) if number != rank()]
        silent = [number for number in others if after[number].writes == before[number].writes]
        if silent:
            return f"{_ranks(silent)} stopped, dead or cut off"
        furthest = max(progress[1:] for progress in after)
        behind = [number for number, progress in enumerate(after) if progress[1:] < furthest]
        if behind:
            return f"{_ranks(behind)} behind, at step {min(after[number].step for number in behind)}"
        return "all ranks respond and made equal progress: run.step_timeout_s is too short, or the network is at fault"


def lost_peer(error: BaseException) -> bool:
    """Return whether `error` is a failed collective, which is what a rank sees when another one is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown} is" if len(numbers) == 1 else f"ranks {shown} are"


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or raise its `RuntimeError`; raise `TimeoutError` if it takes longer.

    A store whose process is stopped never answers.
    """
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
