"""Find the files of `data.path` and read the documents in them."""

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ndtrain.errors import DamagedError, RecipeError

TEXT_PROBE_BYTES = 1 << 16
# The files of a token cache.
CACHE_FILES = ("tokens.bin", "docs.bin", "meta.json")
TEXT_NAME = re.compile(r"[^.].*\.(txt|md|py|rst|jsonl?|html|c|h|rs|js|ts|toml|csv|tex)", re.IGNORECASE)


def find_files(path: str) -> list[Path]:
    """Return the files of `data.path`, sorted by path relative to it. Raises `RecipeError` if there are none.

    `path` is a file, a directory (searched recursively for text suffixes, without hidden names) or a glob (`**` is
    recursive; every regular file that matches is taken).
    """
    root = Path(path).expanduser()
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = list(_walk(root))
    else:
        found = [file for file in map(Path, set(glob.glob(str(root), recursive=True))) if file.is_file()]
    if found:
        return sorted(found, key=lambda file: (file.relative_to(root) if root.is_dir() else file).as_posix())
    hint = f"give a file, a glob or a directory of text files (relative paths start at {Path.cwd()})"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not root.exists():
        hint += "; datasets on the Hugging Face hub cannot be read yet, download this one first"
    raise RecipeError(f'data.path = "{path}" matches no file; {hint}')


def _walk(root: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise DamagedError(f"cannot read the directory {error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        if all(name in names for name in CACHE_FILES):  # a token cache stored beside the data is not data
            folders[:], names = [], []
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if TEXT_NAME.fullmatch(name))
        yield from (file for file in files if file.is_file())


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise an `OSError` of the body as a `DamagedError` that names `file`."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"cannot read {file}: {error.strerror}") from error


def is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def documents_of(file: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (a document's UTF-8 bytes, the bytes read for it) per line of a .jsonl, or once for any other file."""
    with reading(file), file.open("rb") as content:
        if not is_jsonl(file):
            raw = content.read()
            if b"\0" in raw[:TEXT_PROBE_BYTES]:
                raise RecipeError(f"{file} is not text: it contains zero bytes; data.path takes text files and .jsonl")
            yield raw, len(raw)
            return
        for number, line in enumerate(content, 1):
            yield (_json_text(line, f"{file}, line {number}") if line.strip() else b""), len(line)


def _json_text(line: bytes, where: str) -> bytes:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DamagedError(f'{where}: not a JSON object with a string under "text"')
    return row["text"].encode("utf-8", "replace")  # a lone surrogate has no UTF-8 form and becomes "?"


def stamp_of(file: Path) -> list[int]:
    """Return [size in bytes, mtime in ns] of a file. Raises `DamagedError` if it cannot be read."""
    with reading(file):
        stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]
