"""`[[data.sources]]`: several sources are one stream, by their shares, the same on every mesh and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from ndtrain.errors import RecipeError
from ndtrain.recipe import load_recipe, to_toml
from ndtrain.train.length import with_steps
from ndtrain.train.preview import open_preview
from tests import tiny
from tests.chat.tokenizers import inner_of
from tests.ranks import get_pool
from tests.test_evaluation import lines, plain
from tests.test_resume import resumed
from tests.test_sft import conversations
from tests.test_train import trained

WEIGHTS = {"prose": 3.0, "chat": 1.0, "lists": 2.0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Text, chat and prepared tokens, 23 to 60 samples of 64 tokens each."""
    root = tmp_path_factory.mktemp("sources")
    inner_of("qwen").save_pretrained(root / "tokenizer")
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    np.save(root / "lists.npy", (np.arange(60 * 64) % 100).astype(np.uint16).reshape(60, 64))
    corpus = tiny.write_corpus(root / "corpus")
    return [
        {"name": "prose", "path": str(corpus), "weight": 3},
        {"name": "chat", "path": str(root / "chat.jsonl"), "chat_template": "chatml", "too_long": "cut"},
        {"name": "lists", "path": str(root / "lists.npy"), "weight": 2, "documents": "rows", "packing": "concat"},
    ]


def recipe_of(folder: Path, sources: list[dict[str, Any]], *, steps: int = 6, **more: dict[str, Any]) -> Path:
    tokenizer = Path(sources[0]["path"]).parent / "tokenizer"
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": "llama", "config": {**tiny.CONFIGS["llama"], "vocab_size": 512}},
        corpus=folder,
        run_dir=folder / "run",
        steps=steps,
        data={"seq_len": 64, "tokenizer": str(tokenizer), "sources": sources},
        checkpoint={"every": 2, "resume": "auto"},
        schedule={"warmup_steps": 0},
        **more,
    )
    text = path.read_text().replace(f'path = "{folder}"\n', "", 1)
    path.write_text(text)
    return path


def run(recipe: Path, ranks: int = 1, *overrides: str, stop: int | None = None) -> dict[str, Any]:
    return get_pool(ranks).run(trained, str(recipe), list(overrides), stop, timeout=200)[0]


def steps_of(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(line["loss"], line["grad_norm"], line["epoch"], *line["sources"].values()) for line in found["metrics"]]


