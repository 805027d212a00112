"""Tokenize, pack, mask, order: the same global batches on every mesh.

files -> TokenCache (tokens on disk, memory-mapped) -> Samples (rows of fixed length) -> Order (the endless
stream of sample ids) -> GlobalBatches (the rows of one batch rank). The place in the data is one number, the
cursor: how many samples the whole run has consumed. It knows nothing of ranks, so it survives a new mesh.
"""

import glob
import hashlib
import json
import os
import re
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ndtrain.errors import MENDABLE, DamagedError, NdtrainError, RecipeError

FORMAT_VERSION = 1
IGNORE = -100
TEXT_PROBE_BYTES = 1 << 16
TEXT_NAME = re.compile(r"[^.].*\.(txt|md|py|rst|jsonl?|html|c|h|rs|js|ts|toml|csv|tex)", re.IGNORECASE)
_CACHE_FILES = ("tokens.bin", "docs.bin", "meta.json")
_MEMO_NAME = ".digests.json"

Meta = dict[str, int | str]
IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None] | None


class Tokenizer(Protocol):
    """What the cache needs of a tokenizer. `key` names its behaviour: another behaviour, another key."""

    @property
    def key(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...

    def encode_bytes(self, raw: bytes) -> npt.NDArray[Any]:
        """The ids [n] of one document, without bos and eos."""


def find_files(path: str) -> list[Path]:
    """The files of `data.path`, sorted by path relative to it: a file, a directory (recursive, text suffixes,
    hidden names skipped) or a glob (`**` is recursive; every regular file that matches is taken)."""
    root = Path(path).expanduser()
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = list(_walk(root))
    else:
        found = [file for file in map(Path, set(glob.glob(str(root), recursive=True))) if file.is_file()]
    if found:
        return sorted(found, key=lambda file: (file.relative_to(root) if root.is_dir() else file).as_posix())
    hint = f"give a file, a glob or a directory of text files (looked from {Path.cwd()})"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not root.exists():
        hint += "; datasets on the Hugging Face hub are not read yet, download it first"
    raise RecipeError(f'data.path = "{path}" matches no file; {hint}')


def _walk(root: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise DamagedError(f"cannot read the directory {error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        if all(name in names for name in _CACHE_FILES):  # a token cache kept beside the data is not data
            folders[:], names = [], []
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if TEXT_NAME.fullmatch(name))
        yield from (file for file in files if file.is_file())


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedError(f"cannot read {file}: {error.strerror}") from error


def _is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _documents(file: Path) -> Iterator[tuple[bytes, int]]:
    """(a document's UTF-8 bytes, the bytes read for it): one per line of a .jsonl, else the whole file."""
    with _reading(file), file.open("rb") as content:
        if not _is_jsonl(file):
            raw = content.read()
            if b"\0" in raw[:TEXT_PROBE_BYTES]:
                raise RecipeError(f"{file} is not text: it has zero bytes; data.path takes text files and .jsonl")
            yield raw, len(raw)
            return
        for number, line in enumerate(content, 1):
            yield (_json_text(line, f"{file}, line {number}") if line.strip() else b""), len(line)


def _json_text(line: bytes, where: str) -> bytes:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DamagedError(f'{where}: needs an object with a string under "text"')
    return row["text"].encode("utf-8", "replace")  # a lone surrogate is no text: it becomes "?"


def _stamp(file: Path) -> list[int]:
    with _reading(file):
        stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """Each file's content digest; remembered by (path, size, mtime) so that a start need not read it all.

    A file written in the last two seconds is not remembered: it can change again within one clock tick.
    """
    memo_path = cache_dir / _MEMO_NAME
    try:
        memo = dict(json.loads(memo_path.read_text()))
    except (OSError, ValueError, TypeError):
        memo = {}
    out, learned = [], False
    for file in files:
        name, stamp = os.path.abspath(file), _stamp(file)
        known = memo.get(name)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            out.append(known[-1])
            continue
        with _reading(file), file.open("rb") as content:
            out.append(hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=20)).hexdigest())
        if abs(time.time_ns() - stamp[1]) > 2e9 and _stamp(file) == stamp:
            memo[name], learned = [*stamp, out[-1]], True
    if learned:
        handle, temporary = tempfile.mkstemp(prefix=_MEMO_NAME, dir=cache_dir)
        with os.fdopen(handle, "w") as memo_file:
            json.dump(memo, memo_file)
        os.replace(temporary, memo_path)
    return out


