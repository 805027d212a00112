"""The types that flow from files to the token cache: a row of a file, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ndtrain.errors import NdtrainError, RecipeError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Row(NamedTuple):
    """One row of a file: its fields by name, where it begins ("line 3", "row 7"), bytes of the file read so far.

    `odd` names what a reader would want to know of how it was read: "json" for a text file that begins like JSON data,
    "surrogate" for half a character that became "?", "csv" for the first row of a CSV file.
    """

    fields: Mapping[str, Any]
    where: str
    done: int
    odd: str = ""


class Piece(dict[str, Any]):
    """The fields of a piece of a text that is too long to be in memory at once; it may begin it, end it, or neither."""

    def __init__(self, fields: Mapping[str, Any], *, begins: bool, ends: bool):
        super().__init__(fields)
        self.begins, self.ends = begins, ends


class Encoded(NamedTuple):
    """A document's ids `[n]` with its marks, and which of them carry loss `[n]`, None if all do.

    `special` is a special token that its text spells, or "".
    """

    ids: IntArray
    loss: BoolArray | None = None
    special: str = ""


class RowError(NdtrainError):
    """One row cannot be used, and why; the caller adds file and line."""


class SkippedRow(RowError):
    """A row that the recipe says to leave out, whatever is done with rows that cannot be used."""


class NoRowsError(RecipeError):
    """The files have no row to train on."""


class Encoder(Protocol):
    """Turns the fields of a row into tokens. `key` identifies its behaviour: other behaviour needs another key.

    It can be pickled. `tokenizer` is what it encodes with, `shape` what its rows are, `columns` maps our names of their
    fields to the files', as `data.columns` does, and `skips` says that rows which cannot be used are left out.
    """

    @property
    def shape(self) -> Literal["text", "chat", "tokens"]: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def skips(self) -> bool: ...
    @property
    def tokenizer(self) -> object: ...
    @property
    def key(self) -> str: ...
    @property
    def vocab_size(self) -> int:
        """The largest id + 1; ids may have gaps."""

    @property
    def masked(self) -> bool:
        """Whether `encode` says which tokens carry loss; otherwise all do."""

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        """Return the tokens of a row; fewer than two have no target. Raises `RowError`, and `RecipeError` for all."""
