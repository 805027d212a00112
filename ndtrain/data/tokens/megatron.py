"""Megatron's indexed datasets: sequences one after another in X.bin; their lengths and documents in X.idx.

Layout: megatron/core/datasets/indexed_dataset.py in github.com/NVIDIA/Megatron-LM. After the magic: version (uint64),
code of the dtype (uint8), numbers of sequences and of document bounds (uint64); then the sequences' lengths (int32) and
byte offsets (int64), and the documents' bounds as numbers of sequences (int64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ndtrain.data.files import stamp_of
from ndtrain.data.tokens.block import Block, Reading, damaged, mapped
from ndtrain.errors import RecipeError

_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
# Of Megatron 1 to 8 (6 and 7 are floats), of Megatron-DeepSpeed the others.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
# Documents whose sequences are looked at together.
_DOCUMENTS = 1 << 18


def index_of(file: Path) -> Path:
    """Return the name of the index of X.bin."""
    return file.with_suffix(".idx")


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the documents of X.bin, which are its rows. Raises `DamagedError` where the files contradict each other."""
    index = index_of(file)
    size, index_size = stamp_of(file)[0], stamp_of(index)[0]
    with index.open("rb") as opened:
        head = opened.read(_HEADER.size)
    if head.startswith(_OLD_MAGIC):
        raise RecipeError(f"{index} is of fairseq's old layout (TNTIDX); preprocess the data with --dataset-impl mmap")
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise damaged(index, f"is not the index of {file.name}: it does not begin as Megatron's do (MMIDIDX)")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1:
        raise RecipeError(f"{index} is of version {version} of Megatron's layout; version 1 is read")
    if code not in _DTYPES:
        what = "floats" if code in (6, 7) else "a dtype that Megatron does not have"
        raise RecipeError(f"{index} says that {file.name} holds {what} (code {code}), and token ids are integers")
    dtype = np.dtype(_DTYPES[code])
    wanted = _HEADER.size + 12 * sequences + 8 * bounds
    if sequences and index_size == wanted + sequences:
        raise RecipeError(f"{index} is of a multimodal data set (each sequence has a mode), which is not text")
    if index_size != wanted:
        raise damaged(
            index,
            f"has {index_size:,} bytes, but its header says {sequences:,} sequences and {bounds:,} document bounds, "
            f"{wanted:,} bytes",
        )
    lengths = mapped(index, np.dtype("<i4"), at=_HEADER.size, count=sequences)
    pointers = mapped(index, np.dtype("<i8"), at=_HEADER.size + 4 * sequences, count=sequences)
    documents = mapped(index, np.dtype("<i8"), at=_HEADER.size + 12 * sequences, count=bounds)
    if not bounds or documents[0] != 0 or documents[-1] != sequences:
        raise damaged(index, f"its documents do not cover its {sequences:,} sequences")
    position = 0
    for first in range(0, bounds - 1, _DOCUMENTS):
        ends = documents[first : first + _DOCUMENTS + 1].astype(np.int64)
        if (np.diff(ends) < 0).any() or ends[-1] > sequences:
            raise damaged(index, f"its document bounds fall from number {first + int(np.diff(ends).argmin()):,} on")
        low, high = int(ends[0]), int(ends[-1])
        if high == low:
            continue
        own = lengths[low:high].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(own)])
        wrong = (own < 0) | (pointers[low:high] != (position + starts[:-1]) * dtype.itemsize)
        if wrong.any():
            raise damaged(
                index, f"sequence {low + int(wrong.argmax()):,} does not begin in {file.name} where the one before ends"
            )
        count = int(starts[-1])
        if (position + count) * dtype.itemsize > size:
            raise damaged(
                file, f"has {size:,} bytes, fewer than the sequences that {index.name} lists; it is truncated"
            )
        at = position * dtype.itemsize
        ids = mapped(file, dtype, at=at, count=count)
        yield Block(ids, at, starts[ends[:-1] - low], None, at + ids.nbytes)
        position += count
    if position * dtype.itemsize != size:
        raise damaged(
            file,
            f"has {size:,} bytes, but {index.name} lists {position:,} {dtype.name} tokens, "
            f"{position * dtype.itemsize:,} bytes",
        )
