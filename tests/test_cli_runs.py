"""The commands as a user runs them: torchrun, the local launcher, inspect, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ndtrain.console.inspect import inspect_text
from ndtrain.recipe import load_recipe
from ndtrain.runs.lock import RunLock
from tests import tiny
from tests.ranks import RanksFailed, get_pool
from tests.test_train import MESHES, trained

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def ndtrain(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ndtrain", *args], capture_output=True, text=True, env=ENV, timeout=300
    )


def torchrun(ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*launcher, "-m", "ndtrain", *args], capture_output=True, text=True, env=ENV, timeout=300)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "qwen3", "config": tiny.CONFIGS["qwen3"]},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        mesh=MESHES["tp2"],
        steps=3,
        checkpoint={"resume": "auto"},
    )


def test_a_run_from_scratch_leaves_its_files_and_resumes(recipe: Path, tmp_path: Path) -> None:
    first = torchrun(2, "run", str(recipe))
    assert first.returncode == 0, first.stderr
    assert "step 3/3" in first.stdout and "steps 1 to 3: loss 5." in first.stdout
    assert "Traceback" not in first.stderr and "Warning" not in first.stderr, first.stderr
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = "step epoch loss grad_norm lr tokens tokens_per_second step_seconds mfu peak_memory_bytes time"
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(set(line) == set(keys.split()) and line["mfu"] is None for line in lines)
    assert abs(lines[0]["loss"] - 5.56) < 0.2  # ln 261: the loss of an untrained model
    step = run / "checkpoints" / "step-00000003"
    for name in ("model", "optim", "train_state.json", "manifest.json", "config.json", "tokenizer.json"):
        assert (step / name).exists(), name

    # the README's snippet
    reader = HuggingFaceStorageReader(str(step / "model"))
    stored = reader.read_metadata().state_dict_metadata
    state = {k: torch.full(tuple(m.size), float("nan"), dtype=m.properties.dtype) for k, m in stored.items()}
    with warnings.catch_warnings(action="ignore"):  # torch warns that there is no process group
        dcp.load(state, storage_reader=reader, no_dist=True)
    assert state["model.embed_tokens.weight"].shape == (261, 64)
    assert not any(t.isnan().any() for t in state.values())

    # the local launcher, another mesh, two more steps
    second = ndtrain("run", str(recipe), "--set", "train.steps=5", "--set", "mesh.tp=1", "--set", "mesh.dp_shard=2")
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout and "step 5/5" in second.stdout
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5

    with pytest.raises(RanksFailed, match=r"RecipeError: .* already has a checkpoint of step 5"):
        get_pool(1).run(trained, str(recipe), ["checkpoint.resume=never", "mesh.tp=1", "mesh.dp_shard=1"], timeout=200)


def test_a_second_run_in_a_run_directory_is_refused_and_names_the_first(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    owner = RunLock(tmp_path / "run", launch="")
    owner.take()
    second = ndtrain("run", str(recipe), "--set", "mesh.tp=1")
    owner.release()
    assert second.returncode == 2, second.stderr
    assert f"is in use by process {os.getpid()} on " in second.stderr and "Traceback" not in second.stderr
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["run.dir=/proc/none"], 2, "run.dir"),  # found by rank 0 alone, after the process group has started
    ],
)
def test_an_error_prints_one_line_and_every_rank_exits_with_its_code(
    recipe: Path, overrides: list[str], code: int, words: str
) -> None:
    result = torchrun(2, "run", str(recipe), *[part for o in overrides for part in ("--set", o)])
    errors = [line for line in result.stderr.splitlines() if line.startswith("ndtrain: error:")]
    assert len(errors) == 1 and words in errors[0], result.stderr
    assert "ndtrain/train.py" not in result.stderr
    assert result.stderr.count(f"exitcode  : {code} ") == 2, result.stderr


def test_inspect_counts_what_ranks_hold(recipe: Path) -> None:
    planned = load_recipe(recipe, ["mesh.dp_shard=4"])
    report = json.loads(inspect_text(planned, world_size=8, rank=5, as_json=True))
    total = sum(torch.Size(p["shape"]).numel() for p in report["params"])
    assert report["parameters"] == total
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    described = readme.split("`--json` prints the same as JSON: ")[1].split("\n\n")[0]
    assert [key for key in (*report, *report["params"][0], *report["groups"][0]) if f"`{key}`" not in described] == []
    assert report["bytes"]["rank"]["parameters"] == sum(p["local_bytes"] for p in report["params"])
    assert report["bytes"]["rank"]["optimizer"] == 2 * report["bytes"]["rank"]["parameters"]
    copies = {"-": 2, "replicated_with_grad_allreduce": 2}  # tp 2 keeps these whole on both of its ranks
    held = sum(torch.Size(p["shape"]).numel() * copies.get(p["style"], 1) for p in report["params"])
    assert report["bytes"]["all_ranks"]["parameters"] == 4 * held
    text = ndtrain("inspect", str(recipe), "--world-size", "8", "--set", "mesh.dp_shard=4")
    lines = [line.split() for line in text.stdout.splitlines()]
    assert ["model.layers.{0-1}:", "free_full_weight,", "float32"] in lines
    row = next(line for line in lines if line[0] == "self_attn.q_proj.weight")
    assert row[2:5] == ["colwise", "fsdp:0", "tp:0"]


def test_a_single_process_runs_without_torchrun_even_if_RANK_is_set(recipe: Path) -> None:
    with_rank = {**ENV, "RANK": "0"}
    command = [sys.executable, "-m", "ndtrain", "run", str(recipe), "--set", "mesh.tp=1"]
    result = subprocess.run(command, capture_output=True, text=True, env=with_rank, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_train_state_without_its_keys_is_damaged(recipe: Path, tmp_path: Path) -> None:
    once = ["mesh.tp=1", "mesh.dp_shard=1"]
    get_pool(1).run(trained, str(recipe), once, timeout=200)
    step = tmp_path / "run/checkpoints/step-00000003"
    state = b'{"step": 3}'
    (step / "train_state.json").write_bytes(state)
    entry = {"size": len(state), "xxh3_128": xxhash.xxh3_128_hexdigest(state)}
    tiny.forged(step, lambda manifest: manifest["files"].update({"train_state.json": entry}))
    with pytest.raises(RanksFailed, match=r"DamagedError: .*train_state\.json has no samples"):
        get_pool(1).run(trained, str(recipe), [*once, "train.steps=4"], timeout=200)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reader_of_the_output_that_goes_away_ends_no_run(tmp_path: Path, ranks: int) -> None:
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        batch_ranks=2,
        steps=6,
        mesh={"dp_shard": ranks},
    )
    command = f"{sys.executable} -m ndtrain run {recipe} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENV, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()
