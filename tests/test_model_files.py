"""Every reader takes the files that `from_pretrained` takes, or refuses them by name; copies must be equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ndtrain.convert import convert
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf import hub
from ndtrain.hf.files import model_files
from ndtrain.mesh import MeshSizes
from tests import tiny
from tests.convert_cases import build, save_checkpoint
from tests.ranks import get_pool
from tests.test_load import _full_tensors, _loaded, recipe_for

MODES = ("auto", "rank0", "sharded")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _save(directory: Path, *, seed: int, shards: bool = False, kind: str = "llama") -> Any:
    config = transformers.AutoConfig.for_model(kind, **tiny.CONFIGS[kind])
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size="100KB" if shards else "5GB")
    return model


def _bin(directory: Path, *, seed: int) -> None:
    other = directory.parent / f"bin{seed}"
    torch.save(_save(other, seed=seed).state_dict(), directory / "pytorch_model.bin")


def _both(directory: Path) -> None:
    """A new model.safetensors beside an old index and its files."""
    _save(directory, seed=1, shards=True)
    old = {path.name: path.read_bytes() for path in directory.iterdir()}
    _save(directory, seed=2)  # which removes what it replaces
    for name, content in old.items():
        if not (directory / name).exists():
            (directory / name).write_bytes(content)
    assert (directory / INDEX).exists() and (directory / SINGLE).exists()


def _beside(directory: Path) -> None:
    _save(directory, seed=1)
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00009.safetensors"):
        _save(directory.parent / name, seed=len(name))
        shutil.copy(directory.parent / name / SINGLE, directory / name)
    _bin(directory, seed=3)


def _linked(directory: Path) -> None:
    _save(directory, seed=1, shards=True)
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        path.rename(directory.parent / f"blob{number}")
        path.symlink_to(directory.parent / f"blob{number}")


def _named(directory: Path) -> None:
    _save(directory, seed=1)
    _save(directory.parent / "other", seed=2)
    shutil.copy(directory.parent / "other" / SINGLE, directory / "other.safetensors")
    _set(directory, transformers_weights="other.safetensors")


def _other_name(directory: Path) -> None:
    _save(directory, seed=1, kind="gemma3_text")
    _edit(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))


def _copy_in_other_dtype(directory: Path) -> None:
    _save(directory, seed=1, kind="gemma3_text")

    def add(tensors: dict[str, Tensor]) -> None:
        half = tensors["model.embed_tokens.weight"].bfloat16()
        tensors |= {"model.embed_tokens.weight": half, "lm_head.weight": half.float()}

    _edit(directory, add)


def _set(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


READ: dict[str, Callable[[Path], Any]] = {
    "one file": lambda d: _save(d, seed=1),
    "several files": lambda d: _save(d, seed=1, shards=True),
    "a new file beside an old index": _both,
    "files that are not the model's": _beside,
    "links": _linked,
    "named by config.json": _named,
    "a tied weight under its other name": _other_name,
    "equal copies of a tied weight": _copy_in_other_dtype,
}


@pytest.mark.parametrize("case", READ)
def test_every_reader_takes_the_files_that_from_pretrained_takes(tmp_path: Path, case: str) -> None:
    directory = tmp_path / "model"
    READ[case](directory)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    recipes = {mode: recipe_for(tmp_path / f"{mode}.toml", mode=mode, name=str(directory)) for mode in MODES}
    convert(directory, tmp_path / "checkpoint", verify=True)
    convert(tmp_path / "checkpoint", tmp_path / "hub", dtype="float32", verify=True)
    found = get_pool(2).run(_full_tensors, recipes, {mode: {"m": MeshSizes(1, 2)} for mode in MODES})[0]
    read = {mode: {k: torch.from_numpy(v) for k, v in found[mode]["m"].items()} for mode in MODES}
    read["convert"] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").state_dict()
    for reader, tensors in read.items():
        assert tensors.keys() == plain.keys(), reader
        assert [name for name in plain if not torch.equal(plain[name], tensors[name])] == [], reader


@pytest.mark.parametrize("case", ["one file", "several files", "only torch files"])
def test_files_in_the_cache_of_the_hub_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    if case in READ:
        READ[case](snapshot)
    else:
        snapshot.mkdir(parents=True)
        _bin(snapshot, seed=1)
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here, found = model_files(Path(hub.directory_of("org/name"))), hub.resolve("org/name", "main")
    assert here is not None and found.commit == commit
    assert set(hub.weights_of("org/name", found)) == {here.main, *here.files}


# ---- what is refused


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        _save(directory, seed=1, shards=True)
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return make


def _doubled(directory: Path) -> None:
    _save(directory, seed=1, shards=True)
    files = sorted(directory.glob("*.safetensors"))
    tensors = load_file(files[0])
    save_file(load_file(files[-1]) | {min(tensors): tensors[min(tensors)] + 1}, files[-1], metadata={"format": "pt"})


def _lost_link(directory: Path) -> None:
    _both(directory)
    (directory / SINGLE).unlink()
    (directory / SINGLE).symlink_to(directory.parent / "nothing")


def _lost_file(directory: Path) -> None:
    _save(directory, seed=1, shards=True)
    min(directory.glob("*.safetensors")).unlink()


def _adapter(directory: Path) -> None:
    _save(directory, seed=1)
    (directory / "adapter_config.json").write_text("{}")


def _two_models(directory: Path) -> None:
    save_checkpoint(_save(directory.parent / "other", seed=2), directory)
    shutil.copy(directory.parent / "other" / SINGLE, directory / SINGLE)


def _own_head(directory: Path) -> None:
    """Files hold a head of their own, and config.json says that it is tied."""
    _save(directory, seed=1, kind="llama")
    _set(directory, tie_word_embeddings=True)


def _own_head_in_shards(directory: Path) -> None:
    _save(directory, seed=1, shards=True)
    _set(directory, tie_word_embeddings=True)


def _last_bit(directory: Path) -> None:
    _copy_in_other_dtype(directory)
    _edit(directory, lambda t: t["lm_head.weight"].view(torch.int32).view(-1)[-1:].add_(1))


def _own_bias(directory: Path) -> None:
    """Of two tied pairs, only the biases differ."""
    config = transformers.AutoConfig.for_model("bert", **tiny.MATRIX["bert"] | {"tie_word_embeddings": True})
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    _edit(directory, lambda t: t.update({"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 1}))


def _head_of_another_shape(directory: Path) -> None:
    _save(directory, seed=1, kind="gemma3_text")
    _edit(directory, lambda t: t.update({"lm_head.weight": torch.ones(260, 64)}))


REFUSED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "an index to a missing file": (_lost_file, ["-00001-of-", "is missing", INDEX]),
    "an index without a key": (_index(lambda i: i["weight_map"].pop("model.norm.weight")), ["model.norm.weight"]),
    "an index with a key of no file": (
        _index(lambda i: i["weight_map"].update({"model.spare": min(i["weight_map"].values())})),
        ["model.spare is not in", INDEX],
    ),
    "an index without metadata": (_index(lambda i: i.pop("metadata")), [INDEX, "damaged", "metadata"]),
    "an index out of the directory": (
        _index(lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        [INDEX, "damaged", "../x.safetensors"],
    ),
    "a key in two files": (_doubled, ["model.embed_tokens.weight is in", "but", INDEX]),
    "a link to nothing": (_lost_link, [SINGLE, "is a link to", "nothing"]),
    "an adapter beside": (_adapter, ["adapter_config.json", "merge it"]),
    "a checkpoint and a model": (_two_models, ["manifest.json", SINGLE]),
    "another head": (_own_head, ["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings = false"]),
    "another head, in several files": (_own_head_in_shards, ["lm_head.weight", "model.embed_tokens.weight"]),
    "one of two tied pairs": (_own_bias, ["cls.predictions.decoder.bias", "cls.predictions.bias", "different values"]),
    "a head of another shape": (_head_of_another_shape, ["lm_head.weight"]),
    "a head that differs in one bit": (_last_bit, ["lm_head.weight", "different values"]),
}


def _errors_of_start(recipes: list[str], sizes: MeshSizes) -> list[tuple[str, str]]:
    """Return class and message of the error that each recipe's start from weights raises on this rank."""
    from ndtrain.train.source import load_start

    answers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ndtrain.load.load_weights", load_start)  # which calls load_weights or reads a checkpoint
        for recipe in recipes:
            try:
                _loaded(recipe, sizes)
            except NdtrainError as error:
                answers.append((type(error).__name__, str(error)))
            else:
                answers.append(("", "loaded"))
    return answers


