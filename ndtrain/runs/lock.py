"""Give a run directory one owner: two runs in one would delete each other's checkpoints and mix their metrics.

RUN_DIR/.lock.json names the owner (host, process, launch) and holds a count that its heartbeat raises. The clocks of
two hosts need not agree, so an owner on another host is watched for a while instead of being judged by a time stamp.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ndtrain.errors import RecipeError
from ndtrain.storage.paths import is_local, os_errors, replace_text

FILE = ".lock.json"
BEAT_S = 10.0
# An owner whose processes cannot be asked counts as gone after so long without a beat.
STALE_S = 45.0
# An object store has no atomic creation: of several that write at once, the last one is the owner.
SETTLE_S = 1.0


class RunLock:
    """Hold `run_dir` for this process from `take` to `release`.

    `launch` identifies what started the process: a restart by the same launcher on the same host takes over the lock of
    its predecessor. Empty if nothing restarts it.
    """

    def __init__(self, run_dir: Path, *, launch: str, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self._file = run_dir / FILE
        self._beat_s, self._stale_s = beat_s, stale_s
        self._own = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "launch": launch,
            "token": uuid.uuid4().hex,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Become the owner. Raises `RecipeError` naming the owner if another one is alive."""
        owner = self._read()
        if owner is not None and not self._may_replace(owner):
            raise self._refused(owner)
        if owner is not None:
            self._remove(owner)
        self._create()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Free the run directory; does nothing if the lock was never taken."""
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join(self._beat_s)
        self._thread = None
        if self._is_own(self._read()):
            with suppress(OSError), os_errors(self._file):
                self._file.unlink()

    def _may_replace(self, owner: dict[str, Any]) -> bool:
        """Return whether `owner` is gone, or is an earlier process of this launch."""
        launch = self._own["launch"]
        if launch and owner.get("launch") == launch and owner.get("host") == self._own["host"]:
            return True
        if owner.get("machine") == self._own["machine"]:
            return _started(owner["pid"]) != owner.get("started")
        # Another machine, or another container of this one: its processes cannot be asked.
        end = time.monotonic() + self._stale_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._stale_s / 10))
            now = self._read()
            if now is not None and now != owner:
                return False
            if now is None and not self._exists():
                return True
        return True

    def _remove(self, owner: dict[str, Any]) -> None:
        """Remove the lock of `owner`, but not that of a process that replaced it in the meantime."""
        with os_errors(self._file):
            if not is_local(self._file):
                return  # written over by `_create`
            aside = self._file.with_name(f"{FILE}.{self._own['token']}")
            with suppress(FileNotFoundError):
                self._file.rename(aside)
                if _parsed(aside.read_text(encoding="utf-8")) != owner:
                    with suppress(FileExistsError):
                        os.link(aside, self._file)
                aside.unlink()

    def _create(self) -> None:
        with os_errors(self._file):
            if is_local(self._file):
                # Linked, so that it appears with its content or not at all.
                beside = self._file.with_name(f"{FILE}.{self._own['token']}")
                beside.write_text(self._text(), encoding="utf-8")
                with suppress(FileExistsError):
                    os.link(beside, self._file)
                beside.unlink()
            else:
                self._file.write_text(self._text(), encoding="utf-8")
                time.sleep(SETTLE_S)
        owner = self._read()
        if owner is None:
            raise RecipeError(f"{self._file} cannot be read; remove it if no run uses this run.dir")
        if not self._is_own(owner):
            raise self._refused(owner)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s):
            owner = self._read()
            if owner is not None and not self._is_own(owner):
                # This process was suspended for so long that another run took over: it must not write any more.
                print(f"ndtrain: error: {self._refused(owner)}", file=sys.stderr, flush=True)
                os._exit(1)
            self._beats += 1
            with suppress(OSError), os_errors(self._file):
                replace_text(self._file, self._text())

    def _refused(self, owner: dict[str, Any]) -> RecipeError:
        return RecipeError(
            f'run.dir = "{self._file.parent}" is in use by process {owner.get("pid")} on {owner.get("host")}, since '
            f"{owner.get('since')}; wait until it ends, stop it, or choose another run.dir"
        )

    def _text(self) -> str:
        return json.dumps({**self._own, "beats": self._beats})

    def _exists(self) -> bool:
        with suppress(OSError), os_errors(self._file):
            return self._file.exists()
        return True  # a file system that does not answer

    def _is_own(self, owner: dict[str, Any] | None) -> bool:
        return owner is not None and owner.get("token") == self._own["token"]

    def _read(self) -> dict[str, Any] | None:
        """Return the lock's content; None if there is no lock, or if it is unreadable."""
        with suppress(OSError), os_errors(self._file):
            return _parsed(self._file.read_text(encoding="utf-8"))
        return None


def _parsed(text: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and type(found.get("pid")) is int:
            return found
    return None


def _machine() -> str:
    """Return what processes that can see each other's ids have in common (Linux; elsewhere the host's name)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when process `pid` started, which tells it from a later one of the same id; None if it is gone."""
    try:
        # The name in parentheses may hold spaces; the 20th field after it is the start in clock ticks since boot.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"
