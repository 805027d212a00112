"""Weights reach the shards bit for bit, on every mesh and in both modes; damaged files stop every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ndtrain.mesh import MeshSizes
from tests import tiny
from tests.ranks import get_pool

MODES = ("rank0", "sharded")
FSDP = {"dp_shard4": MeshSizes(1, 4), "dp_replicate2-dp_shard2": MeshSizes(2, 2)}
EP = {
    "ep2": MeshSizes(1, 4, 1, 1, 2),
    "ep4": MeshSizes(1, 4, 1, 1, 4),
    "dp_shard2-tp2-ep4": MeshSizes(1, 2, 1, 2, 4),
    "dp_replicate2-ep2": MeshSizes(2, 2, 1, 1, 2),
}
WITH_TP = {**FSDP, "dp_shard2-tp2": MeshSizes(1, 2, 1, 2)}
MESHES = {
    "llama": {**WITH_TP, "tp4": MeshSizes(1, 1, 1, 4), "dp_replicate2-tp2": MeshSizes(2, 1, 1, 2)},
    "qwen3": WITH_TP,
    "gemma3_text": WITH_TP,
    "gpt2": FSDP,
    "qwen3_moe": WITH_TP | EP,
    "qwen3_moe_few": {"dp_shard4": MeshSizes(1, 4), "ep2": MeshSizes(1, 4, 1, 1, 2)},
    "qwen3_moe_six": {"dp_shard4": MeshSizes(1, 4)},  # the last rank has no expert
    "phi3": WITH_TP,
    "gpt_neox": {"dp_shard2-tp2": MeshSizes(1, 2, 1, 2)},  # saved under another name by a rule of its class
}

_built: dict[tuple[Any, MeshSizes], Any] = {}


# ---- on the ranks


def _loaded(recipe_path: str, sizes: MeshSizes) -> tuple[Any, Any]:
    """Load a model as training does, into memory that held NaN before."""
    import torch.distributed as dist

    from ndtrain.hf.model import meta_model
    from ndtrain.load import load_weights, materialize
    from ndtrain.mesh import build_mesh
    from ndtrain.parallel import parallelize
    from ndtrain.plan import make_plan
    from ndtrain.recipe import load_recipe
    from ndtrain.runs.process import Runtime

    recipe = load_recipe(Path(recipe_path))
    model = meta_model(recipe)
    plan = make_plan(model, sizes, recipe)
    # One mesh for all loads of a case; the pool closes a case's process groups, so none outlives it.
    world = dist.group.WORLD
    if (world, sizes) not in _built:
        if any(old is not world for old, _ in _built):
            _built.clear()
        _built[world, sizes] = build_mesh(sizes, "cpu")
    parallelize(model, plan, _built[world, sizes], recipe=recipe)
    rank = dist.get_rank()
    runtime = Runtime(rank=rank, local_rank=rank, world_size=sizes.world_size, device=torch.device("cpu"))
    junk = [torch.full((n,), float("nan")) for n in (4, 8, 16, 32, 64, 1024, 2048, 4096, 8192) for _ in range(40)]
    del junk
    materialize(model, runtime, recipe=recipe)
    load_weights(model, plan, recipe=recipe, runtime=runtime)
    return model, plan


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _compare(recipes: dict[str, str], directory: str, meshes: dict[str, MeshSizes]) -> list[str]:
    """List the differences from plain transformers on this rank, over all modes and meshes."""
    from torch.distributed.tensor import DTensor

    from ndtrain.layout import local_boxes

    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole, buffers = plain.state_dict(), dict(plain.named_buffers())
    wrong = []
    for mesh, sizes in meshes.items():
        for mode, recipe in recipes.items():
            model, plan = _loaded(recipe, sizes)
            case = f"{mesh} {mode}"
            state = model.state_dict()
            if set(state) != set(whole):
                wrong.append(f"{case}: keys {sorted(set(state) ^ set(whole))}")
            for name, tensor in state.items():
                local, reference = tensor, whole[name]
                if isinstance(tensor, DTensor):
                    local = tensor.to_local()
                    want = torch.full_like(local, float("nan"))
                    axes = tensor.device_mesh
                    for box in local_boxes(tensor.shape, tuple(axes.shape), axes.get_coordinate(), tensor.placements):
                        want[box.local] = reference[box.inside]
                    reference = want
                elif name in dict(model.named_parameters()):
                    wrong.append(f"{case}: {name} is not sharded")
                if not _same_bits(local, reference):
                    wrong.append(f"{case}: {name}")
            got = dict(model.named_buffers())
            if set(got) != set(buffers):
                wrong.append(f"{case}: buffers {sorted(set(got) ^ set(buffers))}")
            wrong += [f"{case}: buffer {n}" for n, b in got.items() if not _same_bits(b, buffers[n])]
            for alias, source_name in plan.tied.items():
                if model.get_parameter(alias) is not model.get_parameter(source_name):
                    wrong.append(f"{case}: {alias} came apart")
            if not all(p.requires_grad for p in model.parameters()):
                wrong.append(f"{case}: a parameter needs no gradient")
    return wrong


def _errors(recipes: list[str], sizes: MeshSizes) -> list[tuple[str, str]]:
    """Return class and message of the error that loading each recipe raises on this rank."""
    answers = []
    for recipe in recipes:
        try:
            _loaded(recipe, sizes)
        except Exception as error:
            answers.append((type(error).__name__, str(error)))
        else:
            answers.append(("", "loaded"))
    return answers


def _full_tensors(recipes: dict[str, str], meshes: dict[str, dict[str, MeshSizes]]) -> dict[str, Any]:
    """Return {kind: {mesh: {name: numpy array}}} of whole tensors on rank 0, empty ones on the other ranks."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for kind, recipe in recipes.items():
        found[kind] = {}
        for mesh, sizes in meshes[kind].items():
            model, _ = _loaded(recipe, sizes)
            tensors = model.state_dict().items()
            full = {n: (t.full_tensor() if isinstance(t, DTensor) else t).numpy() for n, t in tensors}
            found[kind][mesh] = full if dist.get_rank() == 0 else {}
    return found


