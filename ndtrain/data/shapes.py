"""Tell from the names of a row's fields what it is: text, chat or tokens. Pure.

`columns` maps our names of fields to the data's, as `data.columns` does: {"text": "content"}.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

from ndtrain.data.row import RowError
from ndtrain.recipe.data import COLUMNS

Shape = Literal["text", "chat", "tokens"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

# A row has one of these shapes if it has all fields of one of the shape's groups.
REQUIRED: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "chat": (("messages",), ("conversations",), ("prompt", "completion")),
    "tokens": (("input_ids",),),
}
# Fields for which a row is refused: they are read to be seen.
_REFUSED: dict[Shape, tuple[str, ...]] = {"chat": ("image", "images", "video", "videos", "audio", "audios")}
_NAMED = 12


def names_of(shape: Shape) -> tuple[str, ...]:
    """Return our names of all fields that rows of a shape may have."""
    return COLUMNS.get(shape) or ("input_ids", "labels", "loss_mask")


def shape_of(fields: Iterable[str], columns: Mapping[str, str], format: str = "auto") -> Shape:
    """Return the shape of rows with these fields, or check that they have that of `format`.

    With `columns` only a shape that has all their names counts. Raises `RowError` if there is no shape, or several.
    """
    given = list(fields)
    wanted = [shape for shape in SHAPES if format in ("auto", shape) and columns.keys() <= set(names_of(shape))]
    found = [shape for shape in wanted if _group(given, shape, columns)]
    if not found:
        raise _lacking(wanted, given, columns)
    if len(found) > 1:
        raise RowError(
            f"a row is {' and '.join(found)} at once: {listed(given)}; set data.format to one, {_quoted(found[0])} for "
            "example"
        )
    return found[0]


def fields_of(row: Mapping[str, Any], shape: Shape, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row's fields under our names, without those that have no meaning and those that are null.

    Raises `RowError` if one that the shape needs is missing.
    """
    own = {name: row.get(columns.get(name, name)) for name in names_of(shape)}
    found = {name: value for name, value in own.items() if value is not None}
    if any(found.keys() >= set(group) for group in _groups(shape, columns)):
        return found
    if group := _group(row, shape, columns):
        null = next(name for name in group if name not in found)
        raise RowError(f"{_quoted(columns.get(null, null))} is null")
    raise _lacking((shape,), row, columns)


def used(row: Mapping[str, Any], shape: Shape, columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return those of a row's fields that `columns_of` names; all of them if the row is not of this shape."""
    if not _group(row, shape, columns):
        return row
    return {name: row[name] for name in columns_of(shape, columns) if name in row}


def text_of(fields: Mapping[str, Any]) -> str:
    """Return the text of a row of text. Raises `RowError` if it is no string."""
    text = fields["text"]
    if not isinstance(text, str):
        raise RowError(f"its text is {kind_of(text)}, not a string")
    return text


def is_row(names: Iterable[str], columns: Mapping[str, str]) -> bool:
    """Return whether these are the fields of a row of some shape, with the names of `columns` or without."""
    given = set(names)
    return any(_group(given, shape, mapping) for shape in SHAPES for mapping in (columns, {}))


def key_names(columns: Mapping[str, str]) -> frozenset[str]:
    """Return the names in the data of all fields by which rows are told."""
    own = {name for groups in REQUIRED.values() for group in groups for name in group}
    return frozenset({*own, *(columns[name] for name in own & columns.keys())})


def columns_of(shape: Shape, columns: Mapping[str, str]) -> list[str]:
    """Return the names in the data of all fields that rows of a shape may have, or must not have."""
    return [*(columns.get(name, name) for name in names_of(shape)), *_REFUSED.get(shape, ())]


def listed(names: Iterable[str]) -> str:
    """Return the fields there are, for a message."""
    given = list(names)
    more = f", and {len(given) - _NAMED} others" if len(given) > _NAMED else ""
    return f"its fields are {', '.join(map(_quoted, given[:_NAMED])) or 'none'}{more}"


def kind_of(value: Any) -> str:
    """Return in words what a value of a row is."""
    names = {
        type(None): "null",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _groups(shape: Shape, columns: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of `shape`; only those with a name in `columns`, if there are such."""
    groups = REQUIRED[shape]
    return tuple(group for group in groups if columns.keys() & set(group)) or groups


def _group(given: Iterable[str], shape: Shape, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the first group of `shape` all of whose fields are given, () without one."""
    names = set(given)
    return next((group for group in _groups(shape, columns) if all(columns.get(n, n) in names for n in group)), ())


def _lacking(shapes: Collection[Shape], given: Iterable[str], columns: Mapping[str, str]) -> RowError:
    groups = [[_quoted(columns.get(n, n)) for n in group] for shape in shapes for group in _groups(shape, columns)]
    names = " or ".join(" and ".join(group) for group in groups)
    lacking = f"a row has no {names}: {listed(given)}"
    other = next((shape for shape in SHAPES if shape not in shapes and _group(given, shape, {})), None)
    if other is not None:
        return RowError(
            f"{lacking}; it is {other}, and the data is {next(iter(shapes))}, as data.format, data.columns or the "
            "first row says"
        )
    example = REQUIRED[next(iter(shapes))][0][0]
    return RowError(f'{lacking}; if one of them is meant, name it, as in data.columns.{example} = "content"')


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
