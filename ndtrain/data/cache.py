"""Write the tokens of files to disk, once for the same files and encoder, and memory-map them.

Files are tokenized in groups (`groups_of`), each in a directory of its own (`prepare`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.data.corpus import Corpus, Part
from ndtrain.data.files import stamp_of
from ndtrain.data.formats import name_kind, reading
from ndtrain.data.groups import groups_of
from ndtrain.data.preparation import FORMAT_VERSION, Group, prepare
from ndtrain.data.row import Encoder, NoRowsError
from ndtrain.data.workers import Workers
from ndtrain.errors import MENDABLE, DamagedError, NdtrainError, RecipeError, counted
from ndtrain.storage.paths import is_local

# Bytes from which more processes are worth their start of some seconds.
PARALLEL = 16 << 20
_STALE_SECONDS = 7 * 24 * 3600
_MEMO_NAME = ".digests.json"

Progress = Callable[[int, int], None] | None


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
        with suppress(OSError):  # what is prepared can be used where nothing can be written
            handle, temporary = tempfile.mkstemp(prefix=_MEMO_NAME, dir=cache_dir)
            with os.fdopen(handle, "w") as memo_file:
                json.dump(memo, memo_file)
            os.replace(temporary, memo_path)
    return digests


class Contents(NamedTuple):
    """What a token cache is made of: its key, its groups, the identity of the encoder, and of each file, in order, its
    identity and its size in bytes.
    """

    key: str
    groups: list[Group]
    encoder: str
    files: list[str]
    sizes: list[int]


def contents_of(files: Sequence[Path], encoder: Encoder, *, cache_dir: Path) -> Contents:
    """Return what `build_cache` makes a cache of, without tokenizing. Raises what it raises."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        digests, sizes = _digests(files, cache_dir), list(map(_size, files))
        kinds = [[name_kind(file), digest] for file, digest in zip(files, digests, strict=True)]
        groups = [
            Group(key_of([FORMAT_VERSION, encoder.key, kinds[first:last]]), list(files[first:last]))
            for first, last in groups_of(sizes, digests)
        ]
    except OSError as error:
        raise not_written(cache_dir, error) from error
    key = key_of([group.key for group in groups])
    return Contents(key, groups, encoder.key, [" ".join(map(str, kind)) for kind in kinds], sizes)


def build_cache(
    files: Sequence[Path],
    encoder: Encoder,
    *,
    cache_dir: Path,
    progress: Progress = None,
    workers: int = 1,
    contents: Contents | None = None,
) -> Corpus:
    """Return the tokens of these files; tokenizes what is not in `cache_dir`, in so many processes if it is much.

    `contents` is what `contents_of` returns for them, if that is known. Documents of fewer than two tokens are skipped.
    A few documents at a time are in memory. Ranks and runs may race. `progress(done, total)` is called after each
    document with bytes of the input. Raises `NoRowsError` if no document is left, `RecipeError` or `NdtrainError` if
    the cache cannot be written, `DamagedError` for a file that cannot be read or changes meanwhile, or a cache that is
    truncated or altered.
    """
    contents = contents or contents_of(files, encoder, cache_dir=cache_dir)
    total, before, parts = sum(contents.sizes), 0, []

    def report(done: int) -> None:
        if progress:
            progress(before + done, total)

    _remove_stale(cache_dir)
    sizes = iter(contents.sizes)
    groups = [(group, sum(islice(sizes, len(group.files)))) for group in contents.groups]
    missing = sum(size for group, size in groups if not (cache_dir / group.key).exists())
    with ExitStack() as stack:
        pool = stack.enter_context(Workers(encoder, workers)) if workers > 1 and missing >= PARALLEL else None
        for group, size in groups:
            try:
                directory = prepare(group, encoder, cache_dir=cache_dir, progress=report, workers=pool)
            except OSError as error:
                raise not_written(cache_dir, error) from error
            parts.append(replace(open_part(directory), files=group.files))
            before += size
    corpus = Corpus(parts, contents.key)
    if not corpus.n_docs:
        count = f"{files[0]} has" if len(files) == 1 else f"the {len(files)} files, the first is {files[0]}, have"
        nothing = "no text" if encoder.shape == "text" else "no row to train on"
        raise NoRowsError(f"data.path: {count} {nothing}{_skipped(corpus)}")
    return corpus


