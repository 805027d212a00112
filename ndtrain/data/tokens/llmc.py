"""Shards of llm.c: 256 int32 of header (magic, version, number of tokens), then the tokens.

Layout: dev/data/data_common.py and llmc/dataloader.h in github.com/karpathy/llm.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ndtrain.data.tokens.block import Block, Reading, damaged, mapped, stream
from ndtrain.errors import RecipeError

_HEADER_BYTES = 256 * 4
# Magic -> (version, dtype).
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
# Of multiple-choice questions.
_EVALUATION = 20240522


def matches(start: bytes) -> bool:
    return int.from_bytes(start[:4], "little") in (*KINDS, _EVALUATION)


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the tokens of a shard. Raises `DamagedError` if the header contradicts the size of the file."""
    size = file.stat().st_size
    if size < _HEADER_BYTES:
        raise damaged(file, f"has {size:,} bytes, fewer than the {_HEADER_BYTES:,} of llm.c's header; it is truncated")
    magic, version, count = map(int, np.fromfile(file, dtype="<i4", count=3))
    if magic == _EVALUATION:
        raise RecipeError(f"{file} holds llm.c's multiple-choice questions, not a stream of tokens")
    known, dtype = KINDS[magic]
    if version != known:
        raise RecipeError(f"{file} is of version {version} of llm.c's layout; version {known} is read")
    wanted = _HEADER_BYTES + count * dtype.itemsize
    if size != wanted:
        raise damaged(file, f"has {size:,} bytes, but its header says {count:,} {dtype.name} tokens, {wanted:,} bytes")
    yield from stream(mapped(file, dtype, at=_HEADER_BYTES, count=count), at=_HEADER_BYTES)
