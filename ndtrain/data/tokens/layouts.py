"""The layouts of token files, and which of them a file has. Bytes decide, and a name where they do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ndtrain.data.formats import COMPRESSIONS, reading, refuse_pointer
from ndtrain.data.tokens import arrow, llmc, megatron, npy, parquet, raw
from ndtrain.data.tokens.block import Block, Reading, damaged
from ndtrain.errors import RecipeError

Blocks = Callable[[Path, Reading], Iterator[Block]]

LAYOUTS: dict[str, Blocks] = {
    "npy": npy.blocks,
    "llm.c": llmc.blocks,
    "megatron": megatron.blocks,
    "arrow": arrow.blocks,
    "parquet": parquet.blocks,
    "raw": raw.blocks,
}
# Suffixes of raw tokens, whose bytes say nothing.
RAW_SUFFIXES = (".bin", ".npy")
SUFFIXES = (*RAW_SUFFIXES, ".arrow", ".parquet")
# First bytes of other kinds of files -> what they are.
_OTHERS = {
    b"PK\x03\x04": "a zip archive (as .npz and .pt files are), which cannot be mapped; save each array as .npy",
    b"\x89HDF\r\n\x1a\n": "HDF5; save the tokens as .npy",
    b"LITPKDS": "of lit-gpt's packed layout; write the tokens without its header",
    b"\x80\x02\x8a\n": "a pickle, which is never unpickled; save the tokens as .npy",
    b"\x80\x04\x95": "a pickle, which is never unpickled; save the tokens as .npy",
    b"\x80\x05\x95": "a pickle, which is never unpickled; save the tokens as .npy",
}
_PRINTABLE = bytes(range(32, 127)) + b"\t\r\n"


def is_text(file: Path) -> bool:
    """Return whether a file begins as no file of tokens does, but text."""
    with reading(file), file.open("rb") as content:
        start = content.read(512)
    return len(start) >= 32 and not start.translate(None, _PRINTABLE)


def layout_of(file: Path) -> str:
    """Return the key of `LAYOUTS` that a file has.

    Raises `RecipeError` for a compressed file, which cannot be mapped, and for other kinds; `DamagedError` if it is
    empty or cannot be read.
    """
    with reading(file), file.open("rb") as content:
        start = content.read(512)
    if not start:
        raise damaged(file, "is empty")
    refuse_pointer(start, file)
    suffix = file.suffix.lower()
    for compressed, magic in COMPRESSIONS.items():
        # The magic of gzip alone is a token of 16 bits.
        if suffix == compressed or start.startswith(magic + b"\x08" if compressed == ".gz" else magic):
            raise RecipeError(f"{file} is compressed, and tokens are used where they lie: unpack it")
    if start.startswith(npy.MAGIC):
        return "npy"
    if start.startswith(parquet.MAGIC):
        return "parquet"
    if start.startswith(arrow.FILE) or (start.startswith(arrow.STREAM) and suffix not in RAW_SUFFIXES):
        return "arrow"
    if suffix == ".bin" and megatron.index_of(file).exists():
        return "megatron"
    if llmc.matches(start):
        return "llm.c"
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise RecipeError(f"{file} is {what}")
    if suffix in (".arrow", ".parquet"):
        raise damaged(file, f"does not begin as {suffix[1:]} files do")
    if file.name.startswith("chunk-") and (file.parent / "index.json").is_file():
        raise RecipeError(f"{file} is a chunk of litdata (index.json is beside it), whose layout is not read")
    if suffix in RAW_SUFFIXES:
        if is_text(file):
            raise RecipeError(f'{file} is text, not tokens; set data.format = "text"')
        return "raw"
    raise RecipeError(
        f'{file}: neither its first bytes nor its name say how tokens lie in it; data.format = "tokens" reads .npy, '
        ".bin (raw, llm.c, Megatron with its .idx), .arrow and .parquet (rows of JSON can be written as parquet)"
    )
