"""Prepared tokens of each layout are the ids that were written, in the documents that the layout has, or refused."""

import errno
import json
import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from ndtrain.data.samples import open_samples
from ndtrain.data.tokens import (
    Reading,
    TokenCorpus,
    check_ids,
    find_token_files,
    notes,
    open_tokens,
)
from ndtrain.errors import DamagedError, NdtrainError, RecipeError

EOS, BOS, PAD = 257, 256, 258
Rows = Sequence[Sequence[int]]
ROWS: Rows = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, EOS], [14, 15, EOS]]


def reading(**changes: Any) -> Reading:
    return Reading(EOS, None, PAD, "auto", np.dtype(np.uint16), 259)._replace(**changes)


def opened(path: Path | str, **changes: Any) -> TokenCorpus:
    home = Path(path).parent
    cache_dir = home.parent / f"{home.name}-cache"
    return open_tokens(find_token_files(str(path)), reading(**changes), cache_dir=cache_dir)


def documents(corpus: TokenCorpus) -> list[list[int]]:
    return [corpus.tokens(*corpus.bounds(i)).tolist() for i in range(corpus.n_docs)]


def targets(corpus: TokenCorpus) -> list[list[int]]:
    """Return the ids that carry loss of each document."""
    bounds = [corpus.bounds(i) for i in range(corpus.n_docs)]
    return [corpus.tokens(a, b)[corpus.loss(a, b)].tolist() for a, b in bounds]


# Writers, from the layouts' descriptions.


def write_nanogpt(path: Path, rows: Rows, dtype: str = "<u2") -> Path:
    path.write_bytes(np.array([id for row in rows for id in row], dtype).tobytes())
    return path


def write_llmc(path: Path, rows: Rows, *, magic: int = 20240520, version: int = 1, dtype: str = "H") -> Path:
    ids = [id for row in rows for id in row]
    header = [magic, version, len(ids)] + 253 * [0]
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{dtype}", *ids))
    return path


def write_megatron(
    path: Path, rows: Rows, *, code: int = 8, documents: Sequence[int] | None = None, version: int = 1
) -> Path:
    letter = {1: "B", 4: "i", 5: "q", 8: "H", 7: "f"}[code]
    width, at, pointers = struct.calcsize(letter), 0, []
    with path.open("wb") as data:
        for row in rows:
            data.write(struct.pack(f"<{len(row)}{letter}", *row))
            pointers.append(at)
            at += len(row) * width
    ends = list(range(len(rows) + 1)) if documents is None else list(documents)
    with path.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, len(rows), len(ends)))
        index.write(struct.pack(f"<{len(rows)}i", *map(len, rows)))
        index.write(struct.pack(f"<{len(rows)}q", *pointers))
        index.write(struct.pack(f"<{len(ends)}q", *ends))
    return path


def table_of(rows: Rows, kind: pa.DataType | None = None, **columns: Any) -> pa.Table:
    return pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int32())), **columns})


