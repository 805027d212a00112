"""Divide the files of a corpus into groups that are tokenized and cached together."""

from __future__ import annotations

from collections.abc import Sequence

LARGE = 16 << 20
_MOST = 64 << 20
# Of so many small files one ends its group, whatever comes before it.
_FILES = 64


def groups_of(sizes: Sequence[int], digests: Sequence[str]) -> list[tuple[int, int]]:
    """Return the first file of each group and the one past its last, given sizes in bytes and digests (hex).

    A file of `LARGE` bytes is a group of its own. Which small file ends a group follows from its content, so that a
    file that is added later changes the group that it comes into, and no other.
    """
    groups: list[tuple[int, int]] = []
    start = total = 0
    for index, (size, digest) in enumerate(zip(sizes, digests, strict=True)):
        if size >= LARGE and start < index:
            groups.append((start, index))
            start, total = index, 0
        total += size
        if size >= LARGE or total >= _MOST or int(digest[:8], 16) % _FILES == 0:
            groups.append((start, index + 1))
            start, total = index + 1, 0
    if start < len(sizes):
        groups.append((start, len(sizes)))
    return groups
