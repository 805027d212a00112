"""Which tensor of a model a saved one becomes, by transformers' weight conversions (core_model_loading, 5.23)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ndtrain.hf.compat import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Named(NamedTuple):
    """A saved tensor, what it becomes (with others, where it is converted), and how."""

    key: str
    name: str
    pattern: str | None  # of the converter, that the key matches
    converter: Any  # None where the tensor is only renamed


def kinds(mapping: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters apart."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def named(
    model: PreTrainedModel, keys: Iterable[str], state: Mapping[str, Tensor], mapping: Sequence[Any]
) -> list[Named]:
    """What each saved key becomes in the model of this `state`, in transformers' order; a name may be of no tensor."""
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
