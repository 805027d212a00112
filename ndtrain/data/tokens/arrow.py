"""Arrow files and streams, among them those of `datasets`, whose batches of rows are mapped where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ndtrain.data.tokens.block import Block, Reading, damaged
from ndtrain.data.tokens.columns import Columns
from ndtrain.errors import RecipeError, one_line

FILE = b"ARROW1"
STREAM = b"\xff\xff\xff\xff"
# What a writer puts at the end of a stream; without it the stream may have been longer.
_END = STREAM + b"\0\0\0\0"


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the batches of an Arrow file or stream, one in memory at most.

    A batch whose buffers are compressed, or whose rows are padded, has to be stored elsewhere. Raises `DamagedError`.
    """
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise RecipeError(f"{file} is Arrow, which needs a package: pip install 'ndtrain[parquet]'") from error

    row = 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            whole = source.read_buffer()
            source.seek(0)
            is_file = whole[: len(FILE)].to_pybytes() == FILE
            if not is_file and whole[-len(_END) :].to_pybytes() != _END:
                raise damaged(file, "ends without the end mark of an Arrow stream; it is truncated")
            table = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            columns = Columns(table.schema, file)
            total = table.num_record_batches if is_file else 0
            batches = (table.get_batch(i) for i in range(total)) if is_file else iter(table)
            for number, batch in enumerate(batches, 1):
                batch.validate(full=True)
                rows = columns.rows(batch, row)
                row += batch.num_rows
                at = None
                if rows.unchanged:
                    at = rows.ids.ctypes.data - whole.address if rows.ids.size else 0
                    if not 0 <= at <= whole.size - rows.ids.nbytes:
                        at = None  # it was unpacked into memory
                done = whole.size * number // total if is_file else source.tell()
                yield Block(rows.ids, at, rows.starts, rows.loss, done, columns.ignored)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise damaged(file, f"after row {row:,}: cannot be read as Arrow: {one_line(error)}") from error
