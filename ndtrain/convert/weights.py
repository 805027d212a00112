"""Runs transformers' weight conversions (core_model_loading, 5.23) on one group of tensors at a time, both ways.

`save_pretrained` and `from_pretrained` convert a whole state dict. Here the same transforms first run on meta tensors,
which gives the groups and the outputs of each, and later on the values of one group.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ndtrain.errors import DamagedError
from ndtrain.hf.compat import (
    PrefixChange,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    get_model_conversion_mapping,
)
from ndtrain.hf.model import tied_keys
from ndtrain.hf.weight_names import kinds, named
from ndtrain.layout import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rows(NamedTuple):
    """Names rows low..high of the tensor `source` seen as `[rows, last dim]`."""

    source: str
    low: int
    high: int


class Group(NamedTuple):
    """Describes tensors that are converted together."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]  # in the order in which the transform gives them
    name: str
    patterns: tuple[str, ...]  # of the transform, for each source
    transform: Any  # None where the tensor is only renamed

    def run(self, tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Convert `tensors` and return the results by name; empties `tensors`, so that memory is freed early."""
        if self.transform is None:
            return {self.outputs[0]: tensors.pop(self.sources[0])}
        values = _run(self, tensors, model)
        return dict(zip(self.outputs, values.values(), strict=True))

    def moved(self, shapes: Mapping[str, Ints], model: PreTrainedModel) -> dict[str, list[Rows]] | None:
        """Return the rows of the sources that make up each output, in order; None if the transform does more than that.

        Runs the transform on row numbers in place of rows, for two different numberings: arithmetic on the values
        would treat them differently.
        """
        if self.transform is None or any(len(shapes[key]) < 2 for key in self.sources):
            return None
        counts = [math.prod(shapes[key][:-1]) for key in self.sources]
        starts = [
            2 * sum(counts[:i]) for i in range(len(counts))
        ]  # with gaps, so that no run continues in the next source
        found = []
        for scale, shift in ((1, 0), (3, 7)):
            numbered = {
                key: (torch.arange(start, start + count) * scale + shift).reshape(*shapes[key][:-1], 1)
                for key, start, count in zip(self.sources, starts, counts, strict=True)
            }
            try:
                found.append(list(_run(self, numbered, model).values()))
            except (RuntimeError, ValueError, IndexError):
                return None
        widths = {shapes[key][-1] for key in self.sources}
        kept = all(v.dtype == torch.int64 and v.shape[-1:] == (1,) for v in found[0]) and len(widths) == 1
        if not kept or not all(torch.equal(3 * a + 7, b) for a, b in zip(*found, strict=True)):
            return None
        return {key: self._rows(value.reshape(-1), starts) for key, value in zip(self.outputs, found[0], strict=True)}

    def _rows(self, numbers: Tensor, starts: list[int]) -> list[Rows]:
        ends = torch.cat([(numbers.diff() != 1).nonzero().flatten() + 1, torch.tensor([len(numbers)])]).tolist()
        rows, begin = [], 0
        for end in ends if len(numbers) else ():
            first = int(numbers[begin])
            i = bisect.bisect_right(starts, first) - 1
            rows.append(Rows(self.sources[i], first - starts[i], first - starts[i] + end - begin))
            begin = end
        return rows


def _run(group: Group, tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    for key, pattern in zip(group.sources, group.patterns, strict=True):
        group.transform.add_tensor(group.name, key, pattern, tensors.pop(key))
    with torch.no_grad():
        made = group.transform.convert(group.name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _grouped(found: Iterable[tuple[str, str, str | None, Any]]) -> list[Group]:
    """Group (source, name of the group, pattern that matched, transform), in order; the groups have no outputs yet."""
    groups: dict[str, Group] = {}
    for source, name, pattern, transform in found:
        before = groups.get(name)
        if before is None:
            groups[name] = Group((source,), (), name, (pattern or source,), transform and copy.deepcopy(transform))
        else:
            groups[name] = before._replace(
                sources=(*before.sources, source), patterns=(*before.patterns, pattern or source)
            )
    return list(groups.values())


def to_hub(model: PreTrainedModel, state: Mapping[str, Tensor]) -> tuple[list[Group], dict[str, Tensor]]:
    """Return the groups in which `save_pretrained` converts the meta tensors `state`, and its outputs in its order."""
    # As revert_weight_conversion does for a model that from_pretrained has not made.
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    mapping = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    if not mapping:
        return [Group((key,), (key,), key, (key,), None) for key in state], dict(state)
    reverse = [entry.reverse_transform() for entry in mapping[::-1]]
    renamings, converters = kinds(reverse)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: list[tuple[str, str, str | None, Any]] = []
    for key in sorted(state, key=dot_natural_key):
        name, pattern = apply_converters(key, converters)
        if pattern is None:
            found.append((key, apply_renamings(key, renamings), None, None))
        else:
            found.append((key, name, pattern, by_pattern[pattern]))
    groups: list[Group] = []
    saved: dict[str, Tensor] = {}
    for group in _grouped(found):
        if group.transform is None:
            made = {group.name: state[group.sources[0]]}
        else:
            made = _run(group, {key: state[key] for key in group.sources}, model)
            made = {apply_renamings(key, renamings): value for key, value in made.items()}
        groups.append(group._replace(outputs=tuple(made)))
        saved |= made
    return groups, saved


def from_hub(
    model: PreTrainedModel, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[list[Group], list[str]]:
    """Return the groups that convert the hub's tensors `state` (meta) to those of `wanted`, and the unused keys.

    A group without a transform has one output, and a source for each copy that is saved of it. Raises `DamagedError` if
    the result lacks a tensor or one has another shape.
    """
    all_of_it, aliases = model.state_dict(), tied_keys(model)
    found: list[tuple[str, str, str | None, Any]] = []
    unused = []
    for entry in named(model, state, all_of_it, get_model_conversion_mapping(model)):
        if entry.name in all_of_it:
            # A tied weight may be saved under any of its names; copies of it become one group.
            name = aliases.get(entry.name, entry.name) if entry.converter is None else entry.name
            found.append(entry._replace(name=name))
        else:
            unused.append(entry.key)
    groups: list[Group] = []
    found_keys: set[str] = set()
    for group in _grouped(found):
        if group.transform is None:
            made = {group.name: state[group.sources[0]]}
        else:
            try:
                made = _run(group, {key: state[key] for key in group.sources}, model)
            except Exception as error:
                raise DamagedError(
                    f"{group.sources[0]} and the tensors of its group cannot be converted to {group.name}"
                ) from error
        for key, value in made.items():
            if key in wanted and value.shape != wanted[key].shape:
                saved = group.sources[0] if group.transform is None else key
                raise DamagedError(
                    f"{saved} has shape {tuple(value.shape)}, the config says {tuple(wanted[key].shape)}"
                )
        found_keys |= made.keys()
        groups.append(group._replace(outputs=tuple(made)))
    missing = [key for key, value in wanted.items() if key not in found_keys and value.numel()]
    if missing:
        raise DamagedError(f"{len(missing)} of the model's {len(wanted)} tensors missing, first {missing[0]}")
    return groups, unused