@pytest.mark.parametrize("case", REFUSED)
def test_every_reader_refuses_files_that_contradict_each_other(tmp_path: Path, case: str) -> None:
    make, words = REFUSED[case]
    directory = tmp_path / "model"
    make(directory)
    recipes = [recipe_for(tmp_path / f"{mode}.toml", mode=mode, name=str(directory)) for mode in MODES]
    for rank in get_pool(2).run(_errors_of_start, recipes, MeshSizes(1, 2)):
        for mode, (kind, message) in zip(MODES, rank, strict=True):
            assert kind in ("DamagedError", "RecipeError"), (mode, message)
            assert [word for word in words if word not in message] == [], (mode, message)
    with pytest.raises(NdtrainError) as caught:
        convert(directory, tmp_path / "out")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_trained_where_the_config_no_longer_ties_it(tmp_path: Path) -> None:
    _own_head(directory := tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)  # it warns, and does not tie
    own = {"name": str(directory), "config": {"tie_word_embeddings": False}}
    recipes = {mode: recipe_for(tmp_path / f"{mode}.toml", mode=mode, **own) for mode in MODES}
    found = get_pool(1).run(_full_tensors, recipes, {mode: {"m": MeshSizes()} for mode in MODES})[0]
    for mode in MODES:
        tensors = found[mode]["m"]
        want = {name: tensor.numpy() for name, tensor in plain.state_dict().items()}
        assert tensors.keys() == want.keys()
        assert all((tensors[name] == value).all() for name, value in want.items())


