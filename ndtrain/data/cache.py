"""Write the tokens of files to disk, once for the same files and encoder, and memory-map them.

Files are tokenized in groups (`groups_of`), each in a directory of its own: tokens.bin, docs.bin (where documents
begin), loss.bin (which tokens carry loss, one byte each, unless all do) and meta.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.data.corpus import Corpus, Part
from ndtrain.data.documents import documents_of
from ndtrain.data.files import reading, stamp_of
from ndtrain.data.formats import name_kind
from ndtrain.data.groups import groups_of
from ndtrain.data.row import Encoder, RowError
from ndtrain.errors import MENDABLE, DamagedError, NdtrainError, RecipeError

FORMAT_VERSION = 3
_MEMO_NAME = ".digests.json"

Meta = dict[str, Any]
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
        name, stamp = os.path.abspath(file), stamp_of(file)
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


class Group(NamedTuple):
    """Files that are tokenized together, and the key of their tokens."""

    key: str
    files: list[Path]


class Contents(NamedTuple):
    """What a token cache is made of: its key, its groups, and the identities of the encoder and each file, in order."""

    key: str
    groups: list[Group]
    encoder: str
    files: list[str]


def contents_of(files: Sequence[Path], encoder: Encoder, *, cache_dir: Path) -> Contents:
    """Return what `build_cache` makes a cache of, without tokenizing. Raises what it raises."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        digests = _digests(files, cache_dir)
        kinds = [[name_kind(file), digest] for file, digest in zip(files, digests, strict=True)]
        groups = [
            Group(_key([FORMAT_VERSION, encoder.key, kinds[first:last]]), list(files[first:last]))
            for first, last in groups_of([stamp_of(file)[0] for file in files], digests)
        ]
    except OSError as error:
        raise _not_written(cache_dir, error) from error
    key = _key([group.key for group in groups])
    return Contents(key, groups, encoder.key, [" ".join(map(str, kind)) for kind in kinds])


def build_cache(files: Sequence[Path], encoder: Encoder, *, cache_dir: Path, progress: Progress = None) -> Corpus:
    """Return the tokens of these files; tokenizes what is not in `cache_dir`.

    Documents of fewer than two tokens are skipped. One document at a time is in memory. Ranks and runs may race: each
    writes its own directory and the first rename wins. `progress(done, total)` is called after each document with bytes
    of the input. Raises `RecipeError` or `NdtrainError` if the cache cannot be written, `DamagedError` for a file that
    cannot be read or changes meanwhile, or a cache that is truncated or altered.
    """
    contents = contents_of(files, encoder, cache_dir=cache_dir)
    total, before, parts = sum(stamp_of(file)[0] for file in files), 0, []

    def report(done: int) -> None:
        if progress:
            progress(before + done, total)

    for group in contents.groups:
        try:
            parts.append(open_part(_build(group, encoder, cache_dir=cache_dir, progress=report)))
        except OSError as error:
            raise _not_written(cache_dir, error) from error
        before += sum(stamp_of(file)[0] for file in group.files)
    corpus = Corpus(parts, contents.key)
    if not corpus.n_docs:
        count = f"{files[0]} has" if len(files) == 1 else f"the {len(files)} files, the first is {files[0]}, have"
        raise RecipeError(f"data.path: {count} no text")
    return corpus


def _build(group: Group, encoder: Encoder, *, cache_dir: Path, progress: Callable[[int], None]) -> Path:
    final = cache_dir / group.key
    if final.exists():
        return final
    stamps = [stamp_of(file) for file in group.files]
    with tempfile.TemporaryDirectory(prefix=f".{group.key}-", dir=cache_dir, ignore_cleanup_errors=True) as tmp:
        work = Path(tmp)
        meta = _write_tokens(group.files, encoder, folder=work, progress=progress)
        for file, stamp in zip(group.files, stamps, strict=True):
            if stamp_of(file) != stamp:
                raise DamagedError(f"{file} changed while it was being tokenized; start the run again")
        (work / "meta.json").write_text(json.dumps({"version": FORMAT_VERSION, "key": group.key, **meta}))
        for part in work.iterdir():
            with part.open("rb") as written:
                os.fsync(written.fileno())
        work.chmod(0o755)
        try:
            os.rename(work, final)
        except OSError:
            if not final.is_dir():  # otherwise another process was first, with the same content
                raise
    return final


