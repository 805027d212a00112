"""Receive requests to stop or to save: signals, and files named `save` and `stop` in the run directory."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ndtrain.errors import Stopped
from ndtrain.storage.paths import is_local, os_errors

# SLURM (USR1, if the job asks for it), Kubernetes and torchrun (TERM) send these before they kill.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Used in place of a signal's number for the file `stop`.
FILE = 1
# An object store is asked for the files no more often than this.
LOOK_EVERY_S = 10.0


class StopSignals:
    """Hold what this process was asked to do, so that all ranks can act on it at the same step.

    Before the first step there is nothing to save, so a signal raises `Stopped` at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self.signal = 0  # number of the first signal received
        self.training = False
        self._save, self._stop = run_dir / "save", run_dir / "stop"
        self._not_removable: set[Path] = set()
        self._next_look = 0.0

    def listen(self) -> None:
        """Handle the signals until the process ends, since the launcher sends more meanwhile."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, self.signal or number
        if self.training:
            # A second request of any kind must not break the save that the first one asked for.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif first:
            raise nothing_to_save(number)

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


def request_name(stop: int) -> str:
    """Return the name of the signal or file behind a stop number that `StopSignals.seen` returned."""
    return "the file `stop`" if stop == FILE else signal.Signals(stop).name


def nothing_to_save(stop: int) -> Stopped:
    """Return the error for a run that was stopped before its first step; `stop` as in `request_name`."""
    return Stopped(f"stopped by {request_name(stop)} before the first step, so there is nothing to save")
