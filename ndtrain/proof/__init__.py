"""Check, by running the model on noise before its weights are read, that it computes the same on the mesh as alone.

Takes an engine whose parameters have memory but no meaningful values. The model computes in float32 meanwhile, whatever
the run computes in, so that no error hides in rounding; then it is run once more in the run's own dtype. Raises
`PlanError`, or returns whether everything could be checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from ndtrain.engine import Engine
from ndtrain.errors import PlanError
from ndtrain.hf import extra_states
from ndtrain.hf.attention_functions import attention_computes_in
from ndtrain.proof.batch import check_same_batch
from ndtrain.proof.dropout import check_dropout
from ndtrain.proof.eval_mode import check_eval_mode
from ndtrain.proof.masks import check_masks, try_by_documents, why_masks
from ndtrain.proof.noise import check_recomputation
from ndtrain.proof.parts import check_parts
from ndtrain.proof.record import Record, identity, recall, remember
from ndtrain.proof.reference import References
from ndtrain.proof.sequence import FLOAT32, LOW, Limits, check_context_parallel, try_sequence_parallel
from ndtrain.torch_compat import fsdp_in_float32

__all__ = ["Proof", "Record", "References", "check_same_batch", "identity", "prove", "recall", "remember"]


class Proof(NamedTuple):
    """The outcome of `prove`: `known` is False if these weights gave no finite values to compare."""

    known: bool
    notes: tuple[str, ...]


def prove(engine: Engine, references: References | None) -> Proof:
    """Check each axis of the engine's mesh; `references` holds the parts of the whole model, None on one rank.

    Sequence parallelism that changes the model is switched off, with a note. Raises `PlanError` for any other failure.
    Collective.
    """
    notes = list(filter(None, [why_masks(engine)]))
    sequence, low = engine.sequence, engine.plan.low_precision

    def keep_or_drop_sequence_parallelism(limits: Limits) -> None:
        if sequence is not None and sequence.enabled and (note := try_sequence_parallel(engine, sequence, limits)):
            notes.append(note)

    def keep_or_drop_attention_by_documents(*, low: bool) -> None:
        documents, context = engine.documents, engine.context
        # A ring keeps documents apart itself, and is compared with the model on whole sequences.
        whole = context.off() if context is not None and engine.plan.cp == "ring" else nullcontext()
        if documents is not None and documents.enabled:
            with whole:
                note = try_by_documents(engine, documents, low=low)
            notes.extend([note] if note else [])

    modules = _modules(engine)
    with extra_states.kept(engine.model):
        with _float32(engine):
            keep_or_drop_sequence_parallelism(FLOAT32)
            keep_or_drop_attention_by_documents(low=False)
            known = check_masks(engine, low=False) and (references is None or check_parts(engine, references))
            if references is None:
                check_recomputation(engine)  # which parts are checked with
            if known and engine.context is not None:
                check_context_parallel(engine)
            if known and engine.sizes.tp > 1:
                check_dropout(engine)
            if known and engine.recipe.eval is not None:
                check_eval_mode(engine)
        if known and low:
            # Its kernels are others, whose rounding hides small errors: only what is far off is found.
            keep_or_drop_sequence_parallelism(LOW)
            keep_or_drop_attention_by_documents(low=True)
            check_masks(engine, low=True)
            check_recomputation(engine, low=True)
    if changed := [name for name, kind in _modules(engine).items() if modules.get(name) != kind]:
        raise PlanError(
            f"{engine.plan.model_type} replaces its module {changed[0]} while it runs on a short row, so that what was "
            "checked may not be what trains; report it"
        )
    return Proof(known, tuple(notes))


def _modules(engine: Engine) -> dict[str, type]:
    return {name: type(module) for name, module in engine.model.named_modules()}


@contextmanager
def _float32(engine: Engine) -> Iterator[None]:
    """Let the engine's model compute in float32 inside. Flash attention, which cannot, gets what it computes in."""
    plan = engine.plan
    low = next((unit.param_dtype for unit in (*plan.units, plan.root) if unit.param_dtype != "float32"), "float32")
    with fsdp_in_float32(engine.model), attention_computes_in(engine.recipe.model.attn, getattr(torch, low)):
        yield
