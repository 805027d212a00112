"""Encode text: a document is its tokens between the marks for begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import Encoded, Piece
from ndtrain.data.shapes import Shape, fields_of, text_of


class Tokenizer(Protocol):
    """The interface of a tokenizer. `key` identifies its behaviour: other behaviour needs another key."""

    @property
    def key(self) -> str: ...
    @property
    def vocab_size(self) -> int:
        """The largest id + 1; ids may have gaps."""

    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...

    def encode_bytes(self, raw: bytes) -> npt.NDArray[Any]:
        """Return the ids `[n]` of one document, without bos and eos."""

    def spelled(self, text: str) -> str:
        """Return a special token that `text` spells, or ""."""


class TextEncoder:
    """Encodes a text as [bos?] + its tokens + [eos], each mark once; all of them carry loss.

    Of a `Piece` the first has the one mark and the last the other. With `skips`, rows without a text are left out.
    """

    shape: Shape = "text"
    masked = False

    def __init__(self, tokenizer: Tokenizer, columns: Mapping[str, str] | None = None, *, skips: bool = False):
        self.tokenizer, self.vocab_size, self.columns = tokenizer, tokenizer.vocab_size, dict(columns or {})
        self.skips = skips
        own = (tokenizer.key, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        self.key = " ".join(map(str, (*own, *sorted(self.columns.items()), *(["skips"] if skips else []))))

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        text = text_of(fields_of(fields, "text", self.columns))
        begins, ends = (fields.begins, fields.ends) if isinstance(fields, Piece) else (True, True)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids = self.tokenizer.encode_bytes(text.encode()) if text else np.empty(0, np.int64)
        special = self.tokenizer.spelled(text)
        if not ids.size and begins and ends:
            return Encoded(np.empty(0, np.int64), special=special)
        # Text that was rendered with its marks, and is read with them, keeps its own.
        head = [bos] if begins and bos is not None and not (ids.size and ids[0] == bos) else []
        tail = [eos] if ends and not (ids.size and ids[-1] == eos) else []
        marked = [np.array(head, np.int64), ids, np.array(tail, np.int64)]
        return Encoded(np.concatenate(marked, dtype=np.int64), special=special)
