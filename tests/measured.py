"""What a real step allocates and sends, by torch's profiler: for comparison with what `inspect` says."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

OPS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::alltoall_": "all_to_all",
    "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::send": "send",
    "c10d::recv_": "recv",
}
_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
_M_MMAP_THRESHOLD = -3
ITEMSIZE = {"float": 4, "c10::BFloat16": 2, "long int": 8, "double": 8, "bool": 1, "unsigned char": 1, "int": 4}


def measured(path: str, overrides: list[str]) -> dict[str, Any]:
    """The third step of a run on the ranks of a pool: its peak bytes in torch's allocator, and its collectives."""
    from ndtrain.hf.weight_names import model_tensors
    from ndtrain.layout import local_part
    from tests.trainers import trainer_of

    _LIBC.mallopt(_M_MMAP_THRESHOLD, 4096)
    trainer = trainer_of(path, overrides)
    trainer.prepare()
    trainer.train_step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train_step()
    gc.collect()
    state = [t for values in trainer.engine.optimizer.state.values() for t in values.values()]
    kept = [*model_tensors(trainer.engine.model).values(), *state]
    before = _held() - sum(local_part(tensor).untyped_storage().nbytes() for tensor in kept)
    with _Sampled() as sampled:
        trainer.train_step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sent: dict[str, list[int]] = {}
    for event in events:
        if (op := OPS.get(event.get("name"))) is not None:
            total = sent.setdefault(op, [0, 0])
            total[0] += 1
            total[1] += max(_sizes(event["args"]["Input Dims"], event["args"]["Input type"]))
    return {"peak": sampled.most - before, "sent": sent}


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


_LIBC = ctypes.CDLL("libc.so.6")
_LIBC.mallinfo2.restype = _Mallinfo2


def _held() -> int:
    """Bytes that glibc's malloc has given out to this thread: in blocks of their own, and of its arena."""
    info = _LIBC.mallinfo2()
    return int(info.hblkhd + info.uordblks)


class _Sampled(TorchDispatchMode):
    """The most that is held after any operation of torch."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, _held())
        return out


def _sizes(dims: list[Any], types: list[str]) -> list[int]:
    """Bytes of each of an operation's inputs."""
    return [
        math.prod(shape) * ITEMSIZE[kind]
        for shape, kind in zip(dims, types, strict=True)
        if kind in ITEMSIZE and not (shape and isinstance(shape[0], list))
    ] + [
        math.prod(shape) * ITEMSIZE["float"]
        for listed in dims
        if listed and isinstance(listed[0], list)
        for shape in listed
    ]
