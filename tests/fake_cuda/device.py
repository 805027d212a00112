"""A device "cuda" for fake tensors: built and loaded before torch, and what `torch.cuda` says of it."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

NAME = "NVIDIA H100 80GB HBM3"


def load() -> None:
    """Give this process a CUDA device; torch must not be imported yet. Raises `RuntimeError` where that cannot be."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: run python -m tests.fake_cuda")
    if (missing := unavailable()) is not None:
        raise RuntimeError(missing)
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cuda.so"
        command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib"]
        source = Path(__file__).with_name("cuda.cpp")
        subprocess.run([*command, str(source), "-lc10", "-ltorch_cpu", "-o", str(library)], check=True)
        for path in (torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so", library):
            ctypes.CDLL(str(path))


def unavailable() -> str | None:
    """Return why there can be no fake device here; None where there can."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    if (Path(spec.submodule_search_locations[0]) / "lib" / "libtorch_cuda.so").exists():
        return "this build of torch has CUDA, whose hooks cannot be replaced"
    return None if shutil.which("c++") else "there is no C++ compiler (c++)"


class _Stream:
    """A stream on which all is done at once. `waits` is called where the host would wait."""

    waits: Callable[[str], None] = staticmethod(lambda what: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        _Stream.waits("stream.synchronize")

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: object = None) -> _Event:
        return self

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 1.0

    def synchronize(self) -> None:
        _Stream.waits("event.synchronize")


@contextmanager
def present(waits: Callable[[str], None]) -> Iterator[None]:
    """Have `torch.cuda` tell of one H100 inside; `waits(what)` is called where the host waits for the device."""
    import torch

    from ndtrain.torch_compat import FakeTensorMode

    stream = _Stream()
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **kwargs: None,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _Stream,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: stream or _Stream(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "synchronize": lambda device=None: waits("cuda.synchronize"),
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name=NAME, total_memory=80 * 10**9, major=9, minor=0, multi_processor_count=132
        ),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    with ExitStack() as patches:
        # Fake modes are to know that there is no card.
        patches.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        patches.enter_context(mock.patch.object(_Stream, "waits", staticmethod(waits)))
        patches.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        patches.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor))
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
