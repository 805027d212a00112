"""Columns of a table of tokens: `input_ids`, which of them carry loss, and where documents begin in a row.

Names and meaning are those of transformers and TRL. `labels` are the ids themselves, -100 where no loss is taken;
`loss_mask`, `completion_mask` and `assistant_masks` are 0 there. With several of them a token carries loss where all
say so. `attention_mask` is 0 for padding. `seq_lengths` (of TRL's packed rows) and `position_ids` say where a row's
documents begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import BoolArray, IntArray
from ndtrain.data.tokens.block import damaged
from ndtrain.errors import DamagedError, RecipeError

IDS = "input_ids"
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
_READ = ("labels", *_MASKS, "attention_mask", "seq_lengths", "position_ids")
_IGNORE = -100


class Rows(NamedTuple):
    """Rows of a table in a row: ids `[n]`, positions at which documents begin, and which tokens carry loss `[n]`.

    `unchanged` says whether `ids` are the column's own values, without padding that was cut off.
    """

    ids: npt.NDArray[Any]
    starts: IntArray
    loss: BoolArray | None
    unchanged: bool


class Columns:
    """The columns of a table that say something of its tokens. Raises `RecipeError` if there are no tokens."""

    def __init__(self, schema: Any, file: Path):
        import pyarrow

        def has(name: str, *kinds: Any) -> bool:
            if schema.names.count(name) != 1:
                return False
            kind = schema.field(name).type
            lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
            return any(test(kind) for test in lists) and any(test(kind.value_type) for test in kinds)

        self.file = file
        shown = ", ".join(f"{field.name} ({field.type})" for field in schema)[:500]
        if not has(IDS, pyarrow.types.is_integer):
            raise RecipeError(f'{file}: the table has no column "{IDS}" of lists of integers, its columns are {shown}')
        self.names = [IDS]
        for name in _READ:
            if name not in schema.names:
                continue
            masks = (pyarrow.types.is_integer, pyarrow.types.is_boolean)
            if not has(name, *(masks if name in (*_MASKS, "attention_mask") else masks[:1])):
                raise RecipeError(
                    f'{file}: the column "{name}" holds no lists of integers, its columns are {shown}; leave it out'
                )
            self.names.append(name)
        self.ignored = tuple(sorted({*schema.names} - {*self.names}))

    def rows(self, batch: Any, before: int) -> Rows:
        """Return the rows of a record batch that comes after `before` rows. Raises `DamagedError`, with the row."""
        flat = {name: self._flat(batch.column(batch.schema.get_field_index(name)), name, before) for name in self.names}
        ids, bounds = flat.pop(IDS)
        lengths = flat.pop("seq_lengths", None)
        for name, (_, own) in flat.items():
            wrong = np.diff(own) != np.diff(bounds)
            if wrong.any():
                row = int(wrong.argmax())
                raise self._at(
                    before + row,
                    f'"{name}" has {own[row + 1] - own[row]:,} values, "{IDS}" has {bounds[row + 1] - bounds[row]:,}',
                )
        other = {name: values for name, (values, _) in flat.items()}
        starts = bounds[:-1] if lengths is None else self._packed(*lengths, bounds, before)
        if "position_ids" in other:
            starts = np.union1d(starts, self._reset(other["position_ids"], bounds, before))
        loss = self._loss(ids, other, bounds, before)
        keep = (
            self._bits(other["attention_mask"], "attention_mask", bounds, before) if "attention_mask" in other else None
        )
        if keep is None or keep.all():
            return Rows(ids, starts, loss, unchanged=True)
        self._one_run(keep, bounds, before)
        kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        return Rows(ids[keep], kept[starts], None if loss is None else loss[keep], unchanged=False)

    def _loss(
        self, ids: npt.NDArray[Any], other: dict[str, npt.NDArray[Any]], bounds: IntArray, before: int
    ) -> BoolArray | None:
        loss: BoolArray | None = None
        for name in _MASKS:
            if name in other:
                bits = self._bits(other[name], name, bounds, before)
                loss = bits if loss is None else loss & bits
        if "labels" in other:
            labels = other["labels"]
            targets: BoolArray = labels != _IGNORE
            wrong = targets & (labels != ids)
            if wrong.any():
                place = int(wrong.argmax())
                row = _row(bounds, place)
                own = slice(int(bounds[row]), int(bounds[row + 1]))
                why = f"labels are the ids themselves, or {_IGNORE} where no loss is taken"
                if np.array_equal(labels[own][:-1], ids[own][1:]):
                    why = "they are shifted by one, which the trainer does itself: store them unshifted"
                raise self._at(
                    before + row,
                    f'"labels" has {labels[place]} where "{IDS}" has {ids[place]} (token {place - own.start:,}); {why}',
                )
            loss = targets if loss is None else loss & targets
        return loss

    def _flat(self, array: Any, name: str, before: int) -> tuple[npt.NDArray[Any], IntArray]:
        """Return the values of all lists, one after another, and the bounds `[rows + 1]` of each."""
        import pyarrow

        if array.null_count:
            raise self._at(before + int(np.argmax(array.is_null().to_numpy(False))), f'"{name}" is null')
        if pyarrow.types.is_fixed_size_list(array.type):
            bounds = np.arange(len(array) + 1, dtype=np.int64) * array.type.list_size
            values = array.flatten()
        else:
            bounds = array.offsets.to_numpy().astype(np.int64)
            values = array.values.slice(bounds[0], bounds[-1] - bounds[0])
            bounds -= bounds[0]
        if values.null_count:
            row = _row(bounds, int(np.argmax(values.is_null().to_numpy(False))))
            raise self._at(before + row, f'"{name}" has a null')
        return values.to_numpy(zero_copy_only=not pyarrow.types.is_boolean(values.type)), bounds

    def _bits(self, values: npt.NDArray[Any], name: str, bounds: IntArray, before: int) -> BoolArray:
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            place = int(wrong.argmax())
            raise self._at(before + _row(bounds, place), f'"{name}" has {values[place]}, expected 0 or 1')
        return values.astype(np.bool_)

    def _one_run(self, keep: BoolArray, bounds: IntArray, before: int) -> None:
        """Raise `DamagedError` for a row with padding between its tokens."""
        begins = keep.copy()
        begins[1:] &= ~keep[:-1]
        firsts = bounds[:-1][np.diff(bounds) > 0]
        begins[firsts] = keep[firsts]
        runs = np.diff(np.concatenate([[0], np.cumsum(begins)])[bounds])
        if (runs > 1).any():
            raise self._at(
                before + int((runs > 1).argmax()),
                '"attention_mask" has zeros between ones; only padding can be cut off',
            )

    def _packed(self, lengths: npt.NDArray[Any], own: IntArray, bounds: IntArray, before: int) -> IntArray:
        """Return where documents begin in rows that list their documents' lengths."""
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        wrong = np.diff(ends[own]) != np.diff(bounds)
        if wrong.any() or (lengths < 0).any():
            raise self._at(before + int(wrong.argmax()), f'"seq_lengths" does not add up to the tokens of "{IDS}"')
        return np.unique(ends[:-1])

    def _reset(self, positions: npt.NDArray[Any], bounds: IntArray, before: int) -> IntArray:
        """Return where position ids begin again at 0."""
        rises = np.zeros(len(positions), np.bool_)
        rises[1:] = positions[1:] == positions[:-1].astype(np.int64) + 1
        rises[bounds[:-1][np.diff(bounds) > 0]] = False
        wrong = ~rises & (positions != 0)
        if wrong.any():
            place = int(wrong.argmax())
            raise self._at(
                before + _row(bounds, place),
                f'"position_ids" has {positions[place]} where it does not go on; each document counts from 0 by one',
            )
        return np.flatnonzero(positions == 0)

    def _at(self, row: int, what: str) -> DamagedError:
        return damaged(self.file, f"row {row + 1:,}: {what}")


def _row(bounds: IntArray, place: int) -> int:
    return int(np.searchsorted(bounds, place, side="right")) - 1
