"""Data files with one fault each: `python -m tests.odd_data N` reads N of them and prints a table (tests/ODD_DATA.md).

A reader must end with one line that names the file, or give the texts that another reader of the same bytes gives
(Python's json and csv, pyarrow, and the decompressors of whole files): nothing in between.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ndtrain.data.rows import find_shape, row_errors, rows_of
from ndtrain.data.shapes import fields_of, text_of
from ndtrain.errors import DamagedError, RecipeError

Rows = list[dict[str, Any]]
TEXTS = ["one document", "zwei ümläüte, 🙂", 'a "quoted", one', "two\nlines", "x" * 500]


def rows_for(rng: random.Random) -> Rows:
    return [{"id": i, "text": rng.choice(TEXTS) + str(i), "meta": {"n": [i]}} for i in range(rng.randrange(20, 600))]


# How rows become a file, and how another reader gets the texts back.


def lines(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=row.get("id", 0) % 2 == 0) for row in rows).encode() + b"\n"


def of_lines(raw: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in raw.decode("utf-8-sig").split("\n") if line.strip()]


def array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=len(rows) % 3).encode()


def of_array(raw: bytes) -> list[str]:
    found = json.loads(raw.decode("utf-8-sig"))
    return [row["text"] for row in (found if isinstance(found, list) else [found])]


def sheet(rows: Rows) -> bytes:
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def of_sheet(raw: bytes) -> list[str]:
    read = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
    return [row["text"] for row in read]


def table(rows: Rows) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def parquet(rows: Rows) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(table(rows), out, row_group_size=100, write_page_checksum=True)
    return out.getvalue()


def of_parquet(raw: bytes) -> list[str]:
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(io.BytesIO(raw), columns=["text"], page_checksum_verification=True)
    texts: list[str] = found.column("text").to_pylist()
    return texts


def arrow(rows: Rows, *, stream: bool = False) -> bytes:
    import pyarrow

    out, whole = io.BytesIO(), table(rows)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(out, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=100)
    return out.getvalue()


def of_arrow(raw: bytes) -> list[str]:
    import pyarrow

    stream = not raw.startswith(b"ARROW1")
    found = (pyarrow.ipc.open_stream if stream else pyarrow.ipc.open_file)(raw).read_all().column("text")
    found.validate(full=True)
    texts: list[str] = found.to_pylist()
    return texts


def plain(rows: Rows) -> bytes:
    return "\n\n".join(row["text"] for row in rows if isinstance(row.get("text"), str)).encode()


def of_plain(raw: bytes) -> list[str]:
    if b"\0" in raw:
        raise ValueError("binary")
    return [raw.decode("utf-8-sig")]


Kind = tuple[Callable[[Rows], bytes], Callable[[bytes], list[str]]]
KINDS: dict[str, Kind] = {
    ".jsonl": (lines, of_lines),
    ".json": (array, of_array),
    ".csv": (sheet, of_sheet),
    ".txt": (plain, of_plain),
    ".parquet": (parquet, of_parquet),
    ".arrow": (arrow, of_arrow),
    ".stream.arrow": (lambda rows: arrow(rows, stream=True), of_arrow),
}
PACKERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.compress, gzip.decompress),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}


# Faults of rows: before they are written. Of bytes: after.


def _row(rows: Rows, rng: random.Random) -> dict[str, Any]:
    return rows[rng.randrange(1, len(rows))]


ROW_FAULTS: dict[str, Callable[[Rows, random.Random], object]] = {
    "missing key": lambda rows, rng: _row(rows, rng).pop("text"),
    "null": lambda rows, rng: _row(rows, rng).update(text=None),
    "other key from here on": lambda rows, rng: [
        row.update(content=row.pop("text")) for row in rows[rng.randrange(1, len(rows)) :]
    ],
    "key of another shape": lambda rows, rng: rows.insert(rng.randrange(1, len(rows)), {"id": 0, "messages": []}),
    "longer row": lambda rows, rng: _row(rows, rng).update(text="long " * 200_000),
}


def _at(raw: bytes, rng: random.Random) -> int:
    return rng.randrange(len(raw))


BYTE_FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda raw, rng: raw[: _at(raw, rng)],
    "cut at its end": lambda raw, rng: raw[: -rng.randrange(1, 9)],
    "cut at its beginning": lambda raw, rng: raw[rng.randrange(1, 40) :],
    "a byte changed": lambda raw, rng: (at := _at(raw, rng), raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :])[1],
    "bytes inserted": lambda raw, rng: (at := _at(raw, rng), raw[:at] + rng.randbytes(7) + raw[at:])[1],
    "bytes lost": lambda raw, rng: (at := _at(raw, rng), raw[:at] + raw[at + rng.randrange(1, 99) :])[1],
    "a block of zeros": lambda raw, rng: (at := _at(raw, rng), raw[:at] + bytes(64) + raw[at + 64 :])[1],
    "joined twice": lambda raw, rng: raw + raw,
    "rubbish after it": lambda raw, rng: raw + b"\n<html>502</html>",
    "latin-1": lambda raw, rng: raw.decode("utf-8", "replace").encode("latin-1", "replace"),
    "utf-16": lambda raw, rng: raw.decode("utf-8", "replace").encode("utf-16"),
    "byte-order mark": lambda raw, rng: b"\xef\xbb\xbf" + raw,
    "a quote lost": lambda raw, rng: raw.replace(b'"', b"", 1),
    "a bracket lost": lambda raw, rng: raw.replace(b"}", b"", 1),
    "a key twice": lambda raw, rng: raw.replace(b'"id":', b'"text": "other", "id":', 1),
    "a number for a text": lambda raw, rng: raw.replace(b'"text": "', b'"text": 3, "rest": "', 1),
    "deep": lambda raw, rng: raw.replace(b'"meta": {', b'"meta": {"x": ' + b"[" * 50_000, 1),
}


def mutated(folder: Path, seed: int) -> tuple[Path, str, Callable[[], list[str]]]:
    """Write the data file of `seed`; return it, its fault, and another reader of it."""
    rng = random.Random(seed)
    suffix = rng.choice(list(KINDS))
    write, read = KINDS[suffix]
    rows = rows_for(rng)
    fault = rng.choice([*ROW_FAULTS, *BYTE_FAULTS])
    if fault in ROW_FAULTS:
        ROW_FAULTS[fault](rows, rng)
    raw = write(rows)
    if suffix in (".jsonl", ".json", ".csv", ".txt") and rng.random() < 0.4:
        packer = rng.choice(list(PACKERS))
        pack, unpack = PACKERS[packer]
        inside = rng.random() < 0.5
        if fault in BYTE_FAULTS and inside:
            raw = BYTE_FAULTS[fault](raw, rng)
        raw = pack(raw)
        if fault in BYTE_FAULTS and not inside:
            raw = BYTE_FAULTS[fault](raw, rng)
        suffix, inner = suffix + packer, read
        read = lambda raw: inner(unpack(raw))  # noqa: E731
    elif fault in BYTE_FAULTS:
        raw = BYTE_FAULTS[fault](raw, rng)
    file = folder / f"{seed}{suffix}"
    file.write_bytes(raw)
    return file, fault, lambda: read(raw)


def texts_of(file: Path) -> list[str]:
    texts = []
    find_shape([file])
    for row in rows_of(file):
        with row_errors(file, row.where):
            texts.append(text_of(fields_of(row.fields, "text", {})))
    return texts


def outcome(file: Path, other: Callable[[], list[str]]) -> tuple[str, str]:
    """Return ("refused" | "read" | "wrong", the error or what is wrong)."""
    try:
        found = texts_of(file)
    except (RecipeError, DamagedError) as error:
        one_line = "\n" not in str(error) and str(file) in str(error)
        return ("refused" if one_line else "wrong"), str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    try:
        expected = other()
    except Exception as error:
        return "wrong", f"read, though another reader says {type(error).__name__}: {error}"
    return ("read", "") if found == expected else ("wrong", f"{len(found)} texts, another reader has {len(expected)}")


def main(count: int, first: int = 0) -> int:
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            file, fault, other = mutated(Path(folder), seed)
            kind, text = outcome(file, other)
            counts.setdefault(fault, Counter())[kind] += 1
            if kind == "wrong":
                print(f"{file.name}, {fault}: {text[:300]}", flush=True)
            file.unlink()
    kinds = ("refused", "read", "wrong")
    print(f"| fault | {' | '.join(kinds)} |\n|---|---|---|---|")
    for fault, found in sorted(counts.items()):
        print(f"| {fault} | {' | '.join(str(found[kind]) for kind in kinds)} |")
    total: Counter[str] = sum(counts.values(), Counter())
    print(f"| all | {' | '.join(str(total[kind]) for kind in kinds)} |")
    return total["wrong"]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
