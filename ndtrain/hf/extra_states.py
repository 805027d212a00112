"""Save and restore modules' extra states (`get_extra_state`) as data, never as pickled bytes.

TransformerEngine keeps its fp8 scales there. A state is data if it consists of numbers, strings, None, lists, tuples,
dicts with string keys, and tensors; it is saved if every rank has the same. Bytes, also in a tensor, are not data:
only their module can interpret them, and it may unpickle them.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ndtrain.errors import DamagedError
from ndtrain.runs.messages import broadcast_json, of_rank0
from ndtrain.runs.process import world_size
from ndtrain.storage.paths import read_object

SUFFIX, FILE = "_extra_state", "extra_state.json"
_BYTES = (torch.uint8, torch.int8)


def is_extra(key: str) -> bool:
    """Return whether a key of a state dict is a module's extra state."""
    return key.rpartition(".")[2] == SUFFIX


def states(model: nn.Module) -> dict[str, Any]:
    """Return {module: its extra state in JSON types, or None if it is not data}, without empty states."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        state = module.get_extra_state()
        if state is None or (isinstance(state, Tensor) and not state.numel()):
            continue
        try:
            found[name] = to_json(state)
        except TypeError:
            found[name] = None
    return found


def shared_states(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Return {module: state} of data that is equal on all ranks, and the modules of other states. Collective."""
    mine = states(model)
    names = broadcast_json(list(mine))
    first = broadcast_json([json.dumps(state) for state in mine.values()])
    left_out = torch.zeros(len(names) + 1, dtype=torch.uint8)
    left_out[-1] = list(mine) != names
    for i, (name, state) in enumerate(zip(names, first, strict=True)):
        left_out[i] = mine.get(name) is None or json.dumps(mine[name]) != state
    if world_size() > 1:
        dist.all_reduce(left_out, op=dist.ReduceOp.MAX)
    kept = [name for name, out in zip(names, left_out.tolist(), strict=False) if not out]
    return {name: mine[name] for name in kept}, sorted((mine.keys() | set(names)) - set(kept))


@contextmanager
def withheld(model: nn.Module) -> Iterator[None]:
    """Disable `set_extra_state` in the classes of `model`'s modules: transformers would pass them bytes from a file."""
    classes = {c for m in model.modules() for c in type(m).__mro__ if "set_extra_state" in vars(c)} - {nn.Module}
    before = {c: vars(c)["set_extra_state"] for c in classes}
    for kind in before:
        cast(Any, kind).set_extra_state = lambda self, state: None
    try:
        yield
    finally:
        for kind, method in before.items():
            cast(Any, kind).set_extra_state = method


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore the states that are data on exit, for forwards that are not part of training."""
    before = states(model)
    yield
    restore(model, {name: state for name, state in before.items() if state is not None})


def read(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's states, the same on every rank; {} if it has none. Collective.

    Raises `DamagedError` if the file cannot be read.
    """

    def load() -> Any:
        return read_object(directory / FILE) if (directory / FILE).exists() else {}

    return cast(dict[str, Any], of_rank0(load))


def restore(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Pass stored states to their modules. Raises `DamagedError` for a state that this model cannot take."""
    modules = dict(model.named_modules())
    for name, state in stored.items():
        if name not in modules or type(modules[name]).set_extra_state is nn.Module.set_extra_state:
            raise DamagedError(
                f"the files hold an extra state of {name}, but this model has no module of that name that takes one"
            )
        try:
            value = from_json(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"the extra state of {name} cannot be read ({type(error).__name__}: {error})") from error
        modules[name].set_extra_state(value)


def left_out_note(modules: list[str], what: str) -> str:
    """Return the note that the states of `modules` are left out; `what` says of what, and when they start anew."""
    count = len(modules) - 1
    more = f" and of {count} more module{'s' if count > 1 else ''}" if count else ""
    return (
        f"the extra state of {min(modules)}{more} is bytes or differs between ranks, so it is {what}, "
        "it starts from its initial value"
    )


def to_json(value: Any) -> Any:
    """Return `value` in JSON types. Raises `TypeError` if it is not data."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_json(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    if isinstance(value, Tensor) and _is_data(value):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": base64.b64encode(raw).decode(), "dtype": dtype, "shape": list(value.shape)}
    raise TypeError(f"{type(value).__name__} is not data")


def _is_data(tensor: Tensor) -> bool:
    plain = not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.layout is torch.strided
    return plain and tensor.dtype not in _BYTES


def from_json(value: Any) -> Any:
    """Return the value from which `to_json` made `value`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(from_json(item) for item in value["tuple"])
    if "dict" in value:
        return {key: from_json(item) for key, item in value["dict"].items()}
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype) or dtype in _BYTES:
        raise ValueError(f"its dtype is {value['dtype']}")
    raw = bytearray(base64.b64decode(value["tensor"], validate=True))
    shape = [int(n) for n in value["shape"]]
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it has {len(raw)} bytes for shape {shape}")
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
