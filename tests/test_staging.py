"""Host memory for background saves is taken once, before the first step, and pinned at its own size on CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ndtrain.checkpoint.staging import Staging
from ndtrain.checkpoint.tensors import Files


def parts(*tensors: torch.Tensor) -> dict[str, Files]:
    return {"model": {"file": {str(i): (tensor, (0,) * tensor.dim()) for i, tensor in enumerate(tensors)}}}


def test_reserved_memory_is_what_copies_are_made_in() -> None:
    staging = Staging()
    staging.reserve(parts(torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)))
    buffer = staging.buffer.data_ptr()
    given = parts(torch.rand(3, 5), torch.rand(7).bfloat16())
    copied = staging.copy(given)["model"]["file"]
    assert staging.buffer.data_ptr() == buffer and copied["0"][0].data_ptr() == buffer
    for key, (tensor, _) in given["model"]["file"].items():
        assert torch.equal(copied[key][0], tensor) and copied[key][0].data_ptr() != tensor.data_ptr()


def test_on_cuda_the_buffer_is_pinned_at_its_own_size_and_unpinned_before_it_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("pin", address, size)) or 0,
        cudaHostUnregister=lambda address: calls.append(("unpin", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: calls.append(("checked", code)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    staging = Staging()
    staging.reserve(parts(torch.zeros(5, 13)))
    first = staging.buffer.data_ptr()
    size = 320  # 260 bytes in steps of 64; a power of two would be 512
    assert calls == [("pin", first, size), ("checked", 0)]
    staging.reserve(parts(torch.zeros(5, 13)))
    assert len(calls) == 2
    staging.reserve(parts(torch.zeros(100)))
    assert calls[2:] == [("unpin", first), ("pin", staging.buffer.data_ptr(), 448), ("checked", 0)]
    second = staging.buffer.data_ptr()
    del staging
    assert calls[-1] == ("unpin", second)
