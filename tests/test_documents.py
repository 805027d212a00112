"""What a file holds decides how it is read: JSON in its usual shapes, parquet, text, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ndtrain.data import documents
from ndtrain.data.documents import documents_of
from ndtrain.data.files import find_files
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


def texts_of(file: Path) -> list[str]:
    return [document.raw.decode() for document in documents_of(file)]


# Nothing but its name tells that an object of columns is data.
NAMED = [(shape, suffix) for shape in SHAPES for suffix in (".json", ".jsonl", ".ndjson")]
UNNAMED = [(shape, ".unknown") for shape in SHAPES if not shape.startswith("columns")]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(("shape", "suffix"), [*NAMED, *UNNAMED])
def test_json_of_each_shape_gives_its_texts(
    tmp_path: Path, shape: str, suffix: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_CHUNK", chunk)
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
    monkeypatch.setattr(documents, "_CHUNK", 1 << 12)
    monkeypatch.setattr(documents, "_LONGEST", 1 << 18)
    longest = 0
    read = documents._Json._read

    def watched(self: Any, size: int) -> None:
        nonlocal longest
        read(self, size)
        longest = max(longest, len(self.buffer))

    monkeypatch.setattr(documents._Json, "_read", watched)
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
    monkeypatch.setattr(documents, "_CHUNK", chunk)
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
        ('[{"text": "a"},\n ["b"]]', "line 2: not a JSON object"),
        ('{"columns": ["text"], "index": [0], "data": [["a"]]}', "the keys are columns, index, data"),
        ('{"0": {"text": "a"}}', "the keys are 0"),
        ('{"data": [{"text": "a"}]}', "the keys are data"),
        ('{"text": ["a", "b"], "id": [1]}', '"text" is an array'),
        ('{"text": ["a", null]}', '"text" is an array'),
        ('{"text": {"en": "a", "fr": "b"}}', '"text" is an object'),
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
    (document,) = documents_of(tmp_path / "a.txt")
    assert document.raw.decode() == text and document.odd == "json"
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
    assert [document.done for document in documents_of(file)][-1] == file.stat().st_size
    assert texts_of(file.rename(tmp_path / "without_a_suffix")) == texts
    for column, said in (({"content": TEXTS}, r"columns are content \(string\)"), ({"text": [1]}, r"text \(int64\)")):
        pq.write_table(pa.table(column), file)
        with pytest.raises(DamagedError, match=f'no column "text" of strings, its {said if "columns" in said else ""}'):
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
    for raw, said in ((b"PK\x03\x04....", "a zip archive; unpack it"), (b"ARROW1\0\0", "an Arrow file")):
        file.write_bytes(raw)
        with pytest.raises(RecipeError, match=said):
            texts_of(file)


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
