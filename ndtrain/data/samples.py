"""Cut the documents of a token cache into rows of fixed length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from ndtrain.data.cache import IntArray, TokenCache, not_written
from ndtrain.data.index import RowIndex, open_index
from ndtrain.errors import RecipeError

IGNORE = -100

Packing = Literal["concat", "best_fit"] | bool
Row = dict[str, IntArray]


class Samples(ABC):
    """Rows of S = seq_len tokens: dicts of int64 `[S]` input_ids, labels and position_ids.

    Labels are already shifted: labels[t] is the token after input_ids[t], or -100 if that token belongs to another
    document or there is none. A target at a cut is not lost: the row reads one token past its end.
    """

    packing: Packing

    def __init__(self, cache: TokenCache, seq_len: int, *, pad_id: int) -> None:
        self.cache, self.seq_len, self.pad_id = cache, seq_len, pad_id

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = {
            "input_ids": np.full(self.seq_len, self.pad_id, np.int64),
            "labels": np.full(self.seq_len, IGNORE, np.int64),
            "position_ids": np.arange(self.seq_len, dtype=np.int64),
        }
        self._fill(row, index)
        return row

    @abstractmethod
    def _fill(self, row: Row, index: int) -> None:
        """Write tokens, targets and positions to `row`, which is all padding at positions 0 to S - 1."""

    def _put(self, row: Row, start: int, stop: int, *, at: int) -> int:
        """Write the tokens `start` to `stop` of the cache and their targets from place `at` on; return the next place.

        Tokens past the row's end are targets only.
        """
        tokens = self.cache.tokens[start:stop].astype(np.int64)
        end = min(self.seq_len, at + len(tokens))
        row["input_ids"][at:end] = tokens[: end - at]
        row["labels"][at : at + len(tokens) - 1] = tokens[1:]
        return end

    @property
    def fingerprint(self) -> str:
        """Text that identifies the rows."""
        # "True" is what checkpoints of earlier versions have for "concat".
        packing = True if self.packing == "concat" else self.packing
        return f"{self.cache.key} seq_len={self.seq_len} packing={packing} samples={len(self)}"

    def describe(self) -> str:
        """Return how many documents and tokens are in how many rows, and how full these are."""
        rows, tokens = len(self), self._tokens
        return (
            f"documents: {len(self.cache.docs) - 1:,}; rows of {self.seq_len:,} tokens: {rows:,}, "
            f"{tokens / (rows * self.seq_len):.1%} filled by {tokens:,} tokens"
        )

    @property
    @abstractmethod
    def _tokens(self) -> int:
        """The tokens in all rows."""


class Concatenated(Samples):
    """The stream of all documents, cut every S tokens.

    position_ids restart at 0 with each document and each row, and padding (in the last row only) counts as a document
    of its own. Nothing is computed for all documents, of which there may be 1e9.
    """

    packing: Packing = "concat"

    def __len__(self) -> int:
        # A document's last token has no target, so a row that would hold only that token is left out.
        return -(-(len(self.cache.tokens) - 1) // self.seq_len)

    def _fill(self, row: Row, index: int) -> None:
        docs, size, start = self.cache.docs, self.seq_len, index * self.seq_len
        self._put(row, start, start + size + 1, at=0)
        low, high = np.searchsorted(docs, [start, start + size], side="right")
        starts = docs[low:high] - start  # of documents and of the padding at the end, from 1 to S
        row["labels"][starts - 1] = IGNORE
        starts, begins = starts[starts < size], np.zeros(size, np.int64)
        begins[starts] = starts
        row["position_ids"] -= np.maximum.accumulate(begins)

    @property
    def _tokens(self) -> int:
        return min(len(self.cache.tokens), len(self) * self.seq_len)


class Whole(Samples):
    """Whole documents; only one longer than S is cut into pieces, or left out, as `index` says.

    With packing "best_fit" a row holds several, in the order of the data. position_ids restart at 0 with each, and
    padding counts as a document of its own. Without packing each document or piece has its own row, padded on the
    right; position_ids run from 0 to S - 1 through the padding, so that the row is one sequence.
    """

    def __init__(
        self, cache: TokenCache, seq_len: int, *, packing: Literal["best_fit", False], index: RowIndex, pad_id: int
    ) -> None:
        super().__init__(cache, seq_len, pad_id=pad_id)
        self.packing, self.index = packing, index

    def __len__(self) -> int:
        return len(self.index)

    def _fill(self, row: Row, index: int) -> None:
        docs, size = self.cache.docs, self.seq_len
        starts = np.sort(self.index.pieces(index))
        ahead = np.searchsorted(docs, starts, side="right")
        if not len(starts) or starts[0] < 0 or ahead[-1] == len(docs):
            raise self.index.damaged(f"row {index} is not in the data")
        ends, filled = docs[ahead], np.minimum(docs[ahead] - starts, size)
        if ((starts - docs[ahead - 1]) % size).any() or filled.sum() > size:
            raise self.index.damaged(f"row {index} has other pieces than whole ones of {size} tokens")
        at = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            begin, at = at, self._put(row, start, min(start + size + 1, end), at=at)
            row["position_ids"][begin:at] = np.arange(at - begin)
        if self.packing:
            row["position_ids"][at:] = np.arange(size - at)

    @property
    def _tokens(self) -> int:
        return self.index.tokens

    def describe(self) -> str:
        count, done = self.index.too_long, "left out" if self.index.drop else "cut"
        return super().describe() + (f"; longer than a row and {done}: {count:,}" if count else "")


def open_samples(
    cache: TokenCache,
    seq_len: int,
    *,
    packing: Packing,
    too_long: Literal["cut", "drop", "error"] = "cut",
    pad_id: int,
    folder: Path,
    advance: Callable[[], object] = lambda: None,
) -> Samples:
    """Return the rows of `seq_len` tokens; what has to be computed for them is stored in `folder` for later starts.

    `too_long` says what becomes of documents of more than `seq_len` tokens where documents are whole: "cut" into
    pieces of that length, "drop", or `RecipeError`, which is also raised if no row is left. `advance` is called as the
    computation proceeds. Raises `RecipeError` or `NdtrainError` if it cannot be stored, `DamagedError` if what is
    stored is not whole.
    """
    if packing is True or packing == "concat":
        return Concatenated(cache, seq_len, pad_id=pad_id)
    drop = too_long == "drop"
    name = f"{cache.key}-{packing or 'single'}-{seq_len}{'-drop' if drop else ''}"
    path = folder / name
    try:
        index = open_index(cache.docs, seq_len, best_fit=bool(packing), drop=drop, folder=path, advance=advance)
    except OSError as error:
        raise not_written(folder, error) from error
    if too_long == "error" and index.too_long:
        first, last = (int(bound) for bound in cache.docs[index.first_too_long :][:2])
        raise RecipeError(
            f"data.seq_len = {seq_len}: {index.too_long:,} of the {len(cache.docs) - 1:,} documents of data.path are "
            f"longer, the first is document {index.first_too_long + 1:,} with {last - first:,} tokens; raise "
            'data.seq_len, or set data.too_long to "cut" or "drop"'
        )
    if not len(index):
        raise RecipeError(
            f'data.too_long = "drop" leaves no document: all {index.too_long:,} have more than data.seq_len = '
            f'{seq_len} tokens; raise it, or set data.too_long = "cut"'
        )
    return Whole(cache, seq_len, packing="best_fit" if packing else False, index=index, pad_id=pad_id)
