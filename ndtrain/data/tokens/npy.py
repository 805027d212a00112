"""Arrays that numpy saved: one dim is a stream of tokens, two are rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError

import numpy as np

from ndtrain.data.tokens.block import CHUNK, Block, Reading, damaged, mapped, stream
from ndtrain.errors import RecipeError, one_line

MAGIC = b"\x93NUMPY"


def blocks(file: Path, reading: Reading) -> Iterator[Block]:
    """Yield the tokens of an .npy file. Nothing is unpickled.

    Raises `DamagedError` for a header that cannot be read or contradicts the size of the file, `RecipeError` for an
    array that holds something else than tokens.
    """
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with file.open("rb") as opened:
        try:
            version = np.lib.format.read_magic(opened)
            if version not in headers:
                raise ValueError(f"version {version[0]}.{version[1]} is not that of an array of numbers")
            shape, fortran, dtype = headers[version](opened)
        except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
            raise damaged(file, f"its numpy header cannot be read ({one_line(error)})") from error
        at = opened.tell()
    if dtype.kind not in "iu":
        raise RecipeError(f"{file} is an array of {dtype}, and token ids are integers")
    if len(shape) not in (1, 2):
        raise RecipeError(f"{file} has {len(shape)} dims; a stream of tokens has one, rows of tokens have two")
    if fortran and len(shape) == 2:
        raise RecipeError(
            f"{file} stores columns, not rows (Fortran order); save it as numpy.save(file, numpy.ascontiguousarray(a))"
        )
    size, count = file.stat().st_size, int(np.prod(shape, dtype=object))
    if size != at + count * dtype.itemsize:
        raise damaged(
            file, f"has {size:,} bytes, but its header says {list(shape)} of {dtype}, {at + count * dtype.itemsize:,}"
        )
    ids = mapped(file, dtype, at=at, count=count)
    if len(shape) == 1:
        yield from stream(ids, at=at)
        return
    rows, width = shape
    step = max(1, CHUNK // max(1, width))
    for row in range(0, rows if width else 0, step):
        part = ids[row * width : (row + step) * width]
        start = at + row * width * dtype.itemsize
        yield Block(part, start, np.arange(0, len(part), width, dtype=np.int64), None, start + part.nbytes)
