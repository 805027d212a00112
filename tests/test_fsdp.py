"""FSDP units chosen by hand, mixed precision of single modules, and offloading to the host change no training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.utils._pytree import tree_map

from ndtrain.console.plan import fold, plan_report
from ndtrain.errors import PlanError
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes, build_mesh
from ndtrain.parallel import parallelize
from ndtrain.parallel.fsdp import exchange_repeated_at_once
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import load_recipe
from tests import tiny
from tests.matrix.results import CONFIGS, absent
from tests.matrix.worker import whole
from tests.ranks import get_pool
from tests.test_plan import plan_for
from tests.test_plan import recipe_for as meta_recipe
from tests.test_plan_applied import fake_world
from tests.test_train import ALL_MESHES, model_dir, ranks_of, recipe_for, reference, trained
from tests.test_train import world as world  # the fixture

FREE, KEEP = "free_full_weight", "keep_full_weight"
UNITS: dict[str, Any] = {"model.layers.*": FREE, "model.layers.*.mlp": KEEP, "model.norm": KEEP, "lm_head": FREE}
OFFLOAD = {"cpu_offload": True}

# (kind, mesh, what the recipe adds)
SAME: dict[str, tuple[str, str, dict[str, Any]]] = {
    "units": ("qwen3", "dp_shard2", {"fsdp": {"mode": "manual", "modules": UNITS}}),
    "units under tp": (
        "qwen3",
        "dp_shard2-tp2",
        {"fsdp": {"mode": "manual", "modules": {**UNITS, "model.layers.*.self_attn.*_proj": KEEP}}},
    ),
    "recomputed blocks": (
        "qwen3",
        "dp_shard2",
        {"fsdp": {"mode": "manual", "modules": UNITS}, "train": {"activation_checkpointing": "full"}},
    ),
    "a tied weight": (
        "gemma3_text",
        "dp_shard2",
        {"fsdp": {"mode": "manual", "modules": {"model.embed_tokens": FREE, "lm_head": FREE, "model.layers.0": KEEP}}},
    ),
    "experts": (
        "qwen3_moe",
        "ep2",
        {"fsdp": {"mode": "manual", "modules": {"model.layers.0.mlp.experts": [KEEP, "cpu_offload"]}}},
    ),
    "offload": ("qwen3", "dp_shard2", {"fsdp": OFFLOAD, "load": {"mode": "sharded"}}),
    "offload under tp": ("qwen3", "dp_shard2-tp2", {"fsdp": OFFLOAD}),
    "some offload": (
        "llama",
        "dp_shard2",
        {"fsdp": {"mode": "manual", "modules": {"model.layers.0": [FREE, "cpu_offload"], "model.layers.1": KEEP}}},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_units_and_offloading_train_like_plain_transformers(world: dict[str, Any], tmp_path: Path, case: str) -> None:
    kind, mesh, more = SAME[case]
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=3, **more)
    result = get_pool(ranks_of(ALL_MESHES[mesh])).run(trained, str(recipe), [], timeout=300)[0]
    for metrics, (loss, norm) in zip(result["metrics"], reference(model_dir(world, kind), recipe), strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.later = torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, again: bool) -> torch.Tensor:
        scale = self.later(x).sigmoid().sum(-1, keepdim=True) if again else torch.ones(())
        return scale * self.first(x).tanh()


class Looped(torch.nn.Module):
    """A block that runs twice, with a layer that its second run alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.block(self.block(x, False), True))


def looped_gradients() -> float:
    """How far the gradients of a looped block, replicated and accumulated, are from those of one process."""
    torch.manual_seed(0)
    plain, rows = Looped(), torch.randn(2, 4, 3, 8)
    model = copy.deepcopy(plain)
    plain(rows.flatten(0, 2)).square().sum().backward()
    mesh = build_mesh(MeshSizes(2, 2), "cpu").fsdp
    for module in (model.block, model):
        fully_shard(module, mesh=mesh)
    for module in (model.block, model):
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    exchange_repeated_at_once(model)
    for i, micro in enumerate(rows):
        model.set_requires_all_reduce(i == 1)  # type: ignore[attr-defined]
        model(micro[torch.distributed.get_rank()]).square().sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max(float((whole(p.grad)[0] - q.grad).norm() / q.grad.norm()) for p, q in pairs)  # type: ignore[arg-type,operator,union-attr]


