"""Read the rows of JSON: lines, an array of objects, one object, or one object of columns.

One row at a time is in memory (of an object of columns, all), and what was read beyond it.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ndtrain.data.formats import not_utf8, refuse_zero_bytes
from ndtrain.data.row import Row
from ndtrain.data.shapes import is_row, key_names, kind_of
from ndtrain.errors import DamagedError, RecipeError

_CHUNK = 1 << 20
# Characters of a row, or of an object of columns, which is read at once.
_LONGEST = 1 << 28
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")  # files that were joined have marks inside
_ROW = re.compile(rb"\s*(?:\[\s*)?(?=\{)")
_FIRST_KEY = re.compile(rb'\{\s*"([^"\\]*)"\s*:')  # of a row of which the probe has the beginning alone
_PROBE_BYTES = 1 << 16


def begins_with_row(content: io.BufferedReader[Any], columns: Mapping[str, str]) -> bool:
    """Return whether text begins with a row of JSON data: a whole object with the fields of one of the shapes."""
    start = content.peek(_PROBE_BYTES)[:_PROBE_BYTES]
    found = _ROW.match(start)
    if found is None:
        return False
    try:
        row, _ = json.JSONDecoder().raw_decode(start[found.end() :].decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        key = _FIRST_KEY.match(start, found.end())
        return len(start) >= _PROBE_BYTES and key is not None and key[1].decode("utf-8", "ignore") in key_names(columns)
    return is_row(row, columns)


def rows_of_json(
    content: io.BufferedReader[Any], stored: io.BufferedReader[Any], file: Path, columns: Mapping[str, str]
) -> Iterator[Row]:
    """Yield the rows of `content`; the position in `stored` tells the progress.

    Raises `DamagedError`, with file and line, for what is not valid JSON in UTF-8, or another shape of it.
    """
    for value, line, odd in _Json(content, file, columns).values():
        if not isinstance(value, dict):
            raise DamagedError(f"{file}, line {line}: the row is {kind_of(value)}, not a JSON object")
        yield Row(value, f"line {line}", stored.tell(), odd)


class _Value(NamedTuple):
    value: Any
    line: int
    odd: str


class _Json:
    """Reads JSON of any of the known shapes, of which it holds one value (and what was read beyond it)."""

    def __init__(self, content: io.BufferedReader[Any], file: Path, columns: Mapping[str, str]):
        self.content, self.file, self.columns = content, file, columns
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.parser = json.JSONDecoder(object_pairs_hook=_object)
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def values(self) -> Iterator[_Value]:
        """Yield the rows, and what stands in their place."""
        if self._next() == "[":
            yield from self._array()
            return
        first = True
        while self._next():
            value = self._value()
            end = self.line
            more = self._next()
            if more and self.line == end:
                raise self._damaged("more than one value on a line")
            if first and not more and (rows := _rows_of_columns(value.value, self.columns)) is not None:
                yield from (value._replace(value=row) for row in rows)
                return
            first = False
            yield value

    def _array(self) -> Iterator[_Value]:
        self._to(self.at + 1)
        more = self._next() != "]"
        while more:
            yield self._value()
            more = self._next() == ","
            if more:
                self._to(self.at + 1)
                if self._next() == "]":
                    raise self._damaged("not valid JSON (a comma before the end of the array)")
        if self._next() != "]":
            raise self._damaged("not valid JSON (expected a comma or the end of the array)")
        self._to(self.at + 1)
        if self._next():
            raise self._damaged("not valid JSON (data after the end of the array)")

    def _damaged(self, what: str, line: int | None = None) -> DamagedError:
        return DamagedError(f"{self.file}, line {line or self.line}: {what}")

    def _next(self) -> str:
        """Go on to the next character that is no white space and return it; "" at the end of the file."""
        while True:
            found = _SPACE.match(self.buffer, self.at)
            assert found is not None
            self._to(found.end())
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self._read(_CHUNK)

    def _value(self) -> _Value:
        """Return the value that begins here, and go on to its end."""
        line = self.line
        while True:
            try:
                value, end = self.parser.raw_decode(self.buffer, self.at)
                # Only escapes give half of a pair of surrogates, which has no UTF-8 form.
                escaped = any(self.buffer.find(half, self.at, end) >= 0 for half in ("\\ud", "\\uD"))
                whole = _without_surrogates(value) if escaped else value
                self._to(end)
                return _Value(whole, line, "" if whole is value else "surrogate")
            except json.JSONDecodeError as error:
                # A value that goes on beyond the buffer fails near its end, or as a string without one.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 4096
                if self.ended or not cut:
                    line = self.line + self.buffer.count("\n", self.at, error.pos)
                    raise self._damaged(f"not valid JSON ({error.msg})", line) from error
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"not valid JSON ({error})") from error
            if len(self.buffer) - self.at > _LONGEST:
                raise RecipeError(
                    f"{self.file}, line {self.line}: a row, or an object of columns, of more than {_LONGEST:,} "
                    "characters; write the data as JSON lines, or cut it into more rows"
                )
            self._read(max(_CHUNK, len(self.buffer) - self.at))

    def _to(self, at: int) -> None:
        self.line += self.buffer.count("\n", self.at, at)
        self.at = at

    def _read(self, size: int) -> None:
        chunk = self.content.read(size)
        refuse_zero_bytes(chunk, self.file)
        self.ended = not chunk
        rest = self.buffer[self.at :]
        try:
            self.buffer, self.at = rest + self.utf8.decode(chunk, final=self.ended), 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise not_utf8(error, self.file, line) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" comes twice in one object')
    return row


def _without_surrogates(value: Any) -> Any:
    """Return `value` with "?" for each half of a pair of surrogates; the same object if there is none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-8", "replace").decode()
    elif isinstance(value, list):
        new = [_without_surrogates(item) for item in value]
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    elif isinstance(value, dict):
        own = {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
        same = all(a is b and own[a] is value[b] for a, b in zip(own, value, strict=True))
        return value if same else own
    return value


def _rows_of_columns(value: Any, columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """Return the rows of an object of columns (lists of one length, or {row number: cell}), None for another.

    A list may also be one row's field: its messages are objects and its ids numbers, a column's cells texts or lists.
    """
    if not isinstance(value, dict):
        return None
    known = [column for name, column in value.items() if name in key_names(columns)]
    kind = type(known[0]) if known else None
    if kind not in (list, dict) or not all(isinstance(column, kind) for column in value.values()):
        return None
    if kind is dict:
        numbers = list(known[0])
        if not all(list(column) == numbers for column in value.values()) or not all(map(str.isdecimal, numbers)):
            return None
        value = {name: list(column.values()) for name, column in value.items()}
        known = [list(column.values()) for column in known]
    lengths = {len(column) for column in value.values()}
    if lengths != {len(known[0])} or lengths == {0}:
        return None
    if not all(isinstance(cell, str | list) for column in known for cell in column):
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
