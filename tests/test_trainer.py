"""What a trainer says before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ndtrain.accelerators import emulates_bfloat16, find_device
from ndtrain.data import micro_batches
from ndtrain.errors import RecipeError
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import load_recipe
from ndtrain.train.length import arithmetic
from ndtrain.train.setup import slow_dtype
from tests.tiny import recipe_file, save_model
from tests.trainers import Said, trainer_of


@pytest.mark.parametrize(
    ("sizes", "batch", "micro", "words"),
    [
        (
            MeshSizes(1, 2),
            8,
            4,
            "8 sequences x 256 tokens = 2 batch ranks x 1 micro batch x 4 sequences; 1,000 samples",
        ),
        (MeshSizes(2, 2), 16, 2, "16 sequences x 256 tokens = 4 batch ranks x 2 micro batches x 2 sequences; "),
        (MeshSizes(), 1, 1, "1 sequence x 256 tokens = 1 batch rank x 1 micro batch x 1 sequence; "),
        (MeshSizes(1, 4), 7, 2, "= 4 batch ranks x 1 micro batch x 2 sequences, 1 of them empty; "),
        (
            MeshSizes(1, 2),
            8,
            8,
            "x 1 micro batch x 4 sequences (train.micro_batch_size = 8 is cut to a batch rank's share); ",
        ),
    ],
)
def test_the_global_batch_is_told_as_an_equation(sizes: MeshSizes, batch: int, micro: int, words: str) -> None:
    rows, steps = micro_batches(batch, sizes.batch, micro)
    run: Any = SimpleNamespace(
        sizes=sizes,
        recipe=SimpleNamespace(
            train=SimpleNamespace(global_batch_size=batch, micro_batch_size=micro, epochs=None, steps=1),
            data=SimpleNamespace(seq_len=256),
        ),
        batches=SimpleNamespace(micro_steps=steps, micro_batch_size=rows, samples=range(1000)),
        plan=SimpleNamespace(model_type="llama", numel=10, sizes=sizes),
        runtime=SimpleNamespace(world_size=sizes.world_size, device=SimpleNamespace(type="cpu")),
    )
    line = arithmetic(run.recipe, run.plan, run.runtime, run.batches, steps=1)
    assert words in line
    # An equation: the sequences on both sides are equal, but for those that are empty.
    assert sizes.batch * steps * rows - batch == (int(line.split(", ")[-1].split(" of")[0]) if "empty" in line else 0)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cpu(monkeypatch: pytest.MonkeyPatch, **capabilities: bool) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_notes_once_that_the_cpu_has_no_bfloat16(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("some words " * 99)
    (corpus / "b.bin").write_bytes(b"\0")
    recipe = recipe_file(
        tmp_path / "recipe.toml",
        model={"name": str(save_model("llama", tmp_path))},
        corpus=corpus,
        run_dir=tmp_path / "run",
        fsdp={"param_dtype": dtype},
    )
    monkeypatch.setenv("NDTRAIN_CACHE", str(tmp_path / "cache"))
    cpu(monkeypatch, avx2=True, avx512_f=True, avx512_bf16=False)
    said = Said()
    trainer_of(str(recipe), said=said).prepare()
    notes = [line for line in said.said if "no instructions for bfloat16" in line]
    assert len(notes) == (dtype == "bfloat16")
    assert all('set fsdp.param_dtype = "float32"' in note for note in notes)
    assert f'note: data.path = "{corpus}": files read: 1; left out: 1 .bin' in said.said


def test_tf32_is_chosen_told_and_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_file(tmp_path / "recipe.toml", model={"type": "llama"}, corpus=tmp_path, run_dir=tmp_path / "run")
    chosen, usual = load_recipe(recipe, ["train.tf32=true"]), load_recipe(recipe)
    with pytest.raises(RecipeError, match=r"train\.tf32 = true: this cpu device has no TF32; leave it out"):
        list(slow_dtype(chosen, torch.device("cpu")))
    for capability, notes in (((7, 5), 0), ((9, 0), 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert len(list(slow_dtype(usual, torch.device("cuda")))) == notes
    assert not list(slow_dtype(chosen, torch.device("cuda")))
    assert find_device("h100").in_tf32().peak("float32") == 494.5e12


def test_a_cpu_with_instructions_for_bfloat16_emulates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"):
        cpu(monkeypatch, avx2=True, **{name: True})
        assert not emulates_bfloat16(device)
    cpu(monkeypatch, neon=True, bf16=False)
    assert emulates_bfloat16(device)
