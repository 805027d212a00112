"""Look once at all tokens of a file: where documents begin, which tokens carry loss, and what would train wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ndtrain.data.preparation import to_disk
from ndtrain.data.row import BoolArray, IntArray
from ndtrain.data.tokens.block import CHUNK, Block, Reading, damaged
from ndtrain.errors import RecipeError

Meta = dict[str, Any]


class Unmapped(Exception):
    """The file has tokens that do not lie in it as they are."""


class Index:
    """Writes the index of one file into `folder`, chunk by chunk.

    docs.bin has the bounds of documents (int64), loss.bin which tokens carry loss (one byte each, unless all do), and
    tokens.bin the tokens, if `stored`; otherwise pieces.bin says where in the file they lie.

    A stream, and with `documents = "eos"` also a row, is cut after each end token and before each begin token. Each
    token of padding, also an end token that follows one, is a document of its own: it is no target, and no other token
    sees it.
    """

    def __init__(self, file: Path, reading: Reading, *, folder: Path, stored: bool):
        self.file, self.reading, self.folder, self.stored = file, reading, folder, stored
        self.dtype = np.dtype(np.uint16 if reading.vocab_size <= 1 << 16 else np.uint32) if stored else None
        self.tokens = self.documents = self.targets = 0
        self.largest = self.previous = -1
        self.last = 0  # the start of the document in progress
        self.due = True  # whether a document begins at the next token
        self.pieces: list[tuple[int, int]] = []
        self.masked = self.stream = False
        self.ignored: tuple[str, ...] = ()
        # Of the tokens, where rows begin, and the loss.
        self.digests = [xxhash.xxh3_128() for _ in range(3)]
        # Kind -> [count, the first document].
        self.counts: dict[str, list[int]] = {}

    def write(self, blocks: Iterator[Block], progress: Callable[[int], None]) -> Meta:
        """Write the index and return what meta.json says of it, of which `key` identifies the content.

        Raises `Unmapped` if the tokens have to be stored, and `RecipeError` or `DamagedError` for what cannot be used.
        """
        names = ("docs.bin", "loss.bin", "tokens.bin" if self.stored else "pieces.bin")
        with ExitStack() as stack:
            files = [stack.enter_context((self.folder / name).open("wb")) for name in names]
            self.doc_file, self.loss_file, self.place_file = files
            np.zeros(1, np.int64).tofile(self.doc_file)
            for block in blocks:
                self._block(block, progress)
            if self.tokens:
                self._count("single", int(self.tokens - self.last == 1), self.documents)
                self._count("whole", int(self.stream and self.documents == 0), 0)
                np.array([self.tokens], np.int64).tofile(self.doc_file)
                self.documents += 1
            np.array(self.pieces, np.int64).tofile(self.place_file)
            for file in files:
                to_disk(file)
        if not self.masked:  # there was no loss, or ones alone
            (self.folder / "loss.bin").unlink()
        return {
            "dtype": self.dtype.str if self.dtype is not None else None,
            "tokens": self.tokens,
            "documents": self.documents,
            "largest": self.largest,
            "targets": self.targets,
            "masked": self.masked,
            "pieces": None if self.stored else len(self.pieces),
            "ignored": self.ignored,
            "counts": self.counts,
            "key": " ".join(digest.hexdigest() for digest in (self.digests if self.masked else self.digests[:2])),
        }

    def _block(self, block: Block, progress: Callable[[int], None]) -> None:
        self.ignored, self.stream = block.ignored, block.starts is None
        if block.starts is None and self.reading.documents == "rows":
            raise RecipeError(
                f'{self.file} is a stream of tokens without rows; data.documents = "rows" does not apply to it, leave '
                "it out"
            )
        if not self.stored and block.ids.size:
            if block.at is None or self.dtype not in (None, block.ids.dtype):
                raise Unmapped
            self.dtype = block.ids.dtype
            self._piece(block.at)
        if block.starts is not None:
            begun = np.unique(block.starts[block.starts < len(block.ids)])
            self._count("empty", len(block.starts) - len(begun), self.documents)
            self.digests[1].update((begun + self.tokens).astype("<i8").data)
            block = block._replace(starts=begun)
        for low in range(0, len(block.ids), CHUNK):
            high = min(low + CHUNK, len(block.ids))
            starts = None
            if block.starts is not None:
                first, last = np.searchsorted(block.starts, [low, high])
                starts = block.starts[first:last] - low
            self._chunk(block.ids[low:high], starts, None if block.loss is None else block.loss[low:high])
            progress(block.done if block.at is None else block.at + high * block.ids.itemsize)

    def _piece(self, at: int) -> None:
        assert self.dtype is not None
        start, before = self.pieces[-1] if self.pieces else (at, self.tokens)
        if not self.pieces or start + (self.tokens - before) * self.dtype.itemsize != at:
            self.pieces.append((at, self.tokens))

    def _chunk(self, ids: npt.NDArray[Any], starts: IntArray | None, loss: BoolArray | None) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise damaged(self.file, f"token {self.tokens + int(ids.argmin()):,} is {low}, and ids are not negative")
        self.largest = max(self.largest, high)
        self.digests[0].update(np.ascontiguousarray(ids, "<u4" if high < 1 << 32 else "<u8").data)
        begins, odd = self._begins(ids, starts)
        inside = begins[begins < len(ids)]
        new = inside + self.tokens
        new = new[new > self.last]
        new.astype(np.int64).tofile(self.doc_file)
        for kind, places in odd.items():
            first = places[:1] + self.tokens
            self._count(kind, len(places), self.documents + int(np.searchsorted(new, first, side="right").sum()))
        single = np.flatnonzero(np.diff(new, prepend=self.last) == 1)
        self._count("single", len(single), self.documents + int(single[:1].sum()))
        if loss is None:
            self.targets += len(ids) - len(inside)
        else:
            self.targets += int(loss.sum()) - int(loss[inside].sum())
            self.masked = self.masked or not loss.all()
            loss.tofile(self.loss_file)
            self.digests[2].update(np.ascontiguousarray(loss).data)
        if self.stored:
            assert self.dtype is not None
            if high > (1 << 8 * self.dtype.itemsize) - 1:
                raise RecipeError(
                    f"{self.file}: token {self.tokens + int(ids.argmax()):,} is {high}, but the tokenizer has only the "
                    f"ids 0 to {self.reading.vocab_size - 1}; set data.tokenizer to the one that the tokens are of"
                )
            ids.astype(self.dtype).tofile(self.place_file)
        self.documents += len(new)
        self.last = int(new[-1]) if len(new) else self.last
        self.due = bool(len(begins) and begins[-1] == len(ids))
        self.tokens, self.previous = self.tokens + len(ids), int(ids[-1])

    def _begins(self, ids: npt.NDArray[Any], starts: IntArray | None) -> tuple[IntArray, dict[str, IntArray]]:
        """Return the positions, from 0 to n, at which documents begin, and those of tokens that may not be meant so."""
        eos, bos, pad, *_ = self.reading
        ended = np.flatnonzero(ids == eos)
        # Repeated end tokens are padding too.
        again = ended[np.diff(ended, prepend=-1 if self.previous == eos else -2) == 1]
        padding = np.flatnonzero(ids == pad) if pad is not None else ended[:0]
        found = [np.zeros(int(self.due), np.int64), again, padding, padding + 1]
        if starts is not None:
            found.append(starts)
        if starts is None or self.reading.documents == "eos":
            found += [ended + 1, np.flatnonzero(ids == bos) if bos is not None else ended[:0]]
            return np.unique(np.concatenate(found)), {"padding": padding}
        begins = np.unique(np.concatenate(found))
        # At the end of the chunk, the next one shows whether the row goes on.
        after = np.concatenate([[0] if self.previous == eos else [], ended[ended < len(ids) - 1] + 1]).astype(np.int64)
        return begins, {"padding": padding, "ended": np.setdiff1d(after, begins, assume_unique=True)}

    def _count(self, kind: str, count: int, document: int) -> None:
        if count:
            self.counts.setdefault(kind, [0, document])[0] += count
