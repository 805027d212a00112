"""A fault of one rank before the first step, or in a save, ends all ranks with one message and the right exit code."""

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ndtrain.checkpoint import CheckpointStore, load_tensors
from ndtrain.errors import (
    DamagedError,
    NdtrainError,
    PlanError,
    RecipeError,
    Stopped,
    lost_peer,
    of_the_machine,
    out_of_memory,
)
from ndtrain.recipe import RunSection
from ndtrain.runs.launcher import exit_code_of
from ndtrain.runs.phases import MESHES, PHASES, READ
from ndtrain.runs.process import start
from ndtrain.runs.watch import Watch, moved_bytes
from tests.faults.run import check_end, disturbed, prepare
from tests.ranks import get_pool
from tests.test_stop_signals import make_recipe


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def real_error_of_the_allocator() -> Exception:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        real_error_of_the_allocator(),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        caused(RuntimeError("the block failed"), torch.OutOfMemoryError("CUDA out of memory.")),
    ],
)
def test_out_of_memory_is_of_the_machine(error: Exception) -> None:
    assert out_of_memory(error) and of_the_machine(error) and not lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("The client socket has timed out"),  # type: ignore[call-arg]
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2251"),  # type: ignore[call-arg]
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RuntimeError("Connection reset by peer"),
    ],
)
def test_a_broken_link_is_of_the_machine(error: Exception) -> None:
    assert lost_peer(error) and of_the_machine(error) and not out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        KeyboardInterrupt(),
        Stopped("stopped by SIGTERM"),
        DamagedError("a file is damaged"),
        RecipeError("x"),
    ],
)
def test_files_devices_and_requests_are_of_the_machine(error: BaseException) -> None:
    assert of_the_machine(error) and not lost_peer(error) and not out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (8) must match the size of tensor b (4) at non-singleton dimension 2"),
        ValueError("shape '[2, 16, 4, 16]' is invalid for input of size 1024"),
        AttributeError("'DTensor' object has no attribute 'x'"),
        AssertionError(),
        NotImplementedError("aten::foo"),
        PlanError("set mesh.tp = 1"),
        TypeError("broken pipe of my own model"),
    ],
)
def test_other_errors_are_of_the_model(error: Exception) -> None:
    assert not of_the_machine(error)


def raised(path: str, kind: str) -> tuple[str, str]:
    """Return the class and the text of what `prepare` raises where every block's activation raises an error."""
    from tests.trainers import trainer_of

    made: dict[str, Exception] = {
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "host memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        "link": RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:31337"),
        "file": OSError(errno.EIO, "Input/output error"),
        "model": RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x64 and 32x64)"),
    }
    trainer = trainer_of(path)
    with mock.patch("torch.nn.functional.silu", side_effect=made[kind]):
        try:
            trainer.prepare()
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"cp": 2}, {"dp_shard": 2}])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("memory", "OutOfMemoryError"),
        ("host memory", "RuntimeError"),
        ("link", "RuntimeError"),
        ("file", "OSError"),
        ("model", "PlanError"),
    ],
)
def test_the_checks_take_only_the_models_own_errors_for_the_models(
    tmp_path: Path, mesh: dict[str, int], kind: str, name: str
) -> None:
    recipe = make_recipe(tmp_path, steps=3, mesh=mesh)
    for found, text in get_pool(2).run(raised, str(recipe), kind):
        if kind != "model":
            assert found == name and "set mesh" not in text, (found, text)
        else:
            axis = next(iter(mesh))  # without a cut layer, other sizes would not help
            way = "change [model.config] or model.attn" if axis == "dp_shard" else f"set mesh.{axis} = 1"
            assert found == "PlanError" and way in text, (found, text)


def raised_in_bfloat16(path: str, overrides: list[str]) -> tuple[str, str]:
    """Return the class and the text of what `prepare` raises where every block's activation is in float32."""
    from tests.trainers import trainer_of

    trainer = trainer_of(path, [*overrides, "fsdp.param_dtype=bfloat16"])
    with mock.patch("torch.nn.functional.silu", lambda x, inplace=False: x.float() * x.float().sigmoid()):
        try:
            trainer.prepare()
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("overrides", [["mesh.dp_shard=1"], ["mesh.dp_shard=2"], ["mesh.tp=2"], ["mesh.cp=2"]])
def test_a_model_that_does_not_run_in_bfloat16_is_refused_with_that_reason(
    tmp_path: Path, overrides: list[str]
) -> None:
    recipe = make_recipe(tmp_path, steps=3, mesh={"dp_shard": 1})
    for found, text in get_pool(1 if overrides == ["mesh.dp_shard=1"] else 2).run(
        raised_in_bfloat16, str(recipe), overrides
    ):
        assert found == "PlanError" and text.startswith("qwen3 runs in float32, but not in bfloat16 (in Linear: ")
        assert text.endswith('; set fsdp.param_dtype = "float32"')


