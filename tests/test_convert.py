"""`convert` writes what `save_pretrained` of the same model would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ndtrain.convert import convert
from ndtrain.errors import DamagedError, RecipeError
from tests import tiny
from tests.ranks import get_pool
from tests.test_train import MESHES, ranks_of, trained, world  # noqa: F401


def whole(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(
    ("kind", "mesh", "dtype"),
    [
        ("qwen3", "dp_shard2-tp2", torch.float32),
        ("gemma3_text", "dp_shard4", torch.bfloat16),
        ("gpt2", "dp_shard2", torch.float32),
        ("qwen3_moe", "dp_shard2", torch.bfloat16),
        ("phi3", "dp_shard2", torch.float32),
    ],
)
def test_converted_weights_equal_save_pretrained(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    mesh: str,
    dtype: torch.dtype,
) -> None:
    # A learning rate so small that the weights stay what they were in their own dtype: the source is the oracle.
    source = tiny.save_model(kind, tmp_path, dtype=dtype)
    sizes = MESHES[mesh]
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"name": str(source)},
        corpus=world["corpus"],
        run_dir=tmp_path / "run",
        mesh=sizes,
        steps=1,
        batch_ranks=sizes["dp_shard"],
        optim={"lr": 1e-30, "weight_decay": 0.0},
        schedule={"warmup_steps": 0},
    )
    get_pool(ranks_of(sizes)).run(trained, str(recipe), [], timeout=200)
    convert(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "out")
    want, got = whole(source), whole(tmp_path / "out")
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n\treturn 'é€'\n"
    assert tokenizer(text, add_special_tokens=False).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text

    convert(tmp_path / "run", tmp_path / "half", dtype="float16", max_shard_size="50KB")
    half = whole(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    assert all(torch.equal(half[k], v.to(torch.float16)) for k, v in want.items() if v.is_floating_point())

    with pytest.raises(RecipeError, match="not an empty directory"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be created"):
        convert(tmp_path / "run", tmp_path / "file" / "out")
    (next((tmp_path / "run" / "checkpoints").glob("*/model/*.safetensors"))).unlink()
    with pytest.raises(DamagedError):
        convert(tmp_path / "run", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".*part"))


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        convert(tmp_path, tmp_path / "out")
    for size in ("banana", "0GB", "-1GB", "1.2.3GB", "GB"):
        with pytest.raises(RecipeError, match="--max-shard-size"):
            convert(tmp_path, tmp_path / "out", max_shard_size=size)
    with pytest.raises(RecipeError, match="--dtype"):
        convert(tmp_path, tmp_path / "out", dtype="int8")
