"""Write steps and evaluations as lines of metrics.jsonl."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from ndtrain.loggers.logger import Logger
from ndtrain.loggers.metrics import Metrics
from ndtrain.storage.paths import is_local, os_errors


class JsonLines:
    """Append one line a step or evaluation to metrics.jsonl; a step trained again after a crash is appended again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            # A line cut short by a crash must not swallow the next one.
            with path.open("ab") as file:
                file.write(b"\n")

    def write(self, metrics: Metrics) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.as_dict(), allow_nan=False) + "\n")

    def close(self) -> None:
        pass


class UploadedLines:
    """Write metrics.jsonl to an object store, which cannot append: the whole file, at most every `EVERY_S` seconds."""

    EVERY_S = 30.0

    def __init__(self, path: Path):
        self.path = path
        with os_errors(path):
            self._lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._uploaded = time.monotonic()

    def write(self, metrics: Metrics) -> None:
        self._lines.append(json.dumps(metrics.as_dict(), allow_nan=False))
        if time.monotonic() - self._uploaded > self.EVERY_S:
            with suppress(OSError):  # the next upload has these lines too
                self._upload()

    def close(self) -> None:
        self._upload()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        with os_errors(self.path):
            self.path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")


def json_lines(path: Path) -> Logger:
    """Return the logger for `path`, in a local directory or in an object store."""
    return JsonLines(path) if is_local(path) else UploadedLines(path)
