"""Recognize the small text files that git-lfs and git-annex leave in place of large ones."""

from __future__ import annotations

from pathlib import Path

_LFS, _ANNEX = b"version https://git-lfs.github.com/spec/", b"/annex/objects/"
# As many bytes of a file's start tell.
START = max(len(_LFS), len(_ANNEX))


def pointer(start: bytes) -> str | None:
    """Return in words what a file that begins with `start` is, if it is such a pointer."""
    if start.startswith(_LFS):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull` where it comes from"
    if start.startswith(_ANNEX):
        return "is a git-annex pointer, not the file itself; run `git annex get` where it comes from"
    return None


def pointer_at(path: Path) -> str | None:
    """Return in words what the file at `path` is, if it is such a pointer. Raises `OSError`."""
    with path.open("rb") as file:
        return pointer(file.read(START))
