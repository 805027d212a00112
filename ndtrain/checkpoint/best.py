"""The file `best` of a run directory: it names the checkpoint of the lowest held-out loss, which is never pruned."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ndtrain.storage.paths import os_errors, replace_text

FILE = "best"


def name(checkpoint: Path) -> None:
    """Let the file name `checkpoint`, RUN_DIR/checkpoints/step-..., by its path from the run directory."""
    root = checkpoint.parent
    if named(root) != checkpoint.name:
        replace_text(root.parent / FILE, f"{root.name}/{checkpoint.name}\n", durable=True)


def named(root: Path) -> str | None:
    """Return the name of the checkpoint in `root`, RUN_DIR/checkpoints, that the file names; None without one."""
    file = root.parent / FILE
    with suppress(OSError, UnicodeDecodeError), os_errors(file):
        return file.read_text(encoding="utf-8").strip().removeprefix(f"{root.name}/") or None
    return None