def test_tying_by_the_recipe_what_is_saved_apart_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    model = _save(directory, seed=1)
    save_checkpoint(model, tmp_path / "checkpoint")
    recipes = [
        recipe_for(
            tmp_path / f"{mode}{name}.toml", mode=mode, name=str(tmp_path / name), config={"tie_word_embeddings": True}
        )
        for name in ("model", "checkpoint")
        for mode in MODES
    ]
    for rank in get_pool(2).run(_errors_of_start, recipes, MeshSizes(1, 2)):
        for kind, message in rank:
            assert kind == "DamagedError" and "lm_head.weight" in message and "different values" in message


def test_convert_compares_the_copies_in_a_dcp_directory(tmp_path: Path) -> None:
    model = build("gemma3_text")
    model.save_pretrained(tmp_path / "want")
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= state.keys()
    dcp.save(state, checkpoint_id=tmp_path / "equal", no_dist=True)
    convert(tmp_path / "equal", tmp_path / "out", config=tmp_path / "want", verify=True)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "want" / SINGLE).read_bytes()
    state["lm_head.weight"][3, 4] += 1
    dcp.save(state, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(DamagedError, match=r"lm_head.weight and model.embed_tokens.weight are saved with different"):
        convert(tmp_path / "other", tmp_path / "out2", config=tmp_path / "want")


# ---- load.mode = "auto"


def _notes(recipe: str, sizes: MeshSizes) -> tuple[list[str], dict[str, Any]]:
    """Return the notes on loading and the whole weights."""
    import ndtrain.load

    kept: list[list[str]] = []
    load = ndtrain.load.load_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ndtrain.load.load_weights", lambda *args, **kwargs: kept.append(load(*args, **kwargs)))
        model, _ = _loaded(recipe, sizes)
    return kept[0], {name: tensor.full_tensor().numpy() for name, tensor in model.state_dict().items()}


def test_weights_that_are_not_safetensors_are_read_on_rank_0_with_a_note(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    _bin(directory, seed=1)
    shutil.copy(tmp_path / "bin1" / "config.json", directory)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    auto, sharded = (recipe_for(tmp_path / f"{m}.toml", mode=m, name=str(directory)) for m in ("auto", "sharded"))
    for notes, tensors in get_pool(2).run(_notes, auto, MeshSizes(1, 2)):
        why = "because pytorch_model.bin is not safetensors"
        assert notes == [f'load.mode = "auto": rank 0 reads the weights and sends them, {why}']
        assert all((tensors[name] == value.numpy()).all() for name, value in plain.items())
    ((kind, message),) = get_pool(1).run(_errors_of_start, [sharded], MeshSizes())[0]
    assert kind == "RecipeError" and 'set load.mode = "rank0"' in message
    with pytest.raises(RecipeError, match=r"has its weights in pytorch_model\.bin, and convert reads safetensors"):
        convert(directory, tmp_path / "out")
    _set(directory, tie_word_embeddings=True)
    ((kind, message),) = get_pool(1).run(_errors_of_start, [auto], MeshSizes())[0]
    assert kind == "DamagedError" and "lm_head.weight" in message and "different values" in message


def test_weights_merged_along_a_dim_that_the_mesh_cuts_are_read_on_rank_0_with_a_note(tmp_path: Path) -> None:
    directory = tiny.save_model("olmo_hybrid", tmp_path)
    recipe = recipe_for(tmp_path / "auto.toml", mode="auto", name=str(directory), attn="eager")
    Path(recipe).write_text(Path(recipe).read_text().replace("[data]", "[data]\npacking = false"))
    ((note,), _), _ = get_pool(2).run(_notes, recipe, MeshSizes(1, 2))
    assert (
        'load.mode = "auto": rank 0 reads' in note and "has to be converted along dim 0, which this mesh cuts" in note
    )
    assert get_pool(1).run(_notes, recipe, MeshSizes())[0][0] == []  # one rank cuts nothing


def test_weights_that_may_be_missing_are_left_to_transformers_with_a_note(tmp_path: Path) -> None:
    directory = tiny.save_model("hrm_text", tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    recipe = recipe_for(tmp_path / "auto.toml", mode="auto", name=str(directory), attn="eager")
    (((note,), tensors),) = get_pool(1).run(_notes, recipe, MeshSizes())
    assert "rank 0 reads" in note and "the files do not name model." in note
    assert all((tensors[name] == value.numpy()).all() for name, value in plain.items())


def test_safetensors_are_read_in_shards_without_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "model", seed=1)
    recipe = recipe_for(tmp_path / "auto.toml", mode="auto", name=str(tmp_path / "model"))
    assert [notes for notes, _ in get_pool(2).run(_notes_without_rank0, recipe, MeshSizes(1, 2))] == [[], []]


def _notes_without_rank0(recipe: str, sizes: MeshSizes) -> tuple[list[str], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("ndtrain.load.load_rank0")
        return _notes(recipe, sizes)


class Harmful:
    """Something in a pickle that runs code when it is loaded as torch did before 2.6."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_weights_that_hold_other_objects_are_refused_in_our_words_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "model"
    _save(directory, seed=1)
    (directory / SINGLE).unlink()
    torch.save({"lm_head.weight": Harmful()}, directory / "pytorch_model.bin")
    recipe = recipe_for(tmp_path / "r.toml", name=str(directory))
    ((kind, message),) = get_pool(1).run(_errors_of_start, [recipe], MeshSizes())[0]
    assert kind == "DamagedError" and "pytorch_model.bin is damaged, or holds other objects than tensors" in message
    assert "get the model as safetensors" in message and "PyTorch 2.6" not in message
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin"])
def test_pointers_of_git_lfs_are_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DamagedError, match=rf"{name} is a git-lfs pointer, .*git lfs pull"):
        model_files(tmp_path)
