"""What an engine must show on noise before weights are read: asked of the model itself, not read from its source.

It takes an engine whose parameters have memory and contents that mean nothing; it raises a `PlanError`, or returns
whether all was shown.
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
    """Whether the model does on this mesh what it does alone; `known` is False where these weights cannot tell."""

    known: bool
    notes: tuple[str, ...]


def prove(engine: Engine, references: ReferenceBlocks | None) -> Proof:
    """Prove each axis that the engine's mesh has; `references` are whole blocks where tp cuts them. Collective.

    Sequence parallelism that changes the model is switched off, with a note. Raises `PlanError` for all else.
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