def _key(parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _not_written(cache_dir: Path, error: OSError) -> NdtrainError:
    kind = RecipeError if error.errno in MENDABLE else NdtrainError
    return kind(
        f"cannot write the token cache in {cache_dir}: {error.strerror}; set NDTRAIN_CACHE to another directory"
    )


def _write_tokens(files: Sequence[Path], encoder: Encoder, *, folder: Path, progress: Callable[[int], None]) -> Meta:
    dtype = np.dtype(np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32)
    most = encoder.vocab_size - 1
    odd: dict[str, list[Any]] = {}
    tokens = documents = before = told = largest = 0
    with ExitStack() as stack:
        token_file, doc_file = (stack.enter_context((folder / name).open("wb")) for name in ("tokens.bin", "docs.bin"))
        loss_file = stack.enter_context((folder / "loss.bin").open("wb")) if encoder.masked else None
        doc_file.write(struct.pack("=q", 0))
        for number, file in enumerate(files):
            for document in documents_of(file):
                try:
                    ids, loss, special = encoder.encode({"text": document.raw})
                except (RowError, RecipeError) as error:
                    kind_of = DamagedError if isinstance(error, RowError) else RecipeError
                    raise kind_of(f"{file}, {document.where}: {error}") from error
                if ids.size > 1:  # a mark alone has no target
                    if ids.min() < 0 or ids.max() > most:
                        raise RecipeError(
                            f"{file}: the tokenizer gave ids {ids.min()} to {ids.max()}, expected 0 to {most}"
                        )
                    token_file.write(ids.astype(dtype).tobytes())
                    tokens, documents, largest = tokens + ids.size, documents + 1, max(largest, int(ids.max()))
                    doc_file.write(struct.pack("=q", tokens))
                    if loss_file is not None:
                        assert loss is not None and loss.shape == ids.shape
                        loss_file.write(loss.tobytes())
                for kind in filter(None, (document.odd, special and "special")):
                    odd.setdefault(kind, [0, number, document.where, special])[0] += 1
                if before + document.done > told:
                    told = before + document.done
                    progress(told)
            before += stamp_of(file)[0]
        if told < before:
            progress(before)
    return {
        "dtype": dtype.name,
        "tokens": tokens,
        "documents": documents,
        "largest": largest,
        "masked": encoder.masked,
        "odd": odd,
    }


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
    if docs[0] != 0 or docs[-1] != tokens or (docs[1:] - docs[:-1] < 2).any():
        raise damaged("docs.bin", "its document bounds do not match the tokens")
    return Part(
        key=key,
        tokens=mapped("tokens.bin", dtype, tokens),
        docs=docs,
        largest=largest,
        loss=mapped("loss.bin", np.bool_, tokens) if meta.get("masked") else None,
        odd=odd,
    )


_SPELLED = {
    "text": "they are encoded as plain text; if they were rendered with a chat template, set "
    'data.special_tokens = "parse"',
    "parse": 'they are encoded to those tokens (data.special_tokens = "parse")',
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
    }
    for kind, (what, then) in wording.items():
        parts = zip(corpus.parts, contents.groups, strict=True)
        found = [(part.odd[kind], group.files) for part, group in parts if kind in part.odd]
        if found:
            (_, number, where, token), files = found[0]
            count = f"{sum(odd[0] for odd, _ in found):,} of {corpus.n_docs:,}"
            yield f"{what.format(token=token)}: {count}, first {files[number]}, {where}; {then}"