def write_arrow(path: Path, table: pa.Table, *, file: bool = False, batch: int = 2, **options: Any) -> Path:
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    with path.open("wb") as sink, make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def write_parquet(path: Path, table: pa.Table) -> Path:
    pa.parquet.write_table(table, path, row_group_size=3)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "npy": lambda p: (np.save(p / "a.npy", np.array([i for r in ROWS for i in r], np.int64)), p / "a.npy")[1],
    "nanogpt": lambda p: write_nanogpt(p / "a.bin", ROWS),
    "olmo": lambda p: write_nanogpt(p / "part-0-00000.npy", ROWS),
    "llm.c": lambda p: write_llmc(p / "a.bin", ROWS),
    "llm.c llama": lambda p: write_llmc(p / "a.bin", ROWS, magic=20240801, version=7, dtype="I"),
    "megatron": lambda p: write_megatron(p / "a_text_document.bin", ROWS),
    "megatron int32": lambda p: write_megatron(p / "a_text_document.bin", ROWS, code=4),
    "arrow stream": lambda p: write_arrow(p / "a.arrow", table_of(ROWS)),
    "arrow file": lambda p: write_arrow(p / "a.arrow", table_of(ROWS), file=True),
    "arrow large": lambda p: write_arrow(p / "a.arrow", table_of(ROWS, pa.large_list(pa.uint16()))),
    "arrow packed": lambda p: write_arrow(p / "a.arrow", table_of(ROWS), file=True, compression="zstd"),
    "parquet": lambda p: write_parquet(p / "a.parquet", table_of(ROWS)),
}
STORED = {"parquet", "arrow packed"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ndtrain.data.tokens.token_file.SETTLED_SECONDS", 0.0)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_gives_the_ids_that_were_written(folder: Path, layout: str) -> None:
    file = WRITERS[layout](folder)
    for _ in range(2):  # made, then found
        corpus = opened(file)
        assert documents(corpus) == [list(row) for row in ROWS]
        assert not corpus.masked and corpus.largest_id == EOS
    in_place = not any(part.name == "tokens.bin" for part in folder.parent.rglob("*"))
    assert in_place == (layout not in STORED)
    assert "15 in 4 documents; 73.3 % are targets" in next(iter(notes(corpus, reading())))


def test_several_files_are_one_corpus_in_the_order_of_their_names(folder: Path) -> None:
    write_nanogpt(folder / "b.bin", ROWS[2:])
    np.save(folder / "a.npy", np.array([*ROWS[0], *ROWS[1]]))
    write_megatron(folder / "c.bin", ROWS)
    corpus = opened(folder)
    assert documents(corpus) == [list(row) for row in [*ROWS, *ROWS]]
    assert corpus.tokens(3, 16).tolist() == [id for row in [*ROWS, *ROWS] for id in row][3:16]
    samples = open_samples(corpus, 4, packing=True, pad_id=PAD)
    stream = [id for i in range(len(samples)) for id in samples[i]["input_ids"].tolist()]
    assert stream[:30] == [id for row in [*ROWS, *ROWS] for id in row]


# Documents


def test_a_stream_is_cut_after_end_tokens_and_before_begin_tokens(folder: Path) -> None:
    ids = [1, 2, EOS, BOS, 3, 4, BOS, 5, EOS, EOS, 6, 7]
    corpus = opened(write_nanogpt(folder / "a.bin", [ids]), bos=BOS)
    assert documents(corpus) == [[1, 2, EOS], [BOS, 3, 4], [BOS, 5, EOS], [EOS], [6, 7]]
    assert opened(write_nanogpt(folder / "b.bin", [ids])).n_docs == 4
    other = opened(folder / "b.bin", eos=99)
    assert any(note.startswith("files without an end token (id 99): 1, ") for note in notes(other, reading(eos=99)))
    assert any("documents of one token: 1, first at document 3" in note for note in notes(corpus, reading(bos=BOS)))


def test_llmcs_shards_end_each_text_with_the_end_token_of_the_next(folder: Path) -> None:
    corpus = opened(write_llmc(folder / "a.bin", [[EOS, 1, 2], [EOS, 3, 4]]))
    assert documents(corpus) == [[EOS], [1, 2, EOS], [3, 4]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 22])
@pytest.mark.parametrize("rows", [True, False])
def test_documents_do_not_depend_on_what_is_looked_at_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, rows: bool
) -> None:
    monkeypatch.setattr("ndtrain.data.tokens.index.CHUNK", chunk)
    monkeypatch.setattr("ndtrain.data.tokens.npy.CHUNK", chunk)
    ids = np.array([[1, 2, EOS, 3], [4, EOS, EOS, EOS], [5, 6, PAD, PAD]])
    np.save(folder / "a.npy", ids if rows else ids.ravel())
    corpus = opened(folder / "a.npy")
    pads = [[5, 6], [PAD], [PAD]]
    expected = [[1, 2, EOS, 3], [4, EOS], [EOS], [EOS]] if rows else [[1, 2, EOS], [3, 4, EOS], [EOS], [EOS]]
    assert documents(corpus) == [*expected, *pads]
    found = "\n".join(notes(corpus, reading()))
    assert f"tokens of padding (id {PAD}): 2" in found and "documents of one token: 4" in found
    assert ("end tokens (id 257) inside rows: 1, first at document 0" in found) == rows
    assert "41.7 % are targets" in found
    if rows:
        assert documents(opened(folder / "a.npy", documents="eos")) == [[1, 2, EOS], [3], [4, EOS], [EOS], [EOS], *pads]
    else:
        with pytest.raises(RecipeError, match=r'a stream of tokens without rows; data.documents = "rows"'):
            opened(folder / "a.npy", documents="rows")


