"""Let a run outlive its output: a reader that goes away, or a full disk under a log, is no reason to stop training."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class _Output:
    """Passes text on to `stream`, and to nowhere once that cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # What is left in the stream's buffer goes there too, when Python flushes it at its end.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_output() -> None:
    """Let nothing that is printed from now on raise."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)  # type: ignore[assignment]
