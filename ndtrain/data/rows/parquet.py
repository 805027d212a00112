"""Read the rows of a parquet file: only the columns that are wanted, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from ndtrain.data.formats import parquet
from ndtrain.data.row import Row
from ndtrain.data.rows.arrow import damaged_by, native, rows_of_batch
from ndtrain.errors import DamagedError

# Rows that are in memory at once.
_BATCH = 256


class Parquet:
    """A parquet file that is open: `names` are its columns.

    Raises `RecipeError` without pyarrow, `DamagedError` if it is no parquet.
    """

    def __init__(self, stored: BufferedReader[Any], file: Path):
        source = native(stored, file, "parquet")
        self.file, self.size, self.table = file, source.size(), parquet(file, source)
        with damaged_by(file, "cannot be read as parquet"):
            self.names: list[str] = self.table.schema_arrow.names

    def rows(self, wanted: Collection[str]) -> Iterator[Row]:
        """Yield the rows with those of the `wanted` columns that there are. Raises `DamagedError` with file and row."""
        names = [name for name in self.names if name in wanted]
        number, total = 0, self.table.metadata.num_rows
        batches = self.table.iter_batches(batch_size=_BATCH, columns=names)
        while True:
            with damaged_by(self.file, f"cannot be read after row {number}"):
                batch = next(batches, None)
            if batch is None:
                break
            for fields in rows_of_batch(batch, names, self.file, number):
                number += 1
                yield Row(fields, f"row {number}", self.size * number // total)
        if number != total:
            raise DamagedError(f"{self.file}: has {number:,} of the {total:,} rows that it says")
