"""End every rank of a run when one of them fails, dies or makes no progress, with one message that names it.

From the rendezvous on each rank has a thread that writes the rank's progress to the store. A process that is stopped or
dead writes nothing more, and one that waits elsewhere falls behind the others. A rank that fails leaves its exit code
there. However the collectives' backend fails, the thread ends the process within the limit of the phase it is in.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ndtrain.errors import NdtrainError, PlanError, RecipeError, Reported, Stopped, lost_peer
from ndtrain.runs.limits import WAIT_TIMEOUT, set_timeouts
from ndtrain.runs.phases import PHASES, START, STEP, Phase
from ndtrain.runs.reports import STORE_S, Report, print_error, ranks_are, within
from ndtrain.runs.stop_signals import STOP_SIGNALS, nothing_to_save
from ndtrain.runs.wakeup import forget, hear
from ndtrain.torch_compat import collectives_begun, process_groups

if TYPE_CHECKING:
    from ndtrain.recipe import RunSection

# How often a rank writes its progress: at least ten times within any limit, and at most 1,000 ranks each second.
INTERVAL_S = 1.0
RANKS_PER_SECOND = 1000
# A rank that knows its exit code may take so long to end in good order.
LEAVE_S = 10.0
# The most characters of another library's message.
MESSAGE = 300
# The main thread may take so long to act on a request to end.
TERMINATE_S = 3.0
# Bytes that a process moves from or to files between two signs of progress. The threads of a waiting process move fewer
# within any limit; rank 0 may serve the store, whose traffic grows with the ranks.
MOVED_BYTES, MOVED_BYTES_PER_RANK = 1 << 26, 1 << 20


class Progress(NamedTuple):
    """A rank's progress: how often it was written, its step, its beats and collectives, the index of its phase."""

    writes: int
    step: int
    beats: int
    phase: int = PHASES.index(STEP)


class Blame(NamedTuple):
    """Which rank is at fault, in words, and whether it is `gone`: it answers no more."""

    words: str
    gone: bool


