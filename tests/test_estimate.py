"""The memory, FLOPs and collectives that `inspect` reports for a step are those of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ndtrain.accelerators import find_device
from ndtrain.console.inspect import inspect_text, suggest_text
from ndtrain.errors import PlanError, RecipeError
from ndtrain.estimate import StepEstimate, estimate_step, step, suggest
from ndtrain.estimate.record import Collective, Record, Work
from ndtrain.estimate.roofline import seconds, times
from ndtrain.estimate.search import _candidates, changed
from ndtrain.recipe import Recipe, load_recipe
from ndtrain.train import sizes_for
from tests import tiny
from tests.estimate_truth import MODELS, compared
from tests.ranks import get_pool


@pytest.mark.parametrize("case", ["tp 2", "experts, dp_shard 2, ep 2"])
def test_a_dry_step_has_the_memory_and_collectives_of_a_real_one(tmp_path: Path, case: str) -> None:
    ours, theirs, sent, real = compared(case, tmp_path, get_pool(2))
    assert ours == pytest.approx(theirs, rel=0.05)
    assert {op: count for op, (count, _) in sent.items()} == {op: count for op, (count, _) in real.items()}
    for op in {"all_gather", "reduce_scatter"} & set(sent):
        assert sent[op] == real[op]


def recipe_for(folder: Path, kind: str, mesh: dict[str, int], config: dict[str, Any], **more: Any) -> Recipe:
    batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    model = {"type": kind, "init": "random", "config": {**MODELS.get(kind, {}), **config}, **more.pop("model", {})}
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model=model,
        corpus=folder,
        run_dir=folder / "run",
        mesh=mesh,
        batch_ranks=batch_ranks,
        **{"data": {"seq_len": 128}, **more},
    )
    return load_recipe(path)


def estimated(recipe: Recipe, ranks: int, **more: Any) -> StepEstimate:
    return estimate_step(recipe, sizes_for(recipe, ranks), **more)


@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", "none"), ("llama", "full"), ("qwen3_moe", "none")])
def test_flops_are_six_per_weight_and_token_plus_attention(tmp_path: Path, kind: str, checkpointing: str) -> None:
    recipe = recipe_for(
        tmp_path,
        kind,
        {},
        {},
        data={"seq_len": 256, "packing": False},
        train={"activation_checkpointing": checkpointing},
    )
    found = estimated(recipe, 1)
    sizes, tokens = MODELS[kind], 8 * 256
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    if kind == "llama":
        products = 3 * sizes["intermediate_size"]
    else:  # the experts of a token, and the router
        products = 3 * sizes["num_experts_per_tok"] * sizes["moe_intermediate_size"] + sizes["num_experts"]
    layer = sizes["hidden_size"] * (2 * heads + 2 * keys + products)
    weights = sizes["num_hidden_layers"] * layer + sizes["hidden_size"] * sizes["vocab_size"]
    # Causal attention: two products forward, five backward, over half of the pairs.
    attention = sizes["num_hidden_layers"] * 7 * tokens * 256 * heads
    again = 0.0
    if checkpointing == "full":  # except the last product of each layer, whose output is not needed
        last = sizes["hidden_size"] * sizes["intermediate_size"]
        again = 2 * sizes["num_hidden_layers"] * (layer - last) * tokens + attention * 2 / 7
    assert found.flops == pytest.approx(6 * weights * tokens + attention + again, rel=0.03)
    assert found.model_flops == pytest.approx(6 * weights * tokens + attention * 6 / 7, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "mesh", "config"),
    [
        ("llama", {"dp_shard": 4, "tp": 2}, {"num_hidden_layers": 7}),
        ("qwen3_moe", {"dp_shard": 4, "ep": 4}, {"num_hidden_layers": 8, "decoder_sparse_step": 2}),
    ],
)
def test_extrapolating_layers_gives_the_cost_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mesh: dict[str, int], config: dict[str, Any]
) -> None:
    recipe = recipe_for(tmp_path, kind, mesh, config, train={"global_batch_size": 4, "micro_batch_size": 1})
    ranks = 8 if kind == "llama" else 4
    short = estimated(recipe, ranks)
    monkeypatch.setattr(step, "depths", lambda model, plan: None)
    whole = estimated(recipe, ranks)
    assert short.depths is not None and whole.depths is None
    assert short.flops == whole.flops and short.sent(8) == whole.sent(8)
    assert short.peak == whole.peak
    assert short.peaks.items() <= whole.peaks.items()
    device = find_device("h100")
    assert short.times(device, 8).step == pytest.approx(whole.times(device, 8).step)


def test_micro_batches_between_the_first_and_the_last_are_counted(tmp_path: Path) -> None:
    few = recipe_for(
        tmp_path,
        "llama",
        {"dp_shard": 2},
        {"num_hidden_layers": 1},
        train={"global_batch_size": 6, "micro_batch_size": 1},
    )
    many = recipe_for(
        tmp_path,
        "llama",
        {"dp_shard": 2},
        {"num_hidden_layers": 1},
        train={"global_batch_size": 14, "micro_batch_size": 1},
    )
    three, seven = estimated(few, 2), estimated(many, 2)
    assert seven.peak_bytes == three.peak_bytes
    assert seven.flops == pytest.approx(three.flops * 7 / 3, rel=1e-3)
    counts = [{(s.axis, s.op): s.count for s in e.sent(8)} for e in (three, seven)]
    assert counts[1]["fsdp", "reduce_scatter"] * 3 == counts[0]["fsdp", "reduce_scatter"] * 7


def test_a_model_that_depends_on_tensor_values_is_refused(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent / "matrix" / "configs.json").read_text())["dbrx"]
    recipe = recipe_for(tmp_path, "dbrx", {}, config)
    with pytest.raises(PlanError, match=r"dbrx cannot be run on tensors without data: .*; leave out --dry-run"):
        estimated(recipe, 1)
    with pytest.raises(PlanError, match=r"no mesh of 2 x h100 was found .* the last reason: dbrx cannot be run"):
        suggest(recipe, 2, find_device("h100"), 8)


def test_the_roofline_sums_compute_and_exposed_communication() -> None:
    device = find_device("bfloat16=100,float32=10,memory=1e9,bandwidth=50,intra=20,inter=5")
    record = Record()
    record.work[Work("bfloat16", 1000, 100)] = 2  # 10 s each by arithmetic
    record.work[Work("float32", 0, 500)] = 1  # 10 s by memory
    record.sent[Collective("fsdp", 4, "all_gather", 80)] = 1
    record.sent[Collective("tp", 2, "all_reduce", 40)] = 3

    def one(of: Any) -> float:
        return float(of(record))

    found = times(one, {"fsdp": (2, 2), "tp": (2, 1)}, device)
    assert found.compute == 30 and found.by_flops == 20 and found.bound == "compute"
    # 80 bytes: half from another node over two cards, 4 s, and half inside it, 2 s; tp: twice 20 bytes, 2 s each time
    assert found.sent == {"fsdp": 4.0, "tp": 6.0}
    assert found.exposed == {"fsdp": 0.0, "tp": 6.0} and found.step == 36
    far = Collective("fsdp", 4, "all_gather", 4000)
    assert seconds(far, device, on_node=1, nodes=4) == 4000 * 3 / 4 / 5
    assert seconds(Collective("ep", 4, "all_to_all", 400), device, on_node=2, nodes=2) == 400 / 2 / 5


def test_a_device_is_given_by_name_or_figures_and_errors_name_the_fault() -> None:
    own = find_device("h100,memory=94e9")
    assert own.memory == 94e9 and own.bfloat16 == find_device("h100").bfloat16 and "memory given" in own.source
    for text, words in {
        "h101": "h101 is not KEY=NUMBER, .* one of a100, h100",
        "memory=1e9": "lacks bfloat16, float32, bandwidth, intra, inter;",
        "h100,memory=much": "'much' is not a number",
        "h100,memory=-1": "memory=-1 must be a positive number for one of bfloat16",
        "h100,colour=3": "colour=3 must be a positive number for one of bfloat16",
    }.items():
        with pytest.raises(RecipeError, match=words):
            find_device(text)


@pytest.fixture
def small_device() -> str:
    return "bfloat16=1e12,float32=1e12,memory=1e9,bandwidth=1e11,intra=1e10,inter=1e9"


def test_suggestions_fit_and_the_first_is_no_slower_than_other_meshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_device: str
) -> None:
    monkeypatch.setattr("ndtrain.estimate.search.SEARCH_S", 3.0)
    recipe, device = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1}), find_device(small_device)
    found = suggest(recipe, 4, device, 2)
    assert 1 <= len(found) <= 5
    assert [s.times.step for s in found] == sorted(s.times.step for s in found)
    best = found[0]
    again = estimated(changed(recipe, best.change), 4)
    assert again.peak_bytes == best.step.peak_bytes and again.room(device) >= 0
    for mesh in ({"mesh.dp_shard": 4}, {"mesh.dp_shard": 2, "mesh.tp": 2}, {"mesh.dp_shard": 2, "mesh.cp": 2}):
        other = estimated(changed(recipe, mesh), 4)
        assert best.times.step <= other.times(device, 2).step
    report = json.loads(suggest_text(recipe, world_size=4, device=small_device, ranks_per_node=2, as_json=True))
    assert report[0]["set"] == best.change
    assert "mesh.tp" in best.change and all(one.change["mesh.tp"] <= 4 for one in found)  # of 4 key-value heads


def test_sequence_parallelism_is_suggested_where_the_recipe_has_it_off(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "llama", {}, {})
    off = changed(recipe, {"tp.sequence_parallel": False})
    assert all("tp.sequence_parallel" not in change for change in _candidates(recipe, 4, 4, 0))
    found = {(change["mesh.tp"] > 1, change.get("tp.sequence_parallel")) for change in _candidates(off, 4, 4, 0)}
    assert found == {(False, None), (True, True)}


def test_a_step_that_does_not_fit_gets_the_excess_and_a_fix(tmp_path: Path, small_device: str) -> None:
    train = {"global_batch_size": 4, "micro_batch_size": 2}
    recipe = recipe_for(tmp_path, "llama", {"dp_shard": 2}, {"num_hidden_layers": 1}, train=train)
    whole = estimated(recipe, 2).peak_bytes
    text = inspect_text(recipe, world_size=2, device=f"{small_device},memory={whole}")
    assert "does not fit: " in text and "the cheapest single change that makes it fit: " in text
    line = next(line for line in text.splitlines() if "cheapest" in line)
    assert "cpu_offload" in line or "activation_checkpointing" in line or "micro_batch_size" in line
    text = inspect_text(recipe, world_size=2, device=f"{small_device},memory=1e5")
    assert "no single change was found that makes it fit" in text


def test_inspect_prints_a_step_one_layer_or_a_difference(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "llama", {"dp_shard": 2, "tp": 2}, {})
    text = inspect_text(recipe, world_size=4, device="h100", layer="*.layers.2", ranks_per_node=2)
    assert "self_attn.q_proj.weight" in text and "embed_tokens" not in text
    assert "  fsdp: 2 ranks over 2 nodes (0, 2)\n  tp: 2 ranks on one node (0-1)\n" in text
    assert "counted by MFU" in text and "An estimate for h100, 2 ranks per node" in text and "fits: " in text
    report = json.loads(inspect_text(recipe, world_size=4, as_json=True, device="h100"))
    assert report["step"]["peak"]["bytes"] == sum(report["step"]["peak"]["kinds"].values())
    assert report["step"]["roofline"]["fits"] and report["step"]["roofline"]["fix"] is None
    by_axis = {(c["axis"], c["op"]): c for c in report["step"]["collectives"]}
    assert by_axis["fsdp", "all_gather"]["nodes"] == 1 and by_axis["tp", "reduce_scatter"]["count"] > 0
    with pytest.raises(
        RecipeError, match=r"--layer no\.such matches no parameter; one parameter is model\.embed_tokens\.weight"
    ):
        inspect_text(recipe, world_size=4, layer="no.such")

    other = recipe_for(tmp_path, "llama", {"dp_shard": 4}, {})
    lines = inspect_text(recipe, world_size=4, other=other, layer="*.norm").splitlines()
    assert "-tp: 2 ranks on one node (0-1)" in lines
    assert "-tp: 2 ranks over 2 nodes (0-1)" in inspect_text(recipe, world_size=4, other=other, ranks_per_node=1)
    assert lines[0].startswith("-mesh: ") and sum(line.startswith("+mesh: ") for line in lines) == 1
    assert inspect_text(recipe, world_size=4, other=recipe) == "the plans are the same"
