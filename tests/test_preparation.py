"""A corpus has the same tokens however it is prepared: in one process or many, undisturbed or killed."""

import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndtrain.data import preparation
from ndtrain.data.cache import build_cache
from ndtrain.data.corpus import Corpus
from ndtrain.data.row import Encoded, Encoder, RowError
from ndtrain.data.text import TextEncoder
from ndtrain.data.workers import Workers
from ndtrain.errors import DamagedError, NdtrainError, Stopped
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer


class Masked(TextEncoder):
    """Every second token carries loss; some texts do other things."""

    masked = True

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        text = fields["text"]
        if text == "refuse":
            raise RowError("it says so")
        if text == "end":
            os._exit(1)
        if text.startswith("slow"):
            time.sleep(0.002)
        encoded = super().encode(fields)
        return encoded._replace(loss=encoded.ids % 2 == 0)


class Place(TextEncoder):
    """A row becomes the number of the process that encodes it."""

    def encode(self, fields: Mapping[str, Any]) -> Encoded:
        return Encoded(np.array([os.getpid()]))


@pytest.fixture
def all_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes do all the work: otherwise few rows are encoded before they have started."""
    make = Workers.__init__

    def waited(workers: Workers, encoder: Encoder, count: int) -> None:
        make(workers, encoder, count)
        workers._started.result()

    monkeypatch.setattr(Workers, "__init__", waited)


def write(file: Path, texts: list[str]) -> list[Path]:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [file]


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [f"slow {number} " + "x" * source.randrange(200) for number in range(count)]


def build(files: list[Path], cache_dir: Path, workers: int = 1) -> Corpus:
    return build_cache(files, Masked(ByteTokenizer()), cache_dir=cache_dir, workers=workers)


def assert_equal(ours: Corpus, other: Corpus) -> None:
    assert ours.key == other.key
    for mine, theirs in zip(ours.parts, other.parts, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.docs, theirs.docs)
        assert mine.loss is not None and theirs.loss is not None
        np.testing.assert_array_equal(mine.loss, theirs.loss)
        assert mine.odd == theirs.odd and mine.largest == theirs.largest


@pytest.mark.usefixtures("all_started")
def test_several_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "a.jsonl", ["", "a lone \ud800", *texts(900)])
    alone = build(files, tmp_path / "one")
    monkeypatch.setattr("ndtrain.data.cache.PARALLEL", 0)
    before = set(multiprocessing.active_children())
    together = build(files, tmp_path / "many", workers=3)
    assert_equal(together, alone)
    assert together.parts[0].odd["surrogate"][0] == 1 and together.n_docs == 901
    assert set(multiprocessing.active_children()) == before, "the processes have ended"


@pytest.mark.usefixtures("all_started")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("ndtrain.data.cache.PARALLEL", 0)
    files = write(tmp_path / "a.jsonl", ["fine", "refuse", "fine"])
    with pytest.raises(DamagedError, match=r"a\.jsonl, line 2: it says so"):
        build(files, tmp_path / "cache", workers)
    assert [file.name for file in (tmp_path / "cache").iterdir()] in ([".digests.json"], [])


@pytest.mark.usefixtures("all_started")
def test_a_process_that_ends_by_itself_is_reported(tmp_path: Path) -> None:
    with Workers(Masked(ByteTokenizer()), 2) as workers, pytest.raises(NdtrainError, match=r"set data\.workers"):
        list(workers.map([[{"text": "fine"}], [{"text": "end"}], [{"text": "fine"}]]))


def test_this_process_encodes_until_others_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    may_start, start = threading.Event(), Workers._start
    monkeypatch.setattr(Workers, "_start", lambda workers: may_start.wait() and start(workers))
    with Workers(Place(ByteTokenizer()), 2) as workers:

        def batches() -> Iterator[list[dict[str, str]]]:
            yield from ([{"text": "a"}] for _ in range(9))
            may_start.set()
            workers._started.result()
            yield from ([{"text": "a"}] for _ in range(9))

        places = [result.ids[0] for (result,) in workers.map(batches()) if isinstance(result, Encoded)]
    assert places[:9] == [os.getpid()] * 9
    assert len(places) == 18 and os.getpid() not in places[9:]


def test_processes_that_cannot_start_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(workers: Workers) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(Workers, "_start", fails)
    with pytest.raises(OSError, match="no more processes"), Workers(Place(ByteTokenizer()), 2) as workers:
        list(workers.map([{"text": "a"}] for _ in range(10**9)))


def _killed(file: Path, cache_dir: Path, parent: Connection) -> None:
    preparation._SAVE_SECONDS, preparation._BATCH_ROWS = 0.0, 8
    parent.send("begun")
    build([file], cache_dir)


def test_tokenizing_that_is_killed_at_random_moments_ends_as_if_undisturbed(tmp_path: Path) -> None:
    files = write(tmp_path / "a.jsonl", texts(500))
    wanted = build(files, tmp_path / "calm")
    context, moments = multiprocessing.get_context("forkserver"), random.Random(1)
    kept, cache_dir = [0], tmp_path / "cache"
    for _ in range(20):
        ours, theirs = context.Pipe()
        process = context.Process(target=_killed, args=(files[0], cache_dir, theirs))
        process.start()
        assert ours.recv() == "begun"
        process.join(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        for progress in cache_dir.glob(".*.partial/progress.json"):
            kept.append(json.loads(progress.read_text())["rows"])
    assert kept == sorted(kept) and kept[-1] > 0, f"no work is done twice: {kept}"
    assert_equal(build(files, cache_dir), wanted)
    assert [file.name for file in cache_dir.iterdir() if file.name != ".digests.json"] == [wanted.parts[0].key]


@pytest.mark.parametrize("how", ["progress", "tokens", "docs"])
def test_what_a_killed_run_left_is_used_only_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    files = write(tmp_path / "a.jsonl", texts(60))
    wanted = build(files, tmp_path / "calm")
    monkeypatch.setattr(preparation, "_SAVE_SECONDS", 0.0)

    class Stopping(Masked):
        def encode(self, fields: Mapping[str, Any]) -> Encoded:
            if "slow 50" in fields["text"]:
                raise Stopped("asked to")
            return super().encode(fields)

    monkeypatch.setattr(preparation, "_BATCH_ROWS", 8)
    with pytest.raises(Stopped):
        build_cache(files, Stopping(ByteTokenizer()), cache_dir=tmp_path / "cache")
    (partial,) = (tmp_path / "cache").glob(".*.partial")
    assert json.loads((partial / "progress.json").read_text())["rows"] == 48
    if how == "progress":
        (partial / "progress.json").write_text("{")
    else:
        os.truncate(partial / f"{how}.bin", 7)
    assert_equal(build(files, tmp_path / "cache"), wanted)


def test_a_long_text_whose_tokenizing_stops_in_its_middle_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndtrain.data.rows.text._WHOLE", 200)
    monkeypatch.setattr("ndtrain.data.rows.text._PIECE", 100)
    monkeypatch.setattr(preparation, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(preparation, "_BATCH_ROWS", 1)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text("".join(f"line {number}\n" for number in range(100)))
    wanted = build(files, tmp_path / "calm")
    assert wanted.n_docs == 2

    class Stopping(Masked):
        def encode(self, fields: Mapping[str, Any]) -> Encoded:
            if "line 50" in fields["text"]:
                raise Stopped("asked to")
            return super().encode(fields)

    with pytest.raises(Stopped):
        build_cache(files, Stopping(ByteTokenizer()), cache_dir=tmp_path / "cache")
    (partial,) = (tmp_path / "cache").glob(".*.partial")
    left = json.loads((partial / "progress.json").read_text())
    assert left["rows"] > 2 and left["tokens"] > 0 and left["documents"] == 0
    assert_equal(build(files, tmp_path / "cache"), wanted)


def test_the_pieces_of_a_long_text_give_a_byte_level_tokenizer_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tokenizers
    import transformers

    file = tmp_path / "a.txt"
    source = Path(preparation.__file__).read_text(encoding="utf-8")
    file.write_text(source * 3, encoding="utf-8")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], show_progress=False)
    bpe.train_from_iterator([source], trainer)
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    encoder = TextEncoder(HubTokenizer(inner, key=""))
    whole = build_cache([file], encoder, cache_dir=tmp_path / "whole")
    monkeypatch.setattr("ndtrain.data.rows.text._WHOLE", 8000)
    monkeypatch.setattr("ndtrain.data.rows.text._PIECE", 4000)
    pieces = build_cache([file], encoder, cache_dir=tmp_path / "pieces")
    assert whole.n_docs == pieces.n_docs == 1
    np.testing.assert_array_equal(pieces.parts[0].tokens, whole.parts[0].tokens)


def test_what_killed_runs_left_long_ago_is_removed(tmp_path: Path) -> None:
    old, recent = tmp_path / "cache" / ".old.partial", tmp_path / "cache" / ".recent.partial"
    for left in (old, recent):
        left.mkdir(parents=True)
    os.utime(old, (1_000_000_000, 1_000_000_000))
    build(write(tmp_path / "a.jsonl", ["text"]), tmp_path / "cache")
    assert recent.exists() and not old.exists()
