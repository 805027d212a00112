"""The types that flow from files to token caches: rows, documents as ids, and the error of one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ndtrain.errors import NdtrainError


class Row(NamedTuple):
    """One row of a file: its fields by name, where it begins ("line 3", "row 7"), bytes of the file read so far.

    `odd` names what a reader would want to know of how it was read: "json" for a text file that begins like JSON data,
    "surrogate" for half a character that became "?", "csv" for the first row of a CSV file. With `more` the next row
    is the same document's next piece.
    """

    fields: Mapping[str, Any]
    where: str
    done: int
    odd: str = ""
    more: bool = False


class Encoded(NamedTuple):
    """A document's ids `[n]` (int64) with its marks, and which of them carry loss `[n]` (bool), None if all do."""

    ids: npt.NDArray[np.int64]
    loss: npt.NDArray[np.bool_] | None = None


class RowError(NdtrainError):
    """One row cannot be used, for this reason; the caller adds file and line, and says what follows."""