def build_cache(files: Sequence[Path], tokenizer: Tokenizer, *, cache_dir: Path, progress: Progress = None) -> Path:
    """The directory of the cache of these files' tokens; tokenizes only when it is not there yet.

    A document is stored as [bos?] + its tokens + [eos]; empty ones are skipped. One document at a time is in
    memory. Ranks and runs may race: each writes its own directory and the first rename wins.
    `progress(done, total)` counts bytes of the input, after each document.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        stamps = [_stamp(file) for file in files]
        digests = _digests(files, cache_dir)
        identity = [FORMAT_VERSION, tokenizer.key, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id]
        kinds = [[_is_jsonl(file), digest] for file, digest in zip(files, digests, strict=True)]
        key = hashlib.blake2b(json.dumps([identity, kinds]).encode(), digest_size=16).hexdigest()
        final = cache_dir / key
        if final.exists():
            return final
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=cache_dir, ignore_cleanup_errors=True) as tmp:
            work = Path(tmp)
            meta = _write_tokens(files, tokenizer, folder=work, progress=progress)
            for file, stamp in zip(files, stamps, strict=True):
                if _stamp(file) != stamp:
                    raise DamagedError(f"{file} changed while it was being tokenized; start again")
            (work / "meta.json").write_text(json.dumps({"version": FORMAT_VERSION, "key": key, **meta}))
            for part in _CACHE_FILES:
                with (work / part).open("rb") as written:
                    os.fsync(written.fileno())
            work.chmod(0o755)
            try:
                os.rename(work, final)
            except OSError:
                if not final.is_dir():  # else another process was first: its cache has the same content
                    raise
        return final
    except OSError as error:
        kind = RecipeError if error.errno in MENDABLE else NdtrainError
        raise kind(f"cannot write the token cache in {cache_dir} ($NDTRAIN_CACHE): {error.strerror}") from error


def _write_tokens(files: Sequence[Path], tokenizer: Tokenizer, *, folder: Path, progress: Progress) -> Meta:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64)
    total, most = sum(_stamp(file)[0] for file in files), tokenizer.vocab_size - 1
    tokens = documents = done = 0
    with (folder / "tokens.bin").open("wb") as token_file, (folder / "docs.bin").open("wb") as doc_file:
        doc_file.write(struct.pack("=q", 0))
        for file in files:
            for raw, read in _documents(file):
                ids = tokenizer.encode_bytes(raw) if raw else np.empty(0, np.int64)
                if ids.size:
                    row = np.concatenate([head, ids, [tokenizer.eos_id]]).astype(np.int64)
                    if row.min() < 0 or row.max() > most:
                        raise RecipeError(f"{file}: ids {row.min()} to {row.max()}, expected 0 to {most}")
                    token_file.write(row.astype(dtype).tobytes())
                    tokens, documents = tokens + row.size, documents + 1
                    doc_file.write(struct.pack("=q", tokens))
                done += read
                if progress:
                    progress(done, total)
        if not documents:
            raise RecipeError(f"data.path: no text in {len(files)} file(s), the first is {files[0]}")
    return {"dtype": dtype.name, "tokens": tokens, "documents": documents}


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Memory-mapped tokens [n_tokens] (uint16 or uint32) and document bounds [n_docs + 1] (int64)."""

    key: str
    tokens: npt.NDArray[Any]
    docs: IntArray

    @classmethod
    def open(cls, path: Path) -> "TokenCache":
        """Opens what `build_cache` returned; refuses one that is truncated or altered."""

        def damaged(file: str, why: str) -> DamagedError:
            return DamagedError(f"{path / file}: {why}; delete the directory {path} to have it built again")

        try:
            meta = json.loads((path / "meta.json").read_text())
            version, key, dtype = meta["version"], str(meta["key"]), np.dtype(meta["dtype"])
            counts = {"tokens.bin": int(meta["tokens"]), "docs.bin": int(meta["documents"]) + 1}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged("meta.json", f"cannot be read ({error})") from error
        if version != FORMAT_VERSION or dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
            raise damaged("meta.json", f"version {version} with {dtype} is not one this program writes")
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, width in (("tokens.bin", dtype), ("docs.bin", np.dtype(np.int64))):
            try:
                size, wanted = (path / name).stat().st_size, counts[name] * width.itemsize
                if size != wanted:
                    raise damaged(name, f"has {size} bytes where meta.json means {wanted}")
                arrays[name] = np.memmap(path / name, dtype=width, mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise damaged(name, f"cannot be read ({error})") from error
        docs = arrays["docs.bin"]
        if docs[0] != 0 or docs[-1] != counts["tokens.bin"] or (docs[1:] - docs[:-1] < 2).any():
            raise damaged("docs.bin", "its document starts do not fit the tokens")
        return cls(key=key, tokens=arrays["tokens.bin"], docs=docs)


class Samples:
    """Rows of seq_len tokens: dicts of int64 input_ids [S], labels [S], position_ids [S].

    Labels are already shifted: labels[t] is the token after input_ids[t], or -100 where that token is of
    another document or there is none. A target at a cut is not lost: the row reads one token past its end.

    packing: the stream of all documents is cut every S tokens. position_ids restart at 0 with each document
    and each row, and padding (last row only) counts as a document of its own.
    else: each document is cut into pieces of at most S tokens, one a row, padded on the right; position_ids
    run 0..S-1 through the padding, so the row reads as one sequence.
    """

    def __init__(self, cache: TokenCache, seq_len: int, *, packing: bool, pad_id: int) -> None:
        self.cache, self.seq_len, self.packing, self.pad_id = cache, seq_len, packing, pad_id
        # A document's last token has no target, so a row that would hold nothing else is left out.
        if packing:
            self._n = -(-(len(cache.tokens) - 1) // seq_len)
        else:
            pieces = (np.diff(cache.docs) - 1 + seq_len - 1) // seq_len
            self._first_piece: IntArray = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces)])
            self._n = int(self._first_piece[-1])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> dict[str, IntArray]:
        if not 0 <= index < self._n:
            raise IndexError(f"sample {index} of {self._n}")
        docs, size = self.cache.docs, self.seq_len
        if self.packing:
            start, limit = index * size, len(self.cache.tokens)
        else:
            doc = int(np.searchsorted(self._first_piece, index, side="right")) - 1
            start = int(docs[doc]) + (index - int(self._first_piece[doc])) * size
            limit = int(docs[doc + 1])
        chunk = self.cache.tokens[start : min(start + size + 1, limit)].astype(np.int64)
        filled = min(size, len(chunk))
        input_ids = np.full(size, self.pad_id, np.int64)
        labels = np.full(size, IGNORE, np.int64)
        position_ids = np.arange(size, dtype=np.int64)
        input_ids[:filled] = chunk[:filled]
        labels[: len(chunk) - 1] = chunk[1:]
        if self.packing:
            low, high = np.searchsorted(docs, [start, start + size], side="right")
            starts = docs[low:high] - start  # of documents, and of the padding at the stream's end; 1 .. S
            labels[starts - 1] = IGNORE
            starts, begins = starts[starts < size], np.zeros(size, np.int64)
            begins[starts] = starts
            position_ids -= np.maximum.accumulate(begins)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


