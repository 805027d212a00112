"""Write the tokens of files to disk, once for the same files and tokenizer, and memory-map them."""

import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ndtrain.data.files import CACHE_FILES, reading, stamp_of
from ndtrain.data.formats import name_kind
from ndtrain.data.rows import row_errors, rows_of
from ndtrain.data.shapes import fields_of, text_of
from ndtrain.errors import MENDABLE, DamagedError, NdtrainError, RecipeError
from ndtrain.storage.paths import is_local

FORMAT_VERSION = 2
_MEMO_NAME = ".digests.json"

IntArray = npt.NDArray[np.int64]
Meta = dict[str, Any]
Progress = Callable[[int, int], None] | None
# Tell what in a text is odd: the first special token that it spells, or "".
Scan = Callable[[str], str] | None
_NO_COLUMNS: Mapping[str, str] = {}


class Tokenizer(Protocol):
    """The tokenizer interface of the cache. `key` identifies its behaviour: other behaviour needs another key."""

    @property
    def key(self) -> str: ...
    @property
    def vocab_size(self) -> int:
        """The largest id + 1; ids may have gaps."""

    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...

    def encode_bytes(self, raw: bytes) -> npt.NDArray[Any]:
        """Return the ids `[n]` of one document, without bos and eos."""


def _digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """Return each file's content digest, cached by (path, size, mtime) so that a start need not read every file.

    The digest of a file written in the last two seconds is not cached: it can change again within one clock tick.
    """
    memo_path = cache_dir / _MEMO_NAME
    try:
        memo = dict(json.loads(memo_path.read_text()))
    except (OSError, ValueError, TypeError):
        memo = {}
    digests, changed = [], False
    for file in files:
        name, stamp = os.path.abspath(file) if is_local(file) else str(file), stamp_of(file)
        known = memo.get(name)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            digests.append(known[-1])
            continue
        with reading(file), file.open("rb") as content:
            digests.append(hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=20)).hexdigest())
        if abs(time.time_ns() - stamp[1]) > 2e9 and stamp_of(file) == stamp:
            memo[name], changed = [*stamp, digests[-1]], True
    if changed:
        handle, temporary = tempfile.mkstemp(prefix=_MEMO_NAME, dir=cache_dir)
        with os.fdopen(handle, "w") as memo_file:
            json.dump(memo, memo_file)
        os.replace(temporary, memo_path)
    return digests


class Contents(NamedTuple):
    """What a token cache is made of: its key, the tokenizer's identity, and that of each file, in order."""

    key: str
    tokenizer: str
    files: list[str]


def build_cache(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    cache_dir: Path,
    columns: Mapping[str, str] = _NO_COLUMNS,
    progress: Progress = None,
    scan: Scan = None,
) -> Path:
    """Return the directory of the cache of these files' tokens; tokenizes them unless it exists.

    `columns` maps our names of a row's fields to the files', as `data.columns` does.

    A document is stored as [bos?] + its tokens + [eos], each mark once; empty ones are skipped. One document at a time
    is in memory. `scan(text)` returns a special token that a text spells, or ""; such documents are counted in `odd`.
    Ranks and runs may race: each writes its own directory and the first rename wins. `progress(done, total)` is called
    after each document with bytes of the input. Raises `RecipeError` or `NdtrainError` if the cache cannot be written,
    `DamagedError` for a file that cannot be read or changes meanwhile.
    """
    try:
        stamps = [stamp_of(file) for file in files]
        key = _contents(files, tokenizer, cache_dir, columns).key
        final = cache_dir / key
        if final.exists():
            return final
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=cache_dir, ignore_cleanup_errors=True) as tmp:
            work = Path(tmp)
            meta = _write_tokens(files, tokenizer, folder=work, columns=columns, progress=progress, scan=scan)
            for file, stamp in zip(files, stamps, strict=True):
                if stamp_of(file) != stamp:
                    raise DamagedError(f"{file} changed while it was being tokenized; start the run again")
            (work / "meta.json").write_text(json.dumps({"version": FORMAT_VERSION, "key": key, **meta}))
            for part in CACHE_FILES:
                with (work / part).open("rb") as written:
                    os.fsync(written.fileno())
            work.chmod(0o755)
            try:
                os.rename(work, final)
            except OSError:
                if not final.is_dir():  # otherwise another process was first, with the same content
                    raise
        return final
    except OSError as error:
        raise _not_written(cache_dir, error) from error


