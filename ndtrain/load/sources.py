"""Find where each weight of a model is in its files, from their headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ndtrain.hf import extra_states
from ndtrain.hf.compat import get_model_conversion_mapping
from ndtrain.hf.files import ModelFiles
from ndtrain.hf.model import tied_keys
from ndtrain.hf.tied import refuse_other_values
from ndtrain.hf.weight_names import Named, named
from ndtrain.recipe import Recipe
from ndtrain.storage.pieces import converts
from ndtrain.storage.stored import of_piece
from ndtrain.storage.table import Piece
from ndtrain.torch_compat import class_before_fsdp

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sources(NamedTuple):
    """Where a model's weights are saved, and in which form."""

    pieces: Mapping[str, Piece]  # by saved key
    direct: dict[str, Piece]  # by FQN, saved in the model's own form; of a tied weight one copy
    others: list[Named]  # that transformers converts, casts or does not know
    copies: dict[str, list[str]]  # {FQN: saved keys} of weights that are saved more than once
    mapping: Sequence[Any]  # transformers' conversions


def sources(model: PreTrainedModel, files: ModelFiles) -> Sources:
    """Return where the weights of `model` are in safetensors files. Raises `DamagedError`."""
    pieces = {key: piece for key, piece in files.pieces().items() if not extra_states.is_extra(key)}
    with _own_classes(model):
        mapping = get_model_conversion_mapping(model) or []
    direct, others, copies = _apart(model, pieces, mapping)
    return Sources(pieces, direct, others, copies, mapping)


def refuse_copies(found: Sources, recipe: Recipe, *, part: int = 0, parts: int = 1) -> None:
    """Raise `DamagedError` if a weight is saved more than once with different values.

    With `parts`, this rank compares one part of each.
    """
    saved = {key: of_piece(found.pieces[key]) for keys in found.copies.values() for key in keys}
    refuse_other_values(found.copies, saved, recipe.model.name, part=part, parts=parts)


def _apart(
    model: PreTrainedModel, pieces: Mapping[str, Piece], mapping: Sequence[Any]
) -> tuple[dict[str, Piece], list[Named], dict[str, list[str]]]:
    """Split `pieces` into {FQN: piece} of those in the model's own form (tied weights by either name) and others.

    Also return the keys of each FQN that has several.
    """
    state, aliases = model.state_dict(keep_vars=True), tied_keys(model)
    keys: dict[str, list[str]] = defaultdict(list)
    direct: dict[str, Piece] = {}
    others = []
    for saved in named(model, pieces, state, mapping):
        piece, tensor = pieces[saved.key], state.get(saved.name)
        name = aliases.get(saved.name, saved.name)
        if saved.converter is None and tensor is not None:
            keys[name].append(saved.key)
        if saved.converter is not None or tensor is None or not converts(piece.dtype, tensor.dtype):
            others.append(saved)
        else:
            direct.setdefault(name, piece)
    return direct, others, {name: found for name, found in keys.items() if len(found) > 1}


@contextmanager
def _own_classes(model: nn.Module) -> Iterator[None]:
    """Give modules their classes from before FSDP inside: transformers looks up conversions by class name."""
    wrapped = {module: type(module) for module in model.modules() if isinstance(module, FSDPModule)}
    for module in wrapped:
        module.__class__ = class_before_fsdp(module)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, given in wrapped.items():
            module.__class__ = given
