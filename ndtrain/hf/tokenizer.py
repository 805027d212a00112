"""The tokenizers that a recipe can name, behind one interface: bytes of a document in, token ids out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import transformers

from ndtrain.errors import DamagedError, RecipeError, first_line, keeps_its_name
from ndtrain.hf.config import untrusted
from ndtrain.hf.hub import MAIN, directory_of
from ndtrain.hf.special_tokens import can_parse, control_tokens, encode, fast_ids, without_special
from ndtrain.hf.tokenizer_key import PROBE, tokenizer_key
from ndtrain.recipe import Recipe
from ndtrain.storage.pointers import pointer_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARKS = ("<|bos|>", "<|eos|>", "<|pad|>")


class ByteTokenizer:
    """Encodes bytes as ids 0 to 255; 256 begins a document, 257 ends it, 258 pads."""

    key = "bytes-1"
    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id = 258

    @property
    def only_pads(self) -> int | None:
        """The token that pads and means nothing else; None if there is none."""
        return self.pad_id if self.pad_id != self.eos_id else None

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Return the `[n]` uint16 ids of a document, without begin and end marks."""
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, to be looked at, with the marks."""
        runs = groupby(ids, key=lambda id: id < 256)
        return "".join(
            bytes(run).decode(errors="replace") if text else "".join(_MARKS[id - 256] for id in run)
            for text, run in ((text, list(run)) for text, run in runs)
        )

    def spelled(self, text: str) -> str:
        """Return "": no text spells a token that is not a byte."""
        return ""

    def save_pretrained(self, directory: Path) -> None:
        """Write a tokenizer that `AutoTokenizer` loads and that returns the same ids."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        # Byte-level BPE without merges maps each byte to one id; its alphabet has a printable letter for each byte.
        letters = _byte_letters()
        vocab = {letter: byte for byte, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in _MARKS])
        bos, eos, pad = _MARKS
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
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
    """Wraps a tokenizer of transformers; `vocab_size` is its largest id + 1.

    Raises `RecipeError` if it has no end-of-text token.

    Text that spells a special token is encoded as the plain text that it is, or to that token if `parse_special`.
    Added tokens that are not special, such as Gemma's runs of spaces, are ordinary vocabulary in both cases.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str, *, parse_special: bool = False):
        self.inner, self._key = tokenizer, key
        # Ids may have gaps, so the number of tokens says nothing of them.
        ids = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self.vocab_size = max(ids, default=-1) + 1
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
        self._control = control_tokens(tokenizer)
        # Any text may give the unknown token.
        self._refused = [id for id in self._control.values() if id != tokenizer.unk_token_id]
        self.parse_special = False
        self._parse(parse_special)
        self._spelled = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or r"(?!)")

    @property
    def key(self) -> str:
        """The identity of what it does to text."""
        return f"{self._key}-{'parse' if self.parse_special else 'text'}"

    def parsing(self, parse_special: bool) -> HubTokenizer:
        """Return the tokenizer that treats text which spells special tokens so. Raises what the constructor raises."""
        if parse_special == self.parse_special:
            return self
        other = copy(self)
        other._parse(parse_special)
        return other

    def _parse(self, parse_special: bool) -> None:
        if parse_special and not can_parse(self.inner):
            raise RecipeError(
                'data.special_tokens = "parse" is not available with this data.tokenizer, which encodes all text as '
                'plain text; set it to "text"'
            )
        self.parse_special = parse_special

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """Return the `[n]` int64 ids of a document, without begin and end marks.

        Raises `RecipeError` for text that this tokenizer can only encode to a special token.
        """
        try:
            return self._ids(raw.decode())
        except Exception as error:  # of a vocabulary without an unknown token, or of a tokenizer's own code
            if keeps_its_name(error):
                raise
            raise RecipeError(f"data.tokenizer cannot encode the text: {first_line(error)}") from error

    def _ids(self, text: str) -> np.ndarray:
        ids = self._encode(text)
        if self.parse_special or not self._has_control(ids):
            return ids
        # A model of a vocabulary that has the special tokens too may find them in plain text.
        if self._strict is not None and not self._has_control(strict := self._strict(text)):
            return strict
        token = next(token for token, id in self._control.items() if id in ids and id in self._refused)
        raise RecipeError(
            f"data.tokenizer encodes the text {token!r} to its special token and cannot encode it as plain text; "
            'remove it from the data, or set data.special_tokens = "parse"'
        )

    def spelled(self, text: str) -> str:
        """Return the first special token that `text` spells, or ""."""
        found = self._spelled.search(text)
        return found.group() if found else ""

    def _encode(self, text: str) -> np.ndarray:
        return encode(self.inner, text, parse_special=self.parse_special)

    def _has_control(self, ids: np.ndarray) -> bool:
        return bool(np.isin(ids, self._refused).any())

    @cached_property
    def _strict(self) -> Callable[[str], np.ndarray] | None:
        """Encodes text with a copy of the tokenizer whose model has no special tokens; None without such a copy."""
        plain_only = without_special(self.inner, self._control.keys() - {str(self.inner.unk_token)})
        if plain_only is None:
            return None
        strict = partial(fast_ids, plain_only)
        plain = self._spelled.sub(" ", PROBE)
        try:
            return strict if np.array_equal(strict(plain), self._encode(plain)) else None
        except Exception:
            return None

    @property
    def only_pads(self) -> int | None:
        """The token that pads and means nothing else; None if there is none."""
        others = (self.eos_id, self.inner.bos_token_id, self.inner.unk_token_id)
        return None if self.pad_id in others else self.pad_id

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, to be looked at, with all special ones."""
        return str(self.inner.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text_of(self, token: int) -> str:
        """Return the text of a token, for a message."""
        return str(self.inner.convert_ids_to_tokens(token))

    def save_pretrained(self, directory: Path) -> None:
        self.inner.save_pretrained(directory)


def tokenizer_source(recipe: Recipe) -> tuple[str, str, str]:
    """Return what the tokenizer is read from: the key that names it, the name, and its revision on the hub."""
    model, given = recipe.model, recipe.data.tokenizer
    own = given is None or given == model.name
    return (
        "model.name" if given is None else "data.tokenizer",
        str(model.name if given is None else given),
        model.revision if own else MAIN,
    )


def _damaged(at: Path) -> str | None:
    """Return which file of a tokenizer in `at` cannot be read, and why; None if none is known to be damaged."""
    for file in sorted(at.iterdir()) if at.is_dir() else ():
        if not file.is_file() or ("token" not in file.name and "vocab" not in file.name and file.suffix != ".txt"):
            continue
        try:
            if what := pointer_at(file):
                return f"{file} {what}"
            if file.name == "tokenizer.json":
                tokenizers.Tokenizer.from_file(str(file))
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".txt":
                file.read_text(encoding="utf-8")
        except Exception as error:  # tokenizers raises bare ones
            return f"{file} is damaged ({first_line(error)})"
    return None


def load_tokenizer(recipe: Recipe, directory: str | None = None) -> ByteTokenizer | HubTokenizer:
    """Return the recipe's tokenizer, from `directory` or the one that its name stands for.

    Raises `RecipeError` if it cannot be loaded, `DamagedError` if that is for a file of it.
    """
    if recipe.data.tokenizer == "bytes":
        return ByteTokenizer()
    key, name, revision = tokenizer_source(recipe)
    at = directory or directory_of(name, revision, key=key)
    trusted = recipe.model.trust_remote_code
    # Only one process tokenizes, so the library's warning about forks does not apply.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(at, trust_remote_code=trusted)
    except Exception as error:
        if keeps_its_name(error):
            raise
        if Path(at).is_dir() and not any("token" in file.name or "vocab" in file.name for file in Path(at).iterdir()):
            other = "set data.tokenizer to one" if key == "model.name" else "choose another"
            raise RecipeError(f'{key} = "{name}": {at} has no tokenizer; {other}') from error
        what = f'the tokenizer of {key} = "{name}"'
        if not trusted and "trust_remote_code" in str(error):
            raise untrusted(what, at) from error
        if damaged := _damaged(Path(at)):
            raise DamagedError(f"{what} cannot be loaded: {damaged}") from error
        raise RecipeError(f"{what} cannot be loaded: {first_line(error)}") from error
    return HubTokenizer(inner, key=tokenizer_key(inner), parse_special=recipe.data.special_tokens == "parse")
