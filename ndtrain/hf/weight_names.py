"""Name the tensors of a model, and map saved ones to them by transformers' conversions (core_model_loading, 5.23)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ndtrain.hf import extra_states
from ndtrain.hf.compat import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from ndtrain.hf.model import tied_keys

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer once: the state dict without tied aliases and extra states."""
    aliases = tied_keys(model)
    return {
        k: v for k, v in model.state_dict(keep_vars=True).items() if k not in aliases and not extra_states.is_extra(k)
    }


class Named(NamedTuple):
    """A saved tensor, and the model's tensor that it becomes, alone or (if converted) together with others."""

    key: str
    name: str
    pattern: str | None  # the converter's pattern that the key matches
    converter: Any  # None if the tensor is only renamed


def kinds(mapping: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split transformers' mapping into renamings and converters."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def named(
    model: PreTrainedModel, keys: Iterable[str], state: Mapping[str, Tensor], mapping: Sequence[Any]
) -> list[Named]:
    """Return what each saved key becomes in `model` with this `state`, in transformers' order.

    A returned name need not be in `state`.
    """
    renamings, converters = kinds(mapping)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, dict(state)
    found = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        found.append(Named(key, name, pattern, by_pattern[pattern] if pattern is not None else None))
    return found