def test_megatrons_documents_are_those_of_its_index(folder: Path) -> None:
    sentences = [[1, 2], [3], [], [4, 5, EOS], [6, EOS]]
    corpus = opened(write_megatron(folder / "a.bin", sentences, documents=[0, 1, 4, 4, 5]))
    assert documents(corpus) == [[1, 2], [3, 4, 5, EOS], [6, EOS]]
    assert any("documents without a token: 1, first at document" in note for note in notes(corpus, reading()))


def test_a_megatron_prefix_or_index_names_the_pair(folder: Path) -> None:
    file = write_megatron(folder / "a_text_document.bin", ROWS)
    for name in (file.with_suffix(""), file.with_suffix(".idx"), folder, folder / "*"):
        assert find_token_files(str(name)) == [file]
    file.unlink()
    with pytest.raises(DamagedError, match=r"is the index of a_text_document.bin, which is not beside it"):
        find_token_files(str(folder))


# Columns


@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_labels_and_masks_say_what_carries_loss(folder: Path, write: Callable[..., Path]) -> None:
    labels = [[-100, 6, 7, EOS], [-100, -100], [9, 10, 11, -100, 13, EOS], [14, -100, EOS]]
    mask = [[1, 1, 0, 1], [1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1]]
    name = "a.arrow" if write is write_arrow else "a.parquet"
    corpus = opened(write(folder / name, table_of(ROWS, labels=labels, loss_mask=mask, text=["a", "b", "c", "d"])))
    assert documents(corpus) == [list(row) for row in ROWS]
    assert targets(corpus) == [[6, EOS], [], [9, 10, 11, 13, EOS], [14, EOS]]
    found = list(notes(corpus, reading()))
    assert "columns that are not read: text" in found[-1] and "46.7 % are targets" in found[0]
    samples = open_samples(corpus, 8, packing=False, pad_id=PAD)
    assert samples[0]["labels"].tolist() == [6, -100, EOS] + 5 * [-100]
    packed = open_samples(corpus, 32, packing=True, pad_id=PAD)[0]["labels"].tolist()
    assert packed[:15] == [6, -100, EOS, -100, -100, -100, 10, 11, -100, 13, EOS, -100, -100, EOS, -100]


def test_a_mask_of_ones_is_no_mask(folder: Path) -> None:
    corpus = opened(write_arrow(folder / "a.arrow", table_of(ROWS, labels=[list(row) for row in ROWS])))
    assert not corpus.masked


def test_padding_that_the_attention_mask_names_is_cut_off(folder: Path) -> None:
    rows = [[PAD, PAD, 1, 2], [3, 4, 5, EOS], [6, 7, 0, 0], [0, 0, 0, 0]]
    attention = [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    labels = [[-100, -100, -100, 2], [3, 4, 5, EOS], [6, 7, -100, -100], 4 * [-100]]
    corpus = opened(write_arrow(folder / "a.arrow", table_of(rows, attention_mask=attention, labels=labels)))
    assert documents(corpus) == [[1, 2], [3, 4, 5, EOS], [6, 7]]
    assert targets(corpus) == [[2], [3, 4, 5, EOS], [6, 7]]


@pytest.mark.parametrize("name", ["seq_lengths", "position_ids"])
def test_rows_that_were_packed_keep_their_documents(folder: Path, name: str) -> None:
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    values = {"seq_lengths": [[1, 3], [3]], "position_ids": [[0, 0, 1, 2], [0, 1, 2]]}
    corpus = opened(write_parquet(folder / "a.parquet", table_of(rows, **{name: values[name]})))
    assert documents(corpus) == [[1], [2, 3, 4], [5, 6, 7]]


REFUSED_COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "shifted": ({"labels": [[2, 3, -100], [5, 6, -100]]}, r'row 1: "labels" has 2 .* 1 \(token 0\); .*shifted'),
    "other": ({"labels": [[1, 2, 3], [4, 9, 6]]}, r'row 2: "labels" has 9 where "input_ids" has 5 \(token 1\)'),
    "short": ({"labels": [[1, 2, 3], [4, 5]]}, r'row 2: "labels" has 2 values, "input_ids" has 3'),
    "grades": ({"loss_mask": [[0, 1, 2], [0, 0, 0]]}, r'row 1: "loss_mask" has 2, expected 0 or 1'),
    "floats": ({"loss_mask": [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]}, "holds no lists of integers"),
    "null": ({"completion_mask": [[0, 1, 1], None]}, r'row 2: "completion_mask" is null'),
    "null bit": ({"completion_mask": [[0, 1, 1], [0, None, 1]]}, r'row 2: "completion_mask" has a null'),
    "hole": ({"attention_mask": [[1, 1, 1], [1, 0, 1]]}, r"row 2: .attention_mask. has zeros between ones"),
    "numbers of documents": ({"attention_mask": [[1, 1, 2], [1, 1, 1]]}, r"row 1: .attention_mask. has 2"),
    "sum": ({"seq_lengths": [[3], [2]]}, r"row 2: .seq_lengths. does not add up"),
    "positions": ({"position_ids": [[0, 1, 2], [0, 1, 3]]}, r"row 2: .position_ids. has 3"),
    "nothing": ({"labels": [3 * [-100], 3 * [-100]]}, "no token that carries loss"),
    "first": ({"labels": [[1, -100, -100], [4, -100, -100]]}, "no token that carries loss"),
}


