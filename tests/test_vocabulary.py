"""A tokenizer and a model of different sizes: only a token that the text has and the model lacks is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ndtrain.data import TextEncoder, build_cache
from ndtrain.hf.tokenizer import HubTokenizer
from tests import tiny
from tests.ranks import RanksFailed, get_pool
from tests.test_source import notes_of_start
from tests.test_train import trained

LETTERS = {"[UNK]": 0, **{chr(i): i - 96 for i in range(97, 123)}}  # 27 ids


def tokenizer_of(words: dict[str, int], **special: str) -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "z", **special})


def recipe_of(tmp_path: Path, tokenizer: Any, vocabulary: int, text: str, *, saved: bool = False) -> Path:
    """A recipe of three steps over a model of `vocabulary` tokens; with `saved` its weights are in a directory."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {**tiny.CONFIGS["llama"], "vocab_size": vocabulary, **ids}
    model: dict[str, Any] = {"type": "llama", "config": config}
    if saved:
        made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **config))
        made.save_pretrained(tmp_path / "model")
        model = {"name": str(tmp_path / "model")}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(text)
    return tiny.recipe_file(
        tmp_path / "recipe.toml",
        model=model,
        corpus=tmp_path / "corpus",
        run_dir=tmp_path / "run",
        steps=3,
        data={"tokenizer": str(tmp_path / "tokenizer")},
    )


def losses(recipe: Path) -> list[float]:
    return [m["loss"] for m in get_pool(1).run(trained, str(recipe), [])[0]["metrics"]]


def test_tokens_that_the_text_does_not_have_may_be_more_than_the_model_embeds(tmp_path: Path) -> None:
    larger = tokenizer_of({**LETTERS, "extra": 27})
    recipe = recipe_of(tmp_path, larger, 27, "a b c d " * 100, saved=True)
    first = losses(recipe)
    assert len(first) == 3 and all(2 < loss < 5 for loss in first)
    # The tokenizer that the model has room for gives the same training.
    tokenizer_of(LETTERS).save_pretrained(tmp_path / "fits")
    same = get_pool(1).run(trained, str(recipe), [f"data.tokenizer={tmp_path / 'fits'}", f"run.dir={tmp_path / 'b'}"])
    assert [m["loss"] for m in same[0]["metrics"]] == first

    (tmp_path / "corpus" / "a.txt").write_text("a b extra d " * 100)
    with pytest.raises(
        RanksFailed, match=r"RecipeError: the model embeds tokens 0 to 26, but token 27 \(\"extra\"\)"
    ) as e:
        get_pool(1).run(notes_of_start, str(recipe), [f"run.dir={tmp_path / 'c'}"])
    assert 'is in data.path = "' in str(e.value) and "resize_token_embeddings(28)" in str(e.value)
    assert "model.config.vocab_size" not in str(e.value)


def test_the_advice_for_a_model_from_scratch_works(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tokenizer_of({**LETTERS, "extra": 27}), 27, "a b extra d " * 100)
    with pytest.raises(RanksFailed, match=r"set model.config.vocab_size = 28, or choose"):
        get_pool(1).run(notes_of_start, str(recipe), [])
    assert get_pool(1).run(trained, str(recipe), ["model.config.vocab_size=28"])


def test_the_advice_for_pretrained_weights_works(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tokenizer_of({**LETTERS, "extra": 27}), 27, "a b extra d " * 100, saved=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(28)
    model.save_pretrained(tmp_path / "model")
    assert len(losses(recipe)) == 3


def test_a_vocabulary_with_gaps_trains(tmp_path: Path) -> None:
    gaps = tokenizer_of({"[UNK]": 0, "a": 2, "b": 3, "c": 7, "d": 20, "z": 50, "e": 9})
    assert len(gaps) == 7 and HubTokenizer(gaps, key="gaps").vocab_size == 51
    assert len(losses(recipe_of(tmp_path, gaps, 64, "a b c d e " * 100))) == 3


@pytest.mark.parametrize(("special", "lost"), [({"eos_token": "<end>"}, "<end>"), ({"pad_token": "<pad>"}, None)])
def test_special_tokens_count_where_they_are_used(tmp_path: Path, special: dict[str, str], lost: str | None) -> None:
    recipe = recipe_of(tmp_path, tokenizer_of(LETTERS, **special), 27, "a b c d " * 100)
    if lost:
        with pytest.raises(
            RanksFailed, match=rf"token 27 \(\"{lost}\"\) of the tokenizer begins or ends every document"
        ):
            get_pool(1).run(notes_of_start, str(recipe), [])
    else:
        notes = get_pool(1).run(notes_of_start, str(recipe), [])[0]
        assert "note: the model has no token 27, the tokenizer's padding; 26 pads" in notes
        assert len(losses(recipe)) == 3


def test_the_largest_id_is_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c")
    tokenizer = HubTokenizer(tokenizer_of({"[UNK]": 0, "a": 2, "b": 70_000, "c": 3, "z": 5, "late": 90_000}), key="x")
    corpus = build_cache([tmp_path / "a.txt"], TextEncoder(tokenizer), cache_dir=tmp_path / "cache")
    assert corpus.parts[0].tokens.dtype == np.uint32 and corpus.tokens(0, 9).tolist() == [2, 70_000, 3, 5]
    assert corpus.largest_id == 70_000
