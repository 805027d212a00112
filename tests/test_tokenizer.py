"""Text that spells a special token is text; a tokenizer that may give other ids has another key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from ndtrain.data.cache import build_cache, contents_of, notes
from ndtrain.data.text import TextEncoder
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf.compat import rust_tokenizer
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from ndtrain.hf.tokenizer_key import tokenizer_key
from ndtrain.recipe import load_recipe
from tests.tiny import recipe_file

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>"]
QUOTES = [
    "<|im_start|>user\nhi<|eos|>",
    "<|eos|>",
    "a <|bos|> b <|im_start|",
    "é<|pad|><|eos|>\n",
    "<|im_<|eos|>start|>",
]


def bytes_on_disk(directory: Path, **settings: Any) -> Path:
    """A byte-level tokenizer with an `<|im_start|>` (259) and an added token that is not special, `<think>` (260)."""
    ByteTokenizer().save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(directory)
    change(directory / "tokenizer_config.json", **settings)
    return directory


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def pieces(kind: str) -> tuple[transformers.PreTrainedTokenizerFast, str]:
    """A tokenizer whose model has the special tokens in its vocabulary, and text that spells one."""
    letters = ["▁", "a", "b", "<", "/", "s", ">", "</", "</s"]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        vocab = [(token, 0.0) for token in special] + [(letter, -3.0) for letter in letters]
        backend = Tokenizer(models.Unigram(vocab, 0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "bpe":
        ids = {token: id for id, token in enumerate([*special, *letters])}
        merges = [("<", "/"), ("</", "s"), ("</s", ">")]
        backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        words = {token: id for id, token in enumerate([*special, "a", "b"])}
        backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*special, "<|im_start|>"]])
    backend.add_tokens(["<think>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return fast, "a </s> b"


# Special tokens in text


@pytest.mark.parametrize("text", QUOTES)
def test_text_that_spells_a_special_token_is_encoded_as_text(tmp_path: Path, text: str) -> None:
    inner = transformers.AutoTokenizer.from_pretrained(bytes_on_disk(tmp_path))
    ids = HubTokenizer(inner, key="").encode_bytes(text.encode()).tolist()
    assert ids == list(text.encode()), "of a byte-level vocabulary, text is its bytes"
    assert inner.decode(ids) == text and not set(ids) & set(inner.all_special_ids)
    parsed = HubTokenizer(inner, key="", parse_special=True).encode_bytes(text.encode()).tolist()
    assert parsed == inner.encode(text, add_special_tokens=False) != ids


def test_added_tokens_that_are_not_special_are_vocabulary_as_in_transformers(tmp_path: Path) -> None:
    inner = transformers.AutoTokenizer.from_pretrained(bytes_on_disk(tmp_path))
    text = "<think> <|eos|>"
    ids = HubTokenizer(inner, key="").encode_bytes(text.encode()).tolist()
    assert ids == [260, *b" <|eos|>"] == inner.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "words"])
def test_a_vocabulary_that_holds_the_special_tokens_gives_none(kind: str) -> None:
    """transformers' own switch does not reach the model's vocabulary, where the token is a piece like any other."""
    inner, text = pieces(kind)
    eos = inner.eos_token_id
    assert eos in inner.encode(text, add_special_tokens=False, split_special_tokens=True)
    ours = HubTokenizer(inner, key="")
    ids = ours.encode_bytes(text.encode()).tolist()
    assert eos not in ids
    tokens = inner.convert_ids_to_tokens(ids)
    if kind == "words":
        assert tokens == ["a", "<unk>", "b"]
    else:
        assert "".join(tokens).replace("▁", " ").strip() == text
    plain = "a b a/b > a"
    think = inner.convert_tokens_to_ids("<think>")
    assert ours.encode_bytes(f"{text} <think>".encode()).tolist()[-1] == think, "ordinary vocabulary keeps its id"
    assert ours.encode_bytes(plain.encode()).tolist() == inner.encode(plain, add_special_tokens=False)


def test_slow_tokenizers_encode_special_tokens_as_text() -> None:
    inner = transformers.ByT5Tokenizer()
    ids = HubTokenizer(inner, key="").encode_bytes("a</s> <extra_id_3>é".encode()).tolist()
    assert ids == [byte + 3 for byte in "a</s> <extra_id_3>é".encode()]


@pytest.mark.parametrize("parse", [False, True])
def test_ids_are_those_of_transformers_own_encode(tmp_path: Path, parse: bool) -> None:
    """Whatever tokenizer.json says of padding and cutting, and another caller has set before."""
    directory = bytes_on_disk(tmp_path)
    rules = json.loads((directory / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 258, "pad_type_id": 0, "pad_token": "<|pad|>"}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    rules |= {"padding": {**padding, "pad_to_multiple_of": None}, "truncation": truncation}
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    inner = transformers.AutoTokenizer.from_pretrained(directory)
    assert rust_tokenizer(inner) is inner.backend_tokenizer, "the short way is taken"
    ours = HubTokenizer(inner, key="", parse_special=parse)
    for text in [*QUOTES, "plain", ""]:
        inner("other", max_length=2, truncation=True, padding="max_length", split_special_tokens=parse)
        ids = ours.encode_bytes(text.encode()).tolist()
        assert ids == inner.encode(text, add_special_tokens=False, split_special_tokens=not parse)


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    fast, _ = pieces("bpe")

    class Own(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text: str, **kwargs: Any) -> Any:
            return super()._encode_plus(text.replace("a", "b"), **kwargs)

    own = Own(tokenizer_object=fast.backend_tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert rust_tokenizer(own) is None
    given = [HubTokenizer(inner, key="").encode_bytes(b"aab").tolist() for inner in (fast, own)]
    assert given[0] != given[1] == fast.encode("bbb", add_special_tokens=False)
    fast.encode = own.encode  # of the object alone
    assert rust_tokenizer(fast) is None
    assert HubTokenizer(fast, key="").encode_bytes(b"aab").tolist() == given[1]


def test_what_cannot_be_encoded_as_text_is_refused_with_its_line(tmp_path: Path) -> None:
    class Stubborn(transformers.ByT5Tokenizer):
        def tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return super().tokenize(text, **kwargs | {"split_special_tokens": False})

    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "not </s> fine"}\n')
    with pytest.raises(RecipeError, match=r"a\.jsonl, line 2: .*'</s>' to its special token"):
        build_cache([file], TextEncoder(HubTokenizer(Stubborn(), key="")), cache_dir=tmp_path / "cache")


def test_text_that_a_tokenizer_fails_on_is_named(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer = HubTokenizer(inner, key=tokenizer_key(inner))
    assert tokenizer.encode_bytes(b"a b").tolist() == [0, 1]
    for text in ("a c", "a </s>"):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(RecipeError, match=r"a\.txt, line 1: data\.tokenizer (cannot encode|encodes) the text"):
            build_cache([tmp_path / "a.txt"], TextEncoder(tokenizer), cache_dir=tmp_path / "cache")


def test_a_mark_that_is_one_character_stays_the_text_that_it_is() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "\n": 1, "!": 2}, merges=[]))
    backend.add_special_tokens([AddedToken("\n", special=True), AddedToken("!", special=True)])
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\n", pad_token="!")
    assert HubTokenizer(inner, key="").encode_bytes(b"a!\na").tolist() == [0, 2, 1, 0]


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
def test_text_without_special_tokens_is_encoded_as_by_transformers(settings: dict[str, Any]) -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc▁éd")}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **settings)
    ours = HubTokenizer(inner, key="")
    for text in ("abc", " a B  cé", "E\u0301 d", "\n", " "):
        assert ours.encode_bytes(text.encode()).tolist() == inner.encode(text, add_special_tokens=False)


# Marks of documents


BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}},
}


def documents(tmp_path: Path, texts: list[str], **settings: Any) -> tuple[list[str], list[list[int]]]:
    tokenizer_dir = bytes_on_disk(tmp_path / "tokenizer")
    change(tokenizer_dir / "tokenizer.json", post_processor=BEGINS)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inner = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer = HubTokenizer(inner, key=tokenizer_key(inner), **settings)
    encoder, cache_dir = TextEncoder(tokenizer), tmp_path / "cache"
    corpus = build_cache([file], encoder, cache_dir=cache_dir)
    said = list(notes(corpus, contents_of([file], encoder, cache_dir=cache_dir), special_tokens="text"))
    return said, [corpus.tokens(*corpus.bounds(index)).tolist() for index in range(corpus.n_docs)]


RENDERED = ["<|bos|><|im_start|>hi<|eos|>", "plain", "<|bos|>open", "closed<|eos|>", "<|eos|>"]


def test_rendered_text_that_is_parsed_has_each_mark_once(tmp_path: Path) -> None:
    _, rows = documents(tmp_path, RENDERED, parse_special=True)
    assert rows == [
        [256, 259, *b"hi", 257],
        [256, *b"plain", 257],
        [256, *b"open", 257],
        [256, *b"closed", 257],
        [256, 257],
    ]


def test_rendered_text_that_is_not_parsed_is_noted(tmp_path: Path) -> None:
    said, rows = documents(tmp_path, RENDERED)
    assert rows == [[256, *text.encode(), 257] for text in RENDERED]
    (note,) = said
    assert f"special tokens of the tokenizer, such as <|bos|>: 4 of 5, first {tmp_path / 'a.jsonl'}, line 1" in note
    assert 'set data.special_tokens = "parse"' in note
    assert not documents(tmp_path / "other", ["plain"])[0]


# The key


def key_of(directory: Path) -> str:
    return tokenizer_key(transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True))


SETTINGS: dict[str, dict[str, Any]] = {
    "split_special_tokens": {"split_special_tokens": True},
    "another eos": {"eos_token": "<|pad|>"},
    "another special token": {"additional_special_tokens": ["<|im_start|>", "<|new|>"]},
    "clean_up": {"clean_up_tokenization_spaces": True},
    "a setting that we do not know": {"do_lower_case": True},
    "another class": {"tokenizer_class": "GPT2Tokenizer"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_may_change_ids_changes_the_key(tmp_path: Path, name: str) -> None:
    directory = bytes_on_disk(tmp_path / "a")
    before = key_of(directory)
    change(directory / "tokenizer_config.json", **SETTINGS[name])
    assert key_of(directory) != before


def test_flags_of_added_tokens_change_the_key(tmp_path: Path) -> None:
    directory = bytes_on_disk(tmp_path / "a")
    keys = {key_of(directory)}
    rules = json.loads((directory / "tokenizer.json").read_text())
    for flag in ("lstrip", "single_word", "normalized"):
        rules["added_tokens"][-1][flag] = not rules["added_tokens"][-1][flag]
        (directory / "tokenizer.json").write_text(json.dumps(rules))
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config.pop("added_tokens_decoder", None)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        keys.add(key_of(directory))
    change(directory / "tokenizer.json", post_processor=BEGINS)
    assert len(keys | {key_of(directory)}) == 5


def test_the_key_is_that_of_every_process_and_place_and_of_no_chat_template(tmp_path: Path) -> None:
    directory = bytes_on_disk(tmp_path / "a")
    before = key_of(directory)
    code = (
        "import sys, transformers\nfrom ndtrain.hf.tokenizer_key import tokenizer_key\n"
        "print(tokenizer_key(transformers.AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    moved = directory.rename(tmp_path / "b")
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert done.stdout.strip() == before
    change(moved / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=77, padding_side="left")
    assert key_of(moved) == before


OWN = """
import json
from pathlib import Path
from transformers import PreTrainedTokenizer
from .rules import SHIFTS

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.json"}

    def __init__(self, vocab_file=None, **kwargs):
        self.vocab_file = vocab_file
        self.table = json.loads(Path(vocab_file).read_text())
        super().__init__(eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.table)

    def get_vocab(self):
        return {**self.table, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return SHIFTS.get(token, self.table.get(token, 0))

    def _convert_id_to_token(self, index):
        return {id: token for token, id in self.table.items()}[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = Path(save_directory) / "own.json"
        target.write_text(json.dumps(self.table))
        return (str(target),)
"""


def own_code(directory: Path, *, rules: str, table: dict[str, int]) -> str:
    directory.mkdir(parents=True)
    (directory / "tokenization_own.py").write_text(OWN)
    (directory / "rules.py").write_text(rules)
    (directory / "own.json").write_text(json.dumps(table))
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return key_of(directory)


def test_code_and_files_of_a_tokenizer_are_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of other tests, from another folder
    rules, other = "SHIFTS = {}\n", 'SHIFTS = {"ж": 1}\n'  # a letter that no probe has
    table = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    first = own_code(tmp_path / "own_a", rules=rules, table=table)
    assert own_code(tmp_path / "own_b", rules=rules, table=table) == first, "the same in another place"
    assert own_code(tmp_path / "own_c", rules=other, table=table) != first, "a module that its code imports"
    assert own_code(tmp_path / "own_d", rules=rules, table={**table, "ж": 4}) != first


def test_a_tokenizer_that_draws_numbers_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5))
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="ab" * 99)
    with pytest.raises(RecipeError, match="other ids for the same text each time"):
        tokenizer_key(inner)


def test_the_recipe_chooses_what_special_tokens_in_text_are(tmp_path: Path) -> None:
    directory = bytes_on_disk(tmp_path / "a")
    keys = set()
    for value, ids in (("text", [*b"<|eos|>"]), ("parse", [257])):
        data = {"tokenizer": str(directory), "special_tokens": value}
        file = recipe_file(
            tmp_path / "r.toml", model={"type": "llama"}, corpus=tmp_path, run_dir=tmp_path / "run", data=data
        )
        tokenizer = load_tokenizer(load_recipe(file))
        assert tokenizer.encode_bytes(b"<|eos|>").tolist() == ids
        keys.add(tokenizer.key)
    assert len(keys) == 2
    assert np.array_equal(ByteTokenizer().encode_bytes(b"<|eos|>"), np.frombuffer(b"<|eos|>", np.uint8))


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated": ("tokenizer.json", lambda content: content[: len(content) // 2], "is damaged"),
    "something else": ("tokenizer.json", lambda content: b"{}", "is damaged"),
    "settings": ("tokenizer_config.json", lambda content: content[: len(content) // 2], "is damaged"),
    "a pointer": (
        "tokenizer.json",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a git-lfs pointer",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path: Path, case: str) -> None:
    name, change, words = DAMAGED[case]
    ByteTokenizer().save_pretrained(tmp_path / "it")
    file = tmp_path / "it" / name
    file.write_bytes(change(file.read_bytes()))
    path = recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama"},
        corpus=tmp_path,
        run_dir=tmp_path / "run",
        data={"tokenizer": str(tmp_path / "it")},
    )
    with pytest.raises(DamagedError, match=rf"the tokenizer of data.tokenizer = .* cannot be loaded: {file} {words}"):
        load_tokenizer(load_recipe(path))