@pytest.mark.parametrize("case", REFUSED_COLUMNS)
def test_columns_that_contradict_the_ids_are_refused_with_the_row(folder: Path, case: str) -> None:
    columns, match = REFUSED_COLUMNS[case]
    with pytest.raises(NdtrainError, match=match):
        opened(write_parquet(folder / "a.parquet", table_of([[1, 2, 3], [4, 5, 6]], **columns)))
    with pytest.raises(NdtrainError, match=match):
        opened(write_arrow(folder / "a.arrow", table_of([[1, 2, 3], [4, 5, 6]], **columns), batch=1))


# Data sets of `datasets`


def saved_dataset(folder: Path, rows: Rows, files: int = 2) -> Path:
    """Write what `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    step = -(-len(rows) // files)
    for i, name in enumerate(names):
        write_arrow(folder / name, table_of(rows[i * step : (i + 1) * step]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set_is_the_files_that_it_lists(folder: Path) -> None:
    saved = saved_dataset(folder / "set", ROWS)
    write_arrow(saved / "cache-0123.arrow", table_of(ROWS))
    lines: list[str] = []
    files = find_token_files(str(saved), lines.append)
    assert [file.name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert any("state.json does not list are left out: 1, first cache-0123.arrow" in line for line in lines)
    assert documents(opened(saved)) == [list(row) for row in ROWS]
    assert documents(opened(saved / "cache-0123.arrow")) == [list(row) for row in ROWS], "a named file is taken"
    with pytest.raises(RecipeError, match=r"only files that the state\.json beside them does not list"):
        find_token_files(str(saved / "cache*"))
    files[1].unlink()
    with pytest.raises(DamagedError, match=r"lists data-00001-of-00002\.arrow, which is not there"):
        find_token_files(str(saved))
    (saved / "state.json").write_text("{")
    with pytest.raises(DamagedError, match="does not list the files of a data set"):
        find_token_files(str(saved))


def test_splits_are_not_mixed(folder: Path) -> None:
    for name in ("a", "b"):
        saved_dataset(folder / name, ROWS)
    (folder / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(RecipeError, match="holds several splits"):
        find_token_files(str(folder))
    assert len(find_token_files(str(folder / "a"))) == 2
    (folder / "c").mkdir()
    for name in ("shard_train_0001.bin", "shard_val_0000.bin"):
        write_llmc(folder / "c" / name, ROWS)
    with pytest.raises(RecipeError, match=r"holds shard_train_0001\.bin and shard_val_0000\.bin"):
        find_token_files(str(folder / "c"))
    assert len(find_token_files(str(folder / "c" / "*train*"))) == 1


def test_datasets_itself_writes_what_is_read(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [list(row) for row in ROWS]}).save_to_disk(folder / "set", num_shards=2)
    assert documents(opened(folder / "set")) == [list(row) for row in ROWS]


# Ids


def test_ids_beyond_the_embedding_are_refused_with_file_and_place(folder: Path) -> None:
    write_nanogpt(folder / "a.bin", ROWS)
    corpus = opened(write_nanogpt(folder / "b.bin", [*ROWS, [1, 300, EOS]]).parent)
    with pytest.raises(RecipeError, match=r"b\.bin: token 16, in document 4, is 300 .*embeds tokens 0 to 258"):
        check_ids(corpus, 259)
    check_ids(corpus, 301)
    assert "the largest token is 300, but the tokenizer has only the ids 0 to 258" in list(notes(corpus, reading()))[-1]


def test_a_negative_id_is_refused(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([1, 2, -1, EOS]))
    with pytest.raises(DamagedError, match=r"a\.npy: token 2 is -1"):
        opened(folder / "a.npy")


def test_raw_tokens_of_another_width_are_refused(folder: Path) -> None:
    ids = [list(range(1, 40)), [EOS]]
    with pytest.raises(RecipeError, match=r'every second token is 0.*set data.token_dtype = "uint32"'):
        opened(write_nanogpt(folder / "a.bin", ids, "<i4"))
    assert documents(opened(folder / "a.bin", dtype=np.dtype(np.int32))) == [[*range(1, 40), EOS]]
    corpus = opened(write_nanogpt(folder / "b.bin", ids), dtype=np.dtype(np.uint32))
    with pytest.raises(RecipeError, match=r"read as uint32; is data.token_dtype another"):
        check_ids(corpus, 70_000)
    (folder / "b.bin").write_bytes(b"\1\0\2")
    with pytest.raises(DamagedError, match="no whole number of uint16 tokens"):
        opened(folder / "b.bin")


# Files that are not read


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.npy.gz", b"\x1f\x8b\x08" + 40 * b"\0", "is compressed, and tokens are used where they lie: unpack it"),
        ("a.bin", b"\x28\xb5\x2f\xfd" + 40 * b"\1", "is compressed"),
        ("a.npz", b"PK\x03\x04" + 40 * b"\1", "a zip archive"),
        ("a.bin", b"PK\x03\x04" + 40 * b"\1", "a zip archive"),
        ("a.bin", b"\x80\x04\x95" + 40 * b"\1", "never unpickled"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("a.bin", b'{"text": "not tokens, but a row of text"}\n', "is text, not tokens"),
        ("a.jsonl", b'{"input_ids": [1, 2, 3]}\n', "neither its first bytes nor its name"),
        ("a.bin", b"", "is empty"),
        ("a.arrow", b"\1\2\3\4" * 10, "does not begin as arrow files do"),
        ("a.parquet", b"\1\2\3\4" * 10, "does not begin as parquet files do"),
        ("a.bin", struct.pack("<256i", 20240522, *(255 * [0])), "multiple-choice"),
    ],
)
def test_other_files_are_refused_with_the_reason(folder: Path, name: str, content: bytes, match: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(NdtrainError, match=match):
        opened(folder / name)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.ones(5), "float64, and token ids are integers"),
        (np.array([{}], object), "object, and token ids are integers"),
        (np.ones((2, 2, 2), int), "3 dims"),
        (np.asfortranarray(np.ones((3, 2), int)), "Fortran order"),
    ],
)
def test_arrays_that_are_not_tokens_are_refused(folder: Path, array: np.ndarray, match: str) -> None:
    np.save(folder / "a.npy", array)
    with pytest.raises(RecipeError, match=match):
        opened(folder / "a.npy")


def test_other_versions_of_megatrons_layout_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="holds floats"):
        opened(write_megatron(folder / "a.bin", ROWS, code=7))
    with pytest.raises(RecipeError, match="version 2 of Megatron's layout"):
        opened(write_megatron(folder / "b.bin", ROWS, version=2))
    for ends, match in (([0, 2], "do not cover"), ([0, 3, 2, 4], "fall"), ([0, 9, 4], "fall")):
        with pytest.raises(DamagedError, match=match):
            opened(write_megatron(folder / "c.bin", ROWS, documents=ends))
    file = write_megatron(folder / "d.bin", ROWS)
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(DamagedError, match=r"fewer than the sequences that d\.idx lists"):
        opened(file)
    file.write_bytes(file.read_bytes() + 4 * b"\1")
    with pytest.raises(DamagedError, match="lists 15 uint16 tokens, 30 bytes"):
        opened(file)


@pytest.mark.parametrize("layout", [name for name in WRITERS if name not in ("nanogpt", "olmo")])
def test_a_truncated_file_is_damaged(folder: Path, layout: str) -> None:
    file = WRITERS[layout](folder)
    size = file.stat().st_size
    for cut in (2, 8, size // 2, size - 10):
        os.truncate(file, size - cut)
        with pytest.raises(DamagedError):
            opened(file)
    os.truncate(file, size)


def test_mutated_files_end_in_one_line(folder: Path) -> None:
    dice = random.Random(17)
    ended = 0
    for number in range(120):
        layout = dice.choice(list(WRITERS))
        (folder / str(number)).mkdir()
        file = WRITERS[layout](folder / str(number))
        if dice.random() < 0.3 and layout.startswith("megatron"):
            file = file.with_suffix(".idx")
        content = bytearray(file.read_bytes())
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(min(len(content), 200)) if dice.random() < 0.7 else dice.randrange(len(content))
            content[place] = dice.randrange(256)
        file.write_bytes(content)
        try:
            corpus = opened(file)
            assert corpus.n_docs == sum(len(part.docs) - 1 for part in corpus.parts)
            check_ids(corpus, 259)
        except NdtrainError as error:
            ended += 1
            assert "\n" not in str(error) and str(folder) in str(error), f"{number}: {error}"
    assert ended >= 20


# Identity and index


def test_the_key_is_that_of_the_tokens_not_of_path_or_layout(folder: Path) -> None:
    file = write_nanogpt(folder / "a.bin", ROWS)
    first = opened(file).key
    assert opened(file.rename(folder / "b.bin")).key == first
    np.save(folder / "c.npy", np.array([id for row in ROWS for id in row], np.int32))
    assert opened(folder / "c.npy").key == first == opened(folder / "c.npy", vocab_size=70_000).key
    others = [opened(write_nanogpt(folder / "d.bin", [*ROWS[:-1], [14, 16, EOS]])).key]
    others += [opened(folder / "c.npy", **change).key for change in ({"eos": 7}, {"documents": "eos"})]
    pair = write_megatron(folder / "e.bin", ROWS)
    others += [opened(pair).key, opened(write_megatron(folder / "f.bin", ROWS, documents=[0, 2, 4])).key]
    mask = [[0, 1, 1, 1], [1, 1], 6 * [1], 3 * [1]]
    rows = [
        opened(write_arrow(folder / f"{n}.arrow", table_of(ROWS, **c))).key
        for n, c in enumerate(({}, {"loss_mask": mask}))
    ]
    assert rows[0] == opened(pair).key
    assert len({first, *others, rows[1]}) == 7


def test_a_file_that_changes_gets_a_new_index(folder: Path) -> None:
    file = write_nanogpt(folder / "a.bin", ROWS)
    first = opened(file)
    write_nanogpt(file, [[5, EOS, 7, EOS], *ROWS[1:]])  # of the same size
    os.utime(file, ns=(1, 1))
    second = opened(file)
    assert (first.n_docs, second.n_docs) == (4, 5) and second.key != first.key


def test_a_file_that_was_just_written_is_read_when_its_time_can_tell_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndtrain.data.tokens.token_file.SETTLED_SECONDS", 0.3)
    file = write_nanogpt(folder / "a.bin", ROWS)
    started = time.monotonic()
    opened(file)
    assert time.monotonic() - started > 0.1
    started = time.monotonic()
    opened(file)
    assert time.monotonic() - started < 0.1


def test_an_index_that_is_truncated_is_refused(folder: Path) -> None:
    file = write_arrow(folder / "a.arrow", table_of(ROWS, loss_mask=[[0, 1, 1, 1], [1, 1], 6 * [1], 3 * [1]]))
    opened(file)
    index = next(folder.parent.glob("data-cache/tokens-*"))
    for name in ("docs.bin", "loss.bin", "meta.json"):
        content = (index / name).read_bytes()
        (index / name).write_bytes(content[:-1])
        with pytest.raises(DamagedError, match=rf"{name}.*delete the directory"):
            opened(file)
        (index / name).write_bytes(content)


def test_an_index_beside_the_data_is_not_data(folder: Path) -> None:
    file = write_nanogpt(folder / "a.bin", ROWS)
    open_tokens([file], reading(), cache_dir=folder / "cache")
    assert find_token_files(str(folder)) == [file]


def test_more_files_than_a_process_may_open_are_refused_with_the_limit(folder: Path) -> None:
    file = write_nanogpt(folder / "a.bin", ROWS)
    opened(file)
    full = OSError(errno.EMFILE, "Too many open files")
    with (
        mock.patch("ndtrain.data.tokens.token_file.mapped", side_effect=full),
        pytest.raises(RecipeError, match=r"as many files open as it may; raise the limit \(ulimit -n\)"),
    ):
        opened(file)
