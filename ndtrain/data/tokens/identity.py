"""Identify a token file by a part of its content, since a corpus may take hours to read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ndtrain.data.files import reading

# Files of up to so many bytes are read whole, larger ones at evenly spaced blocks with the first and the last.
WHOLE_BYTES = 1 << 24
BLOCKS = 128
_BLOCK_BYTES = 1 << 16


def sampled_digest(file: Path) -> str:
    """Return a digest of the size of a file and of all of it, or of `BLOCKS` blocks that are spread over it.

    Another tokenizer, order or selection of documents changes nearly every block, or the size. An edit in place of a
    few tokens of a large file may not be seen; it moves no document, so that a place in the data keeps its meaning.
    """
    with reading(file), file.open("rb") as content:
        size = content.seek(0, 2)
        found = hashlib.blake2b(f"{size}\n".encode(), digest_size=20)
        if size <= WHOLE_BYTES:
            content.seek(0)
            found.update(content.read())
        else:
            for i in range(BLOCKS):
                content.seek((size - _BLOCK_BYTES) * i // (BLOCKS - 1))
                found.update(content.read(_BLOCK_BYTES))
    return found.hexdigest()