class Order:
    """The endless stream of sample ids: epoch after epoch, each a permutation of its own.

    The permutation sorts raw PCG64 output: numpy keeps that the same in every version, which it does not
    promise of Generator.permutation, and a resumed run must go on in the same order.
    """

    def __init__(self, n_samples: int, *, seed: int, shuffle: bool) -> None:
        if seed < 0:
            raise RecipeError(f"the seed must not be negative, it is {seed}")
        self.n_samples, self.seed, self.shuffle = n_samples, seed, shuffle
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> npt.NDArray[Any]:
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.n_samples)
        return np.argsort(raw, kind="stable").astype(np.uint32 if self.n_samples <= 1 << 32 else np.uint64)

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """The ids [count] at places cursor .. cursor + count - 1 of the stream."""
        parts: list[IntArray] = [np.empty(0, np.int64)]
        while count > 0:
            epoch, place = divmod(cursor, self.n_samples)
            take = min(count, self.n_samples - place)
            ids = self._permutation(epoch)[place : place + take] if self.shuffle else range(place, place + take)
            parts.append(np.asarray(ids, dtype=np.int64))
            cursor, count = cursor + take, count - take
        return np.concatenate(parts)


def micro_batches(global_batch_size: int, batch_ranks: int, most: int) -> tuple[int, int]:
    """(rows of a micro batch, at most `most`; forwards per optimizer step), the same on every rank."""
    rows = min(most, -(-global_batch_size // batch_ranks))
    return rows, -(-global_batch_size // (batch_ranks * rows))


@dataclass
class GlobalBatches:
    """One batch rank's micro batches of each global batch.

    Row k of the global batch goes to micro step k // (R * m), batch rank k // m % R, place k % m (R batch
    ranks, m rows). Places past the last row hold fillers with no target, so every rank runs the same number
    of equally shaped forwards. The global batch is the same rows in the same order for every R and m.
    """

    samples: Samples
    order: Order
    _: KW_ONLY
    global_batch_size: int
    micro_batch_size: int  # at most this; less where a rank's share of the global batch is smaller
    batch_rank: int
    batch_ranks: int
    micro_steps: int = field(init=False)

    def __post_init__(self) -> None:
        if self.order.n_samples != len(self.samples) or not 0 <= self.batch_rank < self.batch_ranks:
            raise ValueError(f"{self.order.n_samples=}, {len(self.samples)=}, {self.batch_rank=}")
        self.micro_batch_size, self.micro_steps = micro_batches(
            self.global_batch_size, self.batch_ranks, self.micro_batch_size
        )

    @property
    def fingerprint(self) -> str:
        """Names the data and its order; a cursor means the same only where this is the same."""
        data, order = self.samples, self.order
        return (
            f"{data.cache.key} seq_len={data.seq_len} packing={data.packing} samples={len(data)} "
            f"seed={order.seed} shuffle={order.shuffle}"
        )

    def sample_ids(self, cursor: int) -> IntArray:
        """The ids [G] of the whole global batch at the cursor; the next batch is at cursor + G."""
        return self.order.sample_ids(cursor, self.global_batch_size)

    def load(self, cursor: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro batches in order, each input_ids, labels, position_ids: int64 [m, S]."""
        ids, micro = self.sample_ids(cursor), self.micro_batch_size
        batches = []
        for step in range(self.micro_steps):
            first = (step * self.batch_ranks + self.batch_rank) * micro
            places = range(first, first + micro)
            rows = [self.samples[int(ids[place if place < len(ids) else 0])] for place in places]
            for filler in rows[max(0, len(ids) - first) :]:
                filler["labels"].fill(IGNORE)
            batches.append({name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})
        return batches


def labels_count(batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """The number of targets in these micro batches (this rank's only; sum it over the batch ranks)."""
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
