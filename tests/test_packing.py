"""Rows of whole documents: which documents are where, what is cut or left out, and what is stored of it."""

from __future__ import annotations

import itertools
import json
import os
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ndtrain.data import index
from ndtrain.data.corpus import Corpus, Part
from ndtrain.data.index import RowIndex, build_index, open_index
from ndtrain.data.samples import Concatenated, Whole, open_samples
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.test_train import ALL_MESHES, ranks_of


def bounds_of(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def corpus_of(lengths: Any, *, parts: int = 1) -> Corpus:
    """Documents whose tokens count up through all of them, so that each token is another."""
    first, made = 0, []
    for some in np.array_split(np.asarray(lengths), parts):
        docs = bounds_of(some)
        tokens = np.arange(first, first + docs[-1], dtype=np.uint32)
        made.append(Part("", tokens=tokens, docs=docs, largest=0))
        first += int(docs[-1])
    return Corpus(made, "k")


def some_lengths(case: int) -> tuple[np.ndarray, int]:
    """Lengths of documents and of rows: few and many of one length, some longer than a row, down to two tokens."""
    random = np.random.default_rng(case)
    size, number = int(random.integers(2, 40)), int(random.integers(1, 80))
    few = random.choice([2, 3, size // 2 + 1, size, size + 1, 3 * size + 1], size=number)
    return np.maximum(2, few if case % 3 == 0 else random.integers(2, (case % 3) * size + 1, size=number)), size


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as textbooks have it: the sizes in each bin."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        room = [(capacity - sum(one), number) for number, one in enumerate(bins) if capacity - sum(one) >= size]
        if room:
            bins[min(room)[1]].append(size)
        else:
            bins.append([size])
    return bins


def cut(lengths: np.ndarray, size: int) -> list[tuple[int, int]]:
    """(first token, tokens) of each piece; a last token alone is none, since it has no target."""
    pieces, start = [], 0
    for length in lengths.tolist():
        pieces += [(start + at, min(size, length - at)) for at in range(0, max(1, length - 1), size)]
        start += length
    return pieces


@pytest.mark.parametrize(("parts", "block"), [(1, 1), (1, 1 << 20), (3, 7)])
def test_rows_are_those_of_best_fit_decreasing(parts: int, block: int) -> None:
    for case in range(120):
        lengths, size = some_lengths(case)
        corpus = corpus_of(lengths, parts=parts)
        found = build_index(partial(corpus.bounds_in_blocks, block), size, best_fit=True)
        sizes = dict(cut(lengths, size))
        rows = [found.pieces(row).tolist() for row in range(len(found))]
        assert sorted(itertools.chain(*rows)) == sorted(sizes), "each piece once"
        fills = sorted(sum(sizes[start] for start in row) for row in rows)
        assert fills == sorted(map(sum, best_fit_decreasing(list(sizes.values()), size))), (lengths, size)
        assert [min(row) for row in rows] == sorted(min(row) for row in rows), "rows in the order of the data"
        assert found.tokens == sum(fills) and found.too_long == (lengths > size).sum()


def test_the_rows_of_these_lengths_never_change() -> None:
    lengths = [5, 9, 2, 3, 8, 20, 4, 7, 6, 2]
    found = build_index(corpus_of(lengths).bounds_in_blocks, 10, best_fit=True)
    assert [sorted(found.pieces(row).tolist()) for row in range(len(found))] == ROWS
    assert found.first_too_long == 5


ROWS = [[0, 64], [5], [14, 19], [16, 51], [27], [37], [47, 58]]


@pytest.mark.parametrize("packing", ["best_fit", False])
def test_documents_are_whole_and_restart_their_positions(tmp_path: Path, packing: Any) -> None:
    for case in range(30):
        lengths, size = some_lengths(case)
        samples = open_samples(
            corpus_of(lengths, parts=1 + case % 2), size, packing=packing, pad_id=7, folder=tmp_path / str(case)
        )
        sizes, docs = dict(cut(lengths, size)), bounds_of(lengths)
        seen: list[int] = []
        for row in (samples[number] for number in range(len(samples))):
            ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
            if not packing:
                np.testing.assert_array_equal(positions, np.arange(size))
            begins = [at for at in range(size) if positions[at] == 0]
            for begin, end in itertools.pairwise([*begins, size]):
                np.testing.assert_array_equal(positions[begin:end], np.arange(end - begin))
                start, filled = int(ids[begin]), end - begin
                if begin and ids[begin] == 7 and (labels[begin:end] == -100).all():
                    assert (ids[begin:end] == 7).all() and end == size, "padding is a document of its own, at the end"
                    continue
                tokens = sizes[start] if not packing else filled
                assert tokens == sizes[start], "a whole document or piece"
                np.testing.assert_array_equal(ids[begin : begin + tokens], np.arange(start, start + tokens))
                last = int(docs[np.searchsorted(docs, start, side="right")]) - 1  # has no target
                want = [t + 1 if t < last else -100 for t in range(start, start + tokens)]
                assert labels[begin : begin + tokens].tolist() == want
                assert (labels[begin + tokens : end] == -100).all()
                seen.append(start)
        assert sorted(seen) == sorted(sizes), "each document once"


def test_long_documents_are_cut_left_out_or_refused(tmp_path: Path) -> None:
    lengths = [4, 11, 5, 30, 10]  # 10 is as long as a row

    def opened(too_long: Any, packing: Any = "best_fit") -> Any:
        return open_samples(corpus_of(lengths), 10, packing=packing, too_long=too_long, pad_id=0, folder=tmp_path)

    for packing in ("best_fit", False):
        rows = [opened("drop", packing)[i] for i in range(len(opened("drop", packing)))]
        tokens = sorted(itertools.chain(*(row["labels"][row["labels"] >= 0].tolist() for row in rows)))
        assert tokens == [1, 2, 3, 16, 17, 18, 19, *range(51, 60)]
        assert opened("drop", packing).describe().endswith("; longer than a row and left out: 2")
        assert opened("cut", packing).describe().endswith("; longer than a row and cut: 2")
        refusal = r"2 of the 5 documents .* the first is document 2, the longest has 30 tokens; .*data\.too_long"
        with pytest.raises(RecipeError, match=refusal):
            opened("error", packing)
    assert "documents: 5; rows of 10 tokens: 6, 98.3% filled by 59 tokens" in opened("cut").describe()
    assert len({opened(how).fingerprint for how in ("cut", "drop")}) == 2
    with pytest.raises(RecipeError, match=r"leaves no document: all 2 have more than data\.seq_len = 3"):
        open_samples(corpus_of([4, 5]), 3, packing=False, too_long="drop", pad_id=0, folder=tmp_path / "none")


@pytest.mark.parametrize("packing", ["best_fit", False])
@pytest.mark.parametrize("at_once", [7, 1 << 24])
def test_a_piece_without_a_target_is_in_no_row(packing: Any, at_once: int) -> None:
    lengths, random = [4, 31, 5, 30, 10, 3], np.random.default_rng(0)
    corpus = corpus_of(lengths, parts=2)
    masked, begins = [], bounds_of(lengths)
    for part in corpus.parts:
        loss = random.random(len(part.tokens)) < 0.1
        loss[part.docs[:-1]] = False
        masked.append(replace(part, loss=loss, targets=int(loss.sum())))
    corpus = Corpus(masked, "k")
    carry = set(np.flatnonzero(corpus.loss(0, corpus.n_tokens)).tolist())
    with mock.patch("ndtrain.data.index._MOST", at_once):
        samples = open_samples(corpus, 10, packing=packing, pad_id=0)
    rows = [samples[i] for i in range(len(samples))]
    assert sorted(itertools.chain(*(row["labels"][row["labels"] >= 0].tolist() for row in rows))) == sorted(carry)
    pieces = [(s, min(s + 10, e)) for b, e in itertools.pairwise(begins) for s in range(b, e - 1, 10)]
    empty = [piece for piece in pieces if not carry & set(range(piece[0] + 1, piece[1] + 1))]
    if packing is False:
        assert len(rows) == len(pieces) - len(empty) and all((row["labels"] >= 0).any() for row in rows)
    assert samples.describe().endswith(f"; without a target, left out: {len(empty)}") and empty


def test_a_document_is_named_by_its_file() -> None:
    files = [[Path("a.jsonl")], [Path("d/b.txt"), Path("d/c.txt")]]
    parts = [replace(part, files=own) for part, own in zip(corpus_of([2] * 6, parts=2).parts, files, strict=True)]
    corpus = Corpus(parts, "k")
    assert corpus.place(2) == "document 3 of a.jsonl"
    assert corpus.place(4) == "document 2 of those in d from b.txt to c.txt"


def test_nothing_that_concat_needs_grows_with_the_documents(tmp_path: Path) -> None:
    """The bounds of a thousand million documents, as a file without blocks, of which a row reads a few pages."""
    file = tmp_path / "docs.bin"
    with file.open("wb") as made:
        made.truncate((10**9 + 1) * 8)
    docs = np.memmap(file, np.int64, "r+").view(np.ndarray)
    docs[-1] = 10**12
    tokens = np.broadcast_to(np.uint16(5), 10**12)
    tracemalloc.start()
    samples = Concatenated(Corpus([Part("", tokens=tokens, docs=docs, largest=5)], "k"), 4096, pad_id=0)
    assert len(samples) == -(-(10**12 - 1) // 4096)
    assert samples[len(samples) // 2]["labels"].tolist() == [5] * 4096
    assert "documents: 1,000,000,000; rows of 4,096 tokens: 244,140,625, 100.0%" in samples.describe()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# ---- what is stored


def stored(folder: Path, **more: Any) -> RowIndex:
    options: dict[str, Any] = {"best_fit": True, "drop": False, "folder": folder, "advance": lambda: None, **more}
    return open_index(corpus_of([5, 9, 2, 3, 8, 20, 4]).bounds_in_blocks, 10, **options)


def test_rows_are_computed_once_and_then_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    for name, more in (("packed", {}), ("single", {"best_fit": False}), ("rest", {"drop": True})):
        first = stored(tmp_path / name, advance=lambda: blocks.append(1), **more)
        assert blocks, "progress is told"
        with monkeypatch.context() as patched:
            patched.setattr(index, "build_index", lambda *a, **k: pytest.fail("computed again"))
            again = stored(tmp_path / name, **more)
        assert (again.rows is None) == ("best_fit" in more)
        for one, other in ((first.starts, again.starts), (first.rows, again.rows)):
            np.testing.assert_array_equal(one, other)
        assert first[2:] == again[2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "rest", "single"], "nothing left over"


def test_another_process_winning_the_race_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    assert len(stored(folder, advance=lambda: stored(folder))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_rows_that_could_not_be_computed_leave_nothing(tmp_path: Path) -> None:
    def stop() -> None:
        raise OSError

    with pytest.raises(OSError):
        stored(tmp_path / "rows", advance=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["starts.bin", "rows.bin", "meta.json"])
@pytest.mark.parametrize("how", ["truncate", "remove", "alter"])
def test_rows_that_are_not_whole_are_refused(tmp_path: Path, name: str, how: str) -> None:
    file = tmp_path / "rows" / name
    stored(file.parent)
    if how == "truncate":
        os.truncate(file, file.stat().st_size - 2)
    elif how == "remove":
        file.unlink()
    elif name == "meta.json":
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 9}))
    else:
        np.array([3] * (file.stat().st_size // 8)).tofile(file)
    cache = corpus_of([5, 9, 2, 3, 8, 20, 4])
    with pytest.raises(DamagedError, match=f"{file.parent}: .*; delete the directory"):
        samples = Whole(cache, 10, packing="best_fit", index=stored(file.parent), pad_id=0)
        for row in range(len(samples)):
            samples[row]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NdtrainError, match=r"cannot write the token cache in .*NDTRAIN_CACHE"):
        open_samples(corpus_of([5, 6]), 8, packing=False, pad_id=0, folder=tmp_path / "file" / "cache")


# ---- what is trained


def gradients(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of a step, and the whole gradient of each parameter, as the optimizer gets it."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    engine, found = trainer.engine, {}
    update = engine.update

    def noted(step: int, *, skip: Any) -> float:
        named = engine.model.named_parameters()
        found.update({fqn: param.grad.full_tensor().clone() for fqn, param in named})  # type: ignore[union-attr]
        return update(step, skip=skip)

    engine.update = noted  # type: ignore[method-assign]
    metrics = trainer.train_step()
    ids = trainer.batches.sample_ids(0).tolist()
    return {"tokens": metrics.tokens, "loss": metrics.loss, "grad_norm": metrics.grad_norm, "ids": ids}, found


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ("1", {}),
        ("tp2", {}),
        ("dp_shard2-cp2", {"cp": {"kind": "ulysses"}}),
        ("dp_shard2-cp2", {"cp": {"kind": "ring"}}),
    ],
)
def test_documents_in_shared_rows_give_the_gradient_that_they_give_alone(
    tmp_path: Path, mesh: str, more: dict[str, Any]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, length in enumerate([60, 5, 9, 40, 21, 62, 1, 33, 17, 28, 2, 12]):  # and two marks each
        (corpus / f"{number:02}.txt").write_text(bytes((number * 37 + i * i) % 90 + 33 for i in range(length)).decode())
    found = []
    for packing, rows in ((False, 12), ("best_fit", 5)):
        folder = tmp_path / str(packing)
        folder.mkdir()
        recipe = tiny.recipe_file(
            folder / "recipe.toml",
            model={"type": "llama", "config": tiny.CONFIGS["llama"]},
            corpus=corpus,
            run_dir=folder / "run",
            mesh=ALL_MESHES[mesh],
            steps=1,
            schedule={"warmup_steps": 0},
            data={"packing": packing, "seq_len": 64},
            train={"global_batch_size": rows, "micro_batch_size": 3},
            **more,
        )
        metrics, grads = get_pool(ranks_of(ALL_MESHES[mesh])).run(gradients, str(recipe), timeout=200)[0]
        assert sorted(metrics["ids"]) == list(range(rows)), "one step is one epoch"
        found.append((metrics, grads))
    (alone, gradients_alone), (shared, gradients_shared) = found
    for fqn, want in gradients_alone.items():
        assert (gradients_shared[fqn] - want).abs().max() <= 1e-4 * want.abs().max(), fqn
    assert shared["tokens"] == alone["tokens"]
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
