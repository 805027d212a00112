"""The memory, FLOPs and collectives that `inspect` reports for a step are those of a real one."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ndtrain.accelerators import DEVICES, find_device
from ndtrain.console.inspect import inspect_text, suggest_text
from ndtrain.errors import PlanError, RecipeError
from ndtrain.estimate import RESERVED, StepEstimate, assumptions, estimate_step, search, step, suggest
from ndtrain.estimate.record import ON_HOST, TO_DEVICE, TO_HOST, TO_HOST_WAITING, Collective, Record, Work
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


@pytest.mark.parametrize(("kind", "mesh"), [("llama", {}), ("qwen3", {}), ("llama", {"cp": 2}), ("gpt_oss", {})])
def test_packed_rows_on_cuda_cost_what_rows_of_one_document_cost(
    tmp_path: Path, kind: str, mesh: dict[str, int]
) -> None:
    half = {"param_dtype": "bfloat16"}
    packed, alone, masked = (
        estimated(
            recipe_for(tmp_path, kind, mesh, tiny.CONFIGS[kind], data={"seq_len": 128, "packing": packing}, fsdp=half),
            mesh.get("cp", 1),
            on_cuda=on_cuda,
        )
        for packing, on_cuda in ((True, True), (False, True), (True, False))
    )
    if kind != "gpt_oss":  # eager attention multiplies all scores
        assert packed.flops == pytest.approx(alone.flops, rel=1e-3)
    assert packed.flops < masked.flops and packed.peak_bytes < masked.peak_bytes


@pytest.mark.parametrize(
    ("kind", "checkpointing", "width"),
    [("llama", "none", 32), ("llama", "none", 64), ("llama", "full", 32), ("qwen3_moe", "none", 32)],
)
def test_flops_are_six_per_weight_and_token_plus_attention(
    tmp_path: Path, kind: str, checkpointing: str, width: int
) -> None:
    recipe = recipe_for(
        tmp_path,
        kind,
        {},
        {"head_dim": width},
        data={"seq_len": 256, "packing": False},
        train={"activation_checkpointing": checkpointing},
    )
    found = estimated(recipe, 1)
    sizes, tokens = MODELS[kind] | {"head_dim": width}, 8 * 256
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


def test_styles_that_do_not_fit_the_model_are_refused_as_such(tmp_path: Path) -> None:
    plan = {"model.layers.*.mlp.up_proj": "colwise_gather_output"}
    recipe = recipe_for(tmp_path, "llama", {"tp": 2}, {}, tp={"plan": plan})
    with pytest.raises(PlanError, match=r"llama does not run on .*tp 2.* with this \[tp\.plan\].*; correct it"):
        estimated(recipe, 2)


def test_the_roofline_sums_compute_and_exposed_communication() -> None:
    device = find_device("bfloat16=100,float32=10,memory=1e9,bandwidth=50,intra=20,inter=5")
    record = Record()
    record.work[Work("bfloat16", 1000, 100)] = 2  # 10 s each by arithmetic
    record.work[Work("float32", 0, 500)] = 1  # 10 s by memory
    record.sent[Collective("fsdp", 4, "all_gather", 80)] = 1
    record.sent[Collective("tp", 2, "all_reduce", 40)] = 3

    def one(of: Any) -> float:
        return float(of(record))

    found = times(one, {"fsdp": (2, 2), "tp": (2, 1)}, device, 2)
    assert found.compute == 30 and found.by_flops == 20 and found.bound == "compute"
    # 80 bytes: half from another node over two cards, 4 s, and half inside it, 2 s; tp: twice 20 bytes, 2 s each time
    assert found.sent == {"fsdp": 4.0, "tp": 6.0}
    assert found.exposed == {"fsdp": 0.0, "tp": 6.0} and found.step == 36
    far = Collective("fsdp", 4, "all_gather", 4000)
    assert seconds(far, device, on_node=1, nodes=4) == 4000 * 3 / 4 / 5
    assert seconds(Collective("ep", 4, "all_to_all", 400), device, on_node=2, nodes=2) == 400 / 2 / 5


def test_the_roofline_adds_the_copies_and_the_update_of_cpu_offload() -> None:
    device = find_device("bfloat16=100,float32=10,memory=1e9,bandwidth=50,intra=20,inter=5,pcie=10,host_bandwidth=32")
    record = Record()
    record.work[Work("bfloat16", 1000, 100)] = 1  # 10 s
    record.sent[Collective("fsdp", 2, "all_gather", 480)] = 1  # 12 s, 2 of them exposed
    record.host.update({TO_DEVICE: 128, TO_HOST: 16, TO_HOST_WAITING: 8, ON_HOST: 40})

    def one(of: Any) -> float:
        return float(of(record))

    # Four ranks share 32 bytes/s: 8 each, which is less than the link's 10.
    found = times(one, {"fsdp": (2, 1)}, device, 4)
    assert found.host == {"copies to devices": 16.0, "copies to hosts": 3.0, "host memory": 5.0}
    assert found.host_exposed == {"copies to devices": 4.0, "copies to hosts": 1.0, "host memory": 5.0}
    assert found.step == 10 + 2 + 4 + 1 + 5 and found.bound == "compute"
    assert times(one, {"fsdp": (2, 1)}, device, 1).host["copies to devices"] == 12.8
    record.host[ON_HOST] = 400
    assert times(one, {"fsdp": (2, 1)}, device, 4).bound == "host memory"
    lines = " ".join(assumptions(device, 4))
    assert "the 4 ranks of a node can read and write 3.2e-08 GB/s" in lines and "pcie = 1e-08 GB/s" in lines


@pytest.mark.parametrize(
    ("mesh", "ranks", "steps", "fsdp"),
    [
        ({"dp_shard": 2}, 2, 3, {"cpu_offload": True, "param_dtype": "bfloat16"}),
        ({"dp_shard": 2}, 2, 2, {"cpu_offload": True, "reshard_after_forward": False, "param_dtype": "float32"}),
        ({}, 1, 3, {"cpu_offload": True}),
        ({"dp_replicate": 2, "dp_shard": 2}, 4, 2, {"cpu_offload": True}),
        ({"dp_shard": 2, "tp": 2}, 4, 2, {"mode": "manual", "modules": {"model.layers.1": ["cpu_offload"]}}),
    ],
)
def test_the_copies_of_cpu_offload_are_those_that_fsdp_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int], ranks: int, steps: int, fsdp: dict[str, Any]
) -> None:
    train = {"global_batch_size": mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1) * steps, "micro_batch_size": 1}
    recipe = recipe_for(tmp_path, "llama", mesh, {"num_hidden_layers": 2}, train=train, fsdp=fsdp)
    asked: Counter[str] = Counter()  # bytes for which FSDP calls Tensor.to, by the function that does
    to = torch.Tensor.to

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked[sys._getframe(1).f_code.co_name] += tensor.numel() * tensor.itemsize * ("non_blocking" in kwargs)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    found = estimated(recipe, ranks)
    assert found.depths is None and len(found.records) == 1
    host, plan = found.records[0][1].host, found.plan
    held = sum(p.local_numel(plan.sizes, 0) for p in plan.params if p.fqn in plan.on_host)
    assert held and (held < plan.rank_numel(0)) == ("modules" in fsdp)
    # Not counted by FSDP: a sum over tp of norms that are on the host, by the device.
    assert host[TO_DEVICE] == pytest.approx(asked["all_gather_inputs"], rel=2e-3) and host[TO_DEVICE]
    assert host[TO_HOST] + host[TO_HOST_WAITING] == pytest.approx(asked["foreach_reduce"], rel=2e-3)
    # Replicas add up micro batches on the device; else the host adds each to the first, and waits for its copy.
    later = 0 if "dp_replicate" in mesh else steps - 1
    assert host[TO_HOST] == 4 * held and host[TO_HOST_WAITING] == pytest.approx(4 * held * later, rel=2e-3)
    # AdamW reads four tensors and writes three; the norm reads gradients, clipping reads and writes them.
    assert host[ON_HOST] == pytest.approx(held * (28 + 4 + 8 + 12 * later), rel=0.01)


def test_offloading_to_the_host_costs_time(tmp_path: Path) -> None:
    """At a device's own figures, where host memory is slower than the device's; and with a slow host much more."""
    train = {"global_batch_size": 16, "micro_batch_size": 4}
    recipe = recipe_for(tmp_path, "llama", {"dp_shard": 2}, {"num_hidden_layers": 1}, train=train)
    plain, offloaded = (estimated(changed(recipe, {"fsdp.cpu_offload": on}), 2) for on in (False, True))
    assert offloaded.peak_bytes < plain.peak_bytes
    for device in map(find_device, DEVICES):
        assert offloaded.times(device, 8).step > 1.2 * plain.times(device, 8).step
    slow = find_device("h100,host_bandwidth=1e9")
    assert offloaded.times(slow, 8).step > 50 * plain.times(slow, 8).step
    text = inspect_text(
        changed(recipe, {"fsdp.cpu_offload": True}), world_size=2, device="h100,host_bandwidth=1e9,pcie=5e8"
    )
    assert "bound by host memory" in text and re.search(r"cpu_offload, host memory: (\S+ m?s), \1 exposed", text)
    assert (
        "pcie = 0.5 GB/s" in text
        and "host_bandwidth = 1e+09" in text
        and "pcie given" in text.replace("host_bandwidth, ", "")
    )
    # It is not called cheap: the advice has it last, with its cost.
    limit = (offloaded.peak_bytes + plain.peak_bytes) / 2 / (1 - RESERVED)
    text = inspect_text(recipe, world_size=2, device=f"{slow.name},host_bandwidth=1e9,memory={limit}")
    lines = [line for line in text.splitlines() if line.endswith(" device time")]
    assert re.match(r" *fsdp.cpu_offload = true: .* [\d,.]+ times the device time$", lines[-1]) and len(lines) > 1


def test_a_device_is_given_by_name_or_figures_and_errors_name_the_fault() -> None:
    plain = find_device("bfloat16=100,float32=10,memory=1e9,bandwidth=50,intra=20,inter=5")
    assert plain.pcie == find_device("h100").pcie and "but pcie and host_bandwidth, which are" in plain.source
    own = find_device("h100,memory=94e9")
    assert own.memory == 94e9 and own.bfloat16 == find_device("h100").bfloat16 and "memory given" in own.source
    for text, words in {
        "h101": "h101 is not KEY=NUMBER, .* one of a100, .*, h100, ",
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
    monkeypatch.setattr("ndtrain.estimate.search.SEARCHED", 6)
    recipe, device = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1}), find_device(small_device)
    found = suggest(recipe, 4, device, 2).found
    assert 1 <= len(found) <= 5
    assert [s.times.step for s in found] == sorted(s.times.step for s in found)
    best = found[0]
    again = estimated(changed(recipe, best.change), 4, on_cuda=True)
    assert again.peak_bytes == best.step.peak_bytes and again.room(device) >= 0
    for mesh in ({"mesh.dp_shard": 4}, {"mesh.dp_shard": 2, "mesh.tp": 2}, {"mesh.dp_shard": 2, "mesh.cp": 2}):
        other = estimated(changed(recipe, mesh), 4)
        assert best.times.step <= other.times(device, 2).step
    report = json.loads(suggest_text(recipe, world_size=4, device=small_device, ranks_per_node=2, as_json=True))
    assert report["suggestions"][0]["set"] == best.change
    assert "mesh.tp" in best.change and all(one.change["mesh.tp"] <= 4 for one in found)  # of 4 key-value heads


def test_a_search_gives_the_same_on_a_slow_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_device: str
) -> None:
    monkeypatch.setattr(search, "SEARCHED", 2)
    recipe = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1})

    def searched() -> str:
        return suggest_text(recipe, world_size=4, device=small_device, ranks_per_node=2, as_json=True)

    first = searched()
    hours = iter(range(0, 10**9, 3600))
    estimate = search.estimate_step

    def slow(*args: Any, **more: Any) -> StepEstimate:
        with monkeypatch.context() as clock:
            for name in ("time", "monotonic", "perf_counter", "process_time"):
                clock.setattr(time, name, lambda: float(next(hours)))
            return estimate(*args, **more)

    monkeypatch.setattr(search, "estimate_step", slow)
    for name in ("time", "monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(time, name, lambda: float(next(hours)))
    assert searched() == first
    report = json.loads(first)
    assert report["searched"] == 2 and report["candidates"] > 2 and report["figures"]["host_bandwidth"] > 0
    assert report["assumptions"] == assumptions(find_device(small_device), 2)


def test_a_dry_step_does_not_depend_on_those_before(tmp_path: Path) -> None:
    """Meshes of one shape, whose groups have other names because other groups were made before them."""
    recipe = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1}, train={"global_batch_size": 8})
    meshes = [{"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 4}, {"cp": 2, "dp_shard": 2}]
    changes = [{f"mesh.{axis}": size for axis, size in {**mesh, "tp": 2}.items()} for mesh in meshes]

    def sent() -> list[Any]:
        return [estimated(changed(recipe, change), 8).sent(8) for change in changes]

    one_way = sent()
    changes.reverse()
    assert sent() == one_way[::-1]


def test_a_candidate_that_fails_is_one_line_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, device = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1}), find_device(small_device)
    good = estimated(recipe, 1)

    def broken(recipe: Recipe, sizes: Any, **more: Any) -> StepEstimate:
        if sizes.tp == 2:
            raise AttributeError("'Attention' object has no attribute 'scale'\nand more")
        if sizes.cp == 2:
            raise PlanError("mesh.cp = 2 is refused")
        return good

    monkeypatch.setattr(search, "estimate_step", broken)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    seen: list[tuple[int, int]] = []
    found = suggest(recipe, 4, device, 4, progress=lambda done, total: seen.append((done, total)))
    assert found.found and {one.change["mesh.tp"] for one in found.found} == {1, 4}
    reasons = {"AttributeError: 'Attention' object has no attribute 'scale'", "mesh.cp = 2 is refused"}
    assert {one.reason for one in found.failed} == reasons
    assert [done for done, _ in seen] == list(range(found.searched)) and seen[0][1] <= search.SEARCHED
    text = suggest_text(recipe, world_size=4, device=small_device, ranks_per_node=4, as_json=False)
    assert "candidates searched" in capsys.readouterr().err
    failed = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(found.failed) and all("mesh." in line and "train.micro" in line for line in failed)
    assert f"searched {found.searched} of {found.candidates} candidates" in text
    report = json.loads(suggest_text(recipe, world_size=4, device=small_device, ranks_per_node=4, as_json=True))
    assert [(one["change"], one["reason"]) for one in report["failed"]] == [(o.change, o.reason) for o in found.failed]

    def hopeless(recipe: Recipe, sizes: Any, **more: Any) -> StepEstimate:
        raise ZeroDivisionError

    monkeypatch.setattr(search, "estimate_step", hopeless)
    with pytest.raises(
        PlanError, match=r"\(searched \d+ of \d+ candidates; .* the last reason: ZeroDivisionError: no m"
    ):
        suggest(recipe, 4, device, 4)


def test_a_search_counts_what_the_recipe_offloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SEARCHED", 1)
    recipe = recipe_for(tmp_path, "llama", {}, {"num_hidden_layers": 1})
    held = 16 * estimated(recipe, 1).plan.numel
    offloaded = changed(recipe, {"fsdp.cpu_offload": True})
    device = find_device(f"h100,memory={0.9 * held},host_bandwidth=1e9")
    with pytest.raises(PlanError, match="no mesh of 1 x h100 was found"):
        suggest(recipe, 1, device, 8)
    found = suggest(offloaded, 1, device, 8)
    assert found.found[0].times.bound == "host memory"
    count = search._Count(offloaded, device, 8)
    assert count.seconds(found.found[0].change, 1) == pytest.approx(found.found[0].times.step, rel=0.1)


def test_sequence_parallelism_is_suggested_where_the_recipe_has_it_off(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "llama", {}, {})
    off = changed(recipe, {"tp.sequence_parallel": False})
    assert all("tp.sequence_parallel" not in change for change in _candidates(recipe, 4, 4, 0))
    found = {(change["mesh.tp"] > 1, change.get("tp.sequence_parallel")) for change in _candidates(off, 4, 4, 0)}
    assert found == {(False, None), (True, True)}


def test_a_step_that_does_not_fit_gets_the_excess_and_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_device: str
) -> None:
    train = {"global_batch_size": 4, "micro_batch_size": 2}
    recipe = recipe_for(tmp_path, "llama", {"dp_shard": 2}, {"num_hidden_layers": 1}, train=train)
    whole = estimated(recipe, 2).peak_bytes
    text = inspect_text(recipe, world_size=2, device=f"{small_device},memory={whole}")
    assert "does not fit: " in text and "  single changes that make it fit, and their cost; least " in text
    lines = [line for line in text.splitlines() if line.endswith(" device time")]
    assert "fsdp.cpu_offload" in {line.split()[0] for line in lines}
    report = json.loads(inspect_text(recipe, world_size=2, device=f"{small_device},memory={whole}", as_json=True))
    found = report["step"]["roofline"]["fixes"]
    assert [fix["cost"] for fix in found] == sorted(fix["cost"] for fix in found) and len(found) == len(lines)
    text = inspect_text(recipe, world_size=2, device=f"{small_device},memory=1e5")
    assert "no single change was found that makes it fit" in text and "failed: " not in text

    def broken(recipe: Recipe, sizes: Any, **more: Any) -> StepEstimate:
        raise AttributeError("no such part")

    monkeypatch.setattr(search, "estimate_step", broken)
    text = inspect_text(recipe, world_size=2, device=f"{small_device},memory={whole}")
    assert "    failed: fsdp.cpu_offload = true: AttributeError: no such part\n" in text


def test_inspect_prints_a_step_one_layer_or_a_difference(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "llama", {"dp_shard": 2, "tp": 2}, {})
    text = inspect_text(recipe, world_size=4, device="h100", layer="*.layers.2", ranks_per_node=2)
    assert "self_attn.q_proj.weight" in text and "embed_tokens" not in text
    assert "  fsdp: 2 ranks over 2 nodes (0, 2)\n  tp: 2 ranks on one node (0-1)\n" in text
    assert "counted by MFU" in text and "An estimate for h100, 2 ranks per node" in text and "fits: " in text
    report = json.loads(inspect_text(recipe, world_size=4, as_json=True, device="h100"))
    assert report["step"]["peak"]["bytes"] == sum(report["step"]["peak"]["kinds"].values())
    assert report["step"]["roofline"]["fits"] and report["step"]["roofline"]["fixes"] == []
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