class Watch:
    """Watch this rank: enter a phase by `during`, call `beat` on progress; `start` launches the watchdog thread."""

    def __init__(self, section: RunSection):
        self.section = section
        self.phase = START
        self.step = self.beats = 0
        self.saved: Callable[[], int | None] = lambda: None  # the step of the newest checkpoint known to be complete
        self._rank, self._world_size = 0, 1
        self._limit_s, self._deadline = self.phase.limit_s(section), float("inf")
        self._writes = self._advanced = self._told = self._heard = 0
        self._store: Any = None
        self._report: Report | None = None
        self._groups: list[Any] = []
        self._thread: threading.Thread | None = None
        self._terminated_at, self._terminated_by = float("inf"), int(signal.SIGTERM)
        self._due, self._ended = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._interval_s = min(INTERVAL_S, min(phase.limit_s(section) for phase in PHASES) / 10)

    # ---- what the rank's own work calls

    def start(self, store: Any, rank: int, world_size: int) -> None:
        """Launch the watchdog thread if there are other ranks; `store` is one that all of them share."""
        import torch.distributed as dist

        self._rank, self._world_size = rank, world_size
        if world_size == 1:
            return
        self._interval_s = max(self._interval_s, world_size / RANKS_PER_SECOND)
        # A connection of its own, which no waiting collective blocks.
        self._store = dist.PrefixStore("ndtrain/watch", store.clone())
        self._report = Report(self._store, world_size, poll_s=max(INTERVAL_S, self._interval_s))
        self._begin(self._limit_s)
        self._write_progress()
        hear(self._hear)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread: the silence of this rank is no failure any more."""
        if self._thread is not None and not self._ended.is_set():
            self._ended.set()
            self._due.set()
            # Python must not end while a thread is inside torch, which would abort the process.
            self._thread.join(STORE_S)
            forget(self._hear)
            with suppress(RuntimeError, TimeoutError):
                within(STORE_S, lambda: self._store.set(f"left/{self._rank}", ""))

    def beat(self, step: int | None = None) -> None:
        """Record that the rank has made progress, and from the first step on the `step` that it works at."""
        if step is not None:
            if self.phase is not STEP:
                self._enter(STEP)
            self.step = step
        self.beats += 1
        self._deadline = time.monotonic() + self._limit_s

    def advance(self) -> None:
        """Record that reading or writing goes on, in any thread: it counts in phases whose limit is on progress."""
        self._advanced += 1

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Give the body the time of `phase`; up to the next phase or beat after it the longer one's time."""
        before = self.phase
        self._enter(phase)
        yield
        self._enter(before, at_least=self._limit_s)

    def _enter(self, phase: Phase, at_least: float = 0.0) -> None:
        self.phase, self._limit_s = phase, phase.limit_s(self.section)
        self.beats += 1
        self._begin(max(self._limit_s, at_least))
        self._due.set()  # the others learn of the phase at once

    def _begin(self, limit_s: float) -> None:
        """Let a limit begin now: this rank's deadline, and the timeouts of its collectives."""
        self._deadline = time.monotonic() + limit_s
        if self._store is None:
            return
        if not self.step:  # groups made later, for background saves, have timeouts of their own
            self._groups = process_groups()
        # Longer than the thread's limit, so that the thread reports first: it knows the rank at fault.
        backstop = timedelta(seconds=limit_s + 4 * self._interval_s + 5)
        set_timeouts(WAIT_TIMEOUT if self.phase.by_progress else backstop, self._groups)

    # ---- the thread

    def _run(self) -> None:
        assert self._report is not None
        while True:
            self._due.wait(self._interval_s)
            self._due.clear()
            if self._ended.is_set():
                return
            code = None
            with suppress(RuntimeError, TimeoutError):  # the store may come back
                code = within(STORE_S, self._exchange)
            if code is not None:
                # The main thread ends this process unless it waits for something that never comes.
                if self._ending.acquire(blocking=False):
                    os._exit(self._report.make(lambda: 1))
                return
            # Not in this thread: a rank that writes no progress while it ends would be blamed by another.
            if self._is_terminated():
                self._terminated_at = float("inf")
                threading.Thread(target=self._end_terminated, daemon=True).start()
            if time.monotonic() >= self._deadline:
                self._deadline = float("inf")
                reason = f"no progress for {self._limit_s:g} s (run.{self.phase.key})"
                threading.Thread(target=self.end, args=(reason,), daemon=True).start()

    def _exchange(self) -> int | None:
        """Write this rank's progress and read that of all; return the exit code of the run if a rank has reported."""
        assert self._report is not None
        self._write_progress()
        if self.phase.by_progress:
            self._share_progress()
        return self._report.code()

    def _hear(self, number: int) -> None:
        """Note that this rank was asked to end, which its main thread does not see in a collective."""
        if number in (signal.SIGTERM, signal.SIGHUP) and self._terminated_at == float("inf"):
            self._terminated_at, self._terminated_by = time.monotonic(), number

    def _is_terminated(self) -> bool:
        """Return whether this rank was asked to end before its first step, and the main thread has not done so."""
        return not self.step and time.monotonic() > self._terminated_at + TERMINATE_S

    def _write_progress(self) -> None:
        self._writes += 1
        self._store.set(str(self._rank), " ".join(map(str, self._own_progress())))

    def _own_progress(self) -> Progress:
        return Progress(self._writes, self.step, self.beats + collectives_begun(), PHASES.index(self.phase))

    def _read_progress(self) -> dict[int, Progress]:
        """Return the progress of every rank that has joined."""
        keys = [str(number) for number in range(self._world_size)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        values = self._store.multi_get(keys)
        return {int(key): Progress(*map(int, value.split())) for key, value in zip(keys, values, strict=True)}

    def _share_progress(self) -> None:
        """Tell the others of this rank's progress, and let the limit begin anew at the progress of any rank."""
        done = self.beats + self._advanced + moved_bytes() // max(MOVED_BYTES, self._world_size * MOVED_BYTES_PER_RANK)
        shared = self._store.add("progress", int(done != self._told))
        if shared != self._heard:
            self._deadline = time.monotonic() + self._limit_s
        self._told, self._heard = done, shared

    # ---- the end

    def end(self, reason: str) -> NoReturn:
        """Print on one rank why the run cannot go on and which rank is at fault; end this process with exit code 1."""
        self._ending.acquire()  # never released: a second caller waits until the first ends the process
        assert self._report is not None
        os._exit(self._report.make(lambda: self._say_lost(f"{reason}; ", self._blame())))

    def _end_terminated(self) -> NoReturn:
        """End this process, whose main thread waits for something and cannot act on a signal."""
        self._ending.acquire()
        assert self._report is not None
        os._exit(self._report.make(lambda: self._say(nothing_to_save(self._terminated_by))))

    def failed(self, error: BaseException) -> BaseException:
        """Return what to raise for `error`, which ended this rank's work: a `Reported`, after one rank has printed.

        The message is that of the rank that failed by itself. Ranks whose collectives broke with it, or still wait, end
        with its exit code. With one rank `error` is returned as it is. For the main thread.
        """
        if self._report is None or isinstance(error, Reported):
            return error
        self._ending.acquire()
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)  # the launcher sends some as soon as one rank has failed
        if isinstance(error, NdtrainError):
            if error.rank is None:
                self._report.count(_same(error))
            elif error.rank != self._rank:
                self._report.wait(STORE_S)  # the rank that failed knows more
        code = self._report.make(lambda: self._say(error))
        # A collective that was begun, or a file system that hangs, must not keep the process.
        timer = threading.Timer(LEAVE_S, os._exit, [code])
        timer.daemon = True
        timer.start()
        return Reported(code)

    def _say(self, error: BaseException) -> int:
        """Print what ended this rank; return the exit code."""
        if lost_peer(error):
            blame, text = self._blame(), ""
            if not blame.gone:  # then the error itself tells more
                traceback.print_exception(error)
                text = f" ({' '.join(str(error).split())[:MESSAGE]})"
            return self._say_lost(f"a collective failed{text}; ", blame)
        if isinstance(error, Stopped) and "SIGTERM" in str(error) and not self.step:
            # torchrun sends SIGTERM to the other workers when one has died, too.
            blame = self._blame()
            if blame.gone:
                return self._say_lost("", blame)
        if isinstance(error, NdtrainError):
            print_error(error, self._prefix(error))
            return error.exit_code
        if isinstance(error, KeyboardInterrupt):
            return 130
        traceback.print_exception(error)
        text = " ".join(str(error).split())[:MESSAGE]
        print_error(NdtrainError(f"{self._where()}: rank {self._rank}: {type(error).__name__}: {text}"))
        return 1

    def _prefix(self, error: NdtrainError) -> str:
        """Return where the error was met; nothing for a request, or for what all ranks find wrong."""
        assert self._report is not None
        if isinstance(error, Stopped):
            return ""
        if error.rank is None:
            return "" if self._report.counts_all(_same(error)) else f"{self._where()}: rank {self._rank}: "
        return "" if isinstance(error, RecipeError | PlanError) else f"{self._where()}: "

    def _say_lost(self, reason: str, blame: Blame) -> int:
        ends = f"; {self.way_on()}" if self.step else " before its first step"
        print_error(NdtrainError(f"{self._where()}: {reason}{blame.words}. The run ends{ends}"))
        return 1

    def way_on(self) -> str:
        """Return what starting the run again would do."""
        saved = self.saved()
        if saved is None:
            return "no checkpoint is complete to continue from"
        return f"start again to continue from the newest checkpoint (step {saved} is complete)"

    def _where(self) -> str:
        return f"step {self.step}" if self.phase is STEP else self.phase.name

    def _blame(self) -> Blame:
        """Find the rank at fault, as far as the store shows it."""
        try:
            before = within(STORE_S, self._read_progress)
            time.sleep(2.5 * self._interval_s)
            after = within(STORE_S, self._read_progress)
            still = [n for n in before if n != self._rank and after[n].writes == before[n].writes]
            left = [n for n in still if within(STORE_S, partial(self._left, n))]
        except (RuntimeError, TimeoutError):
            return Blame("the store of the ranks does not answer: its process (rank 0 or the launcher) is gone", True)
        if silent := [n for n in still if n not in left]:
            return Blame(f"{ranks_are(silent)} stopped, dead or cut off{self._elsewhere(after, silent)}", True)
        if missing := [n for n in range(self._world_size) if n not in after]:
            return Blame(f"{ranks_are(missing)} missing", False)
        reached = {n: progress[1:3] for n, progress in after.items() if n not in left}
        lowest = min(reached.values())
        if lowest < max(reached.values()):
            behind = [n for n in reached if reached[n] == lowest]
            where = f", at step {lowest[0]}" if self.step else self._elsewhere(after, behind)
            return Blame(f"{ranks_are(behind)} behind{where}", False)
        same = (
            f"all ranks respond and made equal progress: run.{self.phase.key} is too short, or the network is at fault"
        )
        return Blame(same, False)

    def _elsewhere(self, progress: dict[int, Progress], numbers: list[int]) -> str:
        """Return in which phase the first of these ranks is, if this rank is in another."""
        phase = PHASES[progress[numbers[0]].phase]
        return "" if phase is self.phase else f" ({phase.name})"

    def _left(self, number: int) -> bool:
        """Return whether a rank has ended its work in good order."""
        found: bool = self._store.check([f"left/{number}"])
        return found


def _same(error: NdtrainError) -> str:
    """Return the key under which the ranks are counted that raise this error, each by itself."""
    return f"same/{type(error).__name__} {error}"


def moved_bytes() -> int:
    """Return how many bytes this process has read from files and written to them; 0 where the system does not tell."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return 0
