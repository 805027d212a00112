"""The types between the readers of the layouts and the index: consecutive tokens, and how a recipe reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import BoolArray, IntArray
from ndtrain.errors import DamagedError

# Tokens, rows or documents that are looked at together.
CHUNK = 1 << 20


class Reading(NamedTuple):
    """What decides how token files are read, beside their content.

    `eos` ends documents, `bos` begins them (None: no token does), `pad` only pads (None: padding has another meaning
    too). `documents` is data.documents, `dtype` that of raw tokens, `vocab_size` the tokenizer's largest id + 1.
    """

    eos: int
    bos: int | None
    pad: int | None
    documents: Literal["auto", "rows", "eos"]
    dtype: np.dtype[Any]
    vocab_size: int

    @property
    def key(self) -> str:
        """Text that is equal for readings that give the same documents of the same tokens."""
        return f"eos={self.eos} bos={self.bos} pad={self.pad} documents={self.documents}"


class Block(NamedTuple):
    """Consecutive tokens `[n]` of a file, of any integer type.

    `at` is the byte at which they lie in the file as they are, None if they have to be stored elsewhere to be mapped.
    `starts` are the positions in the block, from 0 to n, at which rows begin, None in a stream without rows; `loss`
    `[n]` says which tokens carry loss, None if all do; `done` is how many bytes of the file are read after the block;
    `ignored` are the names of columns that are not read.
    """

    ids: npt.NDArray[Any]
    at: int | None
    starts: IntArray | None
    loss: BoolArray | None
    done: int
    ignored: tuple[str, ...] = ()


def mapped(file: Path, dtype: np.dtype[Any], *, at: int, count: int) -> npt.NDArray[Any]:
    """Return `count` values of a file from byte `at` on as a memory map."""
    if not count:
        return np.empty(0, dtype)  # nothing cannot be mapped
    return np.memmap(file, dtype=dtype, mode="r", offset=at, shape=(count,)).view(np.ndarray)


def stream(ids: npt.NDArray[Any], *, at: int) -> Iterator[Block]:
    """Yield the block of a stream without rows that begins at byte `at`."""
    yield Block(ids, at, None, None, at + ids.nbytes)


def damaged(file: Path, what: str) -> DamagedError:
    return DamagedError(f"{file}: {what}")
