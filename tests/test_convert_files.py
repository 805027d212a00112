"""The files that `convert` writes: byte for byte those of `save_pretrained`, in bounded memory, whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ndtrain import cli
from ndtrain.checkpoint import check
from ndtrain.checkpoint.manifest import write_manifest
from ndtrain.checkpoint.tensors import _write_file
from ndtrain.convert import convert, shards, stream
from ndtrain.convert.shards import parse_size
from ndtrain.errors import DamagedError, NdtrainError, PlanError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.storage.paths import to_path
from ndtrain.storage.stored import stored
from ndtrain.storage.table import Piece
from tests.convert_cases import FAMILIES, build, save_checkpoint
from tests.ranks import get_pool


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_files(got: Path, want: Path) -> None:
    ours, theirs = files(got), files(want)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_file_is_the_one_that_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "want", max_shard_size="100KB")
    assert convert(save_checkpoint(model, tmp_path / "step"), tmp_path / "out", max_shard_size="100KB") == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_files(tmp_path / "out", tmp_path / "want")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    want = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "gemma3_text", "deepseek_v3", "phi3"])
def test_converting_to_a_checkpoint_and_back_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "want", max_shard_size="100KB")
    (tmp_path / "want" / "tokenizer.json").write_text("{}")
    assert convert(tmp_path / "want", tmp_path / "step", verify=True) == []
    check(tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "out", max_shard_size="100KB", verify=True)
    assert_same_files(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_moving_rows_gives_what_the_transform_gives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "want")
    step = save_checkpoint(model, tmp_path / "step", only_rows=True)
    convert(step, tmp_path / "float16", dtype="float16")
    monkeypatch.setattr(stream, "RUN_BYTES", 1)  # those of a tiny model are short
    monkeypatch.setattr(stream.Group, "run", None)
    convert(step, tmp_path / "out", verify=True)
    convert(step, tmp_path / "moved", dtype="float16", verify=True)
    convert(tmp_path / "out", tmp_path / "again", verify=True)
    convert(tmp_path / "again", tmp_path / "back")
    assert_same_files(tmp_path / "out", tmp_path / "want")
    assert_same_files(tmp_path / "back", tmp_path / "want")
    assert_same_files(tmp_path / "moved", tmp_path / "float16")


class Affine:
    """A transform that changes values."""

    def __init__(self, factor: int, shift: int) -> None:
        self.factor, self.shift, self.held = factor, shift, {}

    def add_tensor(self, name: str, key: str, pattern: str, tensor: torch.Tensor) -> None:
        self.held[key] = tensor

    def convert(self, name: str, **_: Any) -> dict[str, torch.Tensor]:
        (value,) = self.held.values()
        self.held = {}
        return {"out": value * self.factor + self.shift}


@pytest.mark.parametrize(("factor", "shift", "moves"), [(1, 0, True), (2, 0, False), (1, 1, False), (2, 7, False)])
def test_a_transform_that_changes_values_is_not_treated_as_moving_rows(factor: int, shift: int, moves: bool) -> None:
    group = stream.Group(("in",), ("out",), "out", ("in",), Affine(factor, shift))
    found = group.moved({"in": (4, 3, 5)}, SimpleNamespace(config=None))  # type: ignore[arg-type]
    assert found == ({"out": [stream.Rows("in", 0, 12)]} if moves else None)


def test_a_hub_directory_that_does_not_match_its_model_is_refused(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    index = tmp_path / "hub" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = sorted(good["weight_map"])[0]
    for name in ("../model-00001-of-00003.safetensors", "/etc/passwd", "a/b.safetensors", ".x.safetensors", 3):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], first: name}}))
        with pytest.raises(DamagedError, match="damaged"):
            convert(tmp_path / "hub", tmp_path / "out")
    index.write_text(json.dumps({**good, "weight_map": {k: v for k, v in good["weight_map"].items() if k != first}}))
    with pytest.raises(DamagedError, match=first.rpartition(".experts")[0] if ".experts" in first else first):
        convert(tmp_path / "hub", tmp_path / "out")
    index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], "spare": good["weight_map"][first]}}))
    with pytest.raises(DamagedError, match="spare is not in"):
        convert(tmp_path / "hub", tmp_path / "out")
    with pytest.raises(RecipeError, match="--dtype"):
        convert(tmp_path / "hub", tmp_path / "out", dtype="float16")

    single = tmp_path / "single"
    model.save_pretrained(single)
    tensors = load_file(single / "model.safetensors")
    spare = {**tensors, "model.spare": torch.ones(2)}
    transformers.modeling_utils.safe_save_file(spare, single / "model.safetensors", metadata={"format": "pt"})
    (note,) = convert(single, tmp_path / "spare")
    assert note == f"left out (not in the model): 1 of {len(spare)} saved weights, first model.spare"
    norm = {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()}
    transformers.modeling_utils.safe_save_file(norm, single / "model.safetensors", metadata={"format": "pt"})
    (note,) = convert(single, tmp_path / "norm")
    assert "dtype other than the config's torch.bfloat16: 1 of" in note and "first model.norm.weight" in note
    eight = {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}
    transformers.modeling_utils.safe_save_file(eight, single / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="unquantized"):
        convert(single, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_match_its_config_is_refused(tmp_path: Path) -> None:
    step = save_checkpoint(build("llama"), tmp_path / "step")
    config = json.loads((step / "config.json").read_text())
    for change, said in (
        ({"num_hidden_layers": 1}, "stored tensors not in the model, first model.layers.1"),
        ({"num_hidden_layers": 3}, "tensors missing, first model.layers.2"),
        ({"vocab_size": 300}, "has shape"),
    ):
        other = save_checkpoint(build("llama"), tmp_path / said.split()[-1], config={**config, **change})
        with pytest.raises(DamagedError, match=said):
            convert(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verification_finds_one_wrong_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = save_checkpoint(build("qwen3_moe"), tmp_path / "step")
    convert(step, tmp_path / "out", verify=True)
    offsets = iter((-1, -5000, 20))  # in values, in those of another tensor, in the header

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[next(offsets)] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(stream, "_forget", flip)
    for number in range(3):
        with pytest.raises(DamagedError):
            convert(step, tmp_path / f"again{number}", verify=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "step"]


def test_an_interrupted_conversion_or_a_full_disk_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = save_checkpoint(build("llama"), tmp_path / "step")

    def interrupt(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(step, tmp_path / "out", progress=interrupt)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(NdtrainError, match="100 are free"):
        convert(step, tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_verification_finds_a_checkpoint_that_was_altered(tmp_path: Path) -> None:
    step = save_checkpoint(build("llama"), tmp_path / "step")
    file = next((step / "model").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=f"model/{file.name} was altered"):
        convert(step, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_out_may_be_a_link_or_a_file_url_but_not_the_current_directory_or_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = save_checkpoint(build("llama"), tmp_path / "step")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    convert(step, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RecipeError, match="is the current directory"):
        convert(step, Path())
    with pytest.raises(RecipeError, match="writes only to a local directory"):
        convert(step, to_path("memory://bucket/out"))
    convert(step, to_path(f"file://{tmp_path}/named"))
    assert (tmp_path / "named" / "model.safetensors").is_file() and not list((tmp_path / "here").iterdir())
    with pytest.raises(RecipeError, match="--max-shard-size does not apply to the Hugging Face directory"):
        convert(tmp_path / "empty", tmp_path / "back", max_shard_size="10KB")


def test_out_may_not_be_inside_the_checkpoint_nor_hide_why_none_is_whole(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    save_checkpoint(build("llama"), step)
    for given in (step, tmp_path / "run"):
        with pytest.raises(RecipeError, match="is inside the checkpoint, and would go with it"):
            convert(given, step / "out")
    convert(tmp_path / "run", tmp_path / "run" / "export")
    (step / "config.json").unlink()
    with pytest.raises(DamagedError, match=r"run has no complete checkpoint: .*config\.json is missing"):
        convert(tmp_path / "run", tmp_path / "out")


def test_shard_sizes_are_parsed_with_their_units() -> None:
    sizes = {"5GB": 5 * 10**9, "0.5gb": 5 * 10**8, " 1.5 MiB ": 3 * 2**19, "1000": 1000, "2kb": 2000, "1TiB": 2**40}
    assert {text: parse_size(text) for text in sizes} == sizes


def test_an_independent_reader_computes_the_same_logits(tmp_path: Path) -> None:
    """Llama by hand, in numpy from the files: no line of transformers."""
    model = build("llama", torch.float32)
    convert(save_checkpoint(model, tmp_path / "step"), tmp_path / "out", max_shard_size="100KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights: dict[str, Any] = {}
    for name in sorted(set(index.values())):
        weights |= load_numpy(tmp_path / "out" / name)
    assert weights.keys() == index.keys()

    def norm(x: Any, key: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{key}.weight"]

    ids = np.arange(3, 15)
    heads, width = config["num_attention_heads"], config["head_dim"]
    angles = np.outer(np.arange(12), config["rope_parameters"]["rope_theta"] ** (-np.arange(0, width, 2) / width))
    cos, sin = np.cos(angles), np.sin(angles)

    def project(x: Any, key: str, *, turn: bool) -> Any:
        y = (x @ weights[key + ".weight"].T).reshape(12, -1, width).transpose(1, 0, 2)
        if turn:
            a, b = np.split(y, 2, -1)
            y = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return np.repeat(y, heads // y.shape[0], 0)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k = (project(y, f"{at}.self_attn.{n}_proj", turn=True) for n in "qk")
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(width) + np.triu(np.full((12, 12), -np.inf), 1)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        mixed = (chances @ project(y, f"{at}.self_attn.v_proj", turn=False)).transpose(1, 0, 2).reshape(12, -1)
        x = x + mixed @ weights[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ weights[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    logits = norm(x, "model.norm") @ weights["lm_head.weight"].T
    want = model(torch.from_numpy(ids)[None]).logits[0].detach().numpy()
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()


MEASURE = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
import torch, transformers, transformers.core_model_loading
from ndtrain.convert import convert
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="bfloat16", verify=True)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_the_largest_group(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 8}
    config = transformers.Qwen3MoeConfig(
        **shape, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=4096
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            torch.arange(i, i + param.numel(), dtype=torch.float32, out=param.view(-1))
    step = save_checkpoint(model, tmp_path / "step")
    total = sum(p.numel() * 4 for p in model.parameters())
    group = 32 * 512 * 512 * 4
    assert total > 400e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(step), str(tmp_path / "out")], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    assert grown < 2 * group + 300e6, f"{grown:,} bytes for groups of {group:,}"
    assert grown < total


# ---- checkpoints of other tools


def test_dcp_directories_of_other_tools_convert(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "want")
    state = dict(model.state_dict())
    compiled = {f"_orig_mod.{k.replace('.mlp.', '.mlp._checkpoint_wrapped_module.')}": v for k, v in state.items()}
    more = {"optimizer": {"state": {"x": torch.ones(2)}, "lr": 0.1}, "step": 3}
    cases = {
        "plain": (state, []),
        "accelerate": ({"model": state}, []),
        "titan": ({**state, "optimizer": more["optimizer"], "train_state": {"step": torch.ones(1)}}, ["optimizer.lr"]),
        "wrapped": ({"app": {"model": compiled, **more}}, ["app.optimizer.lr"]),
    }
    for name, (content, first) in cases.items():
        dcp.save(content, checkpoint_id=tmp_path / name, no_dist=True)
        notes = convert(tmp_path / name, tmp_path / f"{name}-out", config=tmp_path / "want", verify=True)
        assert_same_files(tmp_path / f"{name}-out", tmp_path / "want")
        assert notes == [f"left out (not weights): 3 of {len(state) + 3} entries, first {key}" for key in first]
    with pytest.raises(RecipeError, match="--config"):
        convert(tmp_path / "plain", tmp_path / "out")
    (tmp_path / "x.txt").write_text("{}")
    for wrong in ("x.txt", "plain"):
        with pytest.raises(RecipeError, match=rf"--config .*{wrong} is no config.json, nor a directory with one"):
            convert(tmp_path / "plain", tmp_path / "out", config=tmp_path / wrong)
    with pytest.raises(RecipeError, match="does not exist"):
        convert(tmp_path / "plain", tmp_path / "out", config=tmp_path / "nothing")
    (gone, value), *rest = state.items()
    dcp.save(dict(rest), checkpoint_id=tmp_path / "less", no_dist=True)
    with pytest.raises(DamagedError, match=f"1 of the model's {len(state)} tensors missing, first {gone}"):
        convert(tmp_path / "less", tmp_path / "out", config=tmp_path / "want" / "config.json")
    dcp.save({**state, "model.spare": value}, checkpoint_id=tmp_path / "more", no_dist=True)
    with pytest.raises(DamagedError, match=rf"1 of {len(state) + 1} entries not in the model, first model\.spare"):
        convert(tmp_path / "more", tmp_path / "out", config=tmp_path / "want")


def _save_sharded(directory: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build("qwen3")
    parts = {k: distribute_tensor(v, mesh, [Shard(v.ndim - 1)]) for k, v in model.state_dict().items()}
    dcp.save({"model": parts}, checkpoint_id=directory)


def test_a_dcp_directory_of_two_ranks_converts(tmp_path: Path) -> None:
    get_pool(2).run(_save_sharded, str(tmp_path / "dcp"), timeout=200)
    build("qwen3").save_pretrained(tmp_path / "want")
    convert(tmp_path / "dcp", tmp_path / "out", config=tmp_path / "want")
    assert_same_files(tmp_path / "out", tmp_path / "want")
    next((tmp_path / "dcp").glob("__1_*.distcp")).write_bytes(b"")
    with pytest.raises(DamagedError, match="distcp"):
        convert(tmp_path / "dcp", tmp_path / "again", config=tmp_path / "want")


def test_a_dcp_directory_whose_pieces_overlap_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pieces have as many values as the tensor, but one column is stored twice and the last is not."""
    get_pool(2).run(_save_sharded, str(tmp_path / "dcp"), timeout=200)
    build("qwen3").save_pretrained(tmp_path / "want")
    metadata: Metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    key = "model.model.embed_tokens.weight"
    entry: Any = metadata.state_dict_metadata[key]
    first, second = sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets))
    at = second.offsets[1]
    moved = torch.Size((0, at - 1))
    entry.chunks = [first, ChunkStorageMetadata(moved, second.sizes)]
    index = next(i for i in metadata.storage_data if i.fqn == key and i.offset == second.offsets)
    metadata.storage_data[MetadataIndex(key, moved)] = metadata.storage_data.pop(index)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    monkeypatch.setattr(sys, "argv", ["ndtrain", "convert", "dcp", "out", "--config", "want"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4 and not (tmp_path / "out").exists()
    rows = first.sizes[0]
    said = (
        f"dcp: {key} does not have the shape ({rows}, {2 * at}), but ({rows}, {2 * at - 1}): [0:{rows}, {at - 1}:{at}]"
    )
    assert f"{said} is stored more than once" in capsys.readouterr().err


def test_a_checkpoint_whose_pieces_overlap_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = save_checkpoint(build("llama"), tmp_path / "step", ranks=1)
    whole = load_file(step / "model/00000-of-00001.safetensors")
    key = "model.norm.weight"
    parts = [((0,), whole[key][:32]), ((20,), whole[key][20:32]), ((44,), whole[key][44:])]
    assert sum(part.numel() for _, part in parts) == whole[key].numel()
    (step / "model/00000-of-00001.safetensors").unlink()
    first = {k: (v, (0,) * v.ndim) for k, v in whole.items() if k != key}
    for i, (offsets, part) in enumerate(parts):
        entries = {key: (part, offsets)} | ({} if i else first)
        _write_file(step / f"model/{i:05d}-of-00003.safetensors", entries)
    tensors = json.loads((step / "manifest.json").read_text())["tensors"]
    (step / "manifest.json").unlink()
    write_manifest(step, tensors, {})
    monkeypatch.setattr(sys, "argv", ["ndtrain", "convert", "step", "out"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4 and not (tmp_path / "out").exists()
    assert f"step/model: {key}[20:32] is stored more than once" in capsys.readouterr().err


def test_torchtitans_names_and_rotation_convert(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "want")
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    titan = {}
    for key, value in model.state_dict().items():
        if ".q_proj" in key or ".k_proj" in key:
            value = value.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).clone()  # torchtitan rotates pairs of rows
        for theirs, own in names.items():
            key = key.replace(theirs, own)
        titan[key.removeprefix("model.")] = value
    dcp.save(titan, checkpoint_id=tmp_path / "titan", no_dist=True)
    convert(tmp_path / "titan", tmp_path / "out", config=tmp_path / "want")
    assert_same_files(tmp_path / "out", tmp_path / "want")


RAN: list[str] = []


class Payload:
    def __reduce__(self) -> Any:
        return _run, ("ran",)


def _run(what: str) -> None:
    RAN.append(what)


def test_hostile_pickles_never_run_and_hostile_names_never_leave_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "want")
    dcp.save(dict(model.state_dict()), checkpoint_id=tmp_path / "good", no_dist=True)
    good: Metadata = pickle.loads((tmp_path / "good" / ".metadata").read_bytes())
    (tmp_path / "secret").write_bytes((tmp_path / "good" / "__0_0.distcp").read_bytes())

    def refused(metadata: bytes, match: str) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (tmp_path / "bad" / ".metadata").write_bytes(metadata)
        with pytest.raises(DamagedError, match=match):
            convert(tmp_path / "bad", tmp_path / "out", config=tmp_path / "want")
        assert not (tmp_path / "out").exists() and RAN == []

    refused(pickle.dumps(Payload()), "not part of DCP metadata")
    good.planner_data = Payload()
    refused(pickle.dumps(good), "not part of DCP metadata")
    pickle.loads(pickle.dumps(Payload()))
    assert RAN.pop() == "ran"
    good.planner_data = None
    for payload in (b"cposix\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch\nload\n(S'x'\ntR."):
        refused(payload, "refers to")
    refused(b"ctorch\nSize\n((I1\nttR.", "holds a Size")
    for kind in ("torch\nSize", "torch.distributed.checkpoint.metadata\nMetadata", "collections\nOrderedDict"):
        refused(f"cbuiltins\ngetattr\n(c{kind}\nS'__init__'\ntR.".encode(), "refers to the attribute '__init__'")
    member = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nS'%s'\ntR."
    refused(member % b"__class__", "refers to the attribute '__class__'")
    refused(member % b"TORCH_CONTIGUOUS_FORMAT", "holds a _MEM_FORMAT_ENCODING")
    refused(b"garbage", "cannot be read")
    for name in ("../secret", str(tmp_path / "secret"), ".hidden", ""):
        for info in good.storage_data.values():
            info.relative_path = name
        refused(pickle.dumps(good), "names the file")
    for info in good.storage_data.values():
        info.relative_path = "__0_0.distcp"
    next(iter(good.storage_data.values())).offset = 10**12
    refused(pickle.dumps(good), "cannot be read")

    monkeypatch.setattr(sys, "argv", ["ndtrain", "convert", "bad", "out", "--config", "want"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    assert capsys.readouterr().err.startswith("ndtrain: error: bad/")


@pytest.mark.parametrize("verify", [False, True])
def test_convert_says_where_in_which_dtype_and_how_much_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verify: bool
) -> None:
    """A config of bfloat16 makes bfloat16 of float32 masters, as `save_pretrained` does, and says so."""
    model = build("llama")
    model.config.dtype = torch.bfloat16
    step = save_checkpoint(model, tmp_path / "step")
    monkeypatch.setattr(sys, "argv", ["ndtrain", "convert", str(step), str(tmp_path / "out"), *["--verify"] * verify])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    nbytes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {tmp_path / 'out'}: bfloat16, ") and " in 1 safetensors file" in said
    assert abs(float(said.split("bfloat16, ")[1].split(" KiB")[0]) * 1024 / nbytes - 1) < 0.05
    assert ("every bit read back and compared" in said) == verify


def test_extra_states_that_are_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = type(build("llama").model.norm)
    monkeypatch.setattr(norm, "get_extra_state", lambda self: getattr(self, "kept", torch.zeros(2)), raising=False)
    monkeypatch.setattr(norm, "set_extra_state", lambda self, state: setattr(self, "kept", state), raising=False)
    model = build("llama")
    model.model.norm.kept = torch.tensor([3.0, 4.0])
    states = extra_states.states(model)
    step = save_checkpoint(model, tmp_path / "step", states=states)
    convert(step, tmp_path / "out", verify=True)
    key = "model.norm._extra_state"
    assert load_file(tmp_path / "out" / "model.safetensors")[key].tolist() == [3.0, 4.0]


def test_pieces_that_do_not_make_up_a_tensor_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    whole = [Piece(file, (0, 0), (2, 3), "F32", 8), Piece(file, (2, 0), (2, 3), "F32", 32)]
    assert stored("x", (4, 3), torch.float32, whole, tmp_path).nbytes == 48
    for pieces, shape, said in (
        (whole[:1], (4, 3), r"x does not have the shape \(4, 3\), but \(2, 3\): \[2:4, 0:3\] is in no file"),
        ([], (4, 3), r"x\[0:4, 0:3\] is in no file"),
        ([*whole, whole[1]], (4, 3), r"x\[2:4, 0:3\] is stored more than once"),
        ([whole[0], whole[0]._replace(offsets=(1, 0)), whole[1]], (4, 3), r"x\[1:2, 0:3\] is stored more than once"),
        ([*whole, whole[1]._replace(offsets=(-2, 0))], (4, 3), r"x has a piece .* outside every tensor"),
        ([*whole, whole[1]._replace(offsets=(9, 0), sizes=(0, 3))], (4, 3), "does not have the shape"),
        ([whole[0]._replace(offsets=(0,), sizes=(1,))], (), "does not have the shape"),
        ([whole[0]._replace(offsets=(), sizes=())] * 2, (), r"x\[\] is stored more than once"),
        ([whole[0], whole[1]._replace(dtype="BF16")], (4, 3), "differ in dtype"),
        (whole, (3, 3), "does not have the shape"),
        (whole, (12,), "does not have the shape"),
    ):
        with pytest.raises(DamagedError, match=said):
            stored("x", shape, torch.float32, pieces, tmp_path)
