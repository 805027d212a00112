"""`data.window`: windows of files, the same on every mesh and after a resume, prepared one ahead and removed behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndtrain.data.batches import GlobalBatches
from ndtrain.data.corpus import Corpus, Part
from ndtrain.data.samples import Samples, open_samples
from ndtrain.data.windows import FilePlan, WindowOrder, Windows
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.recipe import load_recipe
from ndtrain.recipe.data import window_bytes
from ndtrain.train.preview import open_preview
from tests import tiny
from tests.chat.tokenizers import inner_of
from tests.ranks import RanksFailed, get_pool
from tests.test_train import trained

SIZES = [40, 7, 90, 33, 12, 25, 60, 8]


def test_all_files_are_in_each_epoch_once_and_windows_are_of_the_size_that_was_asked_for() -> None:
    plan = FilePlan(SIZES, window=64, seed=1, shuffle=True)
    number, orders = 0, []
    for epoch in range(3):
        files: list[int] = []
        while plan.place(number)[0] == epoch:
            own = plan.files(number)
            assert sum(SIZES[file] for file in own) <= 64 or len(own) == 1
            begins, ends = plan.share(number)
            assert begins == pytest.approx(epoch + sum(SIZES[file] for file in files) / sum(SIZES))
            files += own
            assert ends == pytest.approx(epoch + sum(SIZES[file] for file in files) / sum(SIZES))
            number += 1
        assert sorted(files) == list(range(len(SIZES)))
        orders.append(files)
    assert orders[0] != orders[1] != orders[2]
    assert FilePlan(SIZES, window=64, seed=1, shuffle=True).files(number) == plan.files(number), "without those before"
    in_order = FilePlan(SIZES, window=64, seed=1, shuffle=False)
    assert [file for window in range(in_order.count()) for file in in_order.files(window)] == list(range(len(SIZES)))


def windows_of(log: list[str], *, number: int = 0, first: int = 0, shuffle: bool = True) -> Windows:
    """Windows of documents of 5 tokens, as many as a file has bytes, which name their file."""

    def opened(window: int) -> Samples:
        log.append(f"open {window}")
        parts = []
        for file in plan.files(window):
            docs = np.arange(SIZES[file] + 1, dtype=np.int64) * 5
            parts.append(Part("", tokens=np.arange(docs[-1]) + 1000 * file, docs=docs, largest=0))
        return open_samples(Corpus(parts, "k"), 5, packing=False, pad_id=0)

    plan = FilePlan(SIZES, window=64, seed=1, shuffle=shuffle)
    drop = lambda window: log.append(f"drop {window}")  # noqa: E731
    return Windows(plan, opened, drop, lambda: None, key="k", number=number, first=first)


def rows_of(windows: Windows, cursor: int, size: int, ranks: int) -> list[int]:
    """The first tokens of a global batch's rows, in its order, as `ranks` batch ranks load them."""
    windows.reach(cursor, cursor + size)
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(ranks):
        how: dict[str, Any] = {"global_batch_size": size, "micro_batch_size": 2, "batch_rank": rank}
        batches = GlobalBatches(windows, WindowOrder(windows), **how, batch_ranks=ranks)
        for step, batch in enumerate(batches.load(cursor)):
            found[step, rank] = batch["input_ids"][:, 0].tolist()
    return [token for key in sorted(found) for token in found[key]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_is_the_same_for_all_ranks_and_from_every_cursor(shuffle: bool) -> None:
    size, steps = 8, 80
    log: list[str] = []
    windows = windows_of(log, shuffle=shuffle)
    batches, places = [], []
    for step in range(steps):
        batches.append(rows_of(windows, step * size, size, 1))
        places.append(windows.at((step + 1) * size))
    total = sum(SIZES)
    seen = np.ravel(batches)[:total]
    assert sorted(seen) == sorted(1000 * file + 5 * row for file, count in enumerate(SIZES) for row in range(count))
    assert (seen.tolist() == sorted(seen)) != shuffle
    for ranks in (2, 4):
        again = windows_of([], shuffle=shuffle)
        assert [rows_of(again, step * size, size, ranks) for step in range(steps)] == batches
    borders = 0
    for step, (number, first) in enumerate(places[:-1], start=1):
        own: list[str] = []
        resumed = windows_of(own, number=number, first=first, shuffle=shuffle)
        assert rows_of(resumed, step * size, size, 2) == batches[step]
        assert own[0] == f"open {number}", "no window before it"
        borders += first == step * size
    opened = [line for line in log if line.startswith("open")]
    assert opened == [f"open {number}" for number in range(len(opened))]
    at = {line: place for place, line in enumerate(log)}
    assert all(at[f"drop {number}"] < at[f"open {number + 3}"] for number in range(len(opened) - 3)), "few at a time"


@pytest.mark.parametrize("first", range(8))
def test_windows_have_a_whole_epoch_from_the_first_that_begins_in_them_to_its_end(first: int) -> None:
    plan = FilePlan(SIZES, window=64, seed=1, shuffle=True)
    for last in range(first, first + 20):
        seen = [plan.place(number)[0] for number in range(first, last + 1)]
        full = [
            number for number in range(3) if seen.count(number) == sum(plan.place(n)[0] == number for n in range(40))
        ]
        assert plan.has_all(first, last) == bool(full)


def test_windows_without_rows_are_passed_over() -> None:
    def windows(without: set[int], **more: int) -> Windows:
        made = windows_of([], **more)
        open_ = made._open
        made._open = lambda number: None if number in without else open_(number)
        return made

    without = {0, 3, 4}
    one = windows(without)
    batches = [rows_of(one, step * 8, 8, 1) for step in range(60)]
    own = windows(without)
    own.reach(0, 480)
    for step in range(1, 60):
        number, first = own.at(step * 8)
        assert (
            number not in without
            and rows_of(windows(without, number=number, first=first), step * 8, 8, 2) == batches[step]
        )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2e9),
        ("1.5 MiB", 1.5 * 2**20),
        ("700KB", 7e5),
        ("3TB", 3e12),
        ("5B", 5),
        ("4KiB", 4096),
        ("5kB", 5000),
        ("0.5GB", 5e8),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert window_bytes(text) == size


