"""Read a text file, which is one document; a long one in pieces, so that only a piece is in memory."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ndtrain.data.formats import not_utf8, refuse_zero_bytes
from ndtrain.data.row import Piece, Row
from ndtrain.errors import RecipeError

# Bytes of a text that is read whole, and of the pieces of a longer one. Others would cut at other places, where ids may
# differ: a change needs another version of the token cache.
_WHOLE, _PIECE = 1 << 24, 1 << 20
_LONGEST_LINE = 1 << 26
# A line's end between two words: most tokenizers have no token across it, so that a cut there changes no ids.
_BETWEEN_WORDS = re.compile(rb"(?s).*\S\n(?=\S)")


def rows_of_text(
    content: io.BufferedReader[Any], stored: io.BufferedReader[Any], file: Path, *, name: str, odd: str
) -> Iterator[Row]:
    """Yield a text as the field `name`; the position in `stored` tells the progress.

    A text of more than 16 MiB is a row for each of its pieces (`Piece`). A piece ends with the last line in 1 MiB whose
    end is between two words, or else with the last line, or else with a longer line. Raises `DamagedError` for bytes
    that are not UTF-8, `RecipeError` for zero bytes and, in pieces, for a line of more than 64 MiB.
    """
    line, begins = 1, True
    rest = content.read(_WHOLE + 1)
    refuse_zero_bytes(rest, file)
    if len(rest) <= _WHOLE:
        yield Row({name: _decoded(rest, file, line)}, "line 1", stored.tell(), odd)
        return
    ended = False
    while not ended:
        while not ended and (len(rest) <= _PIECE or rest.find(b"\n", 0, len(rest) - 1) < 0):
            if len(rest) > _LONGEST_LINE:
                raise RecipeError(
                    f"{file}, line {line}: a line of more than {_LONGEST_LINE:,} bytes in a text of more than "
                    f"{_WHOLE:,}; break it into lines"
                )
            chunk = content.read(_PIECE)
            refuse_zero_bytes(chunk, file)
            rest, ended = rest + chunk, not chunk
        end = len(rest) if ended else _cut(rest)
        piece, rest = rest[:end], rest[end:]
        fields = Piece({name: _decoded(piece, file, line)}, begins=begins, ends=ended)
        yield Row(fields, f"line {line}", stored.tell(), odd)
        line, odd, begins = line + piece.count(b"\n"), "", False


def _cut(raw: bytes) -> int:
    """Return where to cut `raw`, of more than a piece: in its first piece, or at the end of a longer line."""
    piece = raw[:_PIECE]
    if found := _BETWEEN_WORDS.match(piece):
        return found.end()
    return piece.rfind(b"\n") + 1 or raw.find(b"\n") + 1


def _decoded(raw: bytes, file: Path, line: int) -> str:
    """Return the text of bytes that begin in this line of `file`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, file, line + raw.count(b"\n", 0, error.start)) from error
