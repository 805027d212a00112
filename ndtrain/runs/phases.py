"""The phases of a run, each with the recipe's key for the time that it may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ndtrain.recipe import RunSection


class Phase(NamedTuple):
    """A part of a run that all ranks go through together.

    `key` names its limit in [run]. With `by_progress` the limit is on the time without progress, since the whole takes
    as long as the data or the model is large; otherwise it is on the phase, or in training on a forward and backward.
    """

    name: str
    key: str
    by_progress: bool = False

    def limit_s(self, section: RunSection) -> float:
        """Return its limit in seconds."""
        limit: float = getattr(section, self.key)
        return limit


RENDEZVOUS = Phase("rendezvous", "rendezvous_timeout_s")
START = Phase("start", "start_timeout_s")  # between the other phases
TOKENIZE = Phase("tokenizing", "read_timeout_s", by_progress=True)
FIND = Phase("looking for a checkpoint", "read_timeout_s", by_progress=True)
MESHES = Phase("building the meshes", "start_timeout_s")
NOISE = Phase("filling the model with noise", "start_timeout_s")
PROOF = Phase("checking the model on noise", "start_timeout_s")
READ = Phase("reading the weights", "read_timeout_s", by_progress=True)
RESUME = Phase("reading the checkpoint", "read_timeout_s", by_progress=True)
STEP = Phase("step", "step_timeout_s")
EVALUATE = Phase("evaluating", "step_timeout_s")
SAVE = Phase("saving", "save_timeout_s", by_progress=True)

PHASES = (RENDEZVOUS, START, TOKENIZE, FIND, MESHES, NOISE, PROOF, READ, RESUME, STEP, EVALUATE, SAVE)