def recipe_of(folder: Path, *, steps: int = 12, bad: bool = False, **more: dict[str, Any]) -> Path:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    text = (Path(json.__file__).parent / "decoder.py").read_text()
    for number in range(8):
        rows = [{"text": text[at : at + 90]} for at in range(number * 1000, number * 1000 + 900, 90)]
        lines = [json.dumps(row) for row in rows]
        (data / f"{number}.jsonl").write_text("\n".join(lines) + ("\nno json" if bad and number == 6 else ""))
    return tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=data,
        run_dir=folder / "run",
        steps=steps,
        data={"seq_len": 64, "window": "2300B"},
        checkpoint={"every": 3, "resume": "auto"},
        schedule={"warmup_steps": 0},
        **more,
    )


def run(recipe: Path, ranks: int = 1, *overrides: str, stop: int | None = None) -> dict[str, Any]:
    return get_pool(ranks).run(trained, str(recipe), list(overrides), stop, timeout=200)[0]


def test_a_run_in_windows_resumes_on_another_mesh(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    alone = run(recipe)
    moved = [f"run.dir={tmp_path}/moved", "train.micro_batch_size=2"]
    first = run(recipe, 2, *moved, "mesh.dp_shard=2", stop=6)
    second = run(recipe, 2, *moved, "mesh.tp=2", stop=9)
    third = run(recipe, 1, *moved)
    ids = first["ids"] + second["ids"] + third["ids"]
    assert ids == alone["ids"] and len({id >> 40 for batch in ids for id in batch}) > 3, "several windows"
    one, other = ([(m["loss"], m["grad_norm"], m["epoch"]) for m in found["metrics"]] for found in (third, alone))
    assert one == [pytest.approx(line, rel=1e-4) for line in other]


def test_a_resume_in_a_window_whose_files_have_changed_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe, stop=3)
    for file in (tmp_path / "data").iterdir():
        file.write_text(file.read_text().replace("o", "u"))  # the same size
    with pytest.raises(
        RanksFailed, match=r"RecipeError: .*step-00000003: data\.path: files of window 0, in which the run"
    ):
        run(recipe, 2, "mesh.dp_shard=2", "train.micro_batch_size=2")


def watched(path: str) -> list[tuple[int, list[str], list[int]]]:
    """Before each step: its number, the windows on disk, and those that are open."""
    from ndtrain.train import windows
    from tests import proofs
    from tests.trainers import trainer_of

    found = []
    ahead = windows._Ahead._run
    windows._Ahead._run = lambda self, work: None  # type: ignore[method-assign]  # nothing is prepared ahead
    try:
        trainer: Any = trainer_of(path, [])
        with proofs.remembered():
            trainer.prepare()
        folder = next(windows.cache_root().joinpath("windows").iterdir())
        while trainer.step < trainer.steps:
            on_disk = sorted(entry.name for entry in folder.iterdir())
            found.append((trainer.step, on_disk, sorted(trainer.batches.samples._opened)))
            trainer.train_step()
        trainer.train()
        windows.close_data(trainer.batches)
        assert not folder.exists()
    finally:
        windows._Ahead._run = ahead  # type: ignore[method-assign]
    return found


