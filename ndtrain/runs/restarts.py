"""What the attempts of one launch tell each other: torchrun starts the workers again where one has failed.

RUN_DIR/.launch.json says which launch this is, at which step it began and whether it was stopped on request. It is
there only where torchrun may restart (`--max-restarts`).
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
    """One attempt of `launch`, which makes up to `restarts` more; `first` where it is known to be the first."""

    run_dir: Path
    launch: str
    first: bool
    restarts: int

    @classmethod
    def of_process(cls, run_dir: Path) -> Restarts:
        """As torchrun's variables say; outside it there is one attempt."""
        of = os.environ.get
        # The port of the launcher's own store is another with each launch. Elsewhere the count has to tell; it does not
        # always: a node whose workers did not fail themselves counts no restart.
        own_store = of("TORCHELASTIC_USE_AGENT_STORE") == "True"
        launch = f"{of('TORCHELASTIC_RUN_ID', '')} {of('MASTER_ADDR', '')}:{of('MASTER_PORT', '')}"
        first = not own_store and of("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        return cls(run_dir, launch, first, int(of("TORCHELASTIC_MAX_RESTARTS", "0")))

    def _before(self) -> dict[str, Any] | None:
        """What earlier attempts of this launch have written."""
        if self.first:
            return None
        try:
            said = json.loads((self.run_dir / FILE).read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(said, dict) and said.get("launch") == self.launch and type(said.get("step")) is int
        return said if known else None

    def _write(self, **said: Any) -> None:
        if self.restarts:
            replace_text(self.run_dir / FILE, json.dumps({"launch": self.launch, **said}))

    def open(self, *, is_main: bool) -> None:
        """Forget other launches, whose names may be the same. Raises `Stopped` where this one is stopped already.

        torchrun restarts workers that have ended with 75 as it does those that have failed.
        """
        before = self._before()
        if before is None and is_main:
            with suppress(OSError):
                (self.run_dir / FILE).unlink()
        if before is not None and before.get("stopped"):
            raise Stopped("stopped on request in an earlier attempt of this launch")

    def resume(self, asked: str, newest: int | None) -> str:
        """What to resume from: "auto" once this launch has a checkpoint of its own, whatever the recipe begins with."""
        before = self._before()
        return "auto" if before is not None and newest is not None and newest > before["step"] else asked

    def begin(self, step: int) -> None:
        """Rank 0: this launch has found nothing wrong with the run directory and begins at `step`, -1 for anew."""
        if self._before() is None:
            self._write(step=step)

    def stopped(self) -> None:
        """Rank 0: the launch is stopped, and its further attempts have nothing to do."""
        with suppress(OSError):
            self._write(step=-1, stopped=True)
