"""Cut the documents of a corpus into rows of fixed length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ndtrain.data.cache import not_written
from ndtrain.data.corpus import Corpus
from ndtrain.data.index import VERSION, RowIndex, build_index, open_index
from ndtrain.data.row import IntArray, NoRowsError
from ndtrain.errors import RecipeError

IGNORE = -100

Packing = Literal["concat", "best_fit"] | bool
Sample = dict[str, IntArray]


class Samples(ABC):
    """Rows of S = seq_len tokens: dicts of int64 `[S]` input_ids, labels and position_ids.

    Labels are already shifted: labels[t] is the token after input_ids[t], or -100 if that token belongs to another
    document or carries no loss, or there is none. A target at a cut is not lost: the row reads one token past its end.
    """

    packing: Packing

    def __init__(self, corpus: Corpus, seq_len: int, *, pad_id: int) -> None:
        self.corpus, self.seq_len, self.pad_id = corpus, seq_len, pad_id

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
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
    def _fill(self, row: Sample, index: int) -> None:
        """Write tokens, targets and positions to `row`, which is all padding at positions 0 to S - 1."""

    def _put(self, row: Sample, start: int, stop: int, *, at: int) -> int:
        """Write the tokens `start` to `stop` of the corpus and their targets from place `at` on; return the next place.

        A token past the row's end is a target only.
        """
        tokens = self.corpus.tokens(start, stop)
        end, targets = min(self.seq_len, at + len(tokens)), tokens[1:]
        if self.corpus.masked:
            targets = np.where(self.corpus.loss(start + 1, stop), targets, IGNORE)
        row["input_ids"][at:end] = tokens[: end - at]
        row["labels"][at : at + len(targets)] = targets
        return end

    @property
    def digest(self) -> str | None:
        """The identity of the tokens alone, whatever gave them (`Corpus.digest`)."""
        return self.corpus.digest

    @property
    def fingerprint(self) -> str:
        """Text that identifies the rows."""
        return f"{self.corpus.key} seq_len={self.seq_len} packing={self.packing} samples={len(self)}"

    def describe(self) -> str:
        """Return how many documents and tokens are in how many rows, and how full these are."""
        share = f", of which {self.corpus.targets / self.corpus.n_tokens:.1%} carry loss" if self.corpus.masked else ""
        return (
            f"documents: {self.corpus.n_docs:,}; rows of {self.seq_len:,} tokens: {len(self):,}, "
            f"{self.fill:.1%} filled by {self.held_tokens:,} tokens{share}"
        )

    @property
    def fill(self) -> float:
        """The share of all positions that hold a token."""
        return self.held_tokens / (len(self) * self.seq_len)

    @property
    @abstractmethod
    def held_tokens(self) -> int:
        """The tokens in all rows."""


class Concatenated(Samples):
    """The stream of all documents, cut every S tokens.

    position_ids restart at 0 with each document and each row, and padding (in the last row only) counts as a document
    of its own. Nothing is computed for all documents, of which there may be 1e9.
    """

    packing: Packing = "concat"

    def __len__(self) -> int:
        # A document's last token has no target, so a row that would hold only that token is left out.
        return -(-(self.corpus.n_tokens - 1) // self.seq_len)

    def _fill(self, row: Sample, index: int) -> None:
        size, start = self.seq_len, index * self.seq_len
        self._put(row, start, start + size + 1, at=0)
        starts = self.corpus.ends(start, start + size) - start  # of the next document or of the padding, 1 to S
        row["labels"][starts - 1] = IGNORE
        starts, begins = starts[starts < size], np.zeros(size, np.int64)
        begins[starts] = starts
        row["position_ids"] -= np.maximum.accumulate(begins)

    @property
    def held_tokens(self) -> int:
        return min(self.corpus.n_tokens, len(self) * self.seq_len)


class Whole(Samples):
    """Whole documents; only one longer than S is cut into pieces, or left out, as `index` says.

    With packing "best_fit" a row holds several, in the order of the data. position_ids restart at 0 with each, and
    padding counts as a document of its own. Without packing each document or piece has its own row, padded on the
    right; position_ids run from 0 to S - 1 through the padding, so that the row is one sequence.
    """

    def __init__(
        self, corpus: Corpus, seq_len: int, *, packing: Literal["best_fit", False], index: RowIndex, pad_id: int
    ) -> None:
        super().__init__(corpus, seq_len, pad_id=pad_id)
        self.packing, self.index = packing, index

    def __len__(self) -> int:
        return len(self.index)

    def _fill(self, row: Sample, index: int) -> None:
        size, starts = self.seq_len, np.sort(self.index.pieces(index))
        if not len(starts) or starts[0] < 0 or starts[-1] >= self.corpus.n_tokens:
            raise self.index.damaged(f"row {index} is not in the data")
        begins, ends = self.corpus.around(starts)
        if ((starts - begins) % size).any() or np.minimum(ends - starts, size).sum() > size:
            raise self.index.damaged(f"row {index} has other pieces than whole ones of {size} tokens")
        at = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            begin, at = at, self._put(row, start, min(start + size + 1, end), at=at)
            row["position_ids"][begin:at] = np.arange(at - begin)
        if self.packing:
            row["position_ids"][at:] = np.arange(size - at)

    @property
    def held_tokens(self) -> int:
        return self.index.tokens

    def describe(self) -> str:
        count, done = self.index.too_long, "left out" if self.index.drop else "cut"
        line = super().describe() + (f"; longer than a row and {done}: {count:,}" if count else "")
        return line + (f"; without a target, left out: {self.index.empty:,}" if self.index.empty else "")


def open_samples(
    corpus: Corpus,
    seq_len: int,
    *,
    packing: Packing,
    too_long: Literal["cut", "drop", "error"] = "cut",
    pad_id: int,
    folder: Path | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Samples:
    """Return the rows of `seq_len` tokens; what has to be computed for them is stored in `folder` for later starts.

    `too_long` says what becomes of documents of more than `seq_len` tokens where documents are whole: "cut" into
    pieces of that length, "drop", or `RecipeError`; `NoRowsError` is raised if no row is left. `advance` is called as
    the computation proceeds. Raises `RecipeError` or `NdtrainError` if it cannot be stored, `DamagedError` if what is
    stored is not whole.
    """
    if packing is True or packing == "concat":
        return Concatenated(corpus, seq_len, pad_id=pad_id)
    best_fit, drop = bool(packing), too_long == "drop"
    how: dict[str, Any] = {"best_fit": best_fit, "drop": drop, "carries": corpus.loss if corpus.masked else None}
    if folder is None:
        index = build_index(corpus.bounds_in_blocks, seq_len, **how, advance=advance)
    else:
        name = f"{corpus.key}-{packing or 'single'}-{seq_len}{'-drop' if drop else ''}-{VERSION}"
        try:
            index = open_index(corpus.bounds_in_blocks, seq_len, **how, folder=folder / name, advance=advance)
        except OSError as error:
            raise not_written(folder, error) from error
    if too_long == "error" and index.too_long:
        longest = max(int(np.diff(bounds).max()) for bounds in corpus.bounds_in_blocks())
        raise RecipeError(
            f"data.seq_len = {seq_len}: {index.too_long:,} of the {corpus.n_docs:,} documents of data.path are longer, "
            f"the first is {corpus.place(index.first_too_long)}, the longest has {longest:,} tokens; raise "
            'data.seq_len, or set data.too_long to "cut" or "drop"'
        )
    if not len(index):
        raise NoRowsError(
            f'data.too_long = "drop" leaves no document: all {index.too_long:,} have more than data.seq_len = '
            f'{seq_len} tokens; raise it, or set data.too_long = "cut"'
        )
    return Whole(corpus, seq_len, packing="best_fit" if best_fit else False, index=index, pad_id=pad_id)
