"""The matrix itself: nothing left out, nothing hidden in its table."""

import json
from pathlib import Path

import pytest
import transformers

from tests.matrix import results


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the configs are those of 5.23's types")
def test_every_causal_lm_type_has_a_config_or_a_reason() -> None:
    known = set(results.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(results.CONFIGS) | set(results.UNBUILT) == known
    assert not set(results.CONFIGS) & set(results.UNBUILT)
    assert len(results.UNBUILT) <= 25


def test_the_report_shows_every_type_and_counts_every_cell(tmp_path: Path) -> None:
    built = {"llama": {"kind": "llama"}, "gpt2": {"error": "boom"}}
    (tmp_path / "built.json").write_text(json.dumps(built))
    ours = results.Results(tmp_path / "results.json")
    ours.put("llama", "tp2", {"status": "agrees", "worst": 2e-7})
    ours.put("qwen3", "tp2", {"status": "wrong", "what": "gradient of qwen3", "worst": 0.5})
    results.Results(tmp_path / "peer.json").put("llama", "transformers tp2", {"status": "refused", "what": "no plan"})
    text = results.report(tmp_path, ["tp2", "cp2-ring"])
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert {*results.CONFIGS, *results.UNBUILT} <= set(rows)
    assert "| llama | yes | 2e-07 | refused [" in text
    assert "| tp2 | 1 | 0 | 1 | 0 | 0 | 2 |" in text and "cp2-ring" not in text
    assert f"{transformers.__version__}" in text and "boom" in text and results.UNBUILT["musicgen"] in text


def test_a_changed_config_makes_its_results_due_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = results.Results(tmp_path / "results.json")
    kept.put("llama", "tp2", {"status": "agrees", "worst": 0.0})
    record = {"kind": "llama", "config": results.CONFIGS["llama"]}
    (tmp_path / "built.json").write_text(json.dumps({"llama": record}))
    results.build_all(["llama"], tmp_path, kept)
    assert not kept.due("llama", "tp2", [])
    monkeypatch.setitem(results.CONFIGS, "llama", {"hidden_size": "wide"})
    built = results.build_all(["llama"], tmp_path, kept)
    assert "error" in built["llama"] and kept.due("llama", "tp2", [])
