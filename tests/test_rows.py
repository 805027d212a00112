"""What a file holds decides how it is read: JSON in its usual shapes, CSV, parquet, Arrow, text, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import itertools
import json
import lzma
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ndtrain.data.files import find_files
from ndtrain.data.row import Piece, Row
from ndtrain.data.rows import find_shape, row_errors, rows_of
from ndtrain.data.rows import json as json_rows
from ndtrain.data.rows import text as text_rows
from ndtrain.data.shapes import fields_of, text_of
from ndtrain.errors import DamagedError, NdtrainError, RecipeError

TEXTS = ["first document", "zwei\n\tümlauts 🙂", 'a "quoted" \\ one', ""]
ROWS = [{"id": i, "text": text, "meta": {"n": [i]}} for i, text in enumerate(TEXTS)]
SHAPES: dict[str, str] = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with CRLF and empty ones": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    + "\r\n \r\n",
    "array": json.dumps(ROWS),
    "array over lines": "\n " + json.dumps(ROWS, indent=2),
    "objects over lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "columns": json.dumps({"text": TEXTS, "id": [0, 1, 2, 3]}),
    "columns of pandas": json.dumps(
        {"id": {str(i): i for i in range(4)}, "text": dict(zip("0123", TEXTS, strict=True))}
    ),
    "byte-order marks": "\ufeff" + "\n\ufeff".join(map(json.dumps, ROWS)),
}


def texts_of(file: Path, columns: Mapping[str, str] = {}) -> list[str]:
    texts = []
    for row in rows_of(file, columns=columns):
        with row_errors(file, row.where):
            texts.append(text_of(fields_of(row.fields, "text", columns)))
    return texts


# Nothing but its name tells that an object of columns is data.
NAMED = [(shape, suffix) for shape in SHAPES for suffix in (".json", ".jsonl", ".ndjson")]
UNNAMED = [(shape, ".unknown") for shape in SHAPES if not shape.startswith("columns")]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(("shape", "suffix"), [*NAMED, *UNNAMED])
def test_json_of_each_shape_gives_its_texts(
    tmp_path: Path, shape: str, suffix: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    file = tmp_path / f"train{suffix}"
    file.write_text(SHAPES[shape], encoding="utf-8", newline="")
    assert texts_of(file) == TEXTS


def test_one_object_is_one_document_and_an_empty_array_none(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS[1], indent=4))
    assert texts_of(file) == [TEXTS[1]]
    for empty in ("[ ]", "", "\n"):
        file.write_text(empty)
        assert texts_of(file) == []


def test_a_long_row_is_read_whole_and_only_a_row_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 1 << 12)
    monkeypatch.setattr(json_rows, "_LONGEST", 1 << 18)
    longest = 0
    read = json_rows._Json._read

    def watched(self: Any, size: int) -> None:
        nonlocal longest
        read(self, size)
        longest = max(longest, len(self.buffer))

    monkeypatch.setattr(json_rows._Json, "_read", watched)
    file = tmp_path / "a.json"
    rows = [{"text": "x" * 10_000}] * 500
    file.write_text(json.dumps(rows))
    assert texts_of(file) == ["x" * 10_000] * 500
    assert longest < 40_000
    file.write_text(json.dumps([{"text": "y" * 1_000_000}]))
    with pytest.raises(RecipeError, match="line 1: a row, or an object of columns, of more than"):
        texts_of(file)


LINE_3 = {
    "a comma after the last key": '{"text": "a",}',
    "null": '{"text": null}',
    "a number": '{"text": 3}',
    "an array": '{"text": ["a", "b"]}',
    "a row in a row": '{"text": {"en": "a"}}',
    "another column": '{"content": "a"}',
    "a string": '"a"',
    "a number alone": "7",
    "an array alone": '["a"]',
    "two rows": '{"text": "a"} {"text": "b"}',
    "a key twice": '{"text": "a", "text": "b"}',
    "cut": '{"text": "a',
    "a line in a string": '{"text": "a\nb"}',
    "a page of HTML": "<html><body>404</body></html>",
    "no JSON at all": "plain text",
    "deep": '{"text":' + "[" * 100_000,
    "a bad escape": '{"text": "\\x"}',
    "latin": '{"text": "caf\udce9"}',
}


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize("kind", LINE_3)
def test_a_bad_row_is_refused_with_its_line(
    tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "fine"}', "", LINE_3[kind], '{"text": "after"}', ""]
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DamagedError, match=r"a\.jsonl, line 3: .") as caught:
        texts_of(file)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a"},\n]', "line 2: not valid JSON (a comma before the end of the array)"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: not valid JSON (expected a comma"),
        ('[{"text": "a"}]\n{"text": "b"}', "line 2: not valid JSON (data after the end of the array)"),
        ('[{"text": "a"}', "not valid JSON (expected a comma or the end of the array)"),
        ('[{"text": "a"},\n ["b"]]', "line 2: the row is an array, not a JSON object"),
        ('{"columns": ["text"], "index": [0], "data": [["a"]]}', 'its fields are "columns", "index", "data"'),
        ('{"0": {"text": "a"}}', 'its fields are "0"'),
        ('{"data": [{"text": "a"}]}', 'its fields are "data"'),
        ('{"text": ["a", "b"], "id": [1]}', "text is an array"),
        ('{"text": []}', "text is an array"),
        ('{"text": ["a", null]}', "text is an array"),
        ('{"text": {"en": "a", "fr": "b"}}', "text is an object"),
    ],
)
def test_another_shape_is_refused_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DamagedError) as caught:
        texts_of(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_a_text_file_stays_one_text_whatever_it_holds(tmp_path: Path) -> None:
    text = '{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.md").write_text("\ufeffwords")
    (row,) = rows_of(tmp_path / "a.txt")
    assert row.fields == {"text": text} and row.odd == "json"
    assert texts_of(tmp_path / "b.md") == ["words"]


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zst(raw: bytes) -> bytes:
    backports = pytest.importorskip("backports.zstd")
    packed: bytes = backports.compress(raw)
    return packed


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a"])
@pytest.mark.parametrize("packer", [*PACKERS, ".zst"])
def test_compression_is_told_by_content(tmp_path: Path, packer: str, name: str) -> None:
    pack, file = PACKERS.get(packer, zst), tmp_path / name
    raw = SHAPES["lines"].encode()
    file.write_bytes(pack(raw[:100]) + pack(raw[100:]))  # parallel compressors write one stream after the other
    assert texts_of(file) == TEXTS
    whole = pack(raw * 99)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match=str(file)):
        texts_of(file)


def test_a_zst_file_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = zst(SHAPES["lines"].encode())
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "b.txt").write_text("b")
    monkeypatch.setattr("ndtrain.data.formats._zstd", lambda: None)
    with pytest.raises(RecipeError, match=r"a\.jsonl\.zst.*pip install 'ndtrain\[zstd\]'"):
        texts_of(tmp_path / "a.jsonl.zst")
    notes: list[str] = []
    assert [file.name for file in find_files(str(tmp_path), notes.append)] == ["b.txt"]
    assert "left out: 1 .zst (pip install 'ndtrain[zstd]' to read it)" in notes[0]


def test_parquet_gives_the_texts_of_its_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        texts = TEXTS * 200
        table = pa.table({"id": list(range(800)), "text": pa.array(texts).cast(kind)})
        pq.write_table(table, file, row_group_size=300)
        assert texts_of(file) == texts
    assert [row.done for row in rows_of(file)][-1] == file.stat().st_size
    assert texts_of(file.rename(tmp_path / "without_a_suffix")) == texts
    for column, said in (
        ({"content": TEXTS}, 'a row has no "text": its fields are "content"'),
        ({"text": [1]}, "row 1: its text is a number, not a string"),
        ({"text": [b"a"]}, "row 1: its text is bytes, not a string"),
    ):
        pq.write_table(pa.table(column), file)
        with pytest.raises(DamagedError, match=said):
            texts_of(file)
    pq.write_table(pa.table({"text": ["a", None]}), file)
    with pytest.raises(DamagedError, match=r'row 2: "text" is null'):
        texts_of(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedError, match="cannot be read as parquet"):
        texts_of(file)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.gz", "a"])
def test_the_pointer_of_a_file_is_not_the_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(POINTER)
    with pytest.raises(DamagedError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        texts_of(file)
    file.write_text("/annex/objects/SHA256E-s1--2.txt\n")
    with pytest.raises(DamagedError, match="git-annex pointer"):
        texts_of(file)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_wide_encodings_are_refused_with_the_way_out(tmp_path: Path, name: str, encoding: str) -> None:
    file = tmp_path / name
    file.write_text(SHAPES["lines"], encoding=encoding)
    with pytest.raises(NdtrainError, match=rf"{name} is (UTF-\d\d, not UTF-8.*iconv -f UTF|not text.*zero bytes)"):
        texts_of(file)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_text_that_is_not_utf8_is_refused_wherever_it_is(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(pack(b"words\n" * 100_000 + "naïve\n".encode("latin-1")))
    with pytest.raises(DamagedError, match=r"a\.txt, line 100001: byte 0xef is not UTF-8.*iconv"):
        texts_of(file)
    for cut in ("é".encode()[:1], b"\xc3\x28", b"\xed\xa0\x80"):
        file.write_bytes(pack(cut))
        with pytest.raises(DamagedError, match="line 1: byte"):
            texts_of(file)
    file.write_bytes(pack(b"words\n" * 100_000 + b"\0"))
    with pytest.raises(RecipeError, match="not text: it contains zero bytes"):
        texts_of(file)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"PK\x03\x04....")
    with pytest.raises(RecipeError, match="a zip archive; unpack it"):
        texts_of(file)
    pytest.importorskip("pyarrow")
    file.write_bytes(b"ARROW1\0\0")
    with pytest.raises(DamagedError, match="cannot be read as Arrow"):
        texts_of(file)


# Arrow


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_gives_the_rows_of_its_columns(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = TEXTS * 200
    table = pa.table({"id": list(range(800)), "text": texts, "other": [["x"]] * 800})
    file = tmp_path / "a.arrow"
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    assert texts_of(file) == texts
    rows = list(rows_of(file))
    assert set(rows[0].fields) == {"text"}, "other columns are not read"
    assert rows[-1].where == "row 800" and 0 < rows[0].done < rows[-1].done <= file.stat().st_size
    assert texts_of(file.rename(tmp_path / "without_a_suffix")) == texts
    whole = (tmp_path / "without_a_suffix").read_bytes()
    for cut in (len(whole) - 1, len(whole) - 8, len(whole) // 2, 9):
        file.write_bytes(whole[:cut])
        with pytest.raises(DamagedError, match=r"a\.arrow"):
            texts_of(file)
    file.write_bytes(gzip.compress(whole))
    with pytest.raises(RecipeError, match="is arrow in a compressed file"):
        texts_of(file)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(DamagedError, match='it has two columns "text"'):
            texts_of(tmp_path / name)


# CSV


def test_csv_gives_the_fields_of_its_header(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    for suffix, separator in ((".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t")):
        for mark in ("", "\ufeff"):
            with file.with_suffix(suffix).open("w", newline="", encoding="utf-8") as out:
                out.write(mark)
                writer = csv.DictWriter(out, ["id", "text"], delimiter=separator)
                writer.writeheader()
                writer.writerows(rows)
            found = list(rows_of(file.with_suffix(suffix)))
            assert [row.fields for row in found] == rows
            assert [row.odd for row in found] == ["csv", "", "", ""], "a note says once that a file's rows are read"
            assert [row.where for row in found] == ["line 2", "line 3", "line 5", "line 6"]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text\none\n\ntwo\n"))
    assert texts_of(tmp_path / "b.csv.gz") == ["one", "two"]
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert [len(text) for text in texts_of(tmp_path / "long.csv")] == [200_000]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,id\na,1\nb\n", "line 3: the header has 2 fields, this row 1"),
        ("text,id\na,1\n\nb,2,3\n", "line 4: the header has 2 fields, this row 3"),
        ('text,id\n"a\nb",1\n"c" d,2\n', "line 4: not valid CSV"),
        ('text,id\na,1\n"b,2\nc,3\n', "line 3: not valid CSV"),
        ("date,price\nmonday,3\n", 'line 1: a row has no "text": its fields are "date", "price"'),
        ("just words\nwithout a header\n", 'line 1: a row has no "text"'),
    ],
)
def test_csv_that_is_not_as_its_header_says_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DamagedError) as caught:
        texts_of(tmp_path / "a.csv")
    assert f"a.csv, {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_fields_of_no_use_are_left_out_of_every_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [], "id": 1, "images": [2]}\n{"id": 3}\n')
    rows = [row.fields for row in rows_of(tmp_path / "a.jsonl", shape="chat")]
    # What a row is refused for is seen, and what it has instead of the fields of the shape.
    assert rows == [{"messages": [], "images": [2]}, {"id": 3}]


# Long texts


def test_a_long_text_is_read_in_pieces_cut_between_the_words_of_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "_WHOLE", 25)
    monkeypatch.setattr(text_rows, "_PIECE", 20)
    file = tmp_path / "a.txt"

    def pieces(text: str) -> list[str]:
        file.write_text(text, encoding="utf-8", newline="")
        rows = list(rows_of(file))
        assert "".join(row.fields["text"] for row in rows) == text
        if len(rows) > 1:
            marks = [(row.fields.begins, row.fields.ends) for row in rows if isinstance(row.fields, Piece)]
            assert marks == [(True, False), *[(False, False)] * (len(rows) - 2), (False, True)]
        lines = [f"line {text[:i].count(chr(10)) + 1}" for i in itertools.accumulate(map(len, pieces_of(rows)))]
        assert [row.where for row in rows] == ["line 1", *lines[:-1]]
        return pieces_of(rows)

    def pieces_of(rows: list[Row]) -> list[str]:
        return [row.fields["text"] for row in rows]

    assert pieces("") == [""]
    assert pieces("one\n" * 6 + "x") == ["one\n" * 6 + "x"], "25 bytes are read whole"
    assert pieces("one\n" * 6 + "xy") == ["one\n" * 4, "one\none\nxy"]
    assert pieces("one two\nthree\n\n\n four\nfive six") == ["one two\n", "three\n\n\n four\n", "five six"]
    assert pieces("ab\n \n \n \n \n \n \n \n \n \ncdefghi") == ["ab\n \n \n \n \n \n \n \n \n", " \ncdefghi"]
    assert pieces("x" * 30 + "\ny") == ["x" * 30 + "\n", "y"], "a longer line is not cut"
    assert pieces("ä\n" * 10) == ["ä\n" * 6, "ä\n" * 4]
    file.write_bytes(b"words\n" * 10 + b"\xff\n")
    with pytest.raises(DamagedError, match="line 11: byte 0xff"):
        list(rows_of(file))
    monkeypatch.setattr(text_rows, "_LONGEST_LINE", 40)
    file.write_text("a\n" * 30 + "x" * 100)
    with pytest.raises(RecipeError, match=r"line \d+: a line of more than 40 bytes"):
        list(rows_of(file))


# Shapes and columns


def test_the_first_row_decides_and_rows_of_another_shape_are_refused_with_their_line(tmp_path: Path) -> None:
    empty, chat, text = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    empty.write_text("\n")
    chat.write_text('{"messages": []}\n')
    text.write_text('{"text": "a"}\n{"messages": []}\n')
    assert find_shape([empty, chat, text]) == "chat" and find_shape([empty, text, chat]) == "text"
    assert find_shape([empty]) is None and find_shape([chat], format="tokens") == "tokens"
    with pytest.raises(
        DamagedError,
        match=r'c\.jsonl, line 2: a row has no "text": its fields are "messages"; it is chat, and the data',
    ):
        texts_of(text)
    (tmp_path / "d.txt").write_text("plain")
    assert find_shape([tmp_path / "d.txt", chat]) == "text"
    with pytest.raises(DamagedError, match=r'd\.txt: a row has no "messages" or .*: its fields are "text"'):
        list(rows_of(tmp_path / "d.txt", shape="chat"))
    (tmp_path / "e").write_text('{"messages": []}\n')
    with pytest.raises(DamagedError, match='line 1: a row has no "text"'):
        texts_of(tmp_path / "e")  # no document about JSON, though it is no row of text


def test_columns_name_the_text_in_every_kind_of_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {"text": "content"}
    rows = [{"content": text, "text": "another", "id": 1} for text in TEXTS]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    (tmp_path / "c").write_text(json.dumps(rows))
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.OSFile(str(tmp_path / "e.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with (tmp_path / "f.csv").open("w", newline="") as out:
        csv.DictWriter(out, list(rows[0])).writerows([dict(zip(rows[0], rows[0], strict=True)), *rows])
    for file in sorted(tmp_path.iterdir()):
        assert texts_of(file, columns) == TEXTS, file
        with pytest.raises(DamagedError, match='a row has no "body": its fields are "content", "text", "id"'):
            texts_of(file, {"text": "body"})
    (tmp_path / "g.txt").write_text("plain")
    assert texts_of(tmp_path / "g.txt", columns) == ["plain"], "a text file has no columns"


# Which files are found


def found(path: Path) -> tuple[list[str], str]:
    notes: list[str] = []
    files = find_files(str(path), notes.append)
    return [file.name for file in files], notes[0] if notes else ""


def test_a_directory_is_read_whole_or_says_what_it_left_out(tmp_path: Path) -> None:
    read = ["a.jsonl", "b.jsonl.gz", "d.ndjson", "e.txt.xz"]
    if importlib.util.find_spec("pyarrow"):
        read.insert(2, "c.parquet")
    for name in read:
        (tmp_path / name).write_text("x")
    assert found(tmp_path) == (read, "")
    for name in ("f.bin", "g.bin", "LICENSE", ".hidden.txt", ".git/h.txt", "i.pdf.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "j.txt").symlink_to("nowhere")
    (tmp_path / "k.txt").symlink_to("a.jsonl")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.txt")
    names, note = found(tmp_path)
    assert names == read
    for count in (
        *("2 .bin", "1 .gz", "1 without a suffix", "1 hidden,", "1 hidden directory", "1 broken link"),
        *("1 reached before through a link", "1 directory reached before", "1 pipe or device"),
    ):
        assert count in note, note


def test_a_note_names_the_most_frequent_kinds_that_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for number in range(20):
        (tmp_path / f"a.x{number:02}").write_text("x")
        (tmp_path / f"{number}.bin").write_text("x")
    _, note = found(tmp_path)
    assert "left out: 20 .bin, 1 .x" in note and note.endswith(", 9 others") and note.count(".x") == 11


def test_parquet_without_pyarrow_is_left_out_by_a_directory_and_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert found(tmp_path) == (
        ["a.jsonl"],
        f"data.path = \"{tmp_path}\": files read: 1; left out: 1 .parquet (pip install 'ndtrain[parquet]' to read it)",
    )
    with pytest.raises(RecipeError, match=r"c\.parquet is parquet, which needs a package: pip install 'ndtrain\[parq"):
        texts_of(find_files(str(tmp_path / "c.parquet"))[0])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"matches no file; left out: 1 \.parquet \(pip install"):
        find_files(str(tmp_path))


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "x.txt").write_text("x")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").symlink_to(tmp_path / "elsewhere")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    names, note = found(data)
    assert names == ["x.txt"] and "directory reached before" in note


def test_a_glob_counts_the_directories_that_it_matches(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").write_text("x")
    (tmp_path / "a.txt").write_text("a")
    assert found(tmp_path / "*") == (["a.txt"], f'data.path = "{tmp_path}/*": files read: 1; left out: 1 directory')
    assert found(tmp_path / "**" / "*") == (["a.txt", "x.txt"], "")
    with pytest.raises(RecipeError, match="left out: 1 directory"):
        find_files(str(tmp_path / "s*"))


def test_a_named_path_that_is_no_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("link.txt", "a link to nowhere, which cannot be followed"), ("pipe", "a pipe or a device")):
        with pytest.raises(RecipeError, match=said):
            find_files(str(tmp_path / name))
