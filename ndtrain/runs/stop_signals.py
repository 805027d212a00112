"""What is asked of a run from outside: signals, and files named `save` and `stop` in its directory."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ndtrain.errors import Stopped
from ndtrain.storage.paths import is_local, os_errors

# What SLURM (USR1, where it is asked to), Kubernetes and torchrun (TERM) send before they kill.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Stands for the file `stop` where a signal's number would stand.
FILE = 1
LOOK_EVERY_S = 10.0


class StopSignals:
    """What this process was asked: only remembered here, so that all ranks act on it at the same step.

    Before the first step there is nothing to save, and a signal ends the run at once by `Stopped`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.signal = 0  # number of the first one
        self.training = False
        self._save, self._stop = run_dir / "save", run_dir / "stop"
        self._stuck: set[Path] = set()
        self._next_look = 0.0

    def listen(self) -> None:
        """Take the signals from now on to the end of the process: the launcher sends more while it ends."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, self.signal or number
        if self.training:
            # A second request, of whatever kind, must not break the save that the first asked for.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif first:
            raise nothing_to_save(number)

    def seen(self, *, files: bool) -> list[int]:
        """[stop, save] as numbers of which the ranks take the largest; 0 is no. `files`: whether to look at them."""
        files = files and self._due()
        stop = self.signal or (FILE if files and self._is_there(self._stop) else 0)
        return [stop, int(files and self._is_there(self._save))]

    def _due(self) -> bool:
        """Whether to look at the files again: at every step, but an object store is not asked more often than this."""
        if is_local(self._stop):
            return True
        due = time.monotonic() >= self._next_look
        if due:
            self._next_look = time.monotonic() + LOOK_EVERY_S
        return due

    def _is_there(self, path: Path) -> bool:
        if path in self._stuck:
            return False
        if is_local(path):
            return os.path.isfile(path)  # not Path.is_file: a flaky file system is no request
        with suppress(Exception):  # nor is a flaky object store
            return path.exists()
        return False

    def answered(self) -> list[str]:
        """Remove the files; returns those that cannot be removed, which are not looked at again."""
        for path in (self._save, self._stop):
            try:
                with os_errors(path):
                    if os.path.isfile(path) if is_local(path) else path.exists():
                        path.unlink()
            except OSError:
                self._stuck.add(path)
        return [str(path) for path in self._stuck]


def words(stop: int) -> str:
    """Who asked, of a number that `StopSignals.seen` gave."""
    return "the file `stop`" if stop == FILE else signal.Signals(stop).name


def nothing_to_save(stop: int) -> Stopped:
    return Stopped(f"stopped by {words(stop)} before a step was trained; there is nothing to save")