def _skipped(corpus: Corpus) -> str:
    """Return why rows are left out, for a message; "" if none are."""
    first = next((part.odd["skipped"][3] for part in corpus.parts if "skipped" in part.odd), "")
    return f"; left out: {counted(corpus.skipped, 'row')}, first: {first}" if first else ""


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed processes have left and no later run has completed in a week."""
    for left in cache_dir.glob(".*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)
                left.with_suffix(".lock").unlink(missing_ok=True)


def _size(file: Path) -> int:
    return stamp_of(file)[0]


def key_of(parts: object) -> str:
    """Return the key of what `parts` describe, as JSON."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def not_written(cache_dir: Path, error: OSError) -> NdtrainError:
    """Return the error for a token cache, or what is stored beside it, that cannot be written."""
    kind = RecipeError if error.errno in MENDABLE else NdtrainError
    return kind(
        f"cannot write the token cache in {cache_dir}: {error.strerror}; set NDTRAIN_CACHE to another directory"
    )


def open_part(path: Path) -> Part:
    """Open the directory of a group. Raises `DamagedError` if it is truncated or altered."""

    def damaged(file: str, why: str) -> DamagedError:
        return DamagedError(f"{path / file}: {why}; delete the directory {path}, and the next run builds it again")

    try:
        meta = json.loads((path / "meta.json").read_text())
        version, key, dtype = meta["version"], str(meta["key"]), np.dtype(meta["dtype"])
        tokens, documents, largest, odd = int(meta["tokens"]), int(meta["documents"]), int(meta["largest"]), meta["odd"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged("meta.json", f"cannot be read ({error})") from error
    if version != FORMAT_VERSION or dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
        raise damaged("meta.json", f"format version {version} with {dtype} tokens is not supported")

    def mapped(name: str, width: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        width = np.dtype(width)
        try:
            size, wanted = (path / name).stat().st_size, count * width.itemsize
            if size != wanted:
                raise damaged(name, f"has {size:,} of the {wanted:,} bytes that meta.json says")
            # An empty file cannot be mapped.
            return np.memmap(path / name, dtype=width, mode="r").view(np.ndarray) if count else np.empty(0, width)
        except (OSError, ValueError) as error:
            raise damaged(name, f"cannot be read ({error})") from error

    docs = mapped("docs.bin", np.int64, documents + 1)
    # Of 1e9 documents that would take seconds, so bounds that are as they were written are not looked at.
    altered = stamp_of(path / "docs.bin")[1] != meta.get("docs_mtime")
    if docs[0] != 0 or docs[-1] != tokens or (altered and (docs[1:] - docs[:-1] < 2).any()):
        raise damaged("docs.bin", "its document bounds do not match the tokens")
    return Part(
        key=key,
        tokens=mapped("tokens.bin", dtype, tokens),
        docs=docs,
        largest=largest,
        loss=mapped("loss.bin", np.bool_, tokens) if meta.get("masked") else None,
        odd=odd,
        digest=meta.get("digest"),
        targets=meta.get("targets", 0),
        columns=meta.get("columns"),
    )


# data.special_tokens, or data.on_control_text of chat -> what becomes of special tokens in documents.
_SPELLED = {
    "text": "they are encoded as plain text; if they were rendered with a chat template, set "
    'data.special_tokens = "parse"',
    "parse": 'they are encoded to those tokens (data.special_tokens = "parse")',
    "allow": 'they are encoded to those tokens (data.on_control_text = "allow")',
}


def notes(corpus: Corpus, contents: Contents, *, special_tokens: str) -> Iterator[str]:
    """Yield a line for each kind of odd documents, with what to do about them."""
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
        "skipped": ("rows that are left out", "{token}"),
        "csv": (
            "documents that are the first row of a CSV file",
            "such a file is read by the names in its header; to read it as plain text, rename it to .txt",
        ),
    }
    for kind, (what, then) in wording.items():
        parts = zip(corpus.parts, contents.groups, strict=True)
        found = [(part.odd[kind], group.files) for part, group in parts if kind in part.odd]
        if found:
            (_, number, where, token), files = found[0]
            count = f"{sum(odd[0] for odd, _ in found):,} of {corpus.n_docs + corpus.skipped:,}"
            yield f"{what.format(token=token)}: {count}, first {files[number]}, {where}; {then.format(token=token)}"
