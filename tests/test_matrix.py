"""The matrix itself: nothing left out, nothing hidden in its table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.matrix import results, worker
from tests.matrix.__main__ import MESHES
from tests.ranks import RanksFailed, get_pool


def test_every_causal_lm_type_has_a_config_or_a_reason() -> None:
    unknown = results.unknown_types()
    assert not unknown, results.how_to_add(unknown)
    assert not set(results.CONFIGS) & set(results.UNBUILT)
    assert len(results.UNBUILT) <= 25


def test_the_report_shows_every_type_and_counts_every_cell(tmp_path: Path) -> None:
    built = {"llama": {"kind": "llama"}, "gpt2": {"error": "boom"}}
    built["qwen3"] = {"kind": "qwen3"}
    (tmp_path / "built.json").write_text(json.dumps(built))
    ours = results.Results(tmp_path / "results.json")
    ours.put("llama", "tp2", {"status": "agrees", "worst": 2e-7, "limit": 1e-4})
    ours.put("qwen3", "tp2", {"status": "wrong", "what": "gradient of qwen3", "worst": 0.5})
    results.Results(tmp_path / "peer.json").put("llama", "transformers tp2", {"status": "refused", "what": "no plan"})
    text = results.report(tmp_path, ["tp2", "cp2-ring"], ["transformers tp2"], "--peer")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert {*results.CONFIGS, *results.UNBUILT} <= set(rows)
    assert "| llama | yes | 2e-07 | refused [" in text
    assert "| tp2 | 1 | 0 | 1 | 0 | 0 | 2 |" in text and "wrong 5e-01 [" in text and "cp2-ring" not in text
    assert f"{transformers.__version__}" in text and "boom" in text and results.UNBUILT["musicgen"] in text


def test_a_new_type_of_transformers_is_named_with_the_command_that_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "newest", "NewestForCausalLM")
    assert results.unknown_types() == ["newest"]
    with pytest.raises(
        AssertionError, match=r"newest.*configs\.json.*python -m tests\.matrix --out DIR --types newest"
    ):
        test_every_causal_lm_type_has_a_config_or_a_reason()


def test_a_type_that_this_transformers_lacks_is_passed_over_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(results.CONFIGS, "older", {"hidden_size": 64})
    test_every_causal_lm_type_has_a_config_or_a_reason()
    assert "error" in results.build_all(["older"], tmp_path)["older"]
    reason = f"transformers {transformers.__version__} has no such causal LM type"
    assert f"passed over older: {reason}" in capsys.readouterr().out
    table = results.report(tmp_path, ["tp2"], [], "")
    lacking = results.CONFIGS.keys() - results.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert f"It lacks {len(lacking)} that have a config" in table and "| older | no [" in table and reason in table


class Unable:
    """A pool in which nothing can be built."""

    def __init__(self, size: int, *, cases: int) -> None:
        pass

    def run(self, *args: object, timeout: float) -> list[object]:
        raise RanksFailed("rank 0: Traceback\nValueError: not that wide")

    def close(self) -> None:
        pass


def test_a_changed_config_makes_its_results_due_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = results.Results(tmp_path / "results.json")
    kept.put("llama", "tp2", {"status": "agrees", "worst": 0.0, "limit": 1e-4})
    record = {"kind": "llama", "config": results.CONFIGS["llama"], "router_loss": False, "seq": worker.SEQ}
    (tmp_path / "built.json").write_text(json.dumps({"llama": record}))
    monkeypatch.setattr(results, "RankPool", Unable)
    results.build_all(["llama"], tmp_path, kept)
    assert not kept.due("llama", "tp2", [])
    monkeypatch.setitem(results.CONFIGS, "llama", {"hidden_size": "wide"})
    built = results.build_all(["llama"], tmp_path, kept)
    assert built["llama"]["error"] == "ValueError: not that wide" and kept.due("llama", "tp2", [])


# Types that together take every path: windows, fused and transposed weights, sinks, latent attention, linear mixing.
CHOSEN = [
    *("llama", "phi3", "gpt2", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"),
    *("granitemoe", "qwen3_next"),
]
CHOSEN_MESHES = ["cp2-ulysses", "cp2-ring", "ep2", "dp_shard2-tp2"]
REFUSED = {
    **{(kind, "ep2"): "declares no experts" for kind in ("llama", "phi3", "gpt2", "gemma3_text", "gpt_neox")},
    **{("qwen3_next", mesh): "mixes along the sequence" for mesh in ("cp2-ulysses", "cp2-ring")},
}


# Of newer versions of transformers: noise on which a block follows rounding alone, norms of heads that the plan leaves
# out, and replicas of a block that runs twice.
NEWER = [("dory", "cp2-tp2"), ("sarvam_moe", "tp2"), ("inkling2_loop_text", "dp_replicate2-dp_shard2")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("models"))
    return {kind: get_pool(1).run(worker.build, kind, results.CONFIGS[kind], folder, timeout=200)[0] for kind in CHOSEN}


@pytest.mark.parametrize("kind", CHOSEN)
@pytest.mark.parametrize("name", CHOSEN_MESHES)
def test_a_cell_of_the_matrix(built: dict[str, dict[str, Any]], name: str, kind: str) -> None:
    mesh, more = MESHES[name]
    ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
    found = results.outcome(get_pool(ranks), worker.cell, built[kind], mesh, more, timeout=200)
    reason = REFUSED.get((kind, name))
    assert found["status"] == ("refused" if reason else "agrees"), found
    assert not reason or reason in found["what"]


@pytest.mark.parametrize(("kind", "name"), NEWER)
def test_a_cell_of_a_newer_type(tmp_path: Path, kind: str, name: str) -> None:
    if reason := results.absent(kind):
        pytest.skip(reason)
    made = get_pool(1).run(worker.build, kind, results.CONFIGS[kind], str(tmp_path), timeout=200)[0]
    mesh, more = MESHES[name]
    found = results.outcome(get_pool(math.prod(mesh.values())), worker.cell, made, mesh, more, timeout=200)
    assert found["status"] == "agrees", found


# In bfloat16 beside parameters that a model keeps in float32: frozen, of attention, of a router, with experts spread.
LOW = [("afmoe", "ep2"), ("flint", "tp2"), ("inkling_text", "dp_shard2"), ("hy_v4", "dp_replicate2-dp_shard2")]


@pytest.mark.parametrize(("kind", "name"), LOW)
def test_a_cell_in_bfloat16_of_a_type_that_keeps_parameters_in_float32(tmp_path: Path, kind: str, name: str) -> None:
    if reason := results.absent(kind):
        pytest.skip(reason)
    made = get_pool(1).run(worker.build, kind, results.CONFIGS[kind], str(tmp_path), timeout=200)[0]
    mesh, more = MESHES[name]
    more = {**more, "fsdp": {"param_dtype": "bfloat16"}}
    ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
    found = results.outcome(get_pool(ranks), worker.cell, made, mesh, more, timeout=200)
    assert found["status"] == "agrees" and found["worst"] < 1e-2, found
