"""A step on fake CUDA tensors mixes no devices, and waits for the device no more often than it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import device
from tests.fake_cuda.cases import GOLDEN

pytestmark = pytest.mark.skipif(device.unavailable() is not None, reason=str(device.unavailable()))


def fake_cuda(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.fake_cuda", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_mixes_devices_or_waits_for_one_is_found() -> None:
    found = json.loads(fake_cuda("--faults"))
    assert found.pop("two devices") == ["FakeTensorDeviceMismatchError"]
    assert found == {
        "item": ["item"],
        "float": ["item"],
        "truth value": ["item"],
        "tolist": ["tolist"],
        "cpu": ["copy to the host"],
        "nonzero": ["nonzero"],
        "mask index": ["mask index"],
        "masked_select": ["masked_select"],
        "equal": ["equal"],
        "a number": ["copy to the device"],
        "synchronize": ["cuda.synchronize"],
        "event": ["event.synchronize"],
        "backward": [],
        "fill by a mask": [],
        "full": [],
        "a copy that casts": ["cast on the host", "copy to the device"],
        "a cast after the copy": ["copy to the device"],
        "weights of a file": ["copy to the device"],
        "pinned copy": [],
        "index": [],
    }


def test_a_step_on_cuda_waits_and_runs_no_more_than_it_did(tmp_path: Path) -> None:
    fake_cuda("--json", str(tmp_path / "found.json"))
    known, found = json.loads(GOLDEN.read_text()), json.loads((tmp_path / "found.json").read_text())
    if known["versions"] != found["versions"]:
        pytest.skip(f"golden.json was written with {known['versions']}")
    grown = {
        recipe: {key: (known["counts"][recipe].get(key, 0), now) for key, now in counts.items()}
        for recipe, counts in found["counts"].items()
        if any(now > known["counts"][recipe].get(key, 0) for key, now in counts.items())
    }
    assert not grown, f"(before, now): {grown}; where this is meant: python -m tests.fake_cuda --golden"


def test_experts_and_sinks_run_on_cuda_on_every_axis() -> None:
    out = fake_cuda("--types", "gpt_oss", "gemma2", "--meshes", "tp2", "cp2-ulysses", "dp_shard2-tp2-ep4")
    assert "FAILS" not in out, out


def test_packed_rows_of_8k_take_flash_attention_and_no_mask() -> None:
    lines = fake_cuda("--types", "llama", "qwen3", "gpt_oss", "--meshes", "dp_shard2", "--length", "8192").splitlines()
    assert len(lines) == 3 and all("'masks': 0," in line for line in lines), lines
    # GPT-OSS has sinks, so FlexAttention takes it.
    assert ["'_varlen_attn': 4," in line for line in lines] == [True, True, False], lines