def seconds_watched(folder: str, by_progress: bool, advances: bool) -> float:
    """Return how long this rank, of two that wait, was left alive in a phase with a limit of 2 s; at most 5 s."""
    from torch.distributed.distributed_c10d import _get_default_store

    section = RunSection(dir=folder, start_timeout_s=2.0, read_timeout_s=2.0)
    watch, ended = Watch(section), []
    watch.end = lambda reason: ended.append(reason)  # type: ignore[method-assign,assignment,return-value]
    watch.start(dist.PrefixStore(Path(folder).name, _get_default_store()), dist.get_rank(), 2)
    began = time.monotonic()
    with watch.during(READ if by_progress else MESHES):
        while not ended and time.monotonic() - began < 5:
            time.sleep(0.1)
            if advances and dist.get_rank() == 1:
                watch.advance()
    took = time.monotonic() - began
    watch.stop()
    dist.barrier()
    return took


@pytest.mark.parametrize(
    ("by_progress", "advances", "stays"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_of_one_rank_counts_for_all_where_the_limit_is_on_progress(
    tmp_path: Path, by_progress: bool, advances: bool, stays: bool
) -> None:
    folder = tmp_path / f"{by_progress}-{advances}"
    for took in get_pool(2).run(seconds_watched, str(folder), by_progress, advances):
        assert (took >= 5) == stays, took


@pytest.mark.parametrize("key", ["rendezvous", "start", "read", "save", "step"])
def test_each_limit_is_that_of_its_phases_alone(key: str) -> None:
    watch = Watch(RunSection.model_validate({"dir": ".", f"{key}_timeout_s": 7.0}))
    limited = set()
    for phase in PHASES:
        with watch.during(phase):
            if watch._deadline - time.monotonic() < 8:
                limited.add(phase.key)
    assert limited == {f"{key}_timeout_s"}


def test_a_rank_that_does_not_come_is_waited_for_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    begun = time.monotonic()
    words = r"rendezvous: the 2 ranks did not find each other within 3 s \(run\.rendezvous_timeout_s\)"
    with pytest.raises(NdtrainError, match=words), start(RunSection(dir=".", rendezvous_timeout_s=3)):
        pass
    assert 2 < time.monotonic() - begun < 60


def test_blocks_read_and_files_written_or_verified_count_as_progress(tmp_path: Path) -> None:
    calls: list[int] = []
    store = CheckpointStore(tmp_path, keep=1, progress=lambda: calls.append(1))
    path = store.save(1, model={"w": torch.ones(4, 4)}, optim={"w.exp_avg": torch.ones(4)}, state={"step": 1})
    assert path is not None and len(calls) == 2
    assert store.find("auto", verify=True)[0] == path and len(calls) == 4
    got = {"w": torch.zeros(4, 4)}
    load_tensors(path / "model", got, progress=lambda: calls.append(1))
    assert got["w"].eq(1).all() and len(calls) == 5


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux tells what a process moves")
def test_bytes_moved_from_files_and_to_them_are_counted(tmp_path: Path) -> None:
    before = moved_bytes()
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    assert len((tmp_path / "x").read_bytes()) == 1 << 20
    assert 2 << 20 <= moved_bytes() - before < 5 << 20


@pytest.mark.parametrize(
    ("codes", "code"), [([-9, 1], 1), ([1, -9], 1), ([-9, -15], 137), ([-9, 1, 4], 4), ([1, 75], 1)]
)
def test_a_rank_that_reports_a_dead_one_gives_the_launcher_its_exit_code(codes: list[int], code: int) -> None:
    assert exit_code_of(list(enumerate(codes))) == code


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return folder


@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("building the meshes", "stop"),
        ("checking the model on noise", "kill"),
        ("reading the weights", "damaged"),
    ],
)
def test_a_fault_of_one_rank_ends_all_ranks_with_one_message(inputs: Path, phase: str, fault: str) -> None:
    check_end(disturbed(inputs, phase, fault, rank=1), phase, fault, rank=1)
