"""Print one message for all ranks of a run that fails, and give every rank the exit code of the failure."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ndtrain.errors import NdtrainError, Stopped
from ndtrain.storage.urls import without_secrets

# How long the store may take to answer.
STORE_S = 5.0
# Ranks that raise the same error do so within this time.
SAME_S = 1.5


def print_error(error: NdtrainError, prefix: str = "") -> None:
    """Print an error's lines for the user, the first of them behind `prefix`."""
    kind = "" if isinstance(error, Stopped) else "error: "
    sys.stdout.flush()
    for line in f"{prefix}{error}".splitlines() or [type(error).__name__]:
        print(f"ndtrain: {kind}{without_secrets(line)}", file=sys.stderr, flush=True)


def ranks_are(numbers: list[int]) -> str:
    """Return "rank 1 is" or "ranks 1, 2 are"."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown} is" if len(numbers) == 1 else f"ranks {shown} are"


class Report:
    """The message of the first rank that has one; the other ranks end with its exit code.

    `store` is shared by `world_size` ranks. Where it does not answer, each rank speaks for itself.
    """

    def __init__(self, store: Any, world_size: int, *, poll_s: float) -> None:
        self._store, self._world_size, self._poll_s = store, world_size, poll_s

    def make(self, say: Callable[[], int]) -> int:
        """Have `say` print the message and return the exit code, unless another rank does; return the code."""
        try:
            first = within(STORE_S, lambda: self._store.add("reporters", 1)) == 1
        except (RuntimeError, TimeoutError):
            first = True
        if first:
            code = say()
            with suppress(RuntimeError, TimeoutError):
                within(STORE_S, lambda: self._store.set("reported", str(code)))
        else:
            # A rank looks for the silent ones before it speaks.
            found = self.wait(4 * STORE_S + 5 * self._poll_s)
            code = 1 if found is None else found
        # The rank that serves the store leaves last, and the launcher ends no rank before it knows the code.
        self.count("told")
        if first:
            self.counts_all("told", 2 * self._poll_s + 1)
        return code

    def wait(self, seconds: float) -> int | None:
        """Return the exit code of the report, None if there is none within this time."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError, TimeoutError):
            while True:
                # Short requests: the thread that writes progress shares the connection.
                if (code := within(STORE_S, self.code)) is not None or time.monotonic() > end:
                    return code
                time.sleep(0.1)
        return None

    def code(self) -> int | None:
        """Return the exit code of the report, None without one."""
        return int(self._store.get("reported")) if self._store.check(["reported"]) else None

    def count(self, key: str) -> None:
        """Count this rank under `key`."""
        with suppress(RuntimeError, TimeoutError):
            within(STORE_S, lambda: self._store.add(key, 1))

    def counts_all(self, key: str, seconds: float = SAME_S) -> bool:
        """Return whether all ranks are counted under `key` within this time."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError, TimeoutError):
            while not (found := within(STORE_S, lambda: self._store.add(key, 0)) >= self._world_size):
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
            return bool(found)
        return False


def within(seconds: float, work: Callable[[], Any]) -> Any:
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
