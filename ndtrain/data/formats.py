"""Tell how a file of training data is stored: compressed or not, parquet, JSON or plain text.

Its first bytes decide. Its name decides only what bytes do not tell: whether text that is JSON is a row of data or a
document about JSON; and, in a directory, whether the file is training data at all.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EMFILE, ENFILE
from pathlib import Path
from typing import Any

from ndtrain.errors import DamagedError, RecipeError, one_line
from ndtrain.storage.pointers import pointer

COMPRESSIONS = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
TEXT_NAME = re.compile(r"\.(txt|md|py|rst|html|c|h|rs|js|ts|toml|csv|tex)", re.IGNORECASE)
PARQUET = b"PAR1"
# Of other kinds, which could be taken for text until their first zero byte.
OTHERS = {b"PK\x03\x04": "a zip archive; unpack it", b"ARROW1": "an Arrow file; write it as parquet or JSON lines"}
_WIDE_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_ROW = re.compile(rb"\s*(?:\[\s*)?(?=\{)")
_LONG_ROW = re.compile(rb'\{\s*"text"\s*:\s*"')  # of which the probe has the beginning alone
_PROBE_BYTES = 1 << 16


def name_kind(file: Path) -> str | None:
    """Return "json", "text" or "parquet" for the suffix of a name (before .gz, .bz2, .xz, .zst), None for another."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in JSON_SUFFIXES:
        return "json"
    return "parquet" if last == ".parquet" else "text" if TEXT_NAME.fullmatch(last) else None


def can_read(file: Path) -> str:
    """Return "" if the packages that a name asks for are installed, and how to install them otherwise."""
    if name_kind(file) == "parquet" and importlib.util.find_spec("pyarrow") is None:
        return "pip install 'ndtrain[parquet]' to read it"
    if file.suffix.lower() == ".zst" and _zstd() is None:
        return "pip install 'ndtrain[zstd]' to read it"
    return ""


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise an `OSError` of the body as a `DamagedError` that names `file`, of too many files as a `RecipeError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (EMFILE, ENFILE):
            raise RecipeError(
                f"cannot open {file}: this process has as many files open as it may; raise the limit (ulimit -n), or "
                "join the files of data.path to fewer"
            ) from error
        raise DamagedError(f"cannot read {file}: {error.strerror or error}") from error


@contextmanager
def opened(file: Path) -> Iterator[tuple[io.BufferedReader[Any], io.BufferedReader[Any]]]:
    """Yield (the file, its content without compression and without a UTF-8 byte-order mark).

    The position of the first tells the progress. Raises `DamagedError` for a file that cannot be read or unpacked, for
    the pointer of a file that lies elsewhere, and for UTF-16 or UTF-32; `RecipeError` for a kind that is not supported.
    """
    zstd = _zstd()
    broken = (EOFError, zlib.error, lzma.LZMAError, *((zstd.ZstdError,) if zstd is not None else ()))
    try:
        with reading(file), io.BufferedReader(file.open("rb", buffering=0), _PROBE_BYTES) as stored:
            packed = unpacked(stored, file)
            with (
                packed if isinstance(packed, io.BufferedReader) else io.BufferedReader(packed, _PROBE_BYTES) as content
            ):
                _check_start(content.peek(64), file)
                if content.peek(3)[:3] == b"\xef\xbb\xbf":
                    content.read(3)
                yield stored, content
    except broken as error:
        raise DamagedError(f"{file} cannot be unpacked, it is truncated or altered: {error}") from error


def unpacked(stored: io.BufferedReader[Any], file: Path) -> Any:
    """Return a binary stream of what is in `stored`. Raises `RecipeError` if its package is missing."""
    start = stored.peek(8)[:8]
    suffix = next((suffix for suffix, magic in COMPRESSIONS.items() if start.startswith(magic)), "")
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stored)
    if suffix == ".bz2":
        return bz2.BZ2File(stored)
    if suffix == ".xz":
        return lzma.LZMAFile(stored)
    if suffix == ".zst":
        if (zstd := _zstd()) is None:
            raise RecipeError(f"{file} is compressed with zstd, which needs a package: pip install 'ndtrain[zstd]'")
        return zstd.ZstdFile(stored)
    return stored


def refuse_pointer(start: bytes, file: Path) -> None:
    """Raise `DamagedError` for a file that only says where its content lies, given its first bytes."""
    if what := pointer(start):
        raise DamagedError(f"{file} {what}")


def _check_start(start: bytes, file: Path) -> None:
    refuse_pointer(start, file)
    for magic, what in OTHERS.items():
        if start.startswith(magic):
            raise RecipeError(f"{file} is not text: it is {what}")
    for mark, encoding in _WIDE_MARKS.items():
        if start.startswith(mark):
            raise DamagedError(f"{file} is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 {file.name}")


def begins_with_row(content: io.BufferedReader[Any]) -> bool:
    """Return whether text begins with a row of JSON data: a whole object with a string under "text"."""
    start = content.peek(_PROBE_BYTES)[:_PROBE_BYTES]
    found = _ROW.match(start)
    if found is None:
        return False
    try:
        row, _ = json.JSONDecoder().raw_decode(start[found.end() :].decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        return len(start) >= _PROBE_BYTES and _LONG_ROW.match(start, found.end()) is not None
    return isinstance(row.get("text"), str)


def refuse_zero_bytes(chunk: bytes, file: Path) -> None:
    if b"\0" in chunk:
        raise RecipeError(
            f"{file} is not text: it contains zero bytes (as binary files do, and UTF-16 without a mark); "
            "data.path takes text in UTF-8, JSON and parquet, compressed or not"
        )


def parquet(file: Path) -> Any:
    """Return pyarrow's reader of a file. Raises `RecipeError` without pyarrow, `DamagedError` if it is no parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError(f"{file} is parquet, which needs a package: pip install 'ndtrain[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{file} cannot be read as parquet: {one_line(error)}") from error
