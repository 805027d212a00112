"""Every token is trained exactly once per epoch, in the same global batches on every mesh."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndtrain.data.batches import GlobalBatches, labels_count
from ndtrain.data.cache import build_cache, contents_of, notes
from ndtrain.data.corpus import Corpus
from ndtrain.data.files import find_files
from ndtrain.data.order import Order
from ndtrain.data.row import Encoded
from ndtrain.data.samples import Packing, Samples, open_samples
from ndtrain.data.text import TextEncoder, Tokenizer
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer


class Bytes:
    """Ids 0-255 are bytes, 256 bos, 257 eos, 258 pad."""

    eos_id, pad_id = 257, 258

    def __init__(self, key: str = "bytes", *, vocab_size: int = 259, bos_id: int | None = 256) -> None:
        self.key, self.vocab_size, self.bos_id, self.calls = key, vocab_size, bos_id, 0

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        self.calls += 1
        return np.frombuffer(raw, np.uint8).astype(np.int64)

    def spelled(self, text: str) -> str:
        return ""


TEXTS = ["a", "hello world", "", "x" * 30, "yz", "b" * 15, "q" * 7]  # 15 chars: 17 tokens, 16 pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for number, text in enumerate(TEXTS):
        (data / f"{number}.txt").write_text(text)
    return data


def make_cache(folder: Path, tokenizer: Bytes | None = None) -> Corpus:
    return build(find_files(str(folder)), tokenizer or Bytes(), folder.parent / "cache")


def build(files: list[Path], tokenizer: Tokenizer, cache_dir: Path, **kwargs: Any) -> Corpus:
    return build_cache(files, TextEncoder(tokenizer), cache_dir=cache_dir, **kwargs)


def docs_of(corpus: Corpus) -> list[int]:
    """Return the bounds `[d + 1]` of the documents."""
    return [0, *corpus.ends(0, corpus.n_tokens).tolist()]


def directory_of(folder: Path) -> Path:
    """Return the directory of the cache of `folder`, which is one group."""
    make_cache(folder)
    (path,) = (path for path in (folder.parent / "cache").iterdir() if path.is_dir())
    return path


def expected_pairs(texts: list[str] = TEXTS) -> list[tuple[int, int]]:
    pairs = []
    for text in texts:
        row = [256, *text.encode(), 257]
        pairs += list(itertools.pairwise(row)) if text else []
    return sorted(pairs)


def pairs_of(rows: list[dict[str, np.ndarray]]) -> list[tuple[int, int]]:
    return sorted(
        (int(token), int(label))
        for row in rows
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != -100
    )


def naive_packed(corpus: Corpus, seq_len: int) -> list[dict[str, list[int]]]:
    """Return the packed rows, built one token at a time."""
    tokens = corpus.tokens(0, corpus.n_tokens).tolist()
    starts = set(docs_of(corpus))
    rows = []
    for first in range(0, len(tokens) - 1, seq_len):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        position = 0
        for index in range(first, first + seq_len):
            inside = index < len(tokens)
            if index in starts or index == first:  # the end of the stream is in starts: padding begins there
                position = 0
            row["input_ids"].append(tokens[index] if inside else Bytes.pad_id)
            row["labels"].append(tokens[index + 1] if inside and index + 1 not in starts else -100)
            row["position_ids"].append(position)
            position += 1
        rows.append(row)
    return rows


# Samples


@pytest.mark.parametrize("packing", ["concat", "best_fit", False])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 16, 17, 500])
def test_every_target_is_counted_exactly_once(folder: Path, packing: Packing, seq_len: int) -> None:
    samples = open_samples(make_cache(folder), seq_len, packing=packing, pad_id=258)
    rows = [samples[i] for i in range(len(samples))]
    assert pairs_of(rows) == expected_pairs()
    assert all(a.dtype == np.int64 and a.shape == (seq_len,) for row in rows for a in row.values())
    with pytest.raises(IndexError):
        samples[len(samples)]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 16, 41, 500])
def test_packed_rows_equal_a_token_by_token_construction(folder: Path, seq_len: int) -> None:
    corpus = make_cache(folder)
    samples = open_samples(corpus, seq_len, packing=True, pad_id=258)
    got = [{name: a.tolist() for name, a in samples[i].items()} for i in range(len(samples))]
    assert got == naive_packed(corpus, seq_len)


def test_documents_never_share_a_segment_and_padding_is_its_own(folder: Path) -> None:
    samples = open_samples(make_cache(folder), 16, packing=True, pad_id=258)
    for i in range(len(samples)):
        row = samples[i]
        segment = np.cumsum(row["position_ids"] == 0)
        for number in set(segment.tolist()):
            inside = segment == number
            ids, labels = row["input_ids"][inside], row["labels"][inside]
            assert not (ids[1:] == 256).any(), "a document starts in the middle of a segment"
            assert not (ids[:-1] == 257).any(), "a segment goes on after a document's end"
            assert (ids == 258).all() or not (ids == 258).any()
            assert (labels[:-1] == ids[1:]).all() or (ids == 258).all()
            np.testing.assert_array_equal(row["position_ids"][inside], np.arange(inside.sum()))
    assert (samples[len(samples) - 1]["input_ids"] == 258).any(), "the last row is padded here"


def test_without_packing_each_row_holds_one_document_and_positions_run_on(folder: Path) -> None:
    samples = open_samples(make_cache(folder), 16, packing=False, pad_id=258)
    assert len(samples) == 1 + 1 + 2 + 1 + 1 + 1  # 15 chars make 17 tokens, 16 targets: one row
    for i in range(len(samples)):
        row = samples[i]
        np.testing.assert_array_equal(row["position_ids"], np.arange(16))
        assert (row["labels"][row["input_ids"] == 258] == -100).all()
        assert (row["input_ids"] == 256).sum() <= 1 and (row["labels"] != -100).any()


# Several groups of files


def test_a_corpus_of_many_groups_equals_one_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_cache(folder)
    monkeypatch.setattr("ndtrain.data.groups._MOST", 0)
    many = make_cache(folder)
    assert len(one.parts) == 1 and len(many.parts) == len(TEXTS)
    assert docs_of(many) == docs_of(one)
    for start, stop in itertools.combinations(range(one.n_tokens + 2), 2):
        assert many.tokens(start, stop).tolist() == one.tokens(start, stop).tolist()
        assert many.ends(start, stop).tolist() == one.ends(start, stop).tolist()
    for ours, theirs in zip(many.around(np.arange(one.n_tokens)), one.around(np.arange(one.n_tokens)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for most in (1, 2, 100):
        assert [0, *(b for some in many.bounds_in_blocks(most) for b in some[1:])] == docs_of(one)
    for packing in (True, "best_fit", False):
        rows = [open_samples(corpus, 8, packing=packing, pad_id=258) for corpus in (one, many)]
        assert len(rows[0]) == len(rows[1])
        for index in range(len(rows[0])):
            for name, values in rows[0][index].items():
                np.testing.assert_array_equal(values, rows[1][index][name])


def test_a_file_that_is_added_does_not_tokenize_the_others_again(folder: Path) -> None:
    for number in range(400):
        (folder / f"f{number:03}.txt").write_text(f"text {number}")
    make_cache(folder)
    (folder / "f200b.txt").write_text("added")
    tokenizer = Bytes()
    corpus = make_cache(folder, tokenizer)
    assert corpus.n_docs == 407
    assert 1 <= tokenizer.calls < 300, "its group alone"


def test_tokens_without_loss_are_no_targets(folder: Path) -> None:
    class Masked(TextEncoder):
        masked = True

        def encode(self, fields: Mapping[str, Any]) -> Encoded:
            ids = super().encode(fields).ids
            return Encoded(ids, ids % 2 == 0)

    corpus = build_cache(find_files(str(folder)), Masked(Bytes()), cache_dir=folder.parent / "masked")
    for packing in (True, "best_fit", False):
        for seq_len in (3, 16):
            samples = open_samples(corpus, seq_len, packing=packing, pad_id=258)
            rows = [samples[i] for i in range(len(samples))]
            assert pairs_of(rows) == [pair for pair in expected_pairs() if pair[1] % 2 == 0]


# GlobalBatches


def gather(samples: Samples, order: Order, *, size: int, micro: int, ranks: int, cursor: int) -> dict[str, Any]:
    """Return all rows of the global batch in order, and the number of targets on all ranks."""
    loaders = [
        GlobalBatches(
            samples, order, global_batch_size=size, micro_batch_size=micro, batch_rank=rank, batch_ranks=ranks
        )
        for rank in range(ranks)
    ]
    loads = [loader.load(cursor) for loader in loaders]
    assert {len(load) for load in loads} == {loaders[0].micro_steps}
    shapes = {tuple(t.shape) for load in loads for batch in load for t in batch.values()}
    assert shapes == {(loaders[0].micro_batch_size, samples.seq_len)}
    assert all(t.dtype == torch.int64 for load in loads for batch in load for t in batch.values())
    rows = {
        name: torch.cat([load[a][name] for a in range(loaders[0].micro_steps) for load in loads])
        for name in loads[0][0]
    }
    return {"rows": rows, "targets": sum(labels_count(load) for load in loads)}


@pytest.mark.parametrize("size", [8, 7, 1, 9])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 4), (4, 1), (4, 2), (4, 4), (3, 2)])
@pytest.mark.parametrize("cursor", [0, 5])
def test_the_global_batch_is_the_same_for_any_split(
    folder: Path, size: int, ranks: int, micro: int, cursor: int
) -> None:
    samples = open_samples(make_cache(folder), 8, packing=True, pad_id=258)
    order = Order(len(samples), seed=1, shuffle=True)
    got = gather(samples, order, size=size, micro=micro, ranks=ranks, cursor=cursor)
    want = [samples[int(i)] for i in order.sample_ids(cursor, size)]
    for name in ("input_ids", "labels", "position_ids"):
        np.testing.assert_array_equal(got["rows"][name][:size].numpy(), np.stack([row[name] for row in want]))
    assert (got["rows"]["labels"][size:] == -100).all()
    assert got["targets"] == sum(int((row["labels"] != -100).sum()) for row in want)


def test_every_rank_runs_the_same_forwards_if_samples_do_not_divide_evenly(folder: Path) -> None:
    samples = open_samples(make_cache(folder), 8, packing=True, pad_id=258)
    order = Order(len(samples), seed=1, shuffle=True)
    for size, micro, steps, rows in [(7, 2, 1, 2), (7, 1, 2, 1), (1, 4, 1, 1), (7, 9, 1, 2)]:
        for rank in range(4):
            loader = GlobalBatches(
                samples,
                order,
                global_batch_size=size,
                micro_batch_size=micro,
                batch_rank=rank,
                batch_ranks=4,
            )
            assert (loader.micro_steps, loader.micro_batch_size) == (steps, rows)
            assert [tuple(batch["labels"].shape) for batch in loader.load(0)] == [(rows, 8)] * steps
            if size == 1 and rank > 0:
                assert labels_count(loader.load(0)) == 0


def test_no_sample_skipped_or_repeated_when_dp_changes(folder: Path) -> None:
    samples = open_samples(make_cache(folder), 8, packing=True, pad_id=258)
    cursor, seen = 0, []
    for ranks, micro in [(4, 1), (2, 1), (4, 2), (1, 3)]:  # each a fresh start: only the cursor goes on
        order = Order(len(samples), seed=5, shuffle=True)
        got = gather(samples, order, size=6, micro=micro, ranks=ranks, cursor=cursor)
        seen.append(got["rows"]["input_ids"][:6])
        cursor += 6
    ids = Order(len(samples), seed=5, shuffle=True).sample_ids(0, 24)
    want = np.stack([samples[int(i)]["input_ids"] for i in ids])
    np.testing.assert_array_equal(torch.cat(seen).numpy(), want)
    epochs = 24 // len(samples)
    assert epochs >= 1, "the run crosses an epoch's border"
    assert sorted(ids[: len(samples)].tolist()) == list(range(len(samples)))


def test_fingerprint_tells_data_and_order_apart(folder: Path) -> None:
    def fingerprint(seq_len: int, *, packing: Packing = True, seed: int = 0, ranks: int = 1) -> str:
        samples = open_samples(make_cache(folder), seq_len, packing=packing, pad_id=258)
        order = Order(len(samples), seed=seed, shuffle=True)
        return GlobalBatches(
            samples, order, global_batch_size=4, micro_batch_size=1, batch_rank=0, batch_ranks=ranks
        ).fingerprint

    same = fingerprint(8)
    assert fingerprint(8, ranks=4) == same
    assert fingerprint(8, packing="concat") == same
    others = [fingerprint(9), *(fingerprint(8, packing=kind) for kind in ("best_fit", False)), fingerprint(8, seed=1)]
    (folder / "0.txt").write_text("b")
    assert len({same, *others, fingerprint(8)}) == 6


# The cache


def test_a_cache_hit_does_not_tokenize_again(folder: Path) -> None:
    first, second = Bytes(), Bytes()
    reports: list[tuple[int, int]] = []
    files = find_files(str(folder))
    cache_dir = folder.parent / "cache"
    corpus = build(files, first, cache_dir, progress=lambda done, total: reports.append((done, total)))
    assert build(files, second, cache_dir).key == corpus.key
    assert first.calls == 6 and second.calls == 0  # the empty document is skipped
    total = sum(map(len, TEXTS))
    assert reports[-1] == (total, total)
    (part,) = corpus.parts
    assert [p.name for p in cache_dir.iterdir() if p.name != ".digests.json"] == [part.key], "nothing left over"


def test_a_cache_that_cannot_be_written_can_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    prepared = make_cache(folder)
    for file in folder.iterdir():  # as on another machine: their digests are not known there
        os.utime(file, (1_100_000_000, 1_100_000_000))

    def read_only(*given: Any, **more: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    monkeypatch.setattr("os.mkdir", read_only)
    assert make_cache(folder).key == prepared.key
    (folder / "more.txt").write_text("another text")
    with pytest.raises(
        RecipeError, match=r"cannot write the token cache in .*Read-only file system; set NDTRAIN_CACHE"
    ):
        make_cache(folder)


def test_two_tokenizers_have_two_caches(folder: Path) -> None:
    keys = {make_cache(folder, t).key for t in (Bytes(), Bytes("other"), Bytes(bos_id=None))}
    assert len(keys) == 3
    assert make_cache(folder, Bytes(bos_id=None)).n_tokens == make_cache(folder).n_tokens - 6


def test_changed_content_gets_a_new_cache(folder: Path) -> None:
    file = folder / "1.txt"
    for old in folder.iterdir():
        os.utime(old, (1_000_000_000, 1_000_000_000))
    before = make_cache(folder)
    memo = json.loads((folder.parent / "cache" / ".digests.json").read_text())
    assert len(memo) == len(TEXTS)
    file.write_text("HELLO world")  # the same size
    assert make_cache(folder).key != before.key
    file.write_text(TEXTS[1])
    assert make_cache(folder).key == before.key
    (folder.parent / "cache" / ".digests.json").write_text("[tor")
    assert make_cache(folder).key == before.key, "a broken memo is only slower"


@pytest.mark.parametrize("name", ["tokens.bin", "docs.bin", "meta.json"])
@pytest.mark.parametrize("how", ["truncate", "empty", "remove"])
def test_a_truncated_cache_is_refused(folder: Path, name: str, how: str) -> None:
    path = directory_of(folder)
    if how == "remove":
        (path / name).unlink()
    else:
        os.truncate(path / name, (path / name).stat().st_size - 2 if how == "truncate" else 0)
    with pytest.raises(DamagedError, match=f"{name}.*delete the directory {path}"):
        make_cache(folder)


def test_altered_document_starts_are_refused(folder: Path) -> None:
    path = directory_of(folder)
    docs = np.fromfile(path / "docs.bin", np.int64)
    docs[1] = 10_000  # right after it was written, which no clock need tell apart
    docs.tofile(path / "docs.bin")
    with pytest.raises(DamagedError, match=r"docs\.bin"):
        make_cache(folder)


@pytest.mark.parametrize(("vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (259, np.uint16)])
def test_a_large_vocabulary_is_stored_in_32_bits(folder: Path, vocab: int, dtype: type) -> None:
    class Top(Bytes):
        def encode_bytes(self, raw: bytes) -> np.ndarray:
            return np.full(len(raw), self.vocab_size - 1)

    corpus = make_cache(folder, Top("top", vocab_size=vocab))
    (part,) = corpus.parts
    assert part.tokens.dtype == dtype
    assert part.tokens.max() == vocab - 1 and part.docs[-1] == len(part.tokens)
    assert open_samples(corpus, 4, packing=True, pad_id=0)[0]["input_ids"].tolist() == [256, vocab - 1, 257, 256]


def test_an_id_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="expected 0 to 256"):
        make_cache(folder, Bytes(vocab_size=257))


def test_another_process_winning_the_race_is_fine(folder: Path) -> None:
    files, cache_dir = find_files(str(folder)), folder.parent / "cache"

    class Slow(Bytes):
        def encode_bytes(self, raw: bytes) -> np.ndarray:
            if self.calls == 0:
                build(files, Bytes(), cache_dir)
            return super().encode_bytes(raw)

    corpus = build(files, Slow(), cache_dir)
    (part,) = corpus.parts
    assert corpus.n_docs == 6
    assert [p.name for p in cache_dir.iterdir() if p.name != ".digests.json"] == [part.key]


def test_a_failed_build_leaves_nothing(folder: Path) -> None:
    class Broken(Bytes):
        def encode_bytes(self, raw: bytes) -> np.ndarray:
            if self.calls == 2:
                (folder / "0.txt").write_text("written meanwhile")
            return super().encode_bytes(raw)

    with pytest.raises(DamagedError, match=r"0\.txt changed"):
        make_cache(folder, Broken())
    assert [p for p in (folder.parent / "cache").iterdir() if p.name != ".digests.json"] == []
    with pytest.raises(NdtrainError, match="cannot write the token cache"):
        build(find_files(str(folder)), Bytes(), folder / "0.txt" / "cache")


# Files


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "zwei ü", "id": 2}, {"text": ""}, {"text": "lone \ud800"}]
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    corpus = make_cache(data)
    got = [bytes(corpus.tokens(a + 1, b - 1).tolist()).decode() for a, b in itertools.pairwise(docs_of(corpus))]
    assert got == ["one", "zwei ü", "lone ?"]
    (data / "a.jsonl").rename(data / "a.json")
    assert make_cache(data).key == corpus.key, "the same rows"
    (data / "a.json").rename(data / "a.txt")
    assert make_cache(data).key != corpus.key, "the same bytes as one document are another cache"


@pytest.mark.parametrize("bos", [256, None])
def test_a_text_read_in_pieces_is_one_document(
    tmp_path: Path, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("one two three\n" * 100)
    (data / "b.txt").write_text("short")
    whole = make_cache(data, Bytes(bos_id=bos))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("ndtrain.data.rows.text._WHOLE", 200)
    monkeypatch.setattr("ndtrain.data.rows.text._PIECE", 100)
    tokenizer = Bytes(bos_id=bos)
    pieces = make_cache(data, tokenizer)
    assert tokenizer.calls == 16
    assert docs_of(pieces) == docs_of(whole) and pieces.n_docs == 2
    assert pieces.tokens(0, pieces.n_tokens).tolist() == whole.tokens(0, whole.n_tokens).tolist()


def test_a_note_says_that_a_csv_file_is_read_as_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2,two\n")
    (tmp_path / "b.csv").write_text("text\nthree\n")
    files, encoder, cache_dir = find_files(str(tmp_path)), TextEncoder(Bytes()), tmp_path / "cache"
    corpus = build_cache(files, encoder, cache_dir=cache_dir)
    contents = contents_of(files, encoder, cache_dir=cache_dir)
    assert corpus.n_docs == 3
    assert list(notes(corpus, contents, special_tokens="text")) == [
        f"documents that are the first row of a CSV file: 2 of 3, first {tmp_path}/a.csv, line 2; such a file is read "
        "by the names in its header; to read it as plain text, rename it to .txt"
    ]


def test_other_columns_are_another_cache(tmp_path: Path) -> None:
    file, cache_dir = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text('{"text": "one", "body": "other"}\n')
    first = build([file], Bytes(), cache_dir)
    encoder = TextEncoder(Bytes(), {"text": "body"})
    second = build_cache([file], encoder, cache_dir=cache_dir)
    assert first.key != second.key and second.n_tokens == len("other") + 2
    assert contents_of([file], encoder, cache_dir=cache_dir).key == second.key


@pytest.mark.parametrize("line", [b'{"text": "cut', b'{"content": "x"}', b'["text"]', b'{"text": 3}', b"\xff"])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DamagedError, match=r"a\.jsonl, line 2"):
        build([file], Bytes(), tmp_path / "cache")


def test_file_directory_and_glob(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/deep/y.PY", ".hidden.txt", ".git/x.txt", "w.bin", "n.pyc", "[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(path: Path) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_files(str(path))]

    assert names(tmp_path) == ["[1].txt", "a/deep/y.PY", "a/z.md", "b.txt"]
    assert names(tmp_path / "w.bin") == ["w.bin"], "a named file is taken as it is"
    assert names(tmp_path / "[1].txt") == ["[1].txt"]
    assert names(tmp_path / "**" / "*") == ["[1].txt", "a/deep/y.PY", "a/z.md", "b.txt", "n.pyc", "w.bin"]
    assert names(tmp_path / "*.txt") == ["[1].txt", "b.txt"]
    build(find_files(str(tmp_path)), Bytes(), tmp_path / "cache")
    assert names(tmp_path) == ["[1].txt", "a/deep/y.PY", "a/z.md", "b.txt"], (
        "a cache beside the data is not read as data"
    )


def test_a_path_that_matches_nothing_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.txt", tmp_path / "*.txt", tmp_path / "empty"):
        with pytest.raises(RecipeError, match="matches no file") as caught:
            find_files(str(path))
        assert "hub" not in str(caught.value)
        assert str(caught.value).endswith("it is an empty directory") == (path.name == "empty")
    with pytest.raises(RecipeError, match="it has only empty directories"):
        find_files(str(tmp_path))


def test_data_of_empty_documents_alone_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RecipeError, match="no text"):
        build([tmp_path / "a.txt"], Bytes(), tmp_path / "cache")


def test_an_unreadable_file_is_a_damaged_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"cannot read .*gone\.txt"):
        build([tmp_path / "gone.txt"], Bytes(), tmp_path / "cache")


def test_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"words" * 99_999 + b"\0")
    with pytest.raises(RecipeError, match=r"x\.bin is not text"):
        build(find_files(str(tmp_path / "x.bin")), ByteTokenizer(), tmp_path / "cache")
