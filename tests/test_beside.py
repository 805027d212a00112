"""What belongs to a model beside its weights is what plain transformers would save, in checkpoints and converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ndtrain.convert import convert
from ndtrain.errors import RecipeError
from ndtrain.hf.beside import copied, take_generation_config
from ndtrain.hf.hub import is_beside
from ndtrain.hf.model import meta_model
from ndtrain.hf.tokenizer import load_tokenizer
from ndtrain.recipe import load_recipe
from tests import tiny
from tests.own_code import FILES, save_own_code
from tests.ranks import get_pool
from tests.test_train import trained

GENERATION = {"eos_token_id": [256, 257, 3], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 77}
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
# Of steps that change no weight.
STILL: dict[str, Any] = {"optim": {"lr": 0.0, "weight_decay": 0.0}, "schedule": {"warmup_steps": 0}}


def contents(directory: Path) -> dict[str, bytes]:
    """{path: content} of a directory's files without weights and what a checkpoint adds."""
    found = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    added = ("train_state.json", "manifest.json")
    return {path: text for path, text in found.items() if not path.endswith(".safetensors") and path not in added}


def write_tokenizer(directory: Path) -> None:
    """A tokenizer with a chat template and an additional one."""
    words = {"<s>": 256, "</s>": 257, "[UNK]": 0, **{chr(i): i for i in range(33, 127)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    made.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)  # which adds some keys


def plain(base: Path, out: Path, *, own_code: bool = False) -> dict[str, bytes]:
    """What from_pretrained and save_pretrained leave of `base`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=own_code)
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=own_code).save_pretrained(out)
    return contents(out)


def recipe_of(path: Path, base: Path, **model: Any) -> Path:
    """A recipe of three steps that change nothing, with the model's own tokenizer."""
    file = tiny.recipe_file(
        path / "recipe.toml",
        model={"name": str(base), **model},
        corpus=tiny.write_corpus(path / "corpus"),
        run_dir=path / "run",
        steps=3,
        data={"packing": False},
        **STILL,
    )
    file.write_text(file.read_text().replace('tokenizer = "bytes"\n', ""))
    return file


def asked_nothing(path: str, overrides: list[str]) -> dict[str, Any]:
    """A run in which nobody answers a question."""
    with mock.patch("builtins.input", side_effect=AssertionError("a question was asked")):
        return trained(path, overrides)


def test_generation_config_templates_and_processor_of_the_base_travel(tmp_path: Path) -> None:
    base = tiny.save_model("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(base)
    want = plain(base, tmp_path / "want")
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer.json"} < want.keys()
    assert json.loads(want["generation_config.json"])["eos_token_id"] == [256, 257, 3]
    want["preprocessor_config.json"] = (base / "preprocessor_config.json").read_bytes()

    get_pool(1).run(trained, str(recipe_of(tmp_path, base)), [])
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert contents(step) == want
    assert convert(step, tmp_path / "out", verify=True) == []
    assert contents(tmp_path / "out") == want
    assert convert(base, tmp_path / "step", verify=True) == []
    assert contents(tmp_path / "step") == want
    convert(tmp_path / "step", tmp_path / "back")
    assert contents(tmp_path / "back") == want
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert loaded.chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}


def test_a_processor_stays_with_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert copied(tmp_path, processor=True) == {"preprocessor_config.json": b"{}"}
    assert copied(tmp_path, processor=False) == {}


@pytest.mark.parametrize(
    ("text", "said", "kept"),
    [
        ("{", "not a valid JSON file", False),
        ("[1]", "cannot be used", False),
        (json.dumps({"max_new_tokens": -1}), "`max_new_tokens` must be greater than 0", False),
        (json.dumps({"temperature": 0.5, "do_sample": False}), "contradicts itself", True),
        (json.dumps(GENERATION), "", True),
    ],
)
def test_a_generation_config_that_cannot_be_used_is_a_note(tmp_path: Path, text: str, said: str, kept: bool) -> None:
    base = tiny.save_model("llama", tmp_path)
    made = (base / "generation_config.json").read_bytes()
    (base / "generation_config.json").write_text(text)
    if kept:
        made = plain_generation(base, tmp_path / "want")
    notes = convert(base, tmp_path / "step")
    assert len(notes) == bool(said) and all(said in note for note in notes), notes
    assert (tmp_path / "step" / "generation_config.json").read_bytes() == made
    assert len(convert(tmp_path / "step", tmp_path / "out")) == (kept and bool(said))
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == made


def plain_generation(base: Path, out: Path) -> bytes:
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(out)
    return (out / "generation_config.json").read_bytes()


def test_settings_of_generation_in_an_old_config_are_kept(tmp_path: Path) -> None:
    base = tiny.save_model("llama", tmp_path)
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_beams": 4, "no_repeat_ngram_size": 3}))
    recipe = load_recipe(recipe_of(tmp_path, base))
    model = meta_model(recipe)
    assert take_generation_config(model, base) == []
    model.generation_config.save_pretrained(tmp_path / "ours")
    want = plain_generation(base, tmp_path / "want")
    assert b'"num_beams": 4' in want and (tmp_path / "ours" / "generation_config.json").read_bytes() == want
    assert convert(base, tmp_path / "step") == [] and convert(tmp_path / "step", tmp_path / "out") == []
    assert contents(tmp_path / "step") == contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_model_with_its_own_code_runs_converts_and_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=AssertionError("a question was asked")))
    base = save_own_code(tmp_path / "base")
    want = plain(base, tmp_path / "want", own_code=True)
    assert FILES.keys() < want.keys()
    trusts = {"trust_remote_code": True, "attn": "eager"}
    recipe = recipe_of(tmp_path, base, **trusts)
    first = get_pool(1).run(asked_nothing, str(recipe), [])[0]["metrics"]
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert contents(step) == want

    with pytest.raises(RecipeError, match=r"Python code of its own.*add --trust-remote-code"):
        convert(step, tmp_path / "out")
    assert convert(step, tmp_path / "out", verify=True, trust_remote_code=True) == []
    assert contents(tmp_path / "out") == want
    weights = load_file(base / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(tmp_path / "out/model.safetensors").items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    original = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(ids).logits, original(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("hello")["input_ids"] == [95, 92, 99, 99, 102]

    shutil.rmtree(base)
    with pytest.raises(RecipeError, match=r"add --trust-remote-code"):
        convert(tmp_path / "out", tmp_path / "again")
    convert(tmp_path / "out", tmp_path / "again", trust_remote_code=True)
    assert contents(tmp_path / "again") == want
    again = [f"model.name={step}", f"run.dir={tmp_path / 'again_run'}"]
    second = get_pool(1).run(asked_nothing, str(recipe), again)[0]["metrics"]
    assert [m["loss"] for m in second] == [m["loss"] for m in first]
    with pytest.raises(RecipeError, match=r"code of its own.*set model.trust_remote_code = true"):
        meta_model(load_recipe(recipe, [*again, "model.trust_remote_code=false"]))


def test_code_that_a_config_names_travels_also_where_it_does_not_run(tmp_path: Path) -> None:
    base = save_own_code(tmp_path / "base")
    assert copied(base, processor=False).keys() == FILES.keys()
    (base / "helper_small.py").unlink()
    assert "helper_small.py" not in copied(base, processor=False)


def test_overrides_keep_a_model_with_its_own_code_usable(tmp_path: Path) -> None:
    base = save_own_code(tmp_path / "base")
    recipe = load_recipe(recipe_of(tmp_path, base, trust_remote_code=True, attn="eager", config={"hidden_size": 16}))
    model = meta_model(recipe)
    assert type(model).__name__ == "SmallForCausalLM" and model.get_input_embeddings().weight.shape == (261, 16)


@pytest.mark.parametrize(
    ("path", "size", "is_it"),
    [
        ("tokenizer.model.v3", 1000, True),
        ("letters.of_my_own", 1000, True),
        ("additional_chat_templates/tools.jinja", 10, True),
        ("LICENSE", 10, True),
        ("weights.of_my_own", 1 << 30, False),
        ("consolidated.00.pth", 10, False),
        ("model.safetensors.index.json", 10, False),
        ("original/tokenizer.model", 10, False),
        (".gitattributes", 10, False),
        ("../config.json", 10, False),
        ("__0_0.distcp", 10, False),
    ],
)
def test_files_beside_the_weights_are_told_from_weights(path: str, size: int, is_it: bool) -> None:
    assert is_beside(path, size) is is_it


def test_a_foreign_checkpoint_gets_the_files_beside_its_config(tmp_path: Path) -> None:
    base = tiny.save_model("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(base)
    want = plain(base, tmp_path / "want")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert convert(tmp_path / "dcp", tmp_path / "out", config=base) == []
    assert contents(tmp_path / "out") == want
    with pytest.raises(RecipeError, match=r"--config .*nothing does not exist \(looked from"):
        convert(tmp_path / "dcp", tmp_path / "other", config=tmp_path / "nothing")


def test_a_tokenizer_with_its_own_code_asks_for_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=AssertionError("a question was asked")))
    base = save_own_code(tmp_path / "base")
    llama = tiny.save_model("llama", tmp_path)
    recipe = recipe_of(tmp_path, llama)
    with pytest.raises(
        RecipeError, match=r"the tokenizer of data.tokenizer = .*: it comes with Python code of its own"
    ):
        load_tokenizer(load_recipe(recipe, [f"data.tokenizer={base}"]))
    trusted = load_tokenizer(load_recipe(recipe, [f"data.tokenizer={base}", "model.trust_remote_code=true"]))
    assert trusted.vocab_size == 119 and trusted.encode_bytes(b"hello").tolist() == [95, 92, 99, 99, 102]


def test_code_that_transformers_has_too_does_not_run_and_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=AssertionError("a question was asked")))
    base = tiny.save_model("llama", tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_x.py").write_text("raise SystemExit('ran')")
    assert type(meta_model(load_recipe(recipe_of(tmp_path, base)))).__name__ == "LlamaForCausalLM"
    convert(base, tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").read_text() == "raise SystemExit('ran')"
