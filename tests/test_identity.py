"""Base weights are identified by what they are, not by where they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ndtrain.load import base_identity, identity
from ndtrain.recipe import load_recipe
from tests import tiny


def identity_of(folder: Path, name: Path | str, **model: Any) -> str | None:
    path = tiny.recipe_file(
        folder / "r.toml", model={"name": str(name), **model}, corpus=folder, run_dir=folder / "run"
    )
    recipe = load_recipe(path)
    # Of the model only the name of its weights' files is asked.
    return base_identity(SimpleNamespace(config=SimpleNamespace()), recipe)  # type: ignore[arg-type]


def change(directory: Path, key: str, index: int) -> None:
    """Change one value of a tensor of the only weights file."""
    tensors = load_file(directory / "model.safetensors")
    tensors[key].view(-1)[index] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("whole", [True, False])
def test_moved_or_resharded_weights_are_the_same_base_and_other_values_are_not(tmp_path: Path, whole: bool) -> None:
    base = tiny.save_model("qwen3", tmp_path)
    shutil.copytree(base, tmp_path / "moved")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with mock.patch.object(identity, "WHOLE_BYTES", 1 << 28 if whole else 0):
        own = identity_of(tmp_path, base)
        assert own is not None and own.startswith("tensors ")
        assert {identity_of(tmp_path, tmp_path / name) for name in ("moved", "shards")} == {own}
        found = {own}
        # Where only blocks are read: a small tensor, and the first and the last values of a large one.
        for key, index in (("model.norm.weight", 5), ("lm_head.weight", 0), ("lm_head.weight", 261 * 64 - 1)):
            change(tmp_path / "moved", key, index)
            found.add(identity_of(tmp_path, tmp_path / "moved"))
        assert len(found) == 4
        (base / "modeling_x.py").write_text("x = 1")
        assert identity_of(tmp_path, base) == own
        trusted = identity_of(tmp_path, base, trust_remote_code=True)
        (base / "modeling_x.py").write_text("x = 2")
        assert own != trusted != identity_of(tmp_path, base, trust_remote_code=True)
    assert identity_of(tmp_path, base, init="random") == "drawn from train.seed"


def test_pickled_weights_are_identified_by_their_files(tmp_path: Path) -> None:
    base = tiny.save_model("qwen3", tmp_path)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    shutil.copytree(base, tmp_path / "moved")
    assert identity_of(tmp_path, base) == identity_of(tmp_path, tmp_path / "moved") is not None
    with (tmp_path / "moved" / "pytorch_model.bin").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"x")
    assert identity_of(tmp_path, base) != identity_of(tmp_path, tmp_path / "moved")
    (base / "pytorch_model.bin").unlink()
    assert identity_of(tmp_path, base) is None


def test_a_hub_repository_is_identified_by_its_commit(tmp_path: Path) -> None:
    commit = "0123abcd" * 5
    assert identity_of(tmp_path, "org/name", revision=commit) == f"commit {commit}"
    assert identity_of(tmp_path, "org/name") is None  # a run has resolved it
