"""Three steps, a stop, another mesh and three more steps give the same losses as six steps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers
import xxhash

from ndtrain.hf.model import meta_model
from ndtrain.hf.tokenizer import ByteTokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import load_recipe
from ndtrain.recipe.resuming import NEVER
from ndtrain.train.changes import find_changes
from ndtrain.train.data_files import with_format
from ndtrain.train.origin import origin_of
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.test_train import ALL_MESHES, model_dir, ranks_of, trained, world  # noqa: F401


def start(
    world: dict[str, Any],  # noqa: F811
    folder: Path,
    *,
    mesh: str,
    steps: int,
    kind: str,
    optim: dict[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    sizes = ALL_MESHES[mesh]
    recipe = tiny.recipe_file(
        folder / f"{mesh}-{steps}.toml",
        model={"name": str(model_dir(world, kind)), **model},
        corpus=world["corpus"],
        run_dir=folder / "run",
        mesh=sizes,
        steps=6,
        batch_ranks=sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        checkpoint={"every": 3, "resume": "auto"},
        optim=optim or {},
    )
    return get_pool(ranks_of(sizes)).run(trained, str(recipe), [], steps, timeout=300)[0]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen3", "dp_shard2-tp2", "tp4"),
        ("qwen3", "dp_shard4", "1"),
        ("gemma3_text", "dp_replicate2-dp_shard2", "dp_shard2-tp2"),
        ("qwen3_moe", "dp_shard2-tp2-ep4", "dp_shard2"),
        ("qwen3_moe", "ep2", "dp_shard2-tp2"),
        ("phi3", "dp_shard2-tp2", "cp2"),
        ("llama_two_heads", "cp2", "cp4"),  # ulysses, then a ring
    ],
)
def test_resume_on_another_mesh_continues_loss_rate_and_sample_order(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    first: str,
    second: str,
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = start(world, tmp_path / "whole", mesh=first, steps=6, kind=kind)
    begun = start(world, tmp_path / "cut", mesh=first, steps=3, kind=kind)
    ended = start(world, tmp_path / "cut", mesh=second, steps=6, kind=kind)
    assert [m["step"] for m in ended["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert begun["ids"] + ended["ids"] == whole["ids"]
    assert [m["lr"] for m in ended["metrics"]] == [m["lr"] for m in whole["metrics"]]
    for ours, theirs in zip(ended["metrics"], whole["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_resume_draws_the_dropout_that_the_run_would_have_drawn(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    dropout = {"config": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}}
    runs = {}
    for name, steps in (("whole", [6]), ("cut", [3, 6])):
        (tmp_path / name).mkdir()
        for stop in steps:
            runs[name] = start(world, tmp_path / name, mesh="dp_shard2", steps=stop, kind="gpt2", **dropout)
    losses = {name: [m["loss"] for m in run["metrics"]] for name, run in runs.items()}
    assert losses["cut"] == pytest.approx(losses["whole"], rel=1e-6)
    (tmp_path / "dry").mkdir()
    dry = start(world, tmp_path / "dry", mesh="dp_shard2", steps=1, kind="gpt2")
    assert dry["metrics"][0]["loss"] != pytest.approx(losses["whole"][0], rel=1e-4)


def test_resume_with_another_decay_of_norms_is_the_same_on_another_mesh(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The optimizer's groups differ between the meshes and between the two values."""
    ends = {}
    for name, meshes in (("one", ("1", "1")), ("several", ("dp_shard2-tp2", "dp_shard2"))):
        (tmp_path / name).mkdir()
        for mesh, steps, decay in zip(meshes, (3, 6), (True, False), strict=True):
            optim = {"decay_norms": decay, "weight_decay": 30.0}
            ends[name] = start(world, tmp_path / name, mesh=mesh, steps=steps, kind="gpt2", optim=optim)["metrics"]
    for ours, theirs in zip(ends["several"], ends["one"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


# ---- what a resume compares


@pytest.fixture(scope="module")
def finished(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """A run of two steps, its base, its data and others: "base", "moved" (equal), "other" (one value of a norm)."""
    root = tmp_path_factory.mktemp("finished")
    base = tiny.save_model("qwen3", root)
    shutil.copytree(base, root / "moved")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(root / "other", max_shard_size="100KB")
    made = {"root": root, "base": base, "corpus": tiny.write_corpus(root / "corpus"), "recipe": root / "recipe.toml"}
    tiny.recipe_file(
        made["recipe"],
        model={"name": str(base)},
        corpus=made["corpus"],
        run_dir=root / "run",
        steps=2,
        schedule={"warmup_steps": 1},
        checkpoint={"resume": "auto"},
    )
    get_pool(1).run(trained, str(made["recipe"]), [], timeout=100)
    return made


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the finished run, for one test."""
    made = {**finished, "run": tmp_path / "run", "recipe": tmp_path / "recipe.toml"}
    shutil.copytree(finished["root"] / "run", made["run"])
    made["recipe"].write_text(finished["recipe"].read_text().replace(f"{finished['root']}/run", str(made["run"])))
    return made


@pytest.fixture
def with_data(run: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of the finished run and of its data, for one test."""
    shutil.copytree(run["corpus"], tmp_path / "corpus")
    run["recipe"].write_text(run["recipe"].read_text().replace(str(run["corpus"]), f"{tmp_path}/corpus"))
    return {**run, "corpus": tmp_path / "corpus"}


def resumed(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What a resume prints and raises, and whether it tokenizes first."""
    from ndtrain.data.cache import build_cache
    from ndtrain.errors import NdtrainError
    from tests.trainers import Said, trainer_of

    said, error = Said(), ""
    with mock.patch("ndtrain.train.inputs.build_cache", side_effect=build_cache) as build, proofs.remembered():
        try:
            trainer = trainer_of(recipe, overrides, said=said)
            trainer.prepare()
            trainer.train()
        except NdtrainError as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {"said": "\n".join(said.said), "error": error, "tokenized": build.called}


def resume(run: dict[str, Path], *overrides: str) -> dict[str, Any]:
    return get_pool(1).run(resumed, str(run["recipe"]), list(overrides), timeout=100)[0]


def rows(found: dict[str, Any]) -> dict[str, str]:
    """{key: the rest of its line} of the table of changes."""
    lines = found["said"].split(" differs from this run:\n")[1:]
    cells = [line.split(maxsplit=1) for text in lines for line in text.splitlines()[1:] if line.startswith("  ")]
    return {key: " ".join(rest.split()) for key, rest in cells}


def test_a_resume_without_changes_prints_no_table(finished: dict[str, Path]) -> None:
    found = resume(finished)
    assert not found["error"] and "differs" not in found["said"] and "does not record" not in found["said"]


def test_changes_that_leave_the_meaning_are_one_line_each_also_on_a_finished_run(run: dict[str, Path]) -> None:
    before = (run["run"] / "recipe.toml").read_text()
    found = resume(run, "optim.lr=0.5", "train.global_batch_size=16", "fsdp.param_dtype=bfloat16", "log.every=2")
    assert not found["error"] and "nothing to do" in found["said"]
    table = rows(found)
    assert set(table) == {"run.dir", "optim.lr", "train.global_batch_size", "fsdp.param_dtype", "log.every"}
    assert table["optim.lr"] == "0.003 0.5" and table["fsdp.param_dtype"] == '"float32" "bfloat16"'
    assert table["train.global_batch_size"].startswith("8 16 the data goes on at sample 16; the learning rate follows")
    assert (run["run"] / "recipe.toml").read_text() == before  # nothing was trained with the new one
    longer = resume(run, "train.steps=3", "optim.weight_decay=0.2", "optim.decay_norms=true")
    assert set(rows(longer)) == {"run.dir", "train.steps", "optim.weight_decay", "optim.decay_norms"}
    assert "steps 3 to 3" in longer["said"] and "decay_norms = true" in (run["run"] / "recipe.toml").read_text()
    assert set(rows(resume(run, "train.steps=3", "optim.weight_decay=0.2"))) == {"optim.decay_norms"}


REFUSED = [
    (["model.name={root}/other"], {"model.name": "another base"}),
    (["model.init=random"], {"model.init": "another base"}),
    (["train.seed=4"], {"train.seed": "another order of samples, in which the data goes on at sample 16"}),
    (["data.shuffle=false"], {"data.shuffle": "another order"}),
    (["data.tokenizer={root}/run/checkpoints/step-00000002"], {"data.tokenizer": "it gives other tokens"}),
    (["data.path={root}/corpus/0[1-9].txt"], {"data.path": "0 added, 2 removed, 0 changed"}),
    (["data.columns.text=body"], {"data.columns.text": "the files are read in another way"}),
    (["model.config.rms_norm_eps=0.5"], {"model.config.rms_norm_eps": "0.5"}),
    (["data.seq_len=16"], {"data.seq_len": "each sample would be another"}),
    (["data.packing=false"], {"data.packing": "each sample would be another"}),
    (["model.config.num_hidden_layers=1"], {"model.config.num_hidden_layers": "other shapes"}),
    (["data.seq_len=16", "data.shuffle=false"], {"data.seq_len": "another", "data.shuffle": "another order"}),
    (
        ["model.name={root}/other", "data.shuffle=false"],
        {"model.name": "another base", "data.shuffle": "another order"},
    ),
]


@pytest.mark.parametrize(("overrides", "causes"), REFUSED, ids=lambda value: " ".join(value))
def test_a_change_of_the_meaning_is_refused_before_tokenizing_and_named(
    run: dict[str, Path], overrides: list[str], causes: dict[str, str]
) -> None:
    before = (run["run"] / "recipe.toml").read_text()
    overrides = [value.replace("{root}", str(run["root"])) for value in overrides]
    found = resume(run, *overrides)
    assert found["error"].startswith("RecipeError: ") and not found["tokenized"]
    lines = found["error"].splitlines()
    assert len(lines) == len(causes)
    for line, (key, cause) in zip(lines, causes.items(), strict=True):
        assert f"step-00000002: {key} " in line and cause in line and "choose another run.dir" in line, line
        assert "refused" in rows(found)[key]
    assert (run["run"] / "recipe.toml").read_text() == before
    never = any(key in NEVER for key in causes)
    assert ("checkpoint.allow" in found["error"]) != never  # advice where the run can then go on
    allow = resume(run, *overrides, f"checkpoint.allow={json.dumps(list(causes))}") if not never else None
    if allow is not None:
        assert not allow["error"] and all("allowed" in rows(allow)[key] for key in causes), allow["error"]
        assert f"resumed from {run['run']}" in allow["said"]


def test_the_models_config_may_change_where_allowed_but_not_its_shapes(run: dict[str, Path]) -> None:
    allow = 'checkpoint.allow=["model.config"]'
    assert not resume(run, "model.config.rms_norm_eps=0.5", allow)["error"]
    error = resume(run, "model.config.intermediate_size=32", allow)["error"]
    assert "intermediate_size was 96, is now 32 (the checkpoint's tensors have other shapes); restore it, or" in error
    assert "checkpoint.allow" not in error


def test_the_same_content_elsewhere_is_shown_and_not_refused(run: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(run["corpus"], tmp_path / "again")
    found = resume(run, f"model.name={run['root']}/moved", f"data.path={tmp_path}/again", "data.format=text")
    assert "data.format" not in rows(found), "it is what the data was found to be"
    assert not found["error"] and "the same base weights" in rows(found)["model.name"]
    assert "the same content" in rows(found)["data.path"]


def test_other_files_under_data_path_are_refused_with_their_number(with_data: dict[str, Path]) -> None:
    run = with_data
    (run["corpus"] / "03.txt").write_text("another document")
    (run["corpus"] / "04.txt").unlink()
    for name in ("x.txt", "y.txt"):
        (run["corpus"] / name).write_text("a new document")
    found = resume(run)
    assert "the files of data.path changed: 2 added, 1 removed, 1 changed" in found["error"]
    assert found["error"].count("\n") == 0 and not found["tokenized"]


def test_files_too_many_to_list_are_compared_as_a_whole(finished: dict[str, Path]) -> None:
    recipe = with_format(load_recipe(finished["recipe"]))
    with mock.patch("ndtrain.train.origin.MOST_FILES", 3):
        origin = origin_of(meta_model(recipe), recipe, ByteTokenizer())
    assert origin["files"] is None
    state = {"recipe": origin["recipe"], "origin": origin, "data": f"{origin['data']} seq_len=32", "samples": 0}
    args: Any = {"sizes": MeshSizes(), "configs": ({}, {}), "same_shapes": lambda: True}
    assert find_changes(state, recipe, origin, **args) == []
    (change,) = find_changes(state, recipe, {**origin, "data": "other", "content": "other"}, **args)
    assert (change.key, change.rule, change.meaning) == ("data.path", "allow", "the files of data.path changed")
    (change,) = find_changes(state, recipe, {**origin, "data": "other"}, **args)
    assert change.meaning == "this version of ndtrain reads the same files in another way"


def resumed_after_an_upgrade(recipe: str, overrides: list[str], gives_others: bool) -> dict[str, Any]:
    """`resumed` with other versions of the tokenizer's packages, which may give other ids."""
    from ndtrain.hf.tokenizer import HubTokenizer

    encode = HubTokenizer.encode_bytes
    order = -1 if gives_others else 1
    with (
        mock.patch("ndtrain.hf.tokenizer_key._version", lambda name: "99.0"),
        mock.patch.object(HubTokenizer, "encode_bytes", lambda self, raw: encode(self, raw)[::order]),
        # A cache of its own: the key does not know of the order.
        mock.patch.dict(os.environ, {"NDTRAIN_CACHE": f"{Path(recipe).parent}/cache{order}"}),
    ):
        return resumed(recipe, overrides)


def test_a_resume_after_an_upgrade_goes_on_if_the_data_has_the_same_tokens(
    run: dict[str, Path], tmp_path: Path
) -> None:
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    new = [f"data.tokenizer={tmp_path}/tokenizer", f"run.dir={tmp_path}/new", "train.steps=3"]
    get_pool(1).run(trained, str(run["recipe"]), [*new, "checkpoint.every=2"], 2, timeout=100)

    def upgraded(*more: str, gives_others: bool) -> dict[str, Any]:
        args = str(run["recipe"]), [*new, *more], gives_others
        return get_pool(1).run(resumed_after_an_upgrade, *args, timeout=100)[0]

    found = upgraded(gives_others=True)
    assert found["error"].startswith("RecipeError: ") and found["tokenized"]
    assert "data.tokenizer gives other tokens with these versions" in found["error"]
    found = upgraded("data.tokenizer=bytes", gives_others=False)
    assert "data.tokenizer was" in found["error"] and not found["tokenized"]  # another name is another tokenizer
    found = upgraded(gives_others=False)
    assert not found["error"] and "steps 3 to 3" in found["said"], found
    assert "transformers" in rows(found)["data.tokenizer"] and "-> 99.0" in rows(found)["data.tokenizer"]


def test_other_weights_under_the_same_name_are_refused(run: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run["base"], base)
    text = run["recipe"].read_text().replace(str(run["base"]), str(base))
    recipe = tmp_path / "own.toml"
    recipe.write_text(text.replace(str(run["run"]), str(tmp_path / "own")))
    own = {**run, "recipe": recipe}
    assert not resume(own)["error"]
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["model.norm.weight"][5] += 1e-3
    safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "model.name was" in (error := resume(own)["error"]) and "another base" in error
    (base / "model.safetensors").unlink()  # no resume reads them
    assert not resume(own, "train.steps=3")["error"]


def test_a_checkpoint_as_the_base_is_known_by_its_hashes(run: dict[str, Path], tmp_path: Path) -> None:
    step = run["run"] / "checkpoints" / "step-00000002"
    shutil.copytree(step, tmp_path / "moved")
    assert not resume(run, "train.steps=3")["error"]  # has other weights
    new = [f"run.dir={tmp_path}/new", "train.steps=3"]
    assert not resume(run, f"model.name={step}", *new)["error"]
    assert "the same base weights" in rows(resume(run, f"model.name={tmp_path}/moved", *new))["model.name"]
    later = run["run"] / "checkpoints" / "step-00000003"
    error = resume(run, f"model.name={later}", *new)["error"]
    assert "model.name was" in error and "another base" in error


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_it_goes(with_data: dict[str, Path]) -> None:
    run = with_data
    step = run["run"] / "checkpoints" / "step-00000002"

    def earlier(state: dict[str, Any]) -> None:
        for key in ("recipe", "origin"):
            del state[key]
        state["schedule"] = {"kind": "cosine", "warmup_steps": 1, "min_lr_ratio": 0.0, "decay_steps": None}

    rewritten(step, earlier)
    found = resume(run, "schedule.kind=linear", f"model.name={run['root']}/other")
    assert not found["error"] and "does not record its recipe; only the data" in found["said"]
    assert rows(found) == {"schedule.kind": '"cosine" "linear"'}
    for override, key in {"data.seq_len=16": "data.seq_len", "train.seed=1": "train.seed"}.items():
        assert f": {key} was" in (other := resume(run, override))["error"] and not other["tokenized"]
    (run["corpus"] / "03.txt").write_text("another document")
    assert "data.path differs (its files, or the tokenizer, changed)" in resume(run)["error"]
    assert not resume(run, 'checkpoint.allow=["data.path"]')["error"]


def rewritten(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's train_state.json, as if it had been written so."""
    state = json.loads((step / "train_state.json").read_text())
    change(state)
    content = json.dumps(state).encode()
    (step / "train_state.json").write_bytes(content)
    entry = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    tiny.forged(step, lambda manifest: manifest["files"].update({"train_state.json": entry}))


def test_keys_that_a_later_version_names_or_adds_are_no_changes(run: dict[str, Path]) -> None:
    def earlier(state: dict[str, Any]) -> None:
        data, train = state["recipe"]["data"], state["recipe"]["train"]
        assert data.pop("too_long") == "cut" and train.pop("epochs") is None
        data["packing"] = True

    step = run["run"] / "checkpoints" / "step-00000002"
    rewritten(step, earlier)
    assert set(rows(resume(run))) == {"run.dir"}
    assert "data.packing was" in resume(run, "data.packing=best_fit")["error"]

    def earliest(state: dict[str, Any]) -> None:
        del state["recipe"], state["origin"]
        state["data"] = "0123 seq_len=32 packing=True samples=282 seed=3 shuffle=True"

    rewritten(step, earliest)
    assert "data.path differs" in resume(run)["error"]
    assert not resume(run, 'checkpoint.allow=["data.path"]')["error"]


def test_another_order_of_the_same_samples_is_refused(run: dict[str, Path]) -> None:
    rewritten(
        run["run"] / "checkpoints" / "step-00000002",
        lambda state: state.update(data=state["data"].removesuffix(" order=2")),
    )
    error = resume(run, "train.steps=3")["error"]
    assert "was trained on other samples" in error and "use the version of ndtrain that wrote it" in error


def test_another_runs_checkpoint_and_another_mesh_are_one_line_each(run: dict[str, Path], tmp_path: Path) -> None:
    overrides = [f"checkpoint.resume={run['run']}/checkpoints/step-00000002", f"run.dir={tmp_path}/new"]
    overrides += ["mesh.dp_shard=2", "train.steps=3"]
    found = get_pool(2).run(resumed, str(run["recipe"]), overrides, timeout=100)
    table = rows(found[0])
    assert set(table) == {"run.dir", "mesh", "train.steps"} and table["mesh"] == "1 rank dp_shard 2"
    assert "steps 3 to 3" in found[0]["said"] and "differs" not in found[1]["said"]
    refused = get_pool(2).run(resumed, str(run["recipe"]), [*overrides[2:], "train.seed=9"], timeout=100)
    assert all("train.seed was 3, is now 9" in each["error"] for each in refused)


def test_restarts_of_a_launch_print_no_table(run: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = get_pool(1).run(restarted, str(run["recipe"]), timeout=100)[0]
    assert "differs from this run" in found[0] and "differs from this run" not in found[1]


def restarted(recipe: str) -> list[str]:
    """What two starts of one launch print that both die before the next checkpoint."""
    said = []
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, variables):
        for _ in range(2):
            said.append(resumed(recipe, ["optim.lr=0.5"])["said"])
    return said
