"""Tell how a file of training data is stored: compressed or not, parquet, Arrow, JSON, CSV or plain text.

Its first bytes decide. Its name decides only what bytes do not tell: whether text that is JSON or CSV is rows of data
or a document about JSON; and, in a directory, whether the file is training data at all.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EMFILE, ENFILE
from pathlib import Path
from typing import Any

from ndtrain.errors import DamagedError, RecipeError, one_line
from ndtrain.storage.paths import is_local, os_errors
from ndtrain.storage.pointers import pointer

COMPRESSIONS = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
TEXT_NAME = re.compile(r"\.(txt|md|py|rst|html|c|h|rs|js|ts|toml|tex)", re.IGNORECASE)
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"
_KINDS = {
    **dict.fromkeys(JSON_SUFFIXES, "json"),
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Of other kinds, which could be taken for text until their first zero byte.
OTHERS = {b"PK\x03\x04": "a zip archive; unpack it"}
_WIDE_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_PROBE_BYTES = 1 << 16


def name_kind(file: Path) -> str | None:
    """Return "json", "csv", "parquet", "arrow" or "text" by the suffix of a name, None for another.

    That is the suffix before .gz, .bz2, .xz or .zst.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return _KINDS.get(last) or ("text" if TEXT_NAME.fullmatch(last) else None)


def can_read(file: Path) -> str:
    """Return "" if the packages that a name asks for are installed, and how to install them otherwise."""
    if name_kind(file) in ("parquet", "arrow") and importlib.util.find_spec("pyarrow") is None:
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
    """Raise an `OSError` of the body, or an object store's error, as a `DamagedError` that names `file`.

    Raises `RecipeError` for too many open files.
    """
    try:
        with os_errors(file):
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
    with reading(file):
        raw: Any = file.open("rb", buffering=0) if is_local(file) else file.open("rb")
        with io.BufferedReader(raw, _PROBE_BYTES) as stored, _unpacking(file):
            packed = unpacked(stored, file)
            if not isinstance(packed, io.BufferedReader):
                packed = io.BufferedReader(packed, _PROBE_BYTES)
            with packed as content:
                _check_start(content.peek(64), file)
                if content.peek(3)[:3] == b"\xef\xbb\xbf":
                    content.read(3)
                yield stored, content


@contextmanager
def _unpacking(file: Path) -> Iterator[None]:
    zstd = _zstd()
    broken = (EOFError, zlib.error, lzma.LZMAError, *((zstd.ZstdError,) if zstd is not None else ()))
    try:
        yield
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


def refuse_zero_bytes(chunk: bytes, file: Path) -> None:
    if b"\0" in chunk:
        raise RecipeError(
            f"{file} is not text: it contains zero bytes (as binary files do, and UTF-16 without a mark); "
            'data.path takes text in UTF-8, JSON, CSV, parquet, Arrow, and prepared tokens with data.format = "tokens"'
        )


def parquet(file: Path, source: Any = None) -> Any:
    """Return pyarrow's reader of a file, which `source` is if it is open, and which checks the sums of its pages.

    Raises `RecipeError` without pyarrow, `DamagedError` if it is no parquet.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError(f"{file} is parquet, which needs a package: pip install 'ndtrain[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(source or file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{file} cannot be read as parquet: {one_line(error)}") from error


def not_utf8(error: UnicodeDecodeError, file: Path, line: int) -> DamagedError:
    """Return the error of a file whose bytes are not UTF-8 in this line."""
    return DamagedError(
        f"{file}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}); convert the file, "
        f"from Latin-1 for example: iconv -f ISO-8859-1 -t UTF-8 {file.name}"
    )
