"""The tokens of all files of a run as one stream of documents, of which no more is in memory than what is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class Part:
    """Memory-mapped tokens `[n]` of documents with bounds `[d + 1]`, and which tokens carry loss `[n]` (None: all).

    `counts` has what was counted when it was made: {kind of odd documents: [count, index of the first one's file, where
    in it, the special token that it spells]}. `digest` identifies the tokens; parts of earlier versions have none.
    `targets` is the number of tokens that `loss` lets carry loss, if there is one. `columns` has the names in
    data.columns that some row has a field for, None where that is not known. `files` are those that it was made of.
    """

    key: str
    tokens: npt.NDArray[Any]
    docs: IntArray
    largest: int
    loss: BoolArray | None = None
    odd: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    digest: str | None = None
    targets: int = 0
    columns: Collection[str] | None = None
    files: Sequence[Path] = ()


class Corpus:
    """Parts in a row. Positions are those of tokens in the whole stream, indices those of documents."""

    def __init__(self, parts: Sequence[Part], key: str):
        self.parts, self.key = list(parts), key
        self._tokens = np.cumsum([0, *(len(part.tokens) for part in parts)], dtype=np.int64)
        self._docs = np.cumsum([0, *(len(part.docs) - 1 for part in parts)], dtype=np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self._tokens[-1])

    @property
    def n_docs(self) -> int:
        return int(self._docs[-1])

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(part.largest for part in self.parts)

    @property
    def digest(self) -> str | None:
        """The identity of the tokens themselves, whatever gave them; None where a part's is not known."""
        found = [part.digest for part in self.parts if part.digest]
        whole = hashlib.blake2b(" ".join(found).encode(), digest_size=16).hexdigest()
        return whole if len(found) == len(self.parts) else None

    @property
    def targets(self) -> int:
        """How many tokens carry loss. The first of a document never does."""
        return sum(len(p.tokens) - len(p.docs) + 1 if p.loss is None else p.targets for p in self.parts)

    @property
    def skipped(self) -> int:
        """How many rows are left out."""
        return sum(part.odd["skipped"][0] for part in self.parts if "skipped" in part.odd)

    def without_field(self, columns: Iterable[str]) -> list[str]:
        """Return which of these names in data.columns no row has a field for; none of them where that is not known."""
        found = [part.columns for part in self.parts if part.columns is not None]
        return [name for name in columns if len(found) == len(self.parts) and not any(name in own for own in found)]

    def tokens(self, start: int, stop: int) -> IntArray:
        """Return the ids `[stop - start]` from `start` on, fewer at the end of the stream."""
        pieces = [part.tokens[low:high] for part, low, high in self._within(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64)

    def loss(self, start: int, stop: int) -> BoolArray:
        """Return which of the tokens from `start` on carry loss."""
        pieces = [
            np.ones(high - low, np.bool_) if part.loss is None else part.loss[low:high]
            for part, low, high in self._within(start, stop)
        ]
        return np.concatenate([np.empty(0, np.bool_), *pieces])

    @property
    def masked(self) -> bool:
        """Whether there may be tokens without loss."""
        return any(part.loss is not None for part in self.parts)

    def ends(self, start: int, stop: int) -> IntArray:
        """Return the positions in (start, stop] at which documents end, where the next one begins."""
        found: list[IntArray] = [np.empty(0, np.int64)]
        for part, low, high in self._within(start, stop):
            first, last = np.searchsorted(part.docs, [low, high], side="right")
            found.append(part.docs[first:last] + (start - low))
            start += high - low
        return np.concatenate(found)

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the positions of a document's first token and of the one past its last."""
        number = int(np.searchsorted(self._docs, index, side="right")) - 1
        docs, own = self.parts[number].docs, index - int(self._docs[number])
        return int(self._tokens[number] + docs[own]), int(self._tokens[number] + docs[own + 1])

    def place(self, index: int) -> str:
        """Return in words which document that is: its number in its file, or among those of a group of files."""
        number = int(np.searchsorted(self._docs, index, side="right")) - 1
        files, own = self.parts[number].files, index - int(self._docs[number]) + 1
        if not files:
            return f"document {index + 1:,}"
        if len(files) == 1:
            return f"document {own:,} of {files[0]}"
        return f"document {own:,} of those in {files[0].parent} from {files[0].name} to {files[-1].name}"

    def around(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Return where the documents that hold these positions begin and end."""
        begins, ends = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._tokens, positions, side="right") - 1
        for number in np.unique(numbers):
            docs, base, at = self.parts[number].docs, self._tokens[number], numbers == number
            ahead = np.searchsorted(docs, positions[at] - base, side="right")
            begins[at], ends[at] = docs[ahead - 1] + base, docs[ahead] + base
        return begins, ends

    def bounds_in_blocks(self, most: int = 1 << 20) -> Iterator[IntArray]:
        """Yield the bounds `[d + 1]` of at most so many documents at a time, which together are all of them."""
        for part, base in zip(self.parts, self._tokens[:-1], strict=True):
            for first in range(0, len(part.docs) - 1, most):
                yield part.docs[first : first + most + 1] + base

    def _within(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yield each part that has tokens from `start` to `stop`, with the first of them and the one past the last."""
        number = int(np.searchsorted(self._tokens, start, side="right")) - 1
        while number < len(self.parts) and self._tokens[number] < stop:
            base = int(self._tokens[number])
            part = self.parts[number]
            yield part, max(start - base, 0), min(stop - base, len(part.tokens))
            number += 1
