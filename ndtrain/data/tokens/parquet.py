"""Parquet tables, which are compressed and encoded and so cannot be mapped: they are stored once as plain tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ndtrain.data.formats import parquet
from ndtrain.data.tokens.block import Block, Reading, damaged
from ndtrain.data.tokens.columns import Columns
from ndtrain.errors import one_line

MAGIC = b"PAR1"
_ROWS = 1024


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the rows of a parquet file, `_ROWS` in memory. Raises `DamagedError`."""
    table = parquet(file)
    import pyarrow  # installed: the file is open

    size, row = file.stat().st_size, 0
    try:
        columns = Columns(table.schema_arrow, file)
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns.names):
            rows = columns.rows(batch, row)
            row += batch.num_rows
            done = size * row // max(1, table.metadata.num_rows)
            yield Block(rows.ids, None, rows.starts, rows.loss, done, columns.ignored)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(file, f"after row {row:,}: cannot be read: {one_line(error)}") from error
