"""Read and write the header of a safetensors file, for checkpoints, conversion and loading.

A file is 8 bytes with the length of the header, the header as JSON, and the tensors' bytes one after another
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ndtrain.layout import Ints
from ndtrain.storage.paths import read_range

# In safetensors' order: its files store tensors of the last of these first, then by name.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: i for i, name in enumerate(DTYPES)}
_MAX_BYTES = 100_000_000  # safetensors' own limit
_FIRST_BYTES = 1 << 16  # read first, since most headers are shorter


class Entry(NamedTuple):
    """A tensor in a file: the bytes from `start` to `stop` after the header."""

    dtype: str
    shape: Ints
    start: int
    stop: int


class Target(NamedTuple):
    """Shape and dtype of a tensor that will be written."""

    shape: Ints
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(tensors: Mapping[str, Target], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return a header, byte for byte as the library `safetensors` writes it, and each tensor's offset after it.

    The tensors are stored in the order of their offsets, the widest dtypes first, so that all are aligned.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for key in sorted(tensors, key=lambda k: (-_RANK[DTYPE_NAMES[tensors[k].dtype]], k)):
        tensor = tensors[key]
        starts[key], end = end, end + tensor.nbytes
        name = DTYPE_NAMES[tensor.dtype]
        table[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [starts[key], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def read_header(file: Path) -> tuple[int, dict[str, Entry], dict[str, str]]:
    """Return the offset of the first tensor, the entries, and the metadata, all checked against the file's length.

    Raises `OSError`, `ValueError`, `KeyError` or `TypeError` if the file is damaged.
    """
    return parse_header(file.stat().st_size, lambda start, stop: read_range(file, start, stop))


def parse_header(size: int, read: Callable[[int, int], bytes]) -> tuple[int, dict[str, Entry], dict[str, str]]:
    """Return what `read_header` does, of `size` bytes of which `read(start, stop)` returns some."""
    begin = read(0, min(size, _FIRST_BYTES))
    length = int.from_bytes(begin[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_BYTES):
        raise ValueError(f"its header does not fit in its {size:,} bytes")
    if 8 + length > len(begin):
        begin += read(len(begin), 8 + length)
    table = json.loads(begin[8 : 8 + length])
    metadata = table.pop("__metadata__", {})
    entries = {key: _entry(key, value) for key, value in table.items()}
    end = 0
    for start, stop in sorted((entry.start, entry.stop) for entry in entries.values()):
        if not start == end <= stop:
            raise ValueError(
                f"its tensors do not follow one another: one ends at {end:,}, the next is at {start:,} to {stop:,}"
            )
        end = stop
    if size != 8 + length + end:
        raise ValueError(f"it has {size:,} of {8 + length + end:,} bytes")
    return 8 + length, entries, metadata


def are_sizes(values: Iterable[Any]) -> bool:
    """Return whether all values are integers of at least 0. A header of many tensors asks it of each."""
    for n in values:  # noqa: SIM110  several times faster than a generator in `all`
        if type(n) is not int or n < 0:
            return False
    return True


def _entry(key: str, value: Mapping[str, Any]) -> Entry:
    shape, dtype = tuple(value["shape"]), value["dtype"]
    start, stop = value["data_offsets"]
    if not are_sizes(shape):
        raise ValueError(f"{key} has shape {shape}")
    width = DTYPES[dtype].itemsize if dtype in DTYPES else None
    if type(start) is not int or (width is not None and stop - start != math.prod(shape) * width):
        raise ValueError(f"{key} has shape {shape} in bytes {start} to {stop}")
    return Entry(dtype, shape, start, stop)
