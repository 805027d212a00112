"""Receive requests to stop or to save: signals, and files named `save` and `stop` in the run directory.

The first Ctrl-C asks for a stop with a save, the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from ndtrain.errors import Stopped
from ndtrain.runs.environment import speaks_for_all
from ndtrain.runs.wakeup import hear
from ndtrain.storage.paths import is_local, os_errors

# SLURM (USR1, if the job asks for it), Kubernetes and torchrun (TERM) send these before they kill; a terminal that is
# closed sends HUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Used in place of a signal's number for the file `stop`.
FILE = 1
# An object store is asked for the files no more often than this.
LOOK_EVERY_S = 10.0
# Exit code of a process that the second Ctrl-C ends, as shells have it; other ranks let rank 0 print first.
INTERRUPTED = 130
_AFTER_RANK_0_S = 0.5
# The variable in which torch's launcher names the signals that it passes on.
_PASSED_ON = "TORCHELASTIC_SIGNALS_TO_HANDLE"


class Steps(NamedTuple):
    """The last complete step of a run, the step after which a stop would come, and the last saved step."""

    complete: int
    stop_after: int
    saved: int | None


class StopSignals:
    """Hold what this process was asked to do, so that all ranks can act on it at the same step.

    Before the first step there is nothing to save, so Ctrl-C ends the process and another signal raises `Stopped`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.signal = 0  # number of the first signal received
        self._progress: Callable[[], Steps] | None = None
        self._importing = False
        self._interrupts = 0
        self._save, self._stop = run_dir / "save", run_dir / "stop"
        self._not_removable: set[Path] = set()
        self._next_look = 0.0

    def listen(self) -> None:
        """Handle the signals until the process ends, since the launcher sends more meanwhile."""
        handle_all(self._remember)
        hear(self._answer)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """End the process on a request inside, where an exception might be caught by a library that is imported."""
        self._importing = True
        yield
        self._importing = False

    def begin(self, progress: Callable[[], Steps]) -> None:
        """From now on let requests wait for the end of a step; `progress` tells a person what they are about."""
        self._progress = progress

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, self.signal or number
        if first and self._progress is None:
            stopped = nothing_to_save(number)
            # Ctrl-C reaches the ranks at different points, where unwinding would bring their collectives out of step.
            if number == signal.SIGINT or self._importing:
                _leave(str(stopped), stopped.exit_code)
            raise stopped

    def _answer(self, number: int) -> None:
        """Tell what each Ctrl-C does, and end the process at the second."""
        # torchrun passes on the first Ctrl-C as it is, and the second as SIGTERM (torch 2.13).
        by_torchrun = "SIGINT" in os.environ.get(_PASSED_ON, "")
        again = (signal.SIGINT, signal.SIGTERM) if by_torchrun else (signal.SIGINT,)
        if number not in (again if self._interrupts else (signal.SIGINT,)):
            return
        self._interrupts += 1
        if self._interrupts > 1:
            _end(self._progress)
        elif self._progress is not None and speaks_for_all():
            now = self._progress()
            since = f"losing the steps since step {now.saved}" if now.saved else "losing all steps"
            limit = "; torchrun kills the workers 30 s after Ctrl-C (--shutdown-timeout)" if by_torchrun else ""
            _print(f"stopping after step {now.stop_after} with a save; Ctrl-C again ends now, {since}{limit}")

    def seen(self, *, files: bool) -> list[int]:
        """Return [stop, save] as numbers, 0 for no; the ranks take the largest. `files`: whether to look for files."""
        files = files and self._due()
        stop = self.signal or (FILE if files and self._is_there(self._stop) else 0)
        return [stop, int(files and self._is_there(self._save))]

    def _due(self) -> bool:
        """Return whether to look for the files now: at every step, in an object store every `LOOK_EVERY_S`."""
        if is_local(self._stop):
            return True
        due = time.monotonic() >= self._next_look
        if due:
            self._next_look = time.monotonic() + LOOK_EVERY_S
        return due

    def _is_there(self, path: Path) -> bool:
        if path in self._not_removable:
            return False
        if is_local(path):
            return os.path.isfile(path)  # unlike Path.is_file it never raises: a flaky file system is no request
        with suppress(Exception):  # nor is a flaky object store
            return path.exists()
        return False

    def remove_files(self) -> list[str]:
        """Remove the files; return those that cannot be removed, which are ignored from then on."""
        for path in (self._save, self._stop):
            try:
                with os_errors(path):
                    if os.path.isfile(path) if is_local(path) else path.exists():
                        path.unlink()
            except OSError:
                self._not_removable.add(path)
        return [str(path) for path in self._not_removable]


def handle_all(handler: Callable[[int, FrameType | None], None]) -> None:
    """Let `handler` handle the stop signals and Ctrl-C.

    Ctrl-C stays ignored in a process started in the background, and SIGHUP in one started by nohup, except where
    torchrun passes SIGHUP on, which it does before it kills.
    """
    for number in (*STOP_SIGNALS, signal.SIGINT):
        passed_on = number == signal.SIGHUP and "SIGHUP" in os.environ.get(_PASSED_ON, "")
        if number in (signal.SIGTERM, signal.SIGUSR1) or passed_on or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def request_name(stop: int) -> str:
    """Return the name of the signal or file behind a stop number that `StopSignals.seen` returned."""
    return {FILE: "the file `stop`", signal.SIGINT: "Ctrl-C"}.get(stop) or signal.Signals(stop).name


def nothing_to_save(stop: int) -> Stopped:
    """Return the error for a run that was stopped before its first step; `stop` as in `request_name`."""
    return Stopped(f"stopped by {request_name(stop)} before the first step, so there is nothing to save")


def _end(progress: Callable[[], Steps] | None) -> NoReturn:
    """End this process at once; rank 0 prints which steps are lost."""
    if progress is None:
        _leave("ended by Ctrl-C before the first step", INTERRUPTED)
    step, _, saved = progress()
    saved = saved or 0
    lost = {0: "no complete step is lost", 1: f"step {step} is lost"}.get(
        step - saved, f"steps {saved + 1} to {step} are lost"
    )
    way = f"start again to continue from step {saved}" if saved else "none was saved"
    _leave(f"ended by Ctrl-C; {lost}; {way}", INTERRUPTED)


def _leave(line: str, code: int) -> NoReturn:
    """End this process without unwinding; rank 0 prints `line`, and the other ranks let it do so first."""
    if not speaks_for_all():
        time.sleep(_AFTER_RANK_0_S)
    else:
        _print(line)
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the progress line has hidden the cursor
    os._exit(code)


def _print(line: str) -> None:
    print(f"ndtrain: {line}", file=sys.stderr, flush=True)
