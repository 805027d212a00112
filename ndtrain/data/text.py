"""Encode text: a document is its tokens between the marks for begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import Encoded


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
    """Encodes the bytes under "text" as [bos?] + their tokens + [eos], each mark once; all of them carry loss."""

    masked = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.key = " ".join(map(str, (tokenizer.key, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)))

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        raw: bytes = fields["text"]
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids = self.tokenizer.encode_bytes(raw) if raw else np.empty(0, np.int64)
        special = self.tokenizer.spelled(raw.decode())
        if not ids.size:
            return Encoded(np.empty(0, np.int64), special=special)
        # Text that was rendered with its marks, and is read with them, keeps its own.
        head = [] if bos is None or ids[0] == bos else [bos]
        tail = [] if ids[-1] == eos else [eos]
        return Encoded(np.concatenate([head, ids, tail]).astype(np.int64), special=special)