def test_a_mixture_trains_alike_on_every_mesh_and_after_resumes(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    recipe = recipe_of(tmp_path, sources)
    alone = run(recipe)
    assert len(alone["metrics"]) == 6
    for line in alone["metrics"]:
        assert list(line["sources"]) == list(WEIGHTS) and sum(line["sources"].values()) == line["tokens"]
    moved = f"run.dir={tmp_path}/moved"
    small = "train.micro_batch_size=2"
    first = run(recipe, 4, moved, small, "mesh.dp_shard=2", "mesh.tp=2", stop=2)
    second = run(recipe, 2, moved, small, "mesh.cp=2", stop=4)
    third = run(recipe, 2, moved, small, "mesh.dp_shard=2")
    assert first["ids"] + second["ids"] + third["ids"] == alone["ids"]
    for one, other in zip(steps_of(third), steps_of(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_stream_has_the_shares_and_reads_each_source_in_its_own_order(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    preview = open_preview(load_recipe(recipe_of(tmp_path, sources)))
    batches: Any = preview.batches
    sizes = [len(own) for own in batches.samples.sources.values()]
    assert min(sizes) > 10, sizes
    ids = batches.order.sample_ids(0, 10_000)
    number = batches.samples.sources_of(ids)
    counts = np.bincount(number)
    assert np.abs(counts - 10_000 * np.array([3, 1, 2]) / 6).max() <= 1.1
    for source, size in enumerate(sizes):
        own = ids[number == source] - batches.samples.firsts[source]
        for epoch in range(len(own) // size):  # each sample once, then all of them again in another order
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert list(own[:size]) != list(own[size : 2 * size])
    batches.global_batch_size = 100
    np.testing.assert_array_equal(np.concatenate([batches.sample_ids(at) for at in range(0, 10_000, 100)]), ids)


@pytest.mark.parametrize(("stop", "epochs"), [("first", 1), ("first", 3), ("all", 1), ("all", 2)])
def test_a_source_that_ends_ends_the_run(tmp_path: Path, sources: list[dict[str, Any]], stop: str, epochs: int) -> None:
    recipe = load_recipe(recipe_of(tmp_path, sources), [f"data.stop={stop}", "train.steps=1000"])
    batches: Any = open_preview(recipe).batches
    end = batches.order.end(epochs)
    number = batches.samples.sources_of(batches.order.sample_ids(0, end))
    sizes = np.array([len(own) for own in batches.samples.sources.values()])
    read, before = np.bincount(number, minlength=3), np.bincount(number[:-1], minlength=3)
    ended = np.any if stop == "first" else np.all
    assert ended(read >= epochs * sizes) and not ended(before >= epochs * sizes)
    assert batches.order.epoch(end) == epochs
    if epochs == 1:
        steps = -(-end // 8)
        assert with_steps(recipe, batches.order, step=0, cursor=0).train.steps == steps
        assert with_steps(recipe, batches.order, step=steps, cursor=8 * steps).train.steps == steps
        short = load_recipe(recipe_of(tmp_path, sources), [f"data.stop={stop}", "train.steps=2"])
        assert with_steps(short, batches.order, step=0, cursor=0).train.steps == 2
        no_warm_up = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"warmup_steps": None})})
        found = with_steps(no_warm_up, batches.order, step=0, cursor=0)
        assert found.schedule.warmup_steps == (2 * steps + 50) // 100, "not of train.steps"


def test_a_mixture_goes_on_from_the_last_step_of_an_epoch_on_fewer_ranks(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, sources)
    epochs = ["data.stop=first", "train.global_batch_size=32", "train.micro_batch_size=8"]
    text = recipe.read_text()
    assert "steps = 6\n" in text
    recipe.write_text(text.replace("steps = 6\n", "epochs = 2\n"))
    order: Any = open_preview(load_recipe(recipe, epochs)).batches.order
    last, steps = -(-order.end(1) // 32), -(-order.end(2) // 32)
    first = run(recipe, 4, *epochs, "mesh.dp_shard=4", f"checkpoint.every={last}", stop=last)
    second = run(recipe, 2, *epochs, "mesh.dp_shard=2", "checkpoint.every=1", stop=last + 1)
    third = run(recipe, 1, *epochs)
    found = np.ravel(first["ids"] + second["ids"] + third["ids"])
    np.testing.assert_array_equal(found, order.sample_ids(0, 32 * steps))
    assert third["metrics"][last - 1]["epoch"] >= 1 > third["metrics"][last - 2]["epoch"]


def test_a_run_that_its_first_source_has_ended_goes_on_with_another_stop(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, sources)
    batch = ["train.global_batch_size=32", "train.micro_batch_size=8"]
    order: Any = open_preview(load_recipe(recipe, ["data.stop=first", *batch])).batches.order
    last = -(-order.end(1) // 32)
    first = run(recipe, 1, "data.stop=first", f"train.steps={last + 9}", *batch)
    second = run(recipe, 1, "data.stop=never", f"train.steps={last + 1}", *batch)
    found = np.ravel(first["ids"] + second["ids"])
    np.testing.assert_array_equal(found, order.sample_ids(0, 32 * (last + 1)))


def test_epochs_of_a_mixture_are_those_of_the_source_that_stop_names(
    tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    recipe = recipe_of(tmp_path, sources)
    text = recipe.read_text().replace("steps = 6\n", "epochs = 1\n").replace("warmup_steps = 0\n", "")
    recipe.write_text(text)
    with pytest.raises(
        RecipeError, match=r'train\.epochs = 1 needs to know of which source: set data\.stop to "first"'
    ):
        load_recipe(recipe)
    short = [{**source, "weight": 1} for source in sources]
    recipe.write_text(recipe_of(tmp_path, short).read_text().replace("steps = 6\n", "epochs = 1\n"))
    found = run(recipe, 1, "data.stop=first", "schedule.warmup_steps=0")
    assert found["metrics"][-2]["epoch"] < 1 <= found["metrics"][-1]["epoch"]
    again = get_pool(1).run(resumed, str(recipe), ["data.stop=first", "schedule.warmup_steps=0"], timeout=100)[0]
    assert not again["error"] and "raise train.epochs to train further" in again["said"]


def test_held_out_sources_are_measured_each_and_together(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    parts = [tmp_path / "a", tmp_path / "b"]
    for number, file in enumerate(sorted(corpus.iterdir())):
        (parts[number % 2]).mkdir(exist_ok=True)
        file.rename(parts[number % 2] / file.name)
    model = tiny.save_model("llama", tmp_path)
    held_out = [{"path": str(part), "name": part.name} for part in parts]
    at = {"every": 0, "at_start": True}
    common: dict[str, Any] = {"model": {"name": str(model)}, "run_dir": tmp_path / "run", "steps": 3}
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml", corpus=parts[0], **common, eval={"sources": held_out, **at}, mesh={"dp_shard": 2}
    )
    run_to_end(recipe, 2)
    found = next(line for line in lines(tmp_path / "run") if "eval_loss" in line)
    wanted, total, count = {}, 0.0, 0
    for part in parts:
        alone = tiny.recipe_file(tmp_path / "alone.toml", corpus=part, **common, eval={"path": str(part), **at})
        wanted[part.name], own = plain(model, alone)
        total, count = total + wanted[part.name] * own, count + own
    assert found["sources"] == pytest.approx(wanted, rel=1e-5)
    assert found["eval_tokens"] == count and found["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def run_to_end(recipe: Path, ranks: int) -> None:
    get_pool(ranks).run(evaluated, str(recipe), timeout=200)


def evaluated(path: str) -> None:
    from tests import proofs
    from tests.trainers import trainer_of

    trainer = trainer_of(path, [])
    with proofs.remembered():
        trainer.prepare()
    trainer.train()


CHANGES = {
    "weights": (lambda s: s[0].update(weight=4), "another order of samples"),
    "a path of another content": (lambda s: s[0].update(path=s[2]["path"]), "other data"),
    "one source less": (lambda s: s.pop(), "other data"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_resume_refuses_another_mixture(tmp_path: Path, sources: list[dict[str, Any]], case: str) -> None:
    change, meaning = CHANGES[case]
    recipe = recipe_of(tmp_path, sources, steps=2)
    run(recipe)
    changed = [dict(source) for source in sources]
    change(changed)  # type: ignore[no-untyped-call]
    recipe_of(tmp_path, changed, steps=3)
    found = get_pool(1).run(resumed, str(recipe), [], timeout=100)[0]
    assert "data.sources was" in found["error"] and meaning in found["error"], found
    assert 'checkpoint.allow = ["data.sources"]' in found["error"] and not found["tokenized"]
    found = get_pool(1).run(resumed, str(recipe), ['checkpoint.allow=["data.sources"]'], timeout=100)[0]
    assert not found["error"] and "steps 3 to 3" in found["said"]


def test_a_resume_goes_on_with_the_same_sources_elsewhere(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    recipe = recipe_of(tmp_path, sources, steps=2)
    run(recipe)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(sources[1]["path"]).read_bytes())
    changed = [sources[0], sources[1] | {"path": str(copy)}, sources[2] | {"name": "x"}]
    twice = [source | {"weight": 2 * source.get("weight", 1)} for source in changed]
    recipe_of(tmp_path, twice, steps=3)
    found = get_pool(1).run(resumed, str(recipe), [], timeout=100)[0]
    assert not found["error"] and "the same content and shares" in found["said"], found


def test_a_preview_names_the_source_of_each_row(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    preview = open_preview(load_recipe(recipe_of(tmp_path, sources)))
    rows = list(preview.rows(12))
    assert [sum(row["source"] == name for row in rows) for name in WEIGHTS] == [6, 2, 4]
    assert all(row["input_ids"][0] < 100 for row in rows if row["source"] == "lists")
    counts = preview.counts()
    each = counts["sources"]
    assert {name: own["format"] for name, own in each.items()} == {"prose": "text", "chat": "chat", "lists": "tokens"}
    for key in ("documents", "tokens", "targets", "rows", "skipped"):
        assert counts[key] == sum(own[key] for own in each.values())
    assert any("data.sources[1]" in note for note in preview.notes)


BAD: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "a file that is missing": ({1: {"path": "nowhere.jsonl"}}, r"data\.sources\[1\]\.path"),
    "a name without a field": ({1: {"columns": {"tools": "x"}}}, r'data\.sources\[1\]\.columns\.tools = "x": no row'),
    "a key of another format": ({0: {"train_on": ["user"]}}, r'data\.sources\[0\]\.train_on .* format is "text"'),
    "two templates": ({2: {"copy": 1, "chat_template": "llama3"}}, r"data\.sources\[1\] and data\.sources\[2\] are"),
    "two of one name": ({2: {"name": "chat"}}, r'data\.sources\[2\] has the name "chat", as another source has'),
    "no weight": ({2: {"weight": 0}}, r"data\.sources\[2\]\.weight = 0 must be a number above 0"),
    "next to no weight": ({2: {"weight": 1e-9}}, r"data\.sources\[2\]\.weight = 1e-09 is .* fewer than one in 131,072"),
    "no path": ({2: {"path": None}}, r"data\.sources\[2\]\.path is required"),
    "its own length": ({2: {"seq_len": 8}}, r'data\.sources\[2\] has no key "seq_len"; it belongs to \[data\]'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_source_names_it(tmp_path: Path, sources: list[dict[str, Any]], case: str) -> None:
    changes, message = BAD[case]
    changed = [dict(source) for source in sources]
    for number, change in changes.items():
        if "copy" in change:
            changed[number] = {**changed[change["copy"]], "name": "other"}
        changed[number] |= {key: value for key, value in change.items() if key != "copy"}
        changed[number] = {key: value for key, value in changed[number].items() if value is not None}
    with pytest.raises((RecipeError, AssertionError), match=message):
        run(recipe_of(tmp_path, changed))


def test_a_recipe_with_sources_is_read_back(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    recipe = load_recipe(recipe_of(tmp_path, sources))
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(again) == recipe
    assert tomli_w.dumps({"sources": sources}).count("[[sources]]") == 3
