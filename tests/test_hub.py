"""Names of models: local paths are never asked of the hub; a model of the hub is one commit, asked for once a node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

from ndtrain.console.inspect import inspect_text
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf import hub
from ndtrain.hf.config import load_config
from ndtrain.hf.tokenizer import ByteTokenizer, load_tokenizer
from ndtrain.recipe import Recipe, load_recipe
from ndtrain.runs.process import Runtime
from ndtrain.train import with_commit
from ndtrain.train.inputs import open_tokenizer
from tests import tiny
from tests.fake_hub import FakeHub, fake_hub

NAME = "org/tiny"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub of which this process has an empty cache, and a current directory of its own."""
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield server


def recipe_of(tmp_path: Path, *overrides: str, steps: int = 3, tokenizer: str | None = "bytes", **model: Any) -> Path:
    file = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model=model,
        corpus=tiny.write_corpus(tmp_path / "corpus"),
        run_dir=tmp_path / "run",
        steps=steps,
        checkpoint={"resume": "auto"},
    )
    if tokenizer != "bytes":
        text = file.read_text()
        file.write_text(text.replace('tokenizer = "bytes"', f'tokenizer = "{tokenizer}"' if tokenizer else ""))
    return file


def asks(action: Any, *words: str, kind: type[NdtrainError] = RecipeError) -> str:
    """The one line of the error that `action` raises, which has these words."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value).exit_code == kind.exit_code and "\n" not in message
    assert not [word for word in words if word not in message], message
    return message


def named(name: str, **model: Any) -> Recipe:
    data = {"path": "x", "seq_len": 8}
    sections: dict[str, Any] = {"model": {"name": name, **model}, "data": data}
    return Recipe.model_validate({**sections, "optim": {"lr": 1.0}, "train": {"steps": 1}, "run": {"dir": "run"}})


@pytest.mark.parametrize(
    "name", ["./org", "../org", "/org", "/no/such", "org/", "org/tiny/", "a/b/c", ".\\org", "C:\\org"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(served: FakeHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "orgs").mkdir()
    message = asks(lambda: load_config(named(name)), f'model.name = "{name}": there is no such directory')
    assert Path(name).is_absolute() or f"(looked from {tmp_path}" in message
    tokenizers = Recipe.model_validate(
        {**named("x").model_dump(by_alias=True), "data": {"path": "x", "seq_len": 8, "tokenizer": name}}
    )
    asks(lambda: load_tokenizer(tokenizers), f'data.tokenizer = "{name}": there is no such directory')
    assert served.asked == []


def test_a_typo_is_looked_for_in_both_places_and_the_near_name_is_told(served: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    message = asks(
        lambda: load_config(named("models/tiny-lama")),
        f'there is no such directory (looked from {tmp_path}; did you mean "models/tiny-llama"?), nor is there a model '
        f"of that name on the hub ({served.endpoint}; ",
    )
    assert message.startswith('model.name = "models/tiny-lama": ') and served.asked


def test_a_hub_that_cannot_be_reached_is_said_beside_the_missing_directory(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asks(
        lambda: load_config(named("mdoel")),
        "no such directory (looked from",
        "the hub (http://127.0.0.1:9) cannot be reached",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asks(lambda: load_config(named("mdoel")), "no such directory (looked from", "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (None, RecipeError, "has no config.json; give the directory of a model"),
        ("{broken", DamagedError, "config.json cannot be read (Expecting"),
        ("[]", DamagedError, "config.json is not a JSON object"),
        ("{}", RecipeError, "has no model_type, so it is not a model of transformers"),
        ('{"model_type": "lama"}', RecipeError, 'has model_type "lama", which transformers'),
        ('{"model_type": "lama"}', RecipeError, 'did you mean "llama"?'),
        ('{"model_type": "zzzzz"}', RecipeError, "upgrade transformers, or choose another model"),
    ],
)
def test_a_directory_without_a_usable_config_is_one_clear_line(
    tmp_path: Path, config: str | None, kind: type[NdtrainError], said: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    asks(lambda: load_config(named(str(tmp_path))), f'model.name = "{tmp_path}": ', said, kind=kind)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    name = str(tmp_path / "model.safetensors")
    asks(lambda: load_config(named(name)), f'model.name = "{name}" is a file; give the directory of a model')


def test_a_cache_that_cannot_be_written_is_said(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = served.publish(NAME, tiny.save_model("llama", tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    message = asks(
        lambda: load_config(named(NAME)), f"of {NAME} at commit {commit} cannot be downloaded", kind=NdtrainError
    )
    assert f"its cache ({tmp_path}/file/cache) cannot be written: Not a directory" in message


def test_a_file_that_the_cache_lacks_is_said_where_the_hub_is_not_asked(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = served.publish(NAME, tiny.save_model("llama", tmp_path))
    hub.fetch(NAME, commit, ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ("model.safetensors of org/tiny", "HF_HUB_OFFLINE is set, so the hub is not asked")
    asks(lambda: hub.fetch(NAME, commit, ["config.json", "model.safetensors"]), *words, kind=NdtrainError)


def test_a_model_without_a_tokenizer_asks_for_one(tmp_path: Path) -> None:
    model = tiny.save_model("llama", tmp_path)
    asks(lambda: load_tokenizer(named(str(model))), "has no tokenizer; set data.tokenizer to one")


def test_a_revision_is_of_the_hub(served: FakeHub, tmp_path: Path) -> None:
    model = tiny.save_model("llama", tmp_path)
    asks(lambda: load_config(named(str(model), revision="v2")), 'model.revision = "v2" is for models of the hub')
    served.publish(NAME, model)
    asks(lambda: load_config(named(NAME, revision="v2")), 'model.revision = "v2"', "no such branch, tag or commit")
    with pytest.raises(RecipeError, match=r'model.revision = "v2" is for models of the hub, not for'):
        load_recipe(recipe_of(tmp_path, type="llama", config=tiny.CONFIGS["llama"], revision="v2"))
    served.gated.add(NAME)
    asks(lambda: load_config(named(NAME)), f"is gated: accept its terms on {served.endpoint}/{NAME}")


def test_the_files_beside_the_weights_are_of_one_commit_and_asked_for_once(served: FakeHub, tmp_path: Path) -> None:
    model = tiny.save_model("llama", tmp_path / "first")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "picture.png").write_bytes(b"")
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    old = served.publish(NAME, model, "main", "v1")
    later = tiny.save_model("qwen3", tmp_path / "later")
    new = served.publish(NAME, later, "main")
    assert load_config(named(NAME)).model_type == "qwen3"
    recipe, notes = with_commit(named(NAME, revision="v1"), lambda work: work())
    assert recipe.model.revision == old and notes == [f'model.name: {NAME} at commit {old} (revision "v1")']
    before = len(served.asked)
    assert load_config(recipe).model_type == "llama" and len(served.asked) == before
    folder = hub.snapshot_directory(NAME, old)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["additional_chat_templates/tools.jinja", "config.json", "generation_config.json"]
    # A commit that the hub no longer has is read from the cache.
    served.models.clear()
    served.refs.clear()
    report = inspect_text(load_recipe(recipe_of(tmp_path, name=NAME, revision=new)), world_size=1, as_json=True)
    assert json.loads(report)["model_type"] == "qwen3"


def test_a_hub_that_is_down_is_answered_for_by_the_cache(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = served.publish(NAME, tiny.save_model("llama", tmp_path))
    assert transformers.AutoConfig.from_pretrained(NAME, cache_dir=constants.HF_HUB_CACHE).model_type == "llama"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe, notes = with_commit(named(NAME), lambda work: work())
    assert recipe.model.revision == commit and "HF_HUB_OFFLINE is set" in notes[0] and commit in notes[0]
    assert load_config(recipe).model_type == "llama"
    asks(lambda: load_config(named(NAME, revision="v9")), 'does not hold revision "v9"')


def test_a_tokenizer_of_another_model_of_the_hub_is_found_once(served: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save_pretrained(folder)
    served.publish("org/tokens", folder)
    recipe = load_recipe(recipe_of(tmp_path, tokenizer="org/tokens", type="llama", config=tiny.CONFIGS["llama"]))
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    tokenizer, notes = open_tokenizer(recipe, runtime, 261)
    assert tokenizer.vocab_size == 259 and tokenizer.encode_bytes(b"ab").tolist() == [97, 98] and notes == []
    downloads = [line for line in served.asked if line.startswith("GET /org/tokens/resolve")]
    assert len(downloads) == len(set(downloads)) == 2
    served.models.clear()
    asks(
        lambda: open_tokenizer(recipe, runtime, 261),
        'data.tokenizer = "org/tokens": there is no such directory',
        f"nor is there a model of that name on the hub ({served.endpoint}; ",
    )


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/model.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors.index.json", "a.safetensors", "b.safetensors"],
            ["model.safetensors.index.json", "b.safetensors"],
        ),
        (["pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (["README.md"], []),
    ],
)
def test_the_weights_are_those_that_from_pretrained_reads(
    served: FakeHub, tmp_path: Path, files: list[str], wanted: list[str]
) -> None:
    (tmp_path / "model" / "original").mkdir(parents=True)
    for file in files:
        (tmp_path / "model" / file).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "b.safetensors"}}))
    commit = served.publish(NAME, tmp_path / "model")
    found = hub.resolve(NAME, "main")
    assert found.commit == commit and hub.weights_of(NAME, found) == wanted


@pytest.mark.parametrize("shard", ["../../other", "/etc/passwd", 3])
def test_an_index_cannot_name_what_lies_outside(served: FakeHub, tmp_path: Path, shard: object) -> None:
    (tmp_path / "model").mkdir()
    index = {"metadata": {}, "weight_map": {"x": shard}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    served.publish(NAME, tmp_path / "model")
    found = hub.resolve(NAME, "main")
    asks(lambda: hub.weights_of(NAME, found), "model.safetensors.index.json is damaged", kind=DamagedError)


def environment(server: FakeHub, home: Path, **more: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**given, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), **more}


def ran(recipe: Path, server: FakeHub, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ndtrain", "run", str(recipe), *more]
    env = environment(server, tmp_path / "home")
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def of_two_ranks(tmp_path: Path, mode: str) -> tuple[Path, Path]:
    """A model with a tokenizer, and a recipe that names it on the hub and changes no weight."""
    model = tiny.save_model("llama", tmp_path / "first")
    ByteTokenizer().save_pretrained(model)
    recipe = recipe_of(tmp_path, name=NAME, tokenizer=None)
    text = recipe.read_text().replace("lr = 0.003", "lr = 0.0") + f'\n[load]\nmode = "{mode}"\n'
    recipe.write_text(text.replace("[mesh]", "[mesh]\ndp_shard = 2"))
    return model, recipe


BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def requests_for(server: FakeHub, commit: str) -> dict[str, int]:
    """How often each file of the commit was asked for; each time with a HEAD and a GET."""
    asked = Counter(line for line in server.asked if "/resolve/" in line)
    prefix = f"/{NAME}/resolve/{commit}/"
    heads, gets = ({k.split(prefix)[1]: n for k, n in asked.items() if k.startswith(v)} for v in ("HEAD", "GET"))
    assert heads == gets
    return gets


def test_two_ranks_ask_the_hub_once_and_a_restart_keeps_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # of this process
    model, recipe = of_two_ranks(tmp_path, "sharded")
    with fake_hub() as server:
        commit = server.publish(NAME, model)
        result = ran(recipe, server, tmp_path)
        assert result.returncode == 0, result.stderr
        assert f'model.name: {NAME} at commit {commit} (revision "main")' in result.stdout
        assert requests_for(server, commit) == dict.fromkeys((*BESIDE, "model.safetensors"), 1)
        # Rank 0 lists the files of the model, of its tokenizer and of its weights.
        listings = [line for line in server.asked if "/api/models/" in line]
        assert listings[0] == f"GET /api/models/{NAME}/revision/main"
        assert listings[1:] == [f"GET /api/models/{NAME}/revision/{commit}"] * 2
        recorded = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["model"]
        assert (recorded["name"], recorded["revision"]) == (NAME, commit)
        step = tmp_path / "run" / "checkpoints" / "step-00000003"
        assert json.loads((step / "config.json").read_text())["model_type"] == "llama"
        weights = load_file(model / "model.safetensors")
        key = "model.embed_tokens.weight"
        stored = [load_file(file) for file in sorted((step / "model").glob("*.safetensors"))]
        assert torch.equal(torch.cat([part[key] for part in stored if key in part]), weights[key])

        # The model moves on; the run does not.
        config = json.loads((model / "config.json").read_text())
        moved = tiny.save_model("llama", tmp_path / "moved")
        (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
        ByteTokenizer().save_pretrained(moved)
        assert server.publish(NAME, moved) != commit
        server.asked.clear()
        again = ran(recipe, server, tmp_path, "--set", "train.steps=4")
        assert again.returncode == 0, again.stderr
        assert f"model.name: {NAME} at commit {commit} (recorded by the run)" in again.stdout
        assert requests_for(server, commit) == {} and not [line for line in server.asked if line.endswith("/main")]
        assert tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["model"]["revision"] == commit
    other = load_recipe(recipe, [f"model.revision={'0' * 40}"])
    asks(lambda: with_commit(other, lambda work: work()), f"uses commit {commit} of {NAME}; leave model.revision out")
    for way in ("checkpoint.resume=never", 'checkpoint.allow=["model.revision"]'):
        anew = load_recipe(recipe, [f"model.revision={'0' * 40}", way])
        asks(lambda anew=anew: with_commit(anew, lambda work: work()), "cannot be reached")


def test_each_of_two_nodes_downloads_the_files_that_its_ranks_read(tmp_path: Path) -> None:
    model, recipe = of_two_ranks(tmp_path, "rank0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with fake_hub() as server:
        commit = server.publish(NAME, model)
        command = [sys.executable, "-m", "ndtrain", "run", str(recipe)]
        nodes = []
        for rank in ("0", "1"):
            place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **address}
            env = environment(server, tmp_path / f"home{rank}", **place)
            pipe = subprocess.PIPE
            nodes.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        said = [node.communicate(timeout=300) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert requests_for(server, commit) == {**dict.fromkeys(BESIDE, 2), "model.safetensors": 1}
        assert len([line for line in server.asked if "/api/models/" in line]) == 3
