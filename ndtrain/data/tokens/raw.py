"""Files that are tokens and nothing else, as nanoGPT (.bin) and OLMo (.npy without a header) write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ndtrain.data.tokens.block import Block, Reading, damaged, mapped, stream
from ndtrain.errors import RecipeError

_PROBE = 1 << 20
# Fewer values may be zeros by chance.
_LEAST = 16


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the tokens of a file without a header, of `reading.dtype`.

    Raises `DamagedError` for a part of a token at the end, and `RecipeError` where every second value is zero: those
    are the high halves of ids of twice the width.
    """
    dtype, size = reading.dtype, file.stat().st_size
    if size % dtype.itemsize:
        raise damaged(
            file,
            f"has {size:,} bytes, which is no whole number of {dtype.name} tokens; it is truncated, or "
            "data.token_dtype is another",
        )
    ids = mapped(file, dtype, at=0, count=size // dtype.itemsize)
    probe = ids[:_PROBE]
    if probe.size >= _LEAST and not probe[1::2].any() and probe[::2].any():
        wide = {1: "uint16", 2: "uint32", 4: "int64"}.get(dtype.itemsize, "another")
        raise RecipeError(
            f'{file}: read as {dtype.name}, every second token is 0, so they are wider; set data.token_dtype = "{wide}"'
        )
    yield from stream(ids, at=0)