# ---- cases


def recipe_for(path: Path, *, mode: str = "rank0", **model: Any) -> str:
    recipe = tiny.recipe_file(path, model=model, corpus=path.parent, run_dir=path.parent / "run", load={"mode": mode})
    return str(recipe)


def recipes_of(directory: Path, tmp_path: Path) -> dict[str, str]:
    return {mode: recipe_for(tmp_path / f"{mode}.toml", mode=mode, name=str(directory)) for mode in MODES}


@pytest.mark.parametrize("kind", MESHES)
def test_shards_and_buffers_are_bit_equal_to_plain_transformers(tmp_path: Path, kind: str) -> None:
    directory = tiny.save_model(kind, tmp_path)
    recipes = recipes_of(directory, tmp_path)
    assert get_pool(4).run(_compare, recipes, str(directory), MESHES[kind]) == [[]] * 4


def test_one_rank_loads_the_same_bits(tmp_path: Path) -> None:
    directory = tiny.save_model("gemma3_text", tmp_path)
    assert get_pool(1).run(_compare, recipes_of(directory, tmp_path), str(directory), {"1": MeshSizes()}) == [[]]


def test_a_model_in_several_files_loads_the_same_bits(tmp_path: Path) -> None:
    directory = tiny.save_model("llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    split = tmp_path / "split"
    model.save_pretrained(split, max_shard_size="100KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    recipes = recipes_of(split, tmp_path)
    assert get_pool(4).run(_compare, recipes, str(directory), {"dp_shard2-tp2": MeshSizes(1, 2, 1, 2)}) == [[]] * 4


def test_bf16_weights_become_exactly_their_float32_values(tmp_path: Path) -> None:
    directory = tiny.save_model("llama", tmp_path, dtype=torch.bfloat16)
    with safe_open(directory / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    recipes = recipes_of(directory, tmp_path)
    for recipe in recipes.values():
        found = get_pool(4).run(_full_tensors, {"llama": recipe}, {"llama": {"m": MeshSizes(1, 2, 1, 2)}})[0]
        loaded = found["llama"]["m"]
        assert set(loaded) == set(stored)
        for name, tensor in stored.items():
            assert loaded[name].dtype == "float32"
            assert torch.equal(torch.from_numpy(loaded[name]), tensor.float()), name


def test_a_tied_weight_is_found_under_its_other_name(tmp_path: Path) -> None:
    directory = tiny.save_model("gemma3_text", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    recipes = recipes_of(directory, tmp_path)
    assert get_pool(4).run(_compare, recipes, str(directory), FSDP) == [[]] * 4


def test_every_rank_has_its_own_experts(tmp_path: Path) -> None:
    """Guards against rank 0's experts on every rank: in the file, expert i is filled with i."""
    directory = tiny.save_model("qwen3_moe", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            tensor.fill_(expert)
    assert any(".experts.3." in name for name in tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    recipes = recipes_of(directory, tmp_path)
    assert get_pool(4).run(_compare, recipes, str(directory), FSDP | EP) == [[]] * 4
    for recipe in recipes.values():
        found = get_pool(4).run(_full_tensors, {"moe": recipe}, {"moe": {"m": EP["ep2"]}})[0]["moe"]["m"]
        fused = {name: tensor for name, tensor in found.items() if ".experts." in name}
        assert len(fused) == 4
        for name, tensor in fused.items():
            assert [sorted(set(tensor[i].ravel().tolist())) for i in range(4)] == [[0.0], [1.0], [2.0], [3.0]], name


def test_sharded_loading_refuses_weights_merged_along_a_dim_that_the_mesh_cuts(tmp_path: Path) -> None:
    """Three convolutions are saved separately: a rank that takes its part of each would hold other ranks' rows."""
    directory = tiny.save_model("olmo_hybrid", tmp_path)
    recipes = {
        mode: recipe_for(tmp_path / f"{mode}.toml", mode=mode, name=str(directory), attn="eager") for mode in MODES
    }
    for path in recipes.values():
        Path(path).write_text(Path(path).read_text().replace("[data]", "[data]\npacking = false"))
    found = get_pool(2).run(_errors, [recipes["rank0"], recipes["sharded"]], MeshSizes(1, 2))
    for rank in found:
        assert rank[0] == ("", "loaded")
        assert rank[1][0] == "PlanError"
        assert "conv1d.weight is saved in a form that has to be converted along dim 0" in rank[1][1]
        assert 'set load.mode = "rank0"' in rank[1][1]


# ---- random initialization

RANDOM = {
    "llama": {**WITH_TP, "tp4": MeshSizes(1, 1, 1, 4)},
    "gpt2": FSDP,
    "qwen3_moe": WITH_TP | EP,
    "gemma3_text": {"dp_shard4": MeshSizes(1, 4), "dp_shard2-tp2": MeshSizes(1, 2, 1, 2)},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Full tensors of from-scratch models: {kind: {mesh: {name: tensor}}}."""
    root = tmp_path_factory.mktemp("drawn")
    recipes = {kind: recipe_for(root / f"{kind}.toml", type=kind, config=tiny.CONFIGS[kind]) for kind in RANDOM}
    four = get_pool(4).run(_full_tensors, recipes, RANDOM)[0]
    one = get_pool(1).run(_full_tensors, recipes, {kind: {"1": MeshSizes()} for kind in RANDOM})[0]
    return {
        kind: {
            mesh: {name: torch.from_numpy(array) for name, array in arrays.items()}
            for mesh, arrays in {**one[kind], **four[kind]}.items()
        }
        for kind in RANDOM
    }


@pytest.mark.parametrize("kind", RANDOM)
def test_a_model_from_scratch_is_the_same_on_every_mesh(drawn: dict[str, Any], kind: str) -> None:
    reference = drawn[kind]["1"]
    for mesh, tensors in drawn[kind].items():
        assert set(tensors) == set(reference)
        assert [name for name in reference if not _same_bits(tensors[name], reference[name])] == [], mesh


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_a_model_from_scratch_has_the_distribution_of_its_own_initialization(drawn: dict[str, Any], kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **tiny.CONFIGS[kind])
    plain = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    kinds = set()
    for name, tensor in drawn[kind]["1"].items():
        if name.endswith("bias"):
            assert not tensor.any(), name
            kinds.add("bias")
        elif "norm" in name or ".ln_" in name:
            assert bool((tensor == 1).all()), name
            kinds.add("norm")
        else:
            # GPT-2 scales what enters the residual stream by 1 / sqrt(2 n_layer).
            scale = (2 * config.n_layer) ** -0.5 if kind == "gpt2" and "c_proj" in name else 1.0
            if tensor.numel() >= 2000:  # the spread of fewer numbers is too uncertain
                assert tensor.std().item() == pytest.approx(config.initializer_range * scale, rel=0.1), name
                assert tensor.std().item() == pytest.approx(plain[name].std().item(), rel=0.1), name
            assert abs(tensor.mean().item()) < 4 * config.initializer_range / tensor.numel() ** 0.5, name
            kinds.add("weight")
            assert torch.equal(tensor == 0, plain[name] == 0), name  # the padding row
    assert kinds == ({"weight", "norm", "bias"} if kind == "gpt2" else {"weight", "norm"})


def test_weights_of_equal_shape_are_drawn_differently(drawn: dict[str, Any]) -> None:
    tensors = drawn["llama"]["1"]
    seen: list[str] = []
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            for other in seen:
                assert not _same_bits(tensors[other], tensor), f"{name} equals {other}"
            seen.append(name)


def test_the_seed_decides_the_weights(tmp_path: Path, drawn: dict[str, Any]) -> None:
    path = tiny.recipe_file(
        tmp_path / "r.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=tmp_path,
        run_dir=tmp_path / "run",
        train={"seed": 4},
    )
    other = get_pool(1).run(_full_tensors, {"llama": str(path)}, {"llama": {"1": MeshSizes()}})[0]["llama"]["1"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(torch.from_numpy(other[name]), drawn["llama"]["1"][name])


# ---- damage

DOWN = "model.layers.1.mlp.down_proj.weight"


def _edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


def _truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "lacks a weight": (_edit(lambda t: t.pop(DOWN)), "DamagedError", [DOWN, "lacks 1 weight of the model"]),
    "lacks a norm": (_edit(lambda t: t.pop("model.norm.weight")), "DamagedError", ["model.norm.weight"]),
    "wrong shape": (_edit(lambda t: t.update({DOWN: torch.ones(64, 90)})), "DamagedError", [DOWN, "shape"]),
    "NaN in one corner": (_edit(lambda t: t[DOWN][0, :1].fill_(float("nan"))), "DamagedError", [DOWN, "NaN"]),
    "truncated": (_truncate, "DamagedError", ["cannot be read"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "", ["safetensors"]),
    "no config": (lambda d: (d / "config.json").unlink(), "RecipeError", ["model.name", "has no config.json"]),
    "nothing": (shutil.rmtree, "RecipeError", ["model.name", "there is no such directory"]),
}


def test_damaged_weights_stop_every_rank_and_are_named(tmp_path: Path) -> None:
    whole = tiny.save_model("llama", tmp_path)
    cases: list[tuple[str, str, Path]] = []
    recipes = []
    for number, (case, (damage, _, _)) in enumerate(DAMAGE.items()):
        directory = tmp_path / f"damaged{number}"
        shutil.copytree(whole, directory)
        damage(directory)
        for mode in MODES:
            cases.append((case, mode, directory))
            recipes.append(recipe_for(tmp_path / f"{number}-{mode}.toml", mode=mode, name=str(directory)))
    # dp_shard 4: the corner that is NaN lies on rank 0 alone
    every = get_pool(4).run(_errors, recipes, MeshSizes(1, 4))
    problems = []
    for (case, mode, directory), answers in zip(cases, zip(*every, strict=True), strict=True):
        _, kind, words = DAMAGE[case]
        for rank, (got, message) in enumerate(answers):
            allowed = (kind,) if kind else ("DamagedError", "RecipeError")
            absent = [word for word in [*words, str(directory)] if word not in message]
            if got not in allowed or absent:
                problems.append(f"{case}, {mode}, rank {rank}: {got}: {message} (no {absent})")
    assert not problems, "\n".join(problems)


# Overrides that fit no weights, one that does, and what names those at fault.
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 128, "rms_norm_eps": 1e-5}, "model.config.hidden_size = 128: the weights"),
    ({"num_hidden_layers": 3}, "model.config.num_hidden_layers = 3: the weights"),
    ({"vocab_size": 300, "intermediate_size": 64}, "model.config.vocab_size = 300: the weights"),
    ({"tie_word_embeddings": False}, "model.config.tie_word_embeddings = false: the weights"),
]


def test_overrides_that_do_not_fit_the_weights_are_named(tmp_path: Path) -> None:
    untied, tied = (tiny.save_model(kind, tmp_path) for kind in ("llama", "gemma3_text"))
    from_hub = [
        recipe_for(tmp_path / f"{n}-{mode}.toml", mode=mode, name=str(tied if "tie" in str(c) else untied), config=c)
        for n, (c, _) in enumerate(UNFIT)
        for mode in MODES
    ]
    for answers in get_pool(2).run(_errors, from_hub, MeshSizes(1, 2)):
        for (kind, message), words in zip(answers, [words for _, words in UNFIT for _ in MODES], strict=True):
            assert kind == "RecipeError" and message.startswith(words), message
            assert 'leave it out, or set model.init = "random"' in message


def test_weights_that_do_not_fit_their_own_config_are_damaged_whatever_is_overridden(tmp_path: Path) -> None:
    directory = tiny.save_model("llama", tmp_path)
    _edit(lambda t: t.pop(DOWN))(directory)
    recipe = recipe_for(tmp_path / "r.toml", name=str(directory), config={"rms_norm_eps": 1e-5})
    assert get_pool(1).run(_errors, [recipe], MeshSizes())[0][0][0] == "DamagedError"
