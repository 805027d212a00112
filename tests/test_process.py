"""A process takes the device that is its own, and leaves after an error without waiting for its peers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ndtrain.errors import RecipeError
from ndtrain.runs import process


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a process on a machine with CUDA asks of torch, in a launch of one rank outside torchrun."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what a start sets goes no further
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **more: made.append(("init", more["device_id"])))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append(("destroy", None)))
    monkeypatch.setattr(process, "abort_process_groups", lambda: made.append(("abort", None)))
    return made


def test_the_process_group_knows_its_device_and_is_destroyed_in_good_order(calls: list[tuple[str, Any]]) -> None:
    device = torch.device("cuda", 0)
    with process.start() as runtime:
        assert runtime.device == device
    assert calls == [("set_device", device), ("init", device), ("destroy", None)]


def test_torch_is_set_up_for_cuda_where_the_environment_says_nothing(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with process.start():
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "0")
    with process.start():
        assert "PYTORCH_ALLOC_CONF" not in os.environ
        assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"


def test_after_an_error_nccl_is_aborted_rather_than_waited_for(calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(ZeroDivisionError), process.start():
        raise ZeroDivisionError
    assert [name for name, _ in calls] == ["set_device", "init", "abort"]


def test_without_cuda_the_group_is_destroyed_after_an_error_too(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ZeroDivisionError), process.start():
        raise ZeroDivisionError
    assert calls == [("init", None), ("destroy", None)]


@pytest.mark.parametrize(("local_rank", "visible", "index"), [("1", 2, 1), ("3", 1, 0), ("0", 1, 0)])
def test_a_process_that_sees_one_device_takes_it_whatever_its_local_rank(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, local_rank: str, visible: int, index: int
) -> None:
    _launched(monkeypatch, local_rank, visible)
    with process.start() as runtime:
        assert runtime.device == torch.device("cuda", index)


def test_more_processes_than_devices_are_refused(calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    _launched(monkeypatch, "2", 2)
    words = r"LOCAL_RANK 2, but sees 2 CUDA devices; start at most 2 processes"
    with pytest.raises(RecipeError, match=words), process.start():
        pass
    assert calls == []


def _launched(monkeypatch: pytest.MonkeyPatch, local_rank: str, visible: int) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(process, "launcher_store", lambda *_: dist.HashStore())
