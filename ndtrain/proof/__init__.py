"""Check, by running the model on noise before its weights are read, that it computes the same on the mesh as alone.

Takes an engine whose parameters have memory but no meaningful values. Raises `PlanError`, or returns whether everything
could be checked.
"""

from __future__ import annotations

from typing import NamedTuple

from ndtrain.engine import Engine
from ndtrain.hf import extra_states
from ndtrain.proof.batch import check_same_batch
from ndtrain.proof.dropout import check_dropout
from ndtrain.proof.masks import check_masks
from ndtrain.proof.reference import ReferenceBlocks
from ndtrain.proof.sequence import try_sequence_parallel
from ndtrain.proof.tensor import check_tensor_parallel

__all__ = ["Proof", "ReferenceBlocks", "check_same_batch", "prove"]


class Proof(NamedTuple):
    """The outcome of `prove`: `known` is False if these weights gave no finite values to compare."""

    known: bool
    notes: tuple[str, ...]


def prove(engine: Engine, references: ReferenceBlocks | None) -> Proof:
    """Check each axis of the engine's mesh; `references` holds whole blocks if tp cuts them. Collective.

    Sequence parallelism that changes the model is switched off, with a note. Raises `PlanError` for any other failure.
    """
    notes = []
    with extra_states.kept(engine.model):
        if engine.sequence is not None and engine.sequence.enabled:
            note = try_sequence_parallel(engine, engine.sequence)
            notes += [note] if note is not None else []
        known = check_masks(engine) and (references is None or check_tensor_parallel(engine, references))
        if known and engine.sizes.tp > 1:
            check_dropout(engine)
    return Proof(known, tuple(notes))
