"""Read the rows of a file, one at a time: a text file is one, so is a row of JSON, CSV, parquet or Arrow.

The content of a file decides how it is read (see `formats`), and the first of its rows what they are (see `shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ndtrain.data.formats import ARROW_FILE, ARROW_STREAM, PARQUET, name_kind, opened
from ndtrain.data.row import Row, RowError
from ndtrain.data.rows.arrow import Arrow
from ndtrain.data.rows.csv import Csv
from ndtrain.data.rows.json import begins_with_row, rows_of_json
from ndtrain.data.rows.parquet import Parquet
from ndtrain.data.rows.text import rows_of_text
from ndtrain.data.shapes import SHAPES, Shape, columns_of, shape_of, used
from ndtrain.errors import DamagedError, RecipeError

__all__ = ["find_shape", "row_errors", "rows_of"]

_NO_COLUMNS: Mapping[str, str] = {}


class _Source(NamedTuple):
    """A file that is open: the fields of its first row ([] without rows), where that is, and all rows.

    All rows of a table have the same fields, of which `rows` may leave out those that are not wanted.
    """

    names: list[str]
    where: str
    rows: Callable[[Collection[str]], Iterator[Row]]
    table: bool = False


def rows_of(file: Path, *, shape: Shape = "text", columns: Mapping[str, str] = _NO_COLUMNS) -> Iterator[Row]:
    """Yield the rows of a file with its own names of fields, perhaps without those that `shape` has no use for.

    `fields_of` gives the fields of each, and refuses the rows of JSON that have another shape. Raises `DamagedError`,
    with file and line or row, for what cannot be read, and for a table without the columns of the shape; `RecipeError`
    for a kind of file that is not read.
    """
    with _open(file, columns) as source:
        wanted = columns_of(shape, columns)
        if source.table and source.names:
            with row_errors(file, source.where):
                shape_of(source.names, columns, shape)
                if twice := next((name for name in wanted if source.names.count(name) > 1), None):
                    raise RowError(f'it has two columns "{twice}"')
        for row in source.rows(wanted):
            yield row if source.table else row._replace(fields=used(row.fields, shape, columns))


def find_shape(
    files: Iterable[Path], *, format: str = "auto", columns: Mapping[str, str] = _NO_COLUMNS
) -> Shape | None:
    """Return the shape of the first row in `files`, in their order; `format`, where it names one. None without rows.

    Raises what `rows_of` raises, and `DamagedError` for a row of no shape, or of more than one.
    """
    if format != "auto":
        return next(shape for shape in SHAPES if shape == format)
    for file in files:
        with _open(file, columns) as source:
            if source.names:
                with row_errors(file, source.where):
                    return shape_of(source.names, columns)
    return None


@contextmanager
def row_errors(file: Path, where: str) -> Iterator[None]:
    """Raise a `RowError` of the body as a `DamagedError` that names `file` and where in it the row is."""
    try:
        yield
    except RowError as error:
        raise DamagedError(f"{', '.join(filter(None, (str(file), where)))}: {error}") from error


@contextmanager
def _open(file: Path, columns: Mapping[str, str]) -> Iterator[_Source]:
    with opened(file) as (stored, content):
        kind = _kind(file, content, columns)
        if kind in ("parquet", "arrow"):
            if content is not stored:
                raise RecipeError(f"{file} is {kind} in a compressed file; unpack it, {kind} compresses itself")
            table = (Parquet if kind == "parquet" else Arrow)(stored, file)
            yield _Source(table.names, "", table.rows, table=True)
        elif kind == "csv":
            sheet = Csv(content, stored, file, columns)
            yield _Source(sheet.names, "line 1", lambda wanted: sheet.rows(), table=True)
        elif kind == "json":
            rows = rows_of_json(content, stored, file, columns)
            first = next(rows, None)
            yield (
                _Source([], "", lambda wanted: rows)
                if first is None
                else _Source(list(first.fields), first.where, lambda wanted: chain([first], rows))
            )
        else:
            name = columns.get("text", "text")
            odd = "json" if begins_with_row(content, columns) else ""
            texts = rows_of_text(content, stored, file, name=name, odd=odd)
            yield _Source([name], "", lambda wanted: texts, table=True)


def _kind(file: Path, content: BufferedReader[Any], columns: Mapping[str, str]) -> str:
    """Return "parquet", "arrow", "csv", "json" or "text"."""
    start, named = content.peek(8)[:8], name_kind(file)
    if start.startswith((ARROW_FILE, ARROW_STREAM)):  # no text begins so
        return "arrow"
    if named is None:
        return "parquet" if start.startswith(PARQUET) else "json" if begins_with_row(content, columns) else "text"
    return named
