"""Read the rows of an Arrow file or stream: only the columns that are wanted, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from ndtrain.data.formats import ARROW_FILE
from ndtrain.data.row import Row
from ndtrain.errors import DamagedError, RecipeError, one_line
from ndtrain.storage.paths import is_local

# Without it a stream may be cut between two batches.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# Rows that are Python objects at once.
_ROWS = 256


class Arrow:
    """An Arrow file that is open: `names` are its columns.

    Raises `RecipeError` without pyarrow, `DamagedError` if it is no whole Arrow file.
    """

    def __init__(self, stored: BufferedReader[Any], file: Path):
        self.file, self.source = file, native(stored, file, "Arrow")
        with self._damaged():
            self.size = self.source.size()
            self.is_file = self.source.read(len(ARROW_FILE)) == ARROW_FILE
            self.source.seek(max(0, self.size - len(_END_OF_STREAM)))
            if not self.is_file and self.source.read() != _END_OF_STREAM:
                raise DamagedError(f"{file}: the Arrow stream has no end, it is truncated or altered")
            self.names: list[str] = self._open().schema.names

    def rows(self, wanted: Collection[str]) -> Iterator[Row]:
        """Yield the rows with those of the `wanted` columns that there are. Raises `DamagedError` with file and row."""
        names = [name for name in self.names if name in wanted]
        number = 0
        for batch, done in self._batches(names):
            for start in range(0, batch.num_rows, _ROWS):
                for fields in rows_of_batch(batch.slice(start, _ROWS), names, self.file, number):
                    number += 1
                    yield Row(fields, f"row {number}", done)

    def _batches(self, names: Collection[str]) -> Iterator[tuple[Any, int]]:
        """Yield (a batch of the columns `names`, bytes of the file up to its end)."""
        fields = [index for index, name in enumerate(self.names) if name in names]
        with self._damaged():
            reader = self._open(included_fields=fields)
            count = reader.num_record_batches if self.is_file else None
        index = 0
        while count is None or index < count:
            with self._damaged():
                try:
                    batch = reader.get_batch(index) if count is not None else reader.read_next_batch()
                except StopIteration:
                    return
                batch.validate(full=True)  # of an altered file, else memory that is not the file's may be read
            index += 1
            yield batch, self.source.tell() if count is None else self.size * index // count

    def _open(self, **options: Any) -> Any:
        from pyarrow import ipc

        self.source.seek(0)
        reader = ipc.open_file if self.is_file else ipc.open_stream
        return reader(self.source, options=ipc.IpcReadOptions(**options))

    def _damaged(self) -> Any:
        return damaged_by(self.file, "cannot be read as Arrow")


def rows_of_batch(batch: Any, names: list[str], file: Path, before: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch whose columns must be `names`, as dicts; `before` is the number of rows before it."""
    with damaged_by(file, f"cannot be read after row {before}"):
        if batch.schema.names != names:
            raise DamagedError(f"{file}: its columns {', '.join(names)} cannot be told from others; rename them")
        columns = [_cells(batch.column(index)) for index in range(len(names))]
    for cells in zip(*columns, strict=True) if names else ():
        yield dict(zip(names, cells, strict=True))


def _cells(column: Any) -> list[Any]:
    """Return the values of a column. Structs have all fields of their type: those that a row leaves out are null."""
    import pyarrow

    cells: list[Any] = column.to_pylist()
    return [_given(cell) for cell in cells] if pyarrow.types.is_nested(column.type) else cells


def _given(value: Any) -> Any:
    """Return a value without the fields of structs that are null."""
    if isinstance(value, dict):
        return {key: _given(own) for key, own in value.items() if own is not None}
    return [_given(own) for own in value] if isinstance(value, list) else value


def native(stored: BufferedReader[Any], file: Path, kind: str) -> Any:
    """Return pyarrow's own open file of a local one, which it reads fastest; otherwise `stored` as pyarrow's.

    Raises `RecipeError` without pyarrow.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise RecipeError(f"{file} is {kind}, which needs a package: pip install 'ndtrain[parquet]'") from error
    return pyarrow.OSFile(str(file)) if is_local(file) else pyarrow.PythonFile(stored, mode="r")


@contextmanager
def damaged_by(file: Path, what: str) -> Iterator[None]:
    """Raise pyarrow's errors in the body as a `DamagedError`: "file: what: the reason"."""
    import pyarrow

    try:
        yield
    # An altered length asks for too much memory, or is none.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
        raise DamagedError(f"{file}: {what}: {one_line(error)}") from error
