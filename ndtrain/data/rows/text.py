"""Read a text file, which is one document; a long one in pieces, so that only a piece is in memory."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ndtrain.data.formats import not_utf8, refuse_zero_bytes
from ndtrain.data.row import Row
from ndtrain.errors import RecipeError

# Bytes of a piece. Files of another size than a piece's are cut at other places: the ids around a cut may differ.
_PIECE = 1 << 26
_LONGEST_LINE = 1 << 28
# A line's end between two words: most tokenizers have no token across it, so that a cut there changes no ids.
_BETWEEN_WORDS = re.compile(rb"(?s).*\S\n(?=\S)")


def rows_of_text(
    content: io.BufferedReader[Any], stored: io.BufferedReader[Any], file: Path, *, name: str, odd: str
) -> Iterator[Row]:
    """Yield the pieces of a text, in their order, as the field `name`; the position in `stored` tells the progress.

    A text of up to 64 MiB is one piece. A longer one is cut after the last line of the first 64 MiB whose end is
    between two words (or else after its last line), and so on. A longer line is not cut. Raises `DamagedError` for
    bytes that are not UTF-8, `RecipeError` for zero bytes and for a line of more than 256 MiB.
    """
    line, rest, ended = 1, b"", False
    while not ended:
        while len(rest) <= _PIECE or rest.find(b"\n", 0, len(rest) - 1) < 0:
            chunk = content.read(max(_PIECE + 1 - len(rest), 1 << 20))
            refuse_zero_bytes(chunk, file)
            rest += chunk
            if ended := not chunk:
                break
            if len(rest) > _LONGEST_LINE:
                raise RecipeError(
                    f"{file}, line {line}: a line of more than {_LONGEST_LINE:,} bytes in a text of more than "
                    f"{_PIECE:,}; break it into lines"
                )
        end = len(rest) if ended else _cut(rest)
        piece, rest = rest[:end], rest[end:]
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(error, file, line + piece.count(b"\n", 0, error.start)) from error
        yield Row({name: text}, f"line {line}", stored.tell(), odd, more=not ended)
        line, odd = line + piece.count(b"\n"), ""


def _cut(raw: bytes) -> int:
    """Return where to cut `raw`, of more than a piece: in its first piece, or at the end of a longer line."""
    piece = raw[:_PIECE]
    if found := _BETWEEN_WORDS.match(piece):
        return found.end()
    return piece.rfind(b"\n") + 1 or raw.find(b"\n") + 1
