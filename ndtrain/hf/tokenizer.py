"""The tokenizers that a recipe can name, behind one interface: bytes of a document in, token ids out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers

from ndtrain.errors import RecipeError, first_line, keeps_its_name
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ByteTokenizer:
    """Encodes bytes as ids 0 to 255; 256 begins a document, 257 ends it, 258 pads."""

    key = "bytes-1"
    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id = 258

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Return the `[n]` uint16 ids of a document, without begin and end marks."""
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def save_pretrained(self, directory: Path) -> None:
        """Write a tokenizer that `AutoTokenizer` loads and that returns the same ids."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        # Byte-level BPE without merges maps each byte to one id; its alphabet has a printable letter for each byte.
        letters = _byte_letters()
        vocab = {letter: byte for byte, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", "<|pad|>")])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
        ).save_pretrained(directory)


def _byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each byte value."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


class HubTokenizer:
    """Wraps a tokenizer of transformers. Raises `RecipeError` if it has no end-of-text token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str):
        self.inner = tokenizer
        self.key = key
        self.vocab_size = len(tokenizer)
        eos = tokenizer.eos_token_id
        if eos is None:
            raise RecipeError(
                "data.tokenizer has no end-of-text token, which has to separate documents; choose another"
            )
        self.eos_id: int = eos
        # Some tokenizers name a begin token but do not add it, so test what this one does.
        first = tokenizer.encode("a")[:1]
        self.bos_id: int | None = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Return the `[n]` int64 ids of a document, without begin and end marks."""
        ids: Iterable[int] = self.inner.encode(raw.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(list(ids), dtype=np.int64)

    def save_pretrained(self, directory: Path) -> None:
        self.inner.save_pretrained(directory)


def load_tokenizer(recipe: Recipe) -> ByteTokenizer | HubTokenizer:
    """Return the recipe's tokenizer. Raises `RecipeError` if it cannot be loaded."""
    name = recipe.data.tokenizer or recipe.model.name
    if name == "bytes":
        return ByteTokenizer()
    # Only one process tokenizes, so the library's warning about forks does not apply.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:
        if keeps_its_name(error):
            raise
        raise RecipeError(f'data.tokenizer = "{name}" cannot be loaded: {first_line(error)}') from error
    return HubTokenizer(inner, key=_tokenizer_key(inner))


def _tokenizer_key(tokenizer: Any) -> str:
    """Return a key that identifies what a tokenizer does: its class and a digest of its vocabulary and rules."""
    import hashlib

    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
