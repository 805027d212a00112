"""Pass information from start to start of one launch: torchrun restarts the workers when one has failed.

RUN_DIR/.launch.json holds which launch this is, the step at which it began and whether it was stopped on request. It is
written only where torchrun may restart (`--max-restarts`).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ndtrain.errors import Stopped
from ndtrain.storage.paths import replace_text

FILE = ".launch.json"


@dataclass(frozen=True)
class Restarts:
    """The starts of the workers of one launch, of which this process belongs to the newest.

    `launch` identifies the launch, `known_first` is True if this start is certainly its first, and `max_restarts` is
    torchrun's `--max-restarts`.
    """

    run_dir: Path
    launch: str
    known_first: bool
    max_restarts: int

    @classmethod
    def of_process(cls, run_dir: Path) -> Restarts:
        """Return those that torchrun's variables describe; outside torchrun a launch has one start."""
        variable = os.environ.get
        # Each launch has another port for the launcher's own store. Without that store only the restart count can tell,
        # and not always: a node whose workers did not fail themselves counts no restart.
        agent_store = variable("TORCHELASTIC_USE_AGENT_STORE") == "True"
        launch = f"{variable('TORCHELASTIC_RUN_ID', '')} {variable('MASTER_ADDR', '')}:{variable('MASTER_PORT', '')}"
        known_first = not agent_store and variable("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        return cls(run_dir, launch, known_first, int(variable("TORCHELASTIC_MAX_RESTARTS", "0")))

    def _read(self) -> dict[str, Any] | None:
        """Return what earlier starts of this launch wrote, or None."""
        if self.known_first:
            return None
        try:
            record = json.loads((self.run_dir / FILE).read_text())
        except (OSError, ValueError):
            return None
        valid = isinstance(record, dict) and record.get("launch") == self.launch and type(record.get("step")) is int
        return record if valid else None

    def _write(self, **fields: Any) -> None:
        if self.max_restarts:
            replace_text(self.run_dir / FILE, json.dumps({"launch": self.launch, **fields}))

    def refuse_stopped(self) -> None:
        """Raise `Stopped` if this launch was stopped on request.

        torchrun restarts workers that ended with exit code 75 like those that failed.
        """
        earlier = self._read()
        if earlier is not None and earlier.get("stopped"):
            raise Stopped("this launch was stopped on request before its workers were restarted; start a new launch")

    def forget_others(self) -> None:
        """Remove the record of other launches, which may have the same name. For rank 0, once it owns the directory."""
        if self._read() is None:
            with suppress(OSError):
                (self.run_dir / FILE).unlink()

    @property
    def restarted(self) -> bool:
        """Whether an earlier start of this launch has begun to train."""
        return self._read() is not None

    def resume_from(self, requested: str, newest: int | None) -> str:
        """Return what to resume from: "auto" once this launch has saved a checkpoint, else the `requested` value.

        `newest` is the step of the newest checkpoint in the run directory.
        """
        earlier = self._read()
        return "auto" if earlier is not None and newest is not None and newest > earlier["step"] else requested

    def record_begin(self, step: int) -> None:
        """Record the step at which this launch begins, -1 for a new run, unless an earlier start did.

        For rank 0, once the run directory is known to be usable.
        """
        if self._read() is None:
            self._write(step=step)

    def record_stop(self) -> None:
        """Record that the launch was stopped, so that later starts end at once. For rank 0."""
        with suppress(OSError):
            self._write(step=-1, stopped=True)