def test_replicas_of_a_block_that_runs_twice_get_the_whole_gradient() -> None:
    assert max(get_pool(4).run(looped_gradients, timeout=120)) < 1e-5


def compute_in(module: torch.nn.Module, dtype: torch.dtype, output: torch.dtype | None) -> None:
    """Cast as FSDP does for a unit: weights and inputs to `dtype`, outputs to `output`."""
    from torch.nn.utils.stateless import _reparametrize_module

    plain, weights = module.forward, dict(module.named_parameters())

    def cast(to: torch.dtype | None) -> Callable[[Any], Any]:
        return lambda x: x.to(to) if to is not None and isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(cast(dtype), (args, kwargs))
        with _reparametrize_module(module, {name: p.to(dtype) for name, p in weights.items()}):
            return tree_map(cast(output), plain(*args, **kwargs))

    module.forward = forward  # type: ignore[method-assign]


def mixed_reference(
    directory: Path, recipe_path: Path, *, dtypes: dict[str, str], around: str, batch_ranks: int
) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step of a plain loop whose modules compute in `dtypes`, rank by rank."""
    from ndtrain import data
    from ndtrain.engine.schedule import learning_rate
    from ndtrain.hf.tokenizer import ByteTokenizer
    from ndtrain.recipe import load_recipe
    from ndtrain.train import cache_root

    recipe = load_recipe(recipe_path)
    corpus = data.build_cache(
        data.find_files(recipe.data.path), data.TextEncoder(ByteTokenizer()), cache_dir=cache_root() / "data"
    )
    samples = data.open_samples(corpus, recipe.data.seq_len, packing=True, pad_id=258)
    ranks = [
        data.GlobalBatches(
            samples,
            data.Order(len(samples), seed=recipe.train.seed, shuffle=True),
            global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size,
            batch_rank=rank,
            batch_ranks=batch_ranks,
        )
        for rank in range(batch_ranks)
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train()
    for name, dtype in dtypes.items():
        differs = dtype != around and name != "lm_head"
        compute_in(model.get_submodule(name), getattr(torch, dtype), getattr(torch, around) if differs else None)
    groups = tiny.decay_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=recipe.optim.eps)
    results = []
    for step in range(recipe.train.steps):
        batches = [batch for rank in ranks for batch in rank.load(step * recipe.train.global_batch_size)]
        count = data.labels_count(batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            labels = batch["labels"].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, peak=recipe.optim.lr)
        optimizer.step()
        optimizer.zero_grad()
        results.append((total, norm.item()))
    return results


# [fsdp.modules] with fsdp.param_dtype, on a mesh; the dtypes of the units
MIXED: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "low inside high": (
        "dp_shard2",
        "float32",
        {"model.layers.*": FREE, "model.layers.*.mlp": {"policy": KEEP, "mixed_precision": "bfloat16"}},
        {"model.layers.0.mlp": "bfloat16", "model.layers.1.mlp": "bfloat16"},
    ),
    "high inside low": (
        "dp_shard2",
        "bfloat16",
        {
            "model.embed_tokens": {"mixed_precision": True},
            "model.layers.0": {"mixed_precision": "float32"},
            "model.layers.1": FREE,
            "model.layers.1.mlp": {"mixed_precision": False},
            "model.norm": {"mixed_precision": "float32"},
            "lm_head": {"policy": KEEP, "mixed_precision": "float32"},
        },
        {
            "model.embed_tokens": "bfloat16",
            "model.layers.0": "float32",
            "model.layers.1": "bfloat16",
            "model.layers.1.mlp": "float32",
            "model.norm": "float32",
            "lm_head": "float32",
        },
    ),
    "under tp": (
        "dp_shard2-tp2",
        "float32",
        {"model.embed_tokens": {"mixed_precision": "bfloat16"}, "model.norm": {"mixed_precision": "bfloat16"}},
        {"model.embed_tokens": "bfloat16", "model.norm": "bfloat16"},
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_single_modules_compute_in_the_dtype_of_their_mixed_precision(
    world: dict[str, Any], tmp_path: Path, case: str
) -> None:
    mesh, around, modules, dtypes = MIXED[case]
    fsdp = {"mode": "manual", "modules": modules, "param_dtype": around}
    recipe = recipe_for(world, tmp_path, "qwen3", mesh, steps=3, fsdp=fsdp)
    exact = reference(model_dir(world, "qwen3"), recipe)
    result = get_pool(ranks_of(ALL_MESHES[mesh])).run(trained, str(recipe), [], timeout=300)[0]
    want = mixed_reference(model_dir(world, "qwen3"), recipe, dtypes=dtypes, around=around, batch_ranks=2)
    # Once weights were updated, the rounding of single values to bfloat16 makes the two differ.
    limits = [(1e-6, 1e-5), (1e-5, 1e-4)]
    for metrics, (loss, norm), (_, other), (near, nearly) in zip(result["metrics"], want, exact, limits, strict=False):
        assert metrics["loss"] == pytest.approx(loss, rel=near)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=nearly)
        assert metrics["grad_norm"] != pytest.approx(other, rel=2e-5)


def test_the_proof_of_tensor_parallelism_accepts_blocks_in_two_dtypes(world: dict[str, Any], tmp_path: Path) -> None:
    modules = {"model.layers.0": {"mixed_precision": "float32", "cpu_offload": True}, "model.layers.1": KEEP}
    fsdp = {"mode": "manual", "modules": modules, "param_dtype": "bfloat16"}
    recipe = recipe_for(world, tmp_path, "qwen3", "dp_shard2-tp2", steps=3, fsdp=fsdp)
    result = get_pool(4).run(trained, str(recipe), [], timeout=300)[0]
    for metrics, (loss, norm) in zip(result["metrics"], reference(model_dir(world, "qwen3"), recipe), strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=2e-2)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=5e-2)


# ---- the units of a plan, and of the model that it is applied to


def manual(modules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"fsdp": {"mode": "manual", "modules": modules, **more}}


def applied(model: transformers.PreTrainedModel, plan: Plan, name: str) -> tuple[bool, Any, bool]:
    """Return whether the FSDP unit `name` frees its weights, its mixed precision, and whether it is offloaded."""
    group = model.get_submodule(name)._get_fsdp_state()._fsdp_param_group  # type: ignore[operator,union-attr]
    return group.post_forward_mesh_info is not None, group.mp_policy, isinstance(group.offload_policy, CPUOffloadPolicy)


def test_units_are_applied_as_planned(tmp_path: Path) -> None:
    modules = {
        "model.layers.*": [FREE, "cpu_offload"],
        "model.layers.*.self_attn": {"policy": KEEP, "mixed_precision": "float32"},
        "lm_head": {"mixed_precision": "float32"},
    }
    recipe = meta_recipe(tmp_path, "qwen3", **manual(modules, param_dtype="bfloat16", reshard_after_forward=False))
    sizes = MeshSizes(1, 2, 1, 2)
    model, plan = plan_for(recipe, sizes)
    assert [unit.name for unit in plan.units] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
        "model.layers.0",
        "model.layers.1",
        "lm_head",
    ]
    units = {unit.name: unit for unit in plan.units}
    assert {p.fqn for p in plan.params if p.unit == "root"} == {"model.embed_tokens.weight", "model.norm.weight"}
    assert {p.unit for p in plan.params} == {*units, "root"}
    assert plan.on_host == {p.fqn for p in plan.params if p.unit in ("model.layers.0", "model.layers.1")}
    with fake_world(3, 4):
        parallelize(model, plan, build_mesh(sizes, "cpu"), recipe=recipe)
        params = dict(model.named_parameters())
        for planned in plan.params:
            assert params[planned.fqn].placements == planned.placements  # type: ignore[attr-defined]
            assert tuple(params[planned.fqn].to_local().shape) == planned.local_shape(sizes, 3)  # type: ignore[attr-defined]
        frees, mixed, offloaded = applied(model, plan, "model.layers.1")
        assert (frees, offloaded) == (True, True)
        assert (mixed.param_dtype, mixed.reduce_dtype, mixed.output_dtype) == (torch.bfloat16, torch.float32, None)
        frees, mixed, offloaded = applied(model, plan, "model.layers.1.self_attn")
        assert (frees, offloaded) == (False, False)
        assert (mixed.param_dtype, mixed.output_dtype, mixed.cast_forward_inputs) == (
            torch.float32,
            torch.bfloat16,
            True,
        )
        # The head's output is the result, so it is not cast.
        frees, mixed, _ = applied(model, plan, "lm_head")
        assert (frees, mixed.param_dtype, mixed.output_dtype) == (False, torch.float32, None)
        frees, mixed, offloaded = applied(model, plan, "")
        assert (frees, mixed.param_dtype, offloaded) == (False, torch.bfloat16, False)


def test_offloading_moves_every_parameter_to_the_host(tmp_path: Path) -> None:
    recipe = meta_recipe(tmp_path, "gemma3_text", fsdp=OFFLOAD)
    model, plan = plan_for(recipe, MeshSizes(1, 2))
    assert plan.on_host == {p.fqn for p in plan.params}
    with fake_world(0, 2):
        parallelize(model, plan, build_mesh(plan.sizes, "cpu"), recipe=recipe)
        assert all(applied(model, plan, name)[2] for unit in plan.units for name in unit.modules)


def test_classes_to_wrap_are_units_and_the_root_has_the_rest(tmp_path: Path) -> None:
    recipe = meta_recipe(tmp_path, "qwen3", fsdp={"fsdp_transformer_layer_cls_to_wrap": "Qwen3DecoderLayer"})
    _, plan = plan_for(recipe, MeshSizes(1, 2))
    assert [(unit.name, unit.reshard) for unit in plan.units] == [("model.layers.0", True), ("model.layers.1", True)]


def test_a_tied_weight_and_experts_are_one_unit_each(tmp_path: Path) -> None:
    _, plan = plan_for(
        meta_recipe(tmp_path, "gpt2", **manual({"transformer.wte": KEEP, "lm_head": KEEP})), MeshSizes(1, 2)
    )
    assert [(u.modules, u.reshard) for u in plan.units] == [(("transformer.wte", "lm_head"), False)]
    _, plan = plan_for(
        meta_recipe(tmp_path, "qwen3_moe", **manual({"model.layers.0": [KEEP, "cpu_offload"]})),
        MeshSizes(1, 2, 1, 1, 2),
    )
    assert [(u.name, u.experts, u.reshard, u.cpu_offload) for u in plan.units] == [
        ("model.layers.0.mlp.experts", True, False, True),
        ("model.layers.1.mlp.experts", True, True, False),
        ("model.layers.0", False, False, True),
    ]


def test_parameters_kept_in_float32_stay_so_in_units_chosen_by_hand(tmp_path: Path) -> None:
    sections = {"data": {"packing": False}}
    recipe = meta_recipe(
        tmp_path, "ernie4_5_moe", **manual({"model.layers.*": KEEP}, param_dtype="bfloat16"), **sections
    )
    _, plan = plan_for(recipe, MeshSizes(1, 2))
    assert [unit.name for unit in plan.units] == ["model.layers.0", "model.layers.1"]
    kept = plan.units[1].in_float32
    assert kept and all(fqn.startswith("model.layers.1.mlp.") for fqn in kept)
    rows = fold(plan_report(plan, recipe, rank=0, ranks_per_node=8))
    dtypes = {row["fqn"]: title.rpartition(", ")[2] for title, _, _, row in rows}
    assert {fqn for fqn, dtype in dtypes.items() if dtype == "float32"} == set(kept) & set(dtypes)
    low = manual({kept[0].rpartition(".")[0]: {"mixed_precision": True}}, param_dtype="bfloat16")
    with pytest.raises(PlanError, match=r"ernie4_5_moe keeps its parameters in float32"):
        plan_for(meta_recipe(tmp_path, "ernie4_5_moe", **low, **sections), MeshSizes(1, 2))


# Types that keep single parameters of a module, of what it has inside, and whole heads and norms in float32.
KEPT = ["afmoe", "deepseek_v4", "flint", "hy_v4", "inkling_text", "kimi_linear"]


def gathered_dtypes(recipe_path: str) -> dict[str, torch.dtype]:
    recipe = load_recipe(Path(recipe_path))
    model, plan = plan_for(recipe, MeshSizes(1, 1))
    parallelize(model, plan, build_mesh(plan.sizes, "cpu"), recipe=recipe)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return {fqn: param.dtype for fqn, param in model.named_parameters()}


@pytest.mark.parametrize("kind", KEPT)
def test_every_parameter_is_gathered_in_the_dtype_in_which_from_pretrained_reads_it(tmp_path: Path, kind: str) -> None:
    if reason := absent(kind):
        pytest.skip(reason)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hub")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    wanted = {fqn: param.dtype for fqn, param in plain.named_parameters()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    path = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"name": str(tmp_path / "hub"), "attn": "eager"},
        corpus=tmp_path,
        run_dir=tmp_path / "run",
        fsdp={"param_dtype": "bfloat16"},
        data={"packing": False},
    )
    assert get_pool(1).run(gathered_dtypes, str(path)) == [wanted]


EP2 = MeshSizes(1, 2, 1, 1, 2)
REFUSED: dict[str, tuple[str, dict[str, Any], MeshSizes, list[str]]] = {
    "nothing": (
        "llama",
        {"layers.*": FREE},
        MeshSizes(1, 2),
        ['fsdp.modules."layers.*" matches no module of llama', '"model.layers.*"'],
    ),
    "a star crosses no dot": ("llama", {"model.*.mlp": FREE}, MeshSizes(1, 2), ['"model.layers.*.mlp"']),
    "a parameter": ("llama", {"model.norm.weight": FREE}, MeshSizes(1, 2), ["it is a parameter", '"model.norm"']),
    "a class": ("llama", {"LlamaDecoderLayr": {}}, MeshSizes(1, 2), ['"LlamaDecoderLayer"']),
    "no parameters": ("llama", {"model.rotary_emb": FREE}, MeshSizes(1, 2), ["which has no parameters"]),
    "a list": (
        "llama",
        {"model.layers": FREE},
        MeshSizes(1, 2),
        ["a ModuleList without a forward", '"model.layers.*"'],
    ),
    "two policies": (
        "llama",
        {"model.layers.*": FREE, "model.layers.1": KEEP},
        MeshSizes(1, 2),
        ['fsdp.modules."model.layers.1" and fsdp.modules."model.layers.*" both match model.layers.1'],
    ),
    "all in inner units": (
        "llama",
        {"model.layers.*.mlp": FREE, "model.layers.*.mlp.*_proj": FREE},
        MeshSizes(1, 2),
        ['"model.layers.*.mlp" matches model.layers.0.mlp, all of whose parameters'],
    ),
    "half of a tied weight": (
        "gemma3_text",
        {"lm_head": FREE},
        MeshSizes(1, 2),
        ["fsdp.modules.lm_head", "one tied weight", '"model.embed_tokens"', "match neither"],
    ),
    "a tied weight with two policies": (
        "gemma3_text",
        {"lm_head": FREE, "model.embed_tokens": KEEP},
        MeshSizes(1, 2),
        ["one tied weight", "the same policies"],
    ),
    "experts in another dtype": (
        "qwen3_moe",
        {"model.layers.*.mlp.experts": {"mixed_precision": "bfloat16"}},
        EP2,
        ["mixed_precision of its own", "float32"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_units_that_fsdp_cannot_make_are_refused(tmp_path: Path, case: str) -> None:
    kind, modules, sizes, words = REFUSED[case]
    recipe = meta_recipe(tmp_path, kind, **manual(modules))
    with pytest.raises(PlanError) as caught:
        make_plan(meta_model(recipe), sizes, recipe)
    for word in words:
        assert word in str(caught.value)


def test_a_part_of_dispatched_experts_is_refused_as_a_unit(tmp_path: Path) -> None:
    from ndtrain.plan.manual import units

    recipe = meta_recipe(tmp_path, "llama", **manual({"model.layers.*.mlp.up_proj": FREE}))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.up_proj, a part of experts"):
        units(meta_model(recipe), {}, recipe, experts=("model.layers.0.mlp",))


def test_a_unit_whose_weights_are_read_from_outside_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    # The mixer multiplies by this weight without calling its module
    more = {"model": {"attn": "eager"}, "data": {"packing": False}}
    fsdp = {"mode": "manual", "modules": {"backbone.layers.*.mixer.dt_proj": FREE}}
    recipe = recipe_for(world, tmp_path, "falcon_mamba", "dp_shard2", fsdp=fsdp, **more)
    with pytest.raises(
        AssertionError, match=r"PlanError: falcon_mamba .*a unit's weights exist only during its own forward"
    ):
        get_pool(2).run(trained, str(recipe), [], timeout=200)