def contents_of(
    files: Sequence[Path], tokenizer: Tokenizer, *, cache_dir: Path, columns: Mapping[str, str] = _NO_COLUMNS
) -> Contents:
    """Return what `build_cache` would make a cache of, without tokenizing. Raises what it raises."""
    try:
        return _contents(files, tokenizer, cache_dir, columns)
    except OSError as error:
        raise _not_written(cache_dir, error) from error


def _contents(files: Sequence[Path], tokenizer: Tokenizer, cache_dir: Path, columns: Mapping[str, str]) -> Contents:
    cache_dir.mkdir(parents=True, exist_ok=True)
    digests = _digests(files, cache_dir)
    identity = [FORMAT_VERSION, tokenizer.key, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id]
    kinds = [[name_kind(file), digest] for file, digest in zip(files, digests, strict=True)]
    whole = [identity, kinds, *([sorted(columns.items())] if columns else [])]
    key = hashlib.blake2b(json.dumps(whole).encode(), digest_size=16).hexdigest()
    return Contents(key, " ".join(map(str, identity[1:])), [" ".join(map(str, kind)) for kind in kinds])


def _not_written(cache_dir: Path, error: OSError) -> NdtrainError:
    kind = RecipeError if error.errno in MENDABLE else NdtrainError
    return kind(
        f"cannot write the token cache in {cache_dir}: {error.strerror}; set NDTRAIN_CACHE to another directory"
    )


def _encode(tokenizer: Tokenizer, raw: bytes, where: str) -> npt.NDArray[Any]:
    try:
        return tokenizer.encode_bytes(raw) if raw else np.empty(0, np.int64)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _write_tokens(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    folder: Path,
    columns: Mapping[str, str],
    progress: Progress,
    scan: Scan,
) -> Meta:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    bos, eos, most = tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size - 1
    sizes = [stamp_of(file)[0] for file in files]
    odd: dict[str, list[Any]] = {}
    tokens = documents = before = told = largest = 0
    with (folder / "tokens.bin").open("wb") as token_file, (folder / "docs.bin").open("wb") as doc_file:
        doc_file.write(struct.pack("=q", 0))
        for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
            begun = False  # tokens of the document's earlier pieces are written
            for row in rows_of(file, columns=columns):
                with row_errors(file, row.where):
                    text = text_of(fields_of(row.fields, "text", columns))
                ids = _encode(tokenizer, text.encode(), f"{file}, {row.where}")
                # Text that was rendered with its marks, and is read with them, keeps its own.
                head = [] if bos is None or begun or (ids.size and ids[0] == bos) else [bos]
                tail = [] if row.more or (ids.size and ids[-1] == eos) else [eos]
                marked = np.concatenate([head, ids, tail]).astype(np.int64)
                if begun or (ids.size and (row.more or marked.size > 1)):  # a mark alone has no target
                    if marked.size and (marked.min() < 0 or marked.max() > most):
                        raise RecipeError(
                            f"{file}: the tokenizer gave ids {marked.min()} to {marked.max()}, expected 0 to {most}"
                        )
                    token_file.write(marked.astype(dtype).tobytes())
                    tokens, largest = tokens + marked.size, max(largest, int(marked.max(initial=0)))
                    begun = row.more
                    if not begun:
                        documents += 1
                        doc_file.write(struct.pack("=q", tokens))
                special = scan(text) if scan is not None else ""
                for kind in filter(None, (row.odd, special and "special")):
                    odd.setdefault(kind, [0, number, row.where, special])[0] += 1
                if progress and before + row.done > told:
                    told = before + row.done
                    progress(told, sum(sizes))
            before += size
        if progress and told < before:
            progress(before, before)
        if not documents:
            count = f"{files[0]} has" if len(files) == 1 else f"the {len(files)} files, the first is {files[0]}, have"
            raise RecipeError(f"data.path: {count} no text")
    return {"dtype": dtype.name, "tokens": tokens, "documents": documents, "largest": largest, "odd": odd}


