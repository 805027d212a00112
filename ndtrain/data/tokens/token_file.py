"""Open a token file through its index, which is made once: its tokens are mapped where they lie."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndtrain.data.cache import key_of
from ndtrain.data.corpus import Part
from ndtrain.data.files import stamp_of
from ndtrain.data.formats import reading as reading_of
from ndtrain.data.preparation import FORMAT_VERSION, work_directory, write_json
from ndtrain.data.tokens.block import Block, Reading, mapped
from ndtrain.data.tokens.index import Index, Unmapped
from ndtrain.data.tokens.layouts import LAYOUTS
from ndtrain.data.tokens.megatron import index_of
from ndtrain.errors import DamagedError

SETTLED_SECONDS = 2.0


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenFile(Part):
    """The tokens of one file, mapped where they lie, with what was counted in them.

    `key` is equal for the same tokens in the same rows with the same loss, in any layout.
    `targets` is the number of tokens that carry loss and come after another one of their document; `counts` is {kind:
    [count, the first document]} as `Index` counts them, `ignored` the names of columns that are not read.
    """

    file: Path
    layout: str
    targets: int
    counts: Mapping[str, Sequence[int]]
    ignored: Sequence[str]


class Pieces:
    """Tokens `[n]` that lie in several places of a file; slices of it are arrays."""

    def __init__(self, raw: npt.NDArray[np.uint8], dtype: np.dtype[Any], places: npt.NDArray[np.int64], count: int):
        """`places` `[p, 2]` are the first byte of each piece and the number of tokens before it."""
        self.raw, self.dtype, self.places, self.count = raw, dtype, places, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        start, stop, _ = part.indices(self.count)
        found = [np.empty(0, self.dtype)]
        number = int(np.searchsorted(self.places[:, 1], start, side="right")) - 1
        while start < stop:
            at, before = map(int, self.places[number])
            end = int(self.places[number + 1, 1]) if number + 1 < len(self.places) else self.count
            take = min(stop, end) - start
            low = at + (start - before) * self.dtype.itemsize
            found.append(self.raw[low : low + take * self.dtype.itemsize].view(self.dtype))
            start, number = start + take, number + 1
        return np.concatenate(found)


def open_file(
    file: Path, layout: str, *, reading: Reading, cache_dir: Path, progress: Callable[[int], None]
) -> TokenFile:
    """Return the tokens of a file, with the index in `cache_dir`, which is made unless it exists.

    The index is that of a file by its path, size and time of change. Raises what `Index.write` and the layout raise,
    `DamagedError` for a file that changes meanwhile, and `OSError` for the cache.
    """
    parts = [file, index_of(file)] if layout == "megatron" else [file]
    stamps = [stamp_of(part) for part in parts]
    own = [layout, reading.key, reading.dtype.name, reading.vocab_size]
    folder = cache_dir / f"tokens-{key_of([FORMAT_VERSION, *own, os.path.abspath(file), stamps])}"

    def blocks() -> Iterator[Block]:
        with reading_of(file):
            yield from LAYOUTS[layout](file, reading)

    if not folder.exists():
        # A file that is changed once more within a tick of its file system's clock would look the same.
        time.sleep(max(0.0, SETTLED_SECONDS - abs(time.time() - max(stamp[1] for stamp in stamps) / 1e9)))
        with work_directory(cache_dir, folder.name) as work:
            _clear(work)
            try:
                meta = Index(file, reading, folder=work, stored=False).write(blocks(), progress)
            except Unmapped:
                _clear(work)
                meta = Index(file, reading, folder=work, stored=True).write(blocks(), progress)
            if [stamp_of(part) for part in parts] != stamps:
                raise DamagedError(f"{file} changed while it was being read; start the run again")
            write_json(work / "meta.json", {**meta, "layout": layout})
            try:
                os.rename(work, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first, with the same content
                    raise
    return _opened(folder, file)


def _clear(work: Path) -> None:
    """Remove what a killed process has left."""
    for left in work.iterdir():
        left.unlink()


def _opened(folder: Path, file: Path) -> TokenFile:
    def damaged(name: str, why: object) -> DamagedError:
        return DamagedError(f"{folder / name}: {why}; delete the directory {folder}, and the next run makes it again")

    with reading_of(folder / "meta.json"):
        content = (folder / "meta.json").read_bytes()
    try:
        meta = json.loads(content)
        tokens, documents, dtype = int(meta["tokens"]), int(meta["documents"]), np.dtype(meta["dtype"] or np.uint16)
        pieces, masked = meta["pieces"], meta["masked"]
        known = {name: meta[name] for name in ("key", "largest", "layout", "targets", "counts", "ignored")}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged("meta.json", f"cannot be read ({error})") from error

    def part(name: str, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        dtype = np.dtype(dtype)
        with reading_of(folder / name):
            if (folder / name).stat().st_size != count * dtype.itemsize:
                raise damaged(name, "does not have the size that meta.json says")
            return mapped(folder / name, dtype, at=0, count=count)

    docs = part("docs.bin", np.int64, documents + 1)
    if docs[0] != 0 or docs[-1] != tokens:
        raise damaged("docs.bin", "its document bounds do not match the tokens")
    ids: Any
    if pieces is None:
        ids = part("tokens.bin", dtype, tokens)
    else:
        places = part("pieces.bin", np.int64, 2 * pieces).reshape(-1, 2)
        with reading_of(file):
            if len(places) == 1:
                ids = mapped(file, dtype, at=int(places[0, 0]), count=tokens)
            else:
                ids = Pieces(mapped(file, np.dtype(np.uint8), at=0, count=stamp_of(file)[0]), dtype, places, tokens)
    loss = part("loss.bin", np.bool_, tokens) if masked else None
    return TokenFile(file=file, files=[file], tokens=ids, docs=docs, loss=loss, **known)
