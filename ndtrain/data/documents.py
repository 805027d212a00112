"""Read the documents in a file, one at a time: a text file is one, a row of JSON or parquet is one."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ndtrain.data.formats import PARQUET, begins_with_row, name_kind, opened, parquet, refuse_zero_bytes
from ndtrain.errors import DamagedError, RecipeError, one_line

KNOWN = (
    'ndtrain reads JSON lines and arrays of objects like {"text": "..."}, one such object, and one object of columns '
    'like {"text": ["...", "..."]}; a glob in data.path leaves other files out'
)
_CHUNK = 1 << 20
# Characters of a row, or of an object of columns, which is read at once.
_LONGEST = 1 << 28
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")  # files that were joined have marks inside


class Document(NamedTuple):
    """A document's UTF-8 bytes, where in its file it begins, and how many bytes of the file were read so far.

    `odd` names what a reader would want to know of how it was read: "json" for a text file that begins like JSON data,
    "surrogate" for half a character that became "?".
    """

    raw: bytes
    where: str
    done: int
    odd: str = ""


def documents_of(file: Path) -> Iterator[Document]:
    """Yield the documents of a file.

    Raises `DamagedError`, with file and line, for text that is not UTF-8, JSON that is not valid, and rows without a
    string under "text"; `RecipeError` for a kind of file that is not read.
    """
    with opened(file) as (stored, content):
        kind = name_kind(file)
        if kind == "parquet" or (kind is None and content.peek(4)[:4] == PARQUET):
            if content is not stored:
                raise RecipeError(f"{file} is parquet in a compressed file; unpack it, parquet compresses itself")
            yield from _of_parquet(file)
        elif kind == "json" or (kind is None and begins_with_row(content)):
            for text, line in _Json(content, file).texts():
                try:
                    yield Document(text.encode(), f"line {line}", stored.tell())
                except UnicodeEncodeError:  # half of a pair of surrogates has no UTF-8 form
                    yield Document(text.encode("utf-8", "replace"), f"line {line}", stored.tell(), "surrogate")
        else:
            odd = "json" if begins_with_row(content) else ""
            raw = content.read()
            refuse_zero_bytes(raw, file)
            _decode(raw, file)
            yield Document(raw, "line 1", stored.tell(), odd)


def _decode(raw: bytes, file: Path) -> None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, file, raw.count(b"\n", 0, error.start) + 1) from error


def _not_utf8(error: UnicodeDecodeError, file: Path, line: int) -> DamagedError:
    return DamagedError(
        f"{file}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}); convert the file, "
        f"from Latin-1 for example: iconv -f ISO-8859-1 -t UTF-8 {file.name}"
    )


def _of_parquet(file: Path) -> Iterator[Document]:
    """Yield the strings of the column "text", one batch of rows in memory."""
    table = parquet(file)
    import pyarrow  # installed: the file is open

    schema = table.schema_arrow
    names, size = schema.names, file.stat().st_size
    if names.count("text") != 1 or not _is_text(schema.field("text").type):
        kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DamagedError(f'{file}: the table has no column "text" of strings, its columns are {kinds}')
    row = 0
    try:
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise DamagedError(f'{file}, row {row}: "text" is null, not a string')
                yield Document(text.encode(), f"row {row}", size * row // table.metadata.num_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DamagedError(f"{file}, after row {row}: cannot be read: {one_line(error)}") from error


def _is_text(kind: Any) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(
        pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
    )


class _Json:
    """Reads JSON of any of the known shapes, of which it holds one row (and what was read beyond it)."""

    def __init__(self, content: io.BufferedReader[Any], file: Path):
        self.content, self.file = content, file
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.parser = json.JSONDecoder(object_pairs_hook=_object)
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def texts(self) -> Iterator[tuple[str, int]]:
        """Yield (text, its line) of each row. Raises `DamagedError` for another shape."""
        if self._next() == "[":
            for row, line in self._array():
                yield self._text(row, line), line
            return
        first = True
        while self._next():
            line = self.line
            row = self._value()
            end = self.line
            more = self._next()
            if more and self.line == end:
                raise self._damaged("more than one value on a line")
            if first and not more and (columns := _columns(row)) is not None:
                yield from ((text, line) for text in columns)
                return
            first = False
            yield self._text(row, line), line

    def _array(self) -> Iterator[tuple[Any, int]]:
        self._to(self.at + 1)
        more = self._next() != "]"
        while more:
            line = self.line
            yield self._value(), line
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

    def _text(self, row: Any, line: int) -> str:
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return row["text"]  # type: ignore[no-any-return]
        if not isinstance(row, dict):
            what = f"the row is {_name(row)}"
        elif "text" in row:
            what = f'"text" is {_name(row["text"])}'
        else:
            what = f"the keys are {', '.join(list(row)[:8]) or 'none'}"
        raise DamagedError(f'{self.file}, line {line}: not a JSON object with a string under "text": {what}. {KNOWN}')

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

    def _value(self) -> Any:
        """Return the value that begins here, and go on to its end."""
        while True:
            try:
                value, end = self.parser.raw_decode(self.buffer, self.at)
                self._to(end)
                return value
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
            raise _not_utf8(error, self.file, line) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" comes twice in one object')
    return row


def _columns(row: Any) -> list[str] | None:
    """Return the texts of an object of columns (lists of one length, or {row number: value}), None for another."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), list | dict):
        return None
    columns = list(row.values())
    if isinstance(row["text"], list):
        alike = all(isinstance(column, list) and len(column) == len(row["text"]) for column in columns)
        texts = row["text"]
    else:
        alike = all(isinstance(column, dict) and list(column) == list(row["text"]) for column in columns)
        alike = alike and all(key.isdecimal() for key in row["text"])
        texts = list(row["text"].values())
    return texts if alike and all(isinstance(text, str) for text in texts) else None


def _name(value: Any) -> str:
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names[type(value)]