_SPELLED = {
    "text": "they are encoded as plain text; if they were rendered with a chat template, set "
    'data.special_tokens = "parse"',
    "parse": 'they are encoded to those tokens (data.special_tokens = "parse")',
}


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Memory-mapped tokens [n_tokens] (uint16 or uint32) and document bounds [n_docs + 1] (int64).

    `odd` counts the documents that a reader may want to know of: {kind: [count, index of the first one's file, where in
    it, the special token that it spells]}.
    """

    key: str
    tokens: npt.NDArray[Any]
    docs: IntArray
    odd: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    largest: int | None = None  # None in a cache of an earlier version

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return self.largest if self.largest is not None else int(self.tokens.max())

    @classmethod
    def open(cls, path: Path) -> "TokenCache":
        """Open the directory that `build_cache` returned. Raises `DamagedError` if it is truncated or altered."""

        def damaged(file: str, why: str) -> DamagedError:
            return DamagedError(f"{path / file}: {why}; delete the directory {path}, and the next run builds it again")

        try:
            meta = json.loads((path / "meta.json").read_text())
            version, key, dtype = meta["version"], str(meta["key"]), np.dtype(meta["dtype"])
            counts = {"tokens.bin": int(meta["tokens"]), "docs.bin": int(meta["documents"]) + 1}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged("meta.json", f"cannot be read ({error})") from error
        if version != FORMAT_VERSION or dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
            raise damaged("meta.json", f"format version {version} with {dtype} tokens is not supported")
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, width in (("tokens.bin", dtype), ("docs.bin", np.dtype(np.int64))):
            try:
                size, wanted = (path / name).stat().st_size, counts[name] * width.itemsize
                if size != wanted:
                    raise damaged(name, f"has {size:,} of the {wanted:,} bytes that meta.json says")
                arrays[name] = np.memmap(path / name, dtype=width, mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise damaged(name, f"cannot be read ({error})") from error
        docs = arrays["docs.bin"]
        if docs[0] != 0 or docs[-1] != counts["tokens.bin"] or (docs[1:] - docs[:-1] < 2).any():
            raise damaged("docs.bin", "its document bounds do not match the tokens")
        largest = meta.get("largest")
        return cls(
            key=key,
            tokens=arrays["tokens.bin"],
            docs=docs,
            odd=meta.get("odd", {}),
            largest=largest if type(largest) is int else None,
        )

    def notes(self, files: Sequence[Path], *, special_tokens: str) -> Iterator[str]:
        """Yield a line for each kind of odd documents in `files`, with what to do about them."""
        wording = {
            "special": (
                "documents that spell special tokens of the tokenizer, such as {token}",
                _SPELLED[special_tokens],
            ),
            "json": (
                "text files that begin like JSON data",
                "they are read as plain text; to read their rows, rename them to .jsonl",
            ),
            "surrogate": (
                "documents with half a character (a lone surrogate) in their JSON",
                'it was replaced by "?"',
            ),
            "csv": (
                "CSV files",
                "their rows are read by the names in their headers; to read one as plain text, rename it to .txt",
            ),
        }
        for kind, (count, number, where, token) in self.odd.items():
            what, then = wording[kind]
            total = len(self.docs) - 1
            yield f"{what.format(token=token)}: {count:,} of {total:,}, first {files[number]}, {where}; {then}"
