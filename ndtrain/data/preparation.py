"""Tokenize a group of files into a directory: in parallel, in bounded memory, and on from where a killed run was.

tokens.bin, docs.bin (where documents begin), loss.bin (which tokens carry loss, one byte each, unless all do) grow in
`.KEY.partial`, beside progress.json, which says how much of them is known to be on disk. A complete directory has
meta.json and is named by its key.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ndtrain.data.files import stamp_of
from ndtrain.data.row import Encoded, Encoder, Piece, Row, RowError, SkippedRow
from ndtrain.data.rows import rows_of
from ndtrain.data.workers import Result, Workers, encode_all
from ndtrain.errors import DamagedError, RecipeError, Stopped

FORMAT_VERSION = 3
_SAVE_SECONDS = 20.0
_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 18


class Group(NamedTuple):
    """Files that are tokenized together, and the key of their tokens."""

    key: str
    files: list[Path]


@dataclass
class _Counts:
    """What was written: rows read, documents and tokens kept, how many tokens a mask lets carry loss, the largest id,
    the odd documents by kind, and the names in data.columns that some row has a field for.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    largest: int = 0
    odd: dict[str, list[Any]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)


def prepare(
    group: Group, encoder: Encoder, *, cache_dir: Path, progress: Callable[[int], None], workers: Workers | None
) -> Path:
    """Return the directory of the group's tokens, tokenizing them unless it is complete.

    Processes may race: one writes, others write a directory of their own, and the first rename wins. `progress(done)`
    is called with bytes of the input. Raises `DamagedError` for a row that cannot be used, and a file that changes
    meanwhile.
    """
    final = cache_dir / group.key
    if final.exists():
        return final
    stamps = [stamp_of(file) for file in group.files]
    with work_directory(cache_dir, group.key) as work:
        counts = _write(group.files, encoder, work=work, progress=progress, workers=workers)
        for file, stamp in zip(group.files, stamps, strict=True):
            if stamp_of(file) != stamp:
                raise DamagedError(f"{file} changed while it was being tokenized; start the run again")
        meta = {"version": FORMAT_VERSION, "key": group.key, "dtype": _dtype(encoder).name, "masked": encoder.masked}
        meta |= {"digest": _digest(work, encoder), "docs_mtime": _sealed(work / "docs.bin")}
        write_json(work / "meta.json", {**meta, **asdict(counts)})
        (work / "progress.json").unlink(missing_ok=True)
        try:
            os.rename(work, final)
        except OSError:
            if not final.is_dir():  # otherwise another process was first, with the same content
                raise
    return final


def _sealed(file: Path) -> int:
    """Set the file's mtime to a minute ago and return it, in ns: any later change of the file gives it another."""
    mtime = (int(time.time()) - 60) * 10**9
    os.utime(file, ns=(mtime, mtime))
    return mtime


