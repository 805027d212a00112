"""Which tokens of a tokenizer are special, and how text that spells them is encoded as plain text."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from ndtrain.hf.compat import rust_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


# mistral-common encodes all text as plain text and has no switch for it.
_ALWAYS_PLAIN = "MistralCommonBackend"


def can_parse(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer can encode text to the special tokens that it spells."""
    return type(tokenizer).__name__ != _ALWAYS_PLAIN


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    """Return {id: token} of the tokens that were added to the tokenizer's vocabulary, special or not."""
    return tokenizer.added_tokens_decoder if can_parse(tokenizer) else {}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return {text: id} of the special tokens that text may spell by accident.

    Without single characters and white space (such as an end-of-text token that is a line feed): text has no other way
    to spell those.
    """
    texts = {token.content for token in added_tokens(tokenizer).values() if token.special}
    texts |= set(map(str, tokenizer.all_special_tokens))
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in texts if len(text) > 1 and not text.isspace()}
    return {text: id for text, id in ids.items() if isinstance(id, int)}


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, parse_special: bool) -> np.ndarray:
    """Return the int64 ids `[n]` of `text` without begin and end marks."""
    split = can_parse(tokenizer) and not parse_special
    rust = rust_tokenizer(tokenizer)
    if rust is None:
        # Quietly: documents longer than model_max_length are cut into rows.
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split, verbose=False)
        return np.asarray(list(ids), dtype=np.int64)
    # As transformers sets it up, whatever tokenizer.json or another caller has set.
    if rust.truncation is not None:
        rust.no_truncation()
    if rust.padding is not None:
        rust.no_padding()
    if rust.encode_special_tokens != split:
        rust.encode_special_tokens = split
    return fast_ids(rust, text)


def fast_ids(rust: Tokenizer, text: str) -> np.ndarray:
    """Return the int64 ids `[n]` of `text`; which characters each has is not worked out, a fifth of the time."""
    (encoding,) = rust.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encoding.ids, dtype=np.int64)


def without_special(tokenizer: PreTrainedTokenizerBase, special: Collection[str]) -> Tokenizer | None:
    """Return a copy of a tokenizer's Rust backend in whose vocabulary text cannot meet the `special` tokens.

    Ids stay the same. None if there is no such backend, or it has no vocabulary that can be changed.
    """
    from tokenizers import Tokenizer

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    model = rules["model"]
    hidden = {text: f"\0{text}" for text in special}  # no text has zero bytes
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    elif isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): id for piece, id in vocab.items()}
        if "merges" in model:
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & hidden.keys()]
    else:
        return None
    for token in rules["added_tokens"]:  # kept, under the other name: ids are given by position
        token["content"] = hidden.get(token["content"], token["content"])
    rules["post_processor"] = rules["truncation"] = rules["padding"] = None
    return Tokenizer.from_str(json.dumps(rules))
