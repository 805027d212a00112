"""Reads checkpoints that other tools wrote with torch's DCP: plain `dcp.save`, accelerate, torchtitan.

No code in them runs. `.metadata` is a pickle: the unpickler here makes DCP's own records and the types they consist of,
and refuses every other name before anything is called. torch's own `weights_only` reader reads the headers of the
tensors' archives; the values are read as bytes.
"""

from __future__ import annotations

import enum
import io
import math
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from ndtrain.errors import DamagedError
from ndtrain.hf.tied import refuse_other_values
from ndtrain.storage.headers import DTYPE_NAMES
from ndtrain.storage.stored import Stored, stored
from ndtrain.storage.table import LARGEST, Piece
from ndtrain.torch_compat import FakeTensorMode, dcp_records, offset_in_archive

METADATA = ".metadata"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
# Wrappers whose names some frameworks leave in the keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# torchtitan's own names of Llama's weights; it orders the rows of query and key projections differently.
_TITAN = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
        (r"layers\.(\d+)\.attention\.(?:qkv_linear\.)?w([qkvo])\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
        (r"layers\.(\d+)\.attention\.([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
        (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
        (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight"),
        (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight"),
        (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
        (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
        (r"norm\.weight", "model.norm.weight"),
        (r"output\.weight", "lm_head.weight"),
    )
)
# By model type: whether torchtitan keeps the rows of queries and keys in pairs for the rotation.
_TITAN_TYPES = {"llama": True, "qwen3": False}
# First part of the keys of training state that is saved beside the weights.
_BESIDE = re.compile(r"(optim|lr_scheduler|scheduler|train_state|dataloader|data_loader|rng|step|epoch|iteration)\w*")
# By their names in a file.
_RECORDS = {
    **{
        f"{kind.__module__}.{kind.__name__}": kind
        for kind in (
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorProperties,
            dcp.TensorStorageMetadata,
        )
    },
    **dcp_records(),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the records of DCP's metadata and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _RECORDS:
            return _RECORDS[f"{module}.{name}"]
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # some releases of Python 3.11 write a member of an enumeration so
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "Path"):
            return pathlib.PurePosixPath  # the directory it was saved to, which is not used
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which is not part of DCP metadata and is not loaded"
        )


def _enum_member(kind: Any, name: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it refers to the attribute {name!r}, which is not part of DCP metadata")
    return kind[name]


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"it has a tensor of layout {name}; only torch.strided is supported")
    return torch.strided


def read_metadata(directory: Path) -> Any:
    """Return DCP's `Metadata` of a directory without running code of the file. Raises `DamagedError`."""
    path = directory / METADATA
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, dcp.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__} instead of DCP's Metadata")
        if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("state_dict_metadata and storage_data are not dicts")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DamagedError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    return found


def foreign_tensors(
    directory: Path, state: Mapping[str, Tensor], aliases: Mapping[str, str], config: Any
) -> tuple[dict[str, Stored], list[str]]:
    """Return the model's tensors in a DCP directory, by the model's own keys, and notes for the user.

    `state` holds the model's tensors, and `aliases` the names under which tied ones may have been saved too. A prefix
    that all keys share (`model.`, `state.model.`) is removed. Raises `DamagedError`.
    """
    metadata = read_metadata(directory)
    names: dict[str, str] = {}
    for key in metadata.state_dict_metadata:
        plain = str(key)
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        names[plain] = key
    titan = next(
        (name.removesuffix("tok_embeddings.weight") for name in names if name.endswith("tok_embeddings.weight")), None
    )
    if titan is not None:
        if config.model_type not in _TITAN_TYPES:
            raise DamagedError(
                f"{directory} names its weights as torchtitan does, which ndtrain reads for "
                f"{' and '.join(_TITAN_TYPES)}, not for {config.model_type}; convert it with torchtitan's own tool"
            )
        names = {_titan_name(name, titan): key for name, key in names.items()}
    prefix = "" if titan is not None else _prefix(names, state)
    known, beside, unknown = {}, [], []
    for plain, key in names.items():
        own = plain.removeprefix(prefix)
        is_tensor = isinstance(metadata.state_dict_metadata[key], dcp.TensorStorageMetadata)
        if plain.startswith(prefix) and is_tensor and (own in state or own in aliases):
            known[own] = key
        elif not is_tensor or not plain.startswith(prefix) or _BESIDE.fullmatch(own.split(".")[0]):
            beside.append(plain)
        else:
            unknown.append(plain)
    copies: dict[str, list[str]] = {}
    for own in sorted(known):
        copies.setdefault(aliases.get(own, own), []).append(own)
    missing = [key for key, tensor in state.items() if key not in copies and tensor.numel()]
    if missing or unknown:
        some = [f"{len(missing)} of the model's {len(state)} tensors missing, first {missing[0]}"] if missing else []
        some += [f"{len(unknown)} of {len(names)} entries not in the model, first {unknown[0]}"] if unknown else []
        raise DamagedError(f"{directory} does not match the model: {'; '.join(some)}")
    parts = {(str(index.fqn), tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    found = {own: _tensor(directory, key, metadata.state_dict_metadata[key], parts) for own, key in known.items()}
    refuse_other_values(copies, found, directory)
    found = {name: found[owns[0]] for name, owns in copies.items()}
    if titan is not None and _TITAN_TYPES[config.model_type]:
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for own in found:
            if match := re.fullmatch(r".*\.self_attn\.([qk])_proj\.weight", own):
                found[own] = _halves(found[own], heads[match[1]])
    notes = [f"left out (not weights): {len(beside)} of {len(names)} entries, first {min(beside)}"] if beside else []
    return found, notes


def _titan_name(name: str, prefix: str) -> str:
    for pattern, own in _TITAN:
        if name.startswith(prefix) and (match := pattern.fullmatch(name, len(prefix))):
            return match.expand(own)
    return name


def _halves(tensor: Stored, heads: int) -> Stored:
    """Reorder the rows of each head, first the even ones and then the odd, as transformers rotates them."""
    width = tensor.shape[0] // heads
    pieces = []
    for piece in tensor.pieces:
        nbytes = tensor.dtype.itemsize * math.prod(piece.sizes[1:])
        for i in range(piece.sizes[0]):
            head, row = divmod(piece.offsets[0] + i, width)
            to = head * width + (row % 2) * (width // 2) + row // 2
            start = piece.start + i * nbytes
            pieces.append(piece._replace(offsets=(to, *piece.offsets[1:]), sizes=(1, *piece.sizes[1:]), start=start))
    return tensor._replace(pieces=tuple(pieces))


def _prefix(names: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    """Return the prefix of the model's keys: of all that occur before one of them, the one that fits most keys."""
    probe = max(state, key=len)
    candidates = {name[: -len(key)] for key in (probe, *list(state)[:3]) for name in names if name.endswith(key)}
    candidates = {prefix for prefix in candidates if not prefix or prefix.endswith(".")}
    candidates = {prefix for prefix in candidates if not _BESIDE.fullmatch(prefix.split(".")[0])}
    return max(sorted(candidates), key=lambda p: sum(p + key in names for key in state), default="")


def _tensor(directory: Path, key: str, metadata: Any, parts: Mapping[Any, Any]) -> Stored:
    dtype = metadata.properties.dtype
    if dtype not in DTYPE_NAMES:
        raise DamagedError(f"{directory}: {key} has dtype {dtype}, which ndtrain does not convert")
    pieces = []
    for chunk in metadata.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if any(type(n) is not int or not 0 <= n < LARGEST for n in (*offsets, *sizes, *metadata.size)):
            raise DamagedError(
                f"{directory}: {METADATA} gives {key} of shape {tuple(metadata.size)} a piece of shape {sizes} at "
                f"{offsets}; only integers of at least 0 and below 2**62 are valid"
            )
        info = parts.get((key, offsets))
        if info is None:
            raise DamagedError(f"{directory}: {METADATA} does not say in which file the piece of {key} at {offsets} is")
        pieces.append(_piece(directory, key, info, offsets, sizes, dtype))
    return stored(key, tuple(metadata.size), dtype, pieces, directory)


def _piece(directory: Path, key: str, info: Any, offsets: Any, sizes: Any, dtype: torch.dtype) -> Piece:
    """Return where the values of one `torch.save` archive lie within a file. Raises `DamagedError`."""
    name = info.relative_path
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DamagedError(f"{directory}: {METADATA} names the file {name!r}, which is not a path inside the directory")
    path = directory / name
    if getattr(info, "transform_descriptors", None):
        raise DamagedError(f"{path}: {key} is compressed, and ndtrain reads only uncompressed tensors")
    try:
        with path.open("rb") as file, FakeTensorMode():
            archive = _FileRange(file, info.offset, info.length)
            tensor: Any = torch.load(archive, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            if tuple(tensor.shape) != sizes or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}")
            # torch.load sets the offset on fake tensors (torch 2.7 on).
            start = offset_in_archive(tensor) + tensor.storage_offset() * dtype.itemsize
            if not 0 <= start <= info.length - tensor.numel() * dtype.itemsize:
                raise ValueError("its values are outside its archive")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"{path}: {key} at {offsets} cannot be read: {reason}") from error
    return Piece(path, offsets, sizes, DTYPE_NAMES[dtype], info.offset + start)


class _FileRange(io.RawIOBase):
    """Reads bytes `start` to `start + length` of a file as a file of its own."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._offset = file, start, length, 0
        size = file.seek(0, io.SEEK_END)
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start}+{length} are not inside the file of {size:,} bytes")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._length}[whence]
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._offset))
        self._file.seek(self._start + self._offset)
        data = self._file.read(count)
        view[: len(data)] = data
        self._offset += len(data)
        return len(data)
