"""Small tokenizers of the kinds that model families use, with their special tokens, made without any file."""

from __future__ import annotations

from functools import cache

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ndtrain.hf.tokenizer import HubTokenizer, _byte_letters

WORDS = [
    *("the", "he", " the", " is", " of", " a", " to", "user", "assistant", "system", " Paris", " capital", "France"),
    *("What", " What", "Hello", " there", "think", "tool", "_call", "name", "arguments", "content", "ing", "er", "ell"),
    *(".\n", "\n\n", "?\n", "!\n", " \n", "\n", "  ", "   ", '":', '"}', "': ", "},", " {", ' "', '{"'),
]
# Special tokens of each family, then added tokens that are not special; bos, eos, pad, whether offsets lose spaces.
FAMILIES: dict[str, tuple[list[str], list[str], str | None, str, bool]] = {
    "llama3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ],
        [],
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
    ),
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
        None,
        "<|im_end|>",
        False,
    ),
    "gemma": (["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n"], "<bos>", "<eos>", False),
    "phi3": (
        ["<s>", "<|endoftext|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        [],
        "<s>",
        "<|endoftext|>",
        False,
    ),
    "mistral": (
        [
            "<s>",
            "</s>",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
        ],
        [],
        "<s>",
        "</s>",
        True,
    ),
    "gptoss": (
        [
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
            "<|call|>",
        ],
        [],
        "<|startoftext|>",
        "<|return|>",
        True,
    ),
}


def _byte_level(trim: bool) -> Tokenizer:
    """GPT-2's kind: bytes and merges of them, in words."""
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    return _with_merges(vocab, [[letters[byte] for byte in word.encode()] for word in WORDS], trim=trim)


def _with_merges(vocab: dict[str, int], words: list[list[str]], *, trim: bool) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for pieces in words:
        while len(pieces) > 1:
            for pair in merges:  # those of earlier words come first in a tokenizer too
                for at in range(len(pieces) - 1):
                    if (pieces[at], pieces[at + 1]) == pair:
                        pieces[at : at + 2] = ["".join(pair)]
                        break
            if len(pieces) > 1:
                if (pair := (pieces[0], pieces[1])) not in merges:
                    merges.append(pair)
                    vocab.setdefault("".join(pair), len(vocab))
                pieces[:2] = ["".join(pair)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


def _sentence_piece() -> Tokenizer:
    """Gemma's and Llama 2's kind: characters with ▁ for spaces, bytes for what is not in the vocabulary."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *(chr(code) for code in range(33, 127)), "é"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "▁"),
        ("i", "s"),
        ("▁", "is"),
        (".", "▁"),
        ("e", "l"),
        ("el", "l"),
    ]
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


@cache
def inner_of(family: str) -> transformers.PreTrainedTokenizerFast:
    special, added, bos, eos, trim = FAMILIES[family]
    backend = _sentence_piece() if family in ("gemma", "phi3") else _byte_level(trim)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    names = {"bos_token": bos} if bos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=special[1], **names)


def tokenizer_of(family: str) -> HubTokenizer:
    return HubTokenizer(inner_of(family), key=f"tests-{family}")
