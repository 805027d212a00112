"""Recognize causal attention in what transformers asks a mask function for, without computing a mask."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor

from ndtrain.hf.compat import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_causal_mask_function,
)


class Causal(NamedTuple):
    """A query sees the keys of its document up to its own: with a `window` only the last so many, its own included."""

    window: int | None = None


class Packed(NamedTuple):
    """The positions and the documents, each `[B, S]`, that masks of packed rows are made from."""

    positions: Tensor
    documents: Tensor


def causal_attention(asked: Mapping[str, Any], packed: Packed | None = None) -> Causal | None:
    """Return the attention whose mask these arguments of a transformers mask function describe; None for any other.

    `packed` is what keeps documents apart in it, if anything does.
    """
    if asked.get("attention_mask") is not None:
        return None
    window = asked.get("local_size")
    plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if packed is not None:
        remapped = remap_positions_for_packed_sequence(plain, packed.positions)
        plain = and_masks(remapped, packed_sequence_mask_function(packed.documents))
    return Causal(window) if _same(asked["mask_function"], plain) else None


def _same(one: Any, other: Any) -> bool:
    """Return whether both are one object, equal numbers, or functions of the same code over the same variables."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, FunctionType):
        return one.__code__ is other.__code__ and _same(_variables(one), _variables(other))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, int) and one == other


def _variables(function: FunctionType) -> tuple[Any, ...]:
    return *(function.__defaults__ or ()), *(cell.cell_contents for cell in function.__closure__ or ())
