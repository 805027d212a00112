"""A run in an object store (moto's, a real server on this machine): saved, resumed, damaged, converted."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from ndtrain.checkpoint import CheckpointStore
from ndtrain.convert import convert
from ndtrain.data.cache import build_cache
from ndtrain.data.files import find_files, stamp_of
from ndtrain.data.rows import rows_of
from ndtrain.data.shapes import fields_of, text_of
from ndtrain.data.text import TextEncoder
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer
from ndtrain.loggers.tensorboard import require_tensorboard
from ndtrain.recipe import load_recipe
from ndtrain.runs.lock import FILE, RunLock
from ndtrain.runs.stop_signals import LOOK_EVERY_S, StopSignals
from ndtrain.storage.paths import is_local, to_path
from ndtrain.train import with_checkpoint
from tests import proofs, tiny
from tests.ranks import get_pool

BUCKET = "bucket"


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield env
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(path: str, env: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Train on the ranks of a pool; return the lines it reported and its losses."""
    import torch.distributed as dist

    from tests.trainers import Said, trainer_of

    os.environ.update(env)
    reporter = Said()
    trainer = trainer_of(path, overrides, said=reporter)
    with proofs.remembered():
        trainer.prepare()
    trainer.train()
    dist.barrier()
    lines = (to_path(trainer.recipe.run.dir) / "metrics.jsonl").read_text().splitlines()
    return {"lines": reporter.said, "loss": {m["step"]: m["loss"] for m in map(json.loads, lines)}}


def run(corpus: Path, folder: Path, where: str, env: dict[str, str], *, steps: int, **mesh: int) -> dict[str, Any]:
    recipe = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"], "init": "random"},
        corpus=corpus,
        run_dir=where,
        mesh=mesh,
        steps=steps,
        batch_ranks=mesh["dp_shard"],
        schedule={"kind": "constant"},
        checkpoint={"every": 2, "keep": 2, "resume": "auto", "verify": True},
    )
    ranks = mesh["dp_shard"] * mesh.get("tp", 1)
    return get_pool(ranks).run(trained, str(recipe), env, [], timeout=300)[0]


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_a_run_in_an_object_store_equals_one_in_a_directory(env: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/run"
    root = to_path(url)
    near = run(corpus, tmp_path, str(tmp_path / "run"), env, steps=6, dp_shard=2)
    run(corpus, tmp_path, url, env, steps=4, dp_shard=2)
    assert steps_in(root) == ["step-00000002", "step-00000004"]
    far = run(corpus, tmp_path, url, env, steps=6, dp_shard=1, tp=2)
    assert any(line.startswith(f"resumed from {url}/checkpoints/step-00000004") for line in far["lines"])
    assert steps_in(root) == ["step-00000004", "step-00000006"] == steps_in(tmp_path / "run")
    assert {step: pytest.approx(loss, rel=1e-5) for step, loss in near["loss"].items()} == far["loss"]
    convert(root, tmp_path / "far", verify=True)
    convert(tmp_path / "run", tmp_path / "near")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("far", "near"))
    assert ours.keys() == theirs.keys() and (tmp_path / "far" / "tokenizer.json").exists()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


# Damage -> (damaged file, message); a checkpoint without a manifest is ignored without a message.
DAMAGES: dict[str, tuple[str, str | None]] = {
    "manifest gone": ("manifest.json", None),
    "file gone": ("optim/00001-of-00002.safetensors", "optim/00001-of-00002.safetensors is missing"),
    "flipped": ("model/00000-of-00002.safetensors", "model/00000-of-00002.safetensors was altered"),
    "cut": ("model/00001-of-00002.safetensors", "model/00001-of-00002.safetensors has 100 of"),
}


