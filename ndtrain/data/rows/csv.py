"""Read the rows of a CSV or TSV file with a header, as RFC 4180 has it; all fields are strings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ndtrain.data.formats import not_utf8, refuse_zero_bytes
from ndtrain.data.row import Row
from ndtrain.data.shapes import is_row
from ndtrain.errors import DamagedError, RecipeError

# Bytes of a line, and characters of a field, which may have many lines.
_LONGEST = 1 << 28


class Csv:
    """A CSV file that is open: `names` are the fields of its header, none if it is empty.

    Tabs separate the fields of a .tsv; of a .csv commas, unless its header has the names of a row only with semicolons
    or tabs. Raises `DamagedError`, with file and line, for what is not valid.
    """

    def __init__(
        self,
        content: io.BufferedReader[Any],
        stored: io.BufferedReader[Any],
        file: Path,
        columns: Mapping[str, str],
    ):
        self.content, self.stored, self.file = content, stored, file
        self.line = 0
        csv.field_size_limit(_LONGEST)  # of the process; Python's own is 131,072
        tabs = ".tsv" in (suffix.lower() for suffix in file.suffixes)
        self.separator = "\t" if tabs else self._separator(columns)
        self.reader = csv.reader(self._lines(), delimiter=self.separator, strict=True)
        self.names = next(self._records(), (1, []))[1]

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises `DamagedError`, with file and line, for one that is not as the header says."""
        odd = "csv"
        for line, cells in self._records():
            if len(cells) != len(self.names):
                raise DamagedError(
                    f"{self.file}, line {line}: the header has {len(self.names)} fields, this row {len(cells)}; a "
                    "field with a separator or a quote in it must be quoted"
                )
            yield Row(dict(zip(self.names, cells, strict=True)), f"line {line}", self.stored.tell(), odd)
            odd = ""

    def _separator(self, columns: Mapping[str, str]) -> str:
        header = self.content.peek(1 << 16)[: 1 << 16].partition(b"\n")[0].decode("utf-8", "replace")
        for separator in (",", ";", "\t"):
            with suppress(csv.Error):
                if is_row(next(csv.reader([header], delimiter=separator), []), columns):
                    return separator
        return ","

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (the line where it begins, the fields) of each record that is not an empty line."""
        while True:
            line = self.line + 1
            try:
                cells = next(self.reader, None)
            except csv.Error as error:
                raise DamagedError(f"{self.file}, line {line}: not valid CSV ({error})") from error
            if cells is None:
                return
            if cells:
                yield line, cells

    def _lines(self) -> Iterator[str]:
        while raw := self.content.readline(_LONGEST + 1):
            self.line += 1
            if len(raw) > _LONGEST:
                raise RecipeError(f"{self.file}, line {self.line}: a line of more than {_LONGEST:,} bytes")
            refuse_zero_bytes(raw, self.file)
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(error, self.file, self.line) from error