@contextmanager
def work_directory(cache_dir: Path, key: str) -> Iterator[Path]:
    """Yield a directory that this process alone writes to, with what a killed one has left in it.

    It is removed after an error, and stays after a signal.
    """
    with ExitStack() as stack:
        work, lock = cache_dir / f".{key}.partial", cache_dir / f".{key}.lock"
        held = stack.enter_context(lock.open("a"))
        if not _locks(held, lock):
            # Another process is at it, or the file system has no locks.
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{key}-", dir=cache_dir))
            work = Path(own, "tokens")
        work.mkdir(exist_ok=True)
        try:
            yield work
        except (Stopped, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            lock.unlink(missing_ok=True)
            raise
        shutil.rmtree(work, ignore_errors=True)  # of the process that lost the race
        lock.unlink(missing_ok=True)


def _locks(held: io.TextIOWrapper, lock: Path) -> bool:
    """Return whether this process has the lock now; the one that had it may have removed it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(held.fileno()), lock.stat())
    except OSError:
        return False


def _dtype(encoder: Encoder) -> np.dtype[Any]:
    return np.dtype(np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32)


def _write(
    files: Sequence[Path],
    encoder: Encoder,
    *,
    work: Path,
    progress: Callable[[int], None],
    workers: Workers | None,
) -> _Counts:
    dtype = _dtype(encoder)
    counts = _recorded(work, dtype.itemsize, masked=encoder.masked)
    missing = {name: own for name, own in encoder.columns.items() if name not in counts.columns}
    saved, told = time.monotonic(), 0
    with ExitStack() as stack:
        tokens, docs, *loss = (
            stack.enter_context((work / name).open("ab")) for name in _sizes(counts, dtype.itemsize, encoder.masked)
        )
        if not docs.tell():
            docs.write(np.zeros(1, np.int64).tobytes())
        for (number, row, done), encoded in _encoded(files, encoder, skip=counts.rows, workers=workers):
            file = files[number]
            for name in [name for name, own in missing.items() if own in row.fields]:
                counts.columns.append(name)
                del missing[name]
            if isinstance(encoded, SkippedRow) or (isinstance(encoded, RowError) and encoder.skips):
                counts.odd.setdefault("skipped", [0, number, row.where, str(encoded)])[0] += 1
                counts.rows += 1
                continue
            if not isinstance(encoded, Encoded):
                kind = RecipeError if isinstance(encoded, RecipeError) else DamagedError
                raise kind(f"{file}, {row.where}: {encoded}") from encoded
            ids, piece = encoded.ids, row.fields if isinstance(row.fields, Piece) else None
            if ids.size > 1 or (piece is not None and ids.size):  # a mark alone has no target
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= encoder.vocab_size:
                    raise RecipeError(
                        f"{file}: the tokenizer gave ids {low} to {high}, expected 0 to {encoder.vocab_size - 1}"
                    )
                tokens.write(ids.astype(dtype).tobytes())
                counts.tokens, counts.largest = counts.tokens + ids.size, max(counts.largest, high)
                if piece is None or piece.ends:
                    counts.documents += 1
                    docs.write(np.int64(counts.tokens).tobytes())
                if loss:
                    assert encoded.loss is not None and encoded.loss.shape == ids.shape
                    counts.targets += int(encoded.loss.sum())
                    loss[0].write(encoded.loss.tobytes())
            # A table of conversations cannot have been meant as a text.
            how = row.odd if encoder.shape == "text" or row.odd != "csv" else ""
            for odd in filter(None, (how, encoded.special and "special")):
                counts.odd.setdefault(odd, [0, number, row.where, encoded.special])[0] += 1
            counts.rows += 1
            if done > told:
                told = done
                progress(told)
            if time.monotonic() - saved > _SAVE_SECONDS:
                for written in (tokens, docs, *loss):
                    to_disk(written)
                write_json(work / "progress.json", asdict(counts))
                saved = time.monotonic()
        if told < (total := sum(stamp_of(file)[0] for file in files)):
            progress(total)
        for written in (tokens, docs, *loss):
            to_disk(written)
    return counts


def _encoded(
    files: Sequence[Path], encoder: Encoder, *, skip: int, workers: Workers | None
) -> Iterator[tuple[tuple[int, Row, int], Result]]:
    """Yield (index of the file, row, bytes of all files read so far) and its tokens, after the first `skip`."""
    taken: list[list[tuple[int, Row, int]]] = []

    def batches() -> Iterator[list[Any]]:
        for batch in _batches(islice(_rows(files, encoder), skip, None)):
            taken.append(batch)
            yield [row.fields for _, row, _ in batch]

    results = workers.map(batches()) if workers else (encode_all(encoder, batch) for batch in batches())
    for result in results:
        yield from zip(taken.pop(0), result, strict=True)


def _rows(files: Sequence[Path], encoder: Encoder) -> Iterator[tuple[int, Row, int]]:
    before = 0
    for number, file in enumerate(files):
        for row in rows_of(file, shape=encoder.shape, columns=encoder.columns):
            yield number, row, before + row.done
        before += stamp_of(file)[0]


def _batches(rows: Iterator[tuple[int, Row, int]]) -> Iterator[list[tuple[int, Row, int]]]:
    batch: list[tuple[int, Row, int]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _length(row[1].fields)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _length(value: Any) -> int:
    """Return about how many bytes a row's value is in memory."""
    if isinstance(value, str):
        return len(value)
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 8 + sum(map(_length, values))


def _sizes(counts: _Counts, width: int, masked: bool) -> dict[str, int]:
    """Return the bytes of each file, with what `counts` says."""
    sizes = {"tokens.bin": counts.tokens * width, "docs.bin": 8 * (counts.documents + 1)}
    return {**sizes, "loss.bin": counts.tokens} if masked else sizes


def _digest(work: Path, encoder: Encoder) -> str:
    """Return a digest of what the group's documents were encoded to."""
    found = hashlib.blake2b(digest_size=16)
    for name in _sizes(_Counts(), 1, encoder.masked):
        with (work / name).open("rb") as written:
            found.update(hashlib.file_digest(written, "blake2b").digest())
    return found.hexdigest()


def _recorded(work: Path, width: int, *, masked: bool) -> _Counts:
    """Return what a killed process has left, its files cut to that; nothing if it left none or too little."""
    with suppress(OSError, ValueError, TypeError):
        counts = _Counts(**json.loads((work / "progress.json").read_text()))
        sizes = _sizes(counts, width, masked)
        if all((work / name).stat().st_size >= size for name, size in sizes.items()):
            for name, size in sizes.items():
                os.truncate(work / name, size)
            return counts
    for name in ("progress.json", *_sizes(_Counts(), width, masked)):
        (work / name).unlink(missing_ok=True)
    return _Counts()


def write_json(file: Path, value: object) -> None:
    """Replace a file, whole or not at all."""
    temporary = file.with_suffix(".new")
    with temporary.open("w") as written:
        json.dump(value, written)
        to_disk(written)
    temporary.replace(file)


def to_disk(written: io.IOBase | Any) -> None:
    written.flush()
    os.fsync(written.fileno())
