"""Identify what a tokenizer does: two that may give other ids for the same text have other keys."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import unicodedata
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndtrain.errors import RecipeError
from ndtrain.hf.special_tokens import added_tokens, can_parse, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Packages that tokenizers are made of; a release of one may change ids.
_PACKAGES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common", "sacremoses", "regex")
# Settings that change no ids: where files are, and what is done with ids afterwards.
_WITHOUT_EFFECT = {
    *("name_or_path", "is_local", "local_files_only", "files_loaded", "auto_map", "tokenizer_class", "processor_class"),
    *("chat_template", "response_template", "model_max_length", "padding_side", "truncation_side", "model_input_names"),
    *("tokenizer_object", "token", "cache_dir", "revision", "commit_hash", "trust_remote_code"),
}
PROBE = (
    "The quick brown fox's 12345 jumps, (over) the LAZY dog!  two  spaces\n\n\n\ttab \r\n end naïve café ÀÉÎ ﬁ Ⅷ ½ "
    "e\u0301 日本語 中文 한국어 العربية हिन्दी ไทย 🙂\u200d👧 def f(x):\n    return x**2  # <b>&amp;</b> "
    "http://a.b/c?d=e_f-g [MASK] <s> don't I'm we'll 3.14 $1,000"
)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a key that is the same in every process, wherever the files are.

    It covers class, code, versions, the Rust backend with its added tokens, settings, vocabulary, the content of
    vocabulary files, and the ids of some text. Raises `RecipeError` for a tokenizer that gives other ids each time.
    """
    kind = type(tokenizer)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "class": kind.__qualname__,
        "code": _code(kind),
        "versions": packages(),
        "backend": backend.to_str() if backend is not None else None,
        "files": _files(tokenizer),
        "settings": {k: _plain(v) for k, v in tokenizer.init_kwargs.items() if _has_effect(k, v)},
        "attributes": {
            k: v for k, v in vars(tokenizer).items() if isinstance(v, bool | int | str) and _has_effect(k, v)
        },
        "vocabulary": sorted(tokenizer.get_vocab().items()) if backend is None else None,
        "added": [[id, _plain(token)] for id, token in sorted(added_tokens(tokenizer).items())],
        "special": tokenizer.all_special_ids,
        "marks": tokenizer.encode("a"),
        "probe": _probe(tokenizer),
    }
    if _probe(tokenizer) != parts["probe"]:
        raise RecipeError(
            "data.tokenizer gives other ids for the same text each time (BPE dropout, or sampling); switch that off in "
            "its files"
        )
    return f"{kind.__name__}-{_digest(json.dumps(parts, sort_keys=True).encode())}"


def packages() -> dict[str, str | None]:
    """Return the versions of what tokenizers are made of; another one may give other ids."""
    return {**{name: _version(name) for name in _PACKAGES}, "unicode": unicodedata.unidata_version}


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    text = PROBE + "".join(map(str, tokenizer.all_special_tokens))
    found: list[Any] = []
    for parse in (can_parse(tokenizer), False):
        try:
            found.append(encode(tokenizer, text, parse_special=parse).tolist())
        except Exception as error:  # a vocabulary of few words may have none for these, and no unknown token
            found.append(type(error).__name__)
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _has_effect(name: str, value: Any) -> bool:
    is_path = name.endswith(("_file", "_path", "_dir")) or (isinstance(value, str) and Path(value).is_absolute())
    return not is_path and name.lstrip("_") not in _WITHOUT_EFFECT


def _plain(value: Any) -> Any:
    """Return a setting as JSON values, without the addresses of objects."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value).__name__ == "AddedToken":
        names = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
        return [getattr(value, name) for name in names]
    return type(value).__qualname__


def _files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return {name: digest} of the files that a tokenizer was built from and may still read."""
    found = {}
    for name in sorted({*tokenizer.vocab_files_names, *tokenizer.init_kwargs}):
        path = tokenizer.init_kwargs.get(name) or getattr(tokenizer, name, None)
        if isinstance(path, str) and name.endswith("_file") and Path(path).is_file():
            found[name] = _digest(Path(path).read_bytes())
    return found


def _code(kind: type) -> list[str]:
    """Return the digests of the modules of a class, and of their package that they import, outside _FOREIGN."""
    found = []
    modules = [sys.modules.get(base.__module__) for base in kind.__mro__]
    seen: set[str] = set()
    while modules:
        module = modules.pop()
        if module is None or module.__name__ in seen or module.__name__.split(".")[0] in _FOREIGN:
            continue
        seen.add(module.__name__)
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):  # built into Python
            continue
        found.append(_digest(source.encode()))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                name = resolve_name("." * node.level + (node.module or ""), module.__package__ or "")
                modules += [sys.modules.get(full) for full in (name, *(f"{name}.{a.name}" for a in node.names))]
    return sorted(found)


# Their versions are in the key.
_FOREIGN = {"builtins", "transformers", "tokenizers", "typing", "abc", "collections"}