def test_a_damaged_checkpoint_is_skipped_and_an_incomplete_one_removed(
    env: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/damaged"
    run(corpus, tmp_path, url, env, steps=4, dp_shard=2)
    store = CheckpointStore(to_path(url), keep=2)
    newest = store.path(4)
    for damage, (name, reason) in DAMAGES.items():
        content = (newest / name).read_bytes()
        if damage == "flipped":
            (newest / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        elif damage == "cut":
            (newest / name).write_bytes(content[:100])
        else:
            (newest / name).unlink()
        if reason is None:
            assert store.newest_step() == 2
        else:
            found, (message,) = store.find("auto", verify=True)
            assert found == store.path(2) and reason in message and "instead" in message
        (newest / name).write_bytes(content)
    assert store.find("auto", verify=True) == (newest, [])
    assert store.find(f"{url}/checkpoints/step-00000002", verify=True) == (store.path(2), [])
    (newest / "manifest.json").unlink()
    assert store.find("auto", verify=True) == (store.path(2), [])
    assert steps_in(to_path(url)) == ["step-00000002"]
    again = run(corpus, tmp_path, url, env, steps=4, dp_shard=2)
    assert any(line.startswith(f"resumed from {url}/checkpoints/step-00000002") for line in again["lines"])
    assert steps_in(to_path(url)) == ["step-00000002", "step-00000004"]


def test_a_missing_bucket_is_refused_before_loading(env: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r'RecipeError: run.dir = "s3://nobody/run" cannot be used: .*bucket'):
        run(corpus, tmp_path, "s3://nobody/run", env, steps=4, dp_shard=2)


def test_an_object_store_is_asked_for_save_and_stop_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, now = to_path("memory://requests"), 100.0
    monkeypatch.setattr("ndtrain.runs.stop_signals.time.monotonic", lambda: now)
    requests = StopSignals(run_dir)
    assert requests.seen(files=True) == [0, 0]
    (run_dir / "save").write_bytes(b"")
    assert requests.seen(files=True) == [0, 0]
    now += LOOK_EVERY_S
    assert requests.seen(files=False) == [0, 0] and requests.seen(files=True) == [0, 1]
    assert requests.remove_files() == [] and not (run_dir / "save").exists()
    (run_dir / "stop").write_bytes(b"")
    now += LOOK_EVERY_S
    assert requests.seen(files=True) == [1, 0]


def test_uses_of_a_url_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs a local run\.dir"):
        require_tensorboard(to_path("memory://run"))
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml", model={"name": "s3://bucket/run"}, corpus=tmp_path, run_dir=tmp_path / "run"
    )
    with pytest.raises(RecipeError, match="a run starts from a local directory or the hub"):
        with_checkpoint(load_recipe(recipe))
    hub = to_path("memory://hub")
    for name in ("model.safetensors", "config.json"):
        (hub / name).write_bytes(b"")
    with pytest.raises(RecipeError, match="only ndtrain's own checkpoints convert from a URL"):
        convert(hub, tmp_path / "out")


def test_urls_are_paths_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert to_path(str(tmp_path)) == to_path(f"file://{tmp_path}") == tmp_path and is_local(to_path("runs/a"))
    with pytest.raises(RecipeError, match="nosuch://x cannot be used"):
        to_path("nosuch://x")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(RecipeError, match=r"pip install 'ndtrain\[remote\]'"):
        to_path("s3://bucket/x")


def test_a_run_in_an_object_store_has_one_owner(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndtrain.runs.lock.SETTLE_S", 0.05)
    run_dir = to_path(f"s3://{BUCKET}/owned")
    first = RunLock(run_dir, launch="")
    first.take()
    with pytest.raises(RecipeError, match=f'owned" is in use by process {os.getpid()}'):
        RunLock(run_dir, launch="").take()
    first.release()
    second = RunLock(run_dir, launch="")
    second.take()
    second.release()
    assert not (run_dir / FILE).exists()


def test_the_best_checkpoint_of_a_run_in_an_object_store_is_kept_and_named(env: dict[str, str]) -> None:
    root = to_path(f"s3://{BUCKET}/best")
    store = CheckpointStore(root, keep=1)
    for step, best_step in ((1, 1), (2, 1), (3, 1)):
        store.save(step, model={"w": torch.ones(2)}, optim={}, state={"step": step}, best_step=best_step)
    assert steps_in(root) == ["step-00000001", "step-00000003"]
    assert (root / "best").read_text() == "checkpoints/step-00000001\n"
    assert not store.name_best(2)
    store.save(4, model={"w": torch.ones(2)}, optim={}, state={"step": 4}, best_step=4)
    assert steps_in(root) == ["step-00000004"] and (root / "best").read_text() == "checkpoints/step-00000004\n"


# Data in an object store


def upload(folder: Path, url: str) -> str:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (to_path(url) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return url


def texts_of(files: list[Path]) -> list[str]:
    return [text_of(fields_of(row.fields, "text", {})) for file in files for row in rows_of(file)]


def test_data_in_an_object_store_is_read_as_local_data_is(env: dict[str, str], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    here = tmp_path / "data"
    (here / "sub").mkdir(parents=True)
    rows = [{"text": f"row {i}"} for i in range(700)]
    table = pa.Table.from_pylist(rows)
    lines = "\n".join(map(json.dumps, rows)).encode()
    (here / "a.jsonl").write_bytes(lines)
    (here / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (here / "c.txt").write_text("a text")
    pq.write_table(table, here / "sub" / "d.parquet")
    with pa.OSFile(str(here / "sub" / "e.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("f.bin", ".hidden.txt"):
        (here / name).write_text("x")
    url = upload(here, f"s3://{BUCKET}/data")

    notes: list[str] = []
    near, far = find_files(str(here)), find_files(url, notes.append)
    assert [str(file) for file in far] == [f"{url}/{file.relative_to(here).as_posix()}" for file in near]
    assert notes == [f'data.path = "{url}": files read: 5; left out: 1 .bin, 1 hidden']
    assert texts_of(far) == texts_of(near)
    assert [file.name for file in find_files(f"{url}/*.jsonl*")] == ["a.jsonl", "b.jsonl.gz"]
    assert [file.name for file in find_files(f"{url}/f.bin")] == ["f.bin"], "a named file is taken as it is"
    with pytest.raises(RecipeError, match="matches no file"):
        find_files(f"{url}/nothing/*.txt")

    encoder, cache_dir = TextEncoder(ByteTokenizer()), tmp_path / "cache"
    keys = [build_cache(files, encoder, cache_dir=cache_dir).key for files in (near, far)]
    assert keys[0] == keys[1], "the same content"
    before = stamp_of(far[0])
    assert stamp_of(far[0]) == before
    far[0].write_bytes(lines[:-1] + b" ")
    assert stamp_of(far[0]) != before
    far[1].write_bytes(gzip.compress(lines)[:-5])
    for file in far[:2]:
        with pytest.raises(DamagedError, match=f"{url}/{file.name}"):
            texts_of([file])
    far[0].unlink()
    with pytest.raises(DamagedError, match=f"cannot read {url}/a.jsonl"):
        texts_of(far[:1])


def test_a_run_on_data_in_an_object_store_equals_one_on_local_data(
    env: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    url = upload(corpus, f"s3://{BUCKET}/corpus")
    near = run(corpus, tmp_path, str(tmp_path / "near"), env, steps=4, dp_shard=2)
    recipe = tmp_path / "recipe.toml"
    text = recipe.read_text().replace(str(corpus), url).replace(str(tmp_path / "near"), str(tmp_path / "far"))
    recipe.write_text(text)
    far = get_pool(2).run(trained, str(recipe), env, [], timeout=300)[0]
    assert far["loss"] == near["loss"]
    # The same content elsewhere is the same data.
    moved = get_pool(2).run(trained, str(recipe), env, ["train.steps=5", f"data.path={corpus}"], timeout=300)[0]
    assert any("the same content" in line for line in moved["lines"]) and 5 in moved["loss"]
