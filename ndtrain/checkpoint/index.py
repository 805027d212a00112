"""Write and read the index of a tensor directory, which says in which file each piece of each tensor is.

A reader of a checkpoint of 1,000 ranks opens the index and the files that hold its own pieces instead of all files.
The index is made of what the ranks wrote, the manifest has its hash, and each file that is opened must have a header
that agrees with it.

`pieces.index` is in the safetensors format: for each key the table of `Pieces`, int64 `[pieces, 2 + 2 dims]`, and in
the metadata the names of the files and the dtypes. Its suffix is another, so that readers of all safetensors files of
a directory, such as `torch.distributed.checkpoint.HuggingFaceStorageReader`, do not take it for weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndtrain.checkpoint.manifest import HASH, hash_of
from ndtrain.errors import DamagedError
from ndtrain.storage.headers import Target, header_of, parse_header
from ndtrain.storage.pieces import pieces_of_files
from ndtrain.storage.table import LARGEST, Pieces

INDEX = "pieces.index"
_WIDTHS = range(2, 130, 2)  # of tables, of tensors with the 0 to 64 dims that torch has at most


def tables_of(
    rows: Sequence[Tensor], names: Sequence[Sequence[str]], listed: Mapping[str, Any], directory: Path
) -> dict[str, Pieces]:
    """Return {key: pieces} from all ranks' `rows_of` of the tensors `listed`, and the `names` of the files each wrote.

    Empty tensors have no pieces and are left out.
    """
    files = [directory / name for mine in names for name in mine]
    firsts = np.cumsum([0, *map(len, names)])
    for own, first in zip(rows, firsts, strict=False):
        own[:, 1] += int(first)
    merged = np.concatenate([own.numpy() for own in rows])
    merged = merged[np.lexsort((merged[:, 1], merged[:, 0]))]
    keys, most = sorted(listed), (merged.shape[1] - 3) // 2
    bounds = np.searchsorted(merged[:, 0], np.arange(len(keys) + 1))
    found = {}
    for key, begin, end in zip(keys, bounds, bounds[1:], strict=False):
        dims = len(listed[key]["shape"])
        columns = [1, 2, *range(3, 3 + dims), *range(3 + most, 3 + most + dims)]
        if begin < end:
            found[key] = Pieces(listed[key]["dtype"], files, merged[begin:end, columns])
    return found


def write_index(directory: Path, stored: Mapping[str, Pieces]) -> None:
    """Write the index of a directory whose files hold the pieces `stored`."""
    files = next((pieces.files for pieces in stored.values()), ())
    targets = {key: Target(pieces.table.shape, torch.int64) for key, pieces in stored.items()}
    dtypes = {key: pieces.dtype for key, pieces in stored.items()}
    header, starts = header_of(
        targets, {"files": json.dumps([file.name for file in files]), "dtypes": json.dumps(dtypes)}
    )
    with (directory / INDEX).open("wb") as file:
        file.write(header)
        for key in starts:
            file.write(np.ascontiguousarray(stored[key].table, "<i8").tobytes())


def read_index(directory: Path, listed: Mapping[str, Any], names: Iterable[str]) -> dict[str, Pieces]:
    """Return {key: pieces} of a tensor directory from its index.

    `listed` is the manifest's entry of the index, and `names` are the tensor files that it lists. Raises `DamagedError`
    for an index that is not that one, or not of these files.
    """
    where = f"{directory.parent}: {directory.name}/{INDEX}"
    try:
        data = (directory / INDEX).read_bytes()
    except OSError as error:
        raise DamagedError(f"{where} cannot be read ({error.strerror or error})") from error
    if len(data) != listed["size"]:
        raise DamagedError(f"{where} has {len(data):,} of {listed['size']:,} bytes")
    if hash_of(data) != listed[HASH]:
        raise DamagedError(f"{where} was altered")
    try:
        begin, entries, info = parse_header(len(data), lambda start, stop: data[start:stop])
        files, dtypes = json.loads(info["files"]), json.loads(info["dtypes"])
        if sorted(files) != sorted(names):
            raise ValueError("its files are not those of the manifest")
        paths, found = [directory / name for name in files], {}
        for key, entry in entries.items():
            if entry.dtype != "I64" or len(entry.shape) != 2 or entry.shape[0] < 1 or entry.shape[1] not in _WIDTHS:
                raise ValueError(f"the table of {key} is {entry.dtype} of shape {entry.shape}")
            table = np.frombuffer(data, "<i8", entry.shape[0] * entry.shape[1], begin + entry.start)
            found[key] = Pieces(str(dtypes[key]), paths, table.reshape(entry.shape))
            if not 0 <= table.min() <= table.max() < LARGEST or found[key].table[:, 0].max() >= len(files):
                raise ValueError(f"the table of {key} has numbers out of range")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    return found


def check_headers(stored: Mapping[str, Pieces], directory: Path, asked: Callable[[int, Path], bool]) -> None:
    """Raise `DamagedError` unless the headers of files list exactly the pieces that `stored`, an index, does.

    Opens the files of which `asked(number, file)` is true.
    """
    files = next((pieces.files for pieces in stored.values()), ())
    opened = np.array([asked(number, file) for number, file in enumerate(files)], bool)
    where = f"{directory.parent}: {directory.name}"
    found = pieces_of_files(files, np.flatnonzero(opened).tolist(), where)
    for key in stored.keys() | found.keys():
        wanted, held = (
            {*map(tuple, side[key].table[opened[side[key].table[:, 0]]].tolist())} if key in side else set()
            for side in (stored, found)
        )
        if wanted != held or (held and stored[key].dtype != found[key].dtype):
            number = min(wanted ^ held or held)[0]
            raise DamagedError(f"{where}/{files[number].name}: its header and {INDEX} differ in {key}")