def test_the_first_step_needs_one_window_and_few_are_on_disk(tmp_path: Path) -> None:
    found = get_pool(1).run(with_cache, str(tmp_path / "cache"), str(recipe_of(tmp_path)), timeout=200)[0]
    assert found[0] == (0, ["0"], [0])
    assert all(on_disk == [str(number) for number in opened] and len(opened) <= 2 for _, on_disk, opened in found)
    assert found[-1][2][0] >= 2


def with_cache(cache: str, path: str) -> Any:
    from unittest import mock

    with mock.patch.dict("os.environ", {"NDTRAIN_CACHE": cache}):
        return watched(path)


def test_a_bad_row_in_a_later_window_ends_the_run_with_its_line(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bad=True)
    with pytest.raises(RanksFailed, match=r"DamagedError: .*6\.jsonl, line 11") as failed:
        run(recipe, 2, "mesh.dp_shard=2", "train.micro_batch_size=2")
    assert "rank 1:" in str(failed.value)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 12, "steps before were made and logged"


def test_a_window_without_rows_is_left_out_and_data_without_any_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    data = tmp_path / "data"
    (data / "blank.jsonl").write_text(json.dumps({"text": ""}) + "\n" * 3000)
    alone = run(recipe)
    moved = [f"run.dir={tmp_path}/moved", "train.micro_batch_size=2", "mesh.dp_shard=2"]
    assert run(recipe, 2, *moved)["ids"] == alone["ids"]
    assert len({id >> 40 for batch in alone["ids"] for id in batch}) > 3
    for number in range(8):
        (data / f"{number}.jsonl").unlink()
    (data / "blank2.jsonl").write_text(json.dumps({"text": ""}) + "\n" * 3000)
    with pytest.raises(RanksFailed, match=r"NoRowsError: data\.path: .*blank2?\.jsonl has no text"):
        run(recipe, 2, f"run.dir={tmp_path}/none", *moved[1:])


def test_a_file_that_is_no_longer_what_was_planned_ends_the_run(tmp_path: Path) -> None:
    found = get_pool(1).run(with_a_file_grown, str(recipe_of(tmp_path)), timeout=200)[0]
    assert "bytes, and had" in found and "restore it" in found


def with_a_file_grown(path: str) -> str:
    """The error of a run, one of whose files grows before its window."""
    from ndtrain.train import windows
    from tests import proofs
    from tests.trainers import trainer_of

    ahead = windows._Ahead._run
    windows._Ahead._run = lambda self, work: None  # type: ignore[method-assign]  # nothing is prepared ahead
    try:
        trainer: Any = trainer_of(path, [])
        with proofs.remembered():
            trainer.prepare()
        plan = trainer.batches.samples.plan
        with (Path(path).parent / "data" / f"{plan.files(1)[0]}.jsonl").open("a") as grown:
            grown.write(json.dumps({"text": "later"}) + "\n")
        with pytest.raises(DamagedError) as failed:
            trainer.train()
        windows.close_data(trainer.batches)
    finally:
        windows._Ahead._run = ahead  # type: ignore[method-assign]
    return str(failed.value)


def test_a_name_of_a_field_that_no_row_of_a_window_has_is_noted(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    for file in (tmp_path / "data").iterdir():
        file.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    overrides = ["data.columns={tools='x'}", f"data.tokenizer={saved_tokenizer(tmp_path)}", "data.chat_template=chatml"]
    notes = open_preview(load_recipe(recipe, overrides)).notes
    assert 'window 0: note: data.columns.tools = "x": no row of these files has such a field' in notes


def saved_tokenizer(folder: Path) -> Path:
    inner_of("qwen").save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_a_preview_shows_the_first_window_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDTRAIN_CACHE", str(tmp_path / "cache"))
    preview = open_preview(load_recipe(recipe_of(tmp_path)))
    assert any("shown is the first window" in note for note in preview.notes)
    counts = preview.counts()
    assert counts["documents"] == 20 and len(list(preview.rows(100))) == counts["rows"]
    assert not list((tmp_path / "cache" / "windows").iterdir())


REFUSED = {
    "epochs": (["train.epochs=1"], r"data\.window = \"2300B\" does not go with train\.epochs"),
    "sources": (['data.sources=[{path="a"}]'], r"data\.window = \"2300B\" does not go with \[\[data\.sources\]\]"),
    "tokens": (["data.format=tokens"], r'data\.window = "2300B" is for text and chat'),
    "nothing": (["data.window=0B"], r'data\.window = "0B" must be a size'),
    "no size": (["data.window=2 gigabytes"], r'data\.window = "2 gigabytes" must be a size, such as "500MB"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_windows_do_not_go_with_is_refused(tmp_path: Path, case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_of(tmp_path), overrides)
