"""A run saves and stops on request, at the same step on every rank, and with its own exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ndtrain.errors import Stopped
from ndtrain.runs import launcher as launchers
from ndtrain.runs.restarts import Restarts
from ndtrain.runs.stop_signals import FILE, STOP_SIGNALS, StopSignals
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.test_train import trained

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_recipe(folder: Path, *, steps: int, **more: Any) -> Path:
    return tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": "qwen3", "config": {**tiny.CONFIGS["qwen3"], "num_hidden_layers": 1}},
        corpus=tiny.write_corpus(folder / "corpus"),
        run_dir=folder / "run",
        batch_ranks=2,
        steps=steps,
        **{"mesh": {"dp_shard": 2}, "checkpoint": {"resume": "auto"}, **more},
    )


def lines_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def workers(launcher: int) -> dict[int, int]:
    """Return {rank: process id} of a launcher's running workers."""
    found = {}
    for pid in launchers.children(launcher):
        with contextlib.suppress(OSError, KeyError):  # one that has ended has no variables any more
            text = Path(f"/proc/{pid}/environ").read_text()
            found[int(dict(v.split("=", 1) for v in text.split("\0") if "=" in v)["RANK"])] = pid
    return found


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*")) if (run / "checkpoints").is_dir() else []


# Like a SLURM batch script: the signal ends the first wait.
SCRIPT = """
"$@" & run=$!
trap 'kill -USR1 $run' USR1
wait $run || wait $run
"""


def test_the_launcher_hands_signals_on_and_ends_with_75(tmp_path: Path) -> None:
    recipe, run = make_recipe(tmp_path, steps=100_000), tmp_path / "run"
    command = ["bash", "-c", SCRIPT, "bash", sys.executable, "-m", "ndtrain", "run", str(recipe)]
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    launcher = 0
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and lines_of(run), process)
        (run / "save").touch()
        wait_for(lambda: not (run / "save").exists(), process)
        assert len(checkpoints(run)) == 1
        (launcher,) = launchers.children(process.pid)
        process.send_signal(signal.SIGUSR1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            # None of them breaks the save; bash lets what it starts in the background ignore Ctrl-C.
            os.kill(launcher, number)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher or process.pid, signal.SIGTERM)
    last = lines_of(run)[-1]["step"]
    assert process.returncode == 75, err
    assert "ndtrain: stopped by SIGUSR1" in err and err.count("\n") == 1, err
    assert f" after step {last} of 100000, which is saved; start again to continue\n" in err
    assert checkpoints(run)[-1] == f"step-{last:08d}" and len(checkpoints(run)) == 2
    assert f"saved {run}/checkpoints/step-{last:08d}" in out


SLOW = {"global_batch_size": 800, "micro_batch_size": 8}  # a step of seconds
FIRST = r"ndtrain: stopping after step (\d+) with a save; Ctrl-C again ends now, losing (all|the) steps"
STOPPED = r"ndtrain: stopped by Ctrl-C after step (\d+) of 100000, which is saved; start again to continue"
ENDED = r"ndtrain: ended by Ctrl-C; (no complete step|step 1|steps 1 to \d+|steps 2 to \d+|step 2)"


@pytest.mark.parametrize(
    ("ranks", "torchrun", "twice", "code"),
    [(1, False, False, 75), (2, False, False, 75), (2, False, True, 130), (2, True, False, 1), (2, True, True, 1)],
    ids=["one rank", "local workers", "local workers, twice", "torchrun", "torchrun, twice"],
)
def test_ctrl_c_stops_with_a_save_and_a_second_ends_at_once(
    tmp_path: Path, ranks: int, torchrun: bool, twice: bool, code: int
) -> None:
    more = {"train": SLOW} if twice else {}
    recipe, run = make_recipe(tmp_path, steps=100_000, mesh={"dp_shard": ranks}, **more), tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if torchrun else []
    command = [sys.executable, *launcher, "-m", "ndtrain", "run", str(recipe)]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
    said = (tmp_path / "err").read_text
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and lines_of(run), process)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: re.search(FIRST, said()), process)
        if twice:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=100)
    finally:
        for pid in (*workers(process.pid).values(), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    last = lines_of(run)[-1]["step"]
    assert process.returncode == code, said()
    assert len(re.findall(FIRST, said())) == 1 and ("torchrun kills" in said()) == torchrun, said()
    if twice:
        assert re.search(ENDED, said()) and "stopped by" not in said(), said()
        assert not [name for name in checkpoints(run) if not name.startswith(".")]
    else:
        assert [int(n) for n in re.findall(STOPPED, said())] == [last], said()
        assert checkpoints(run) == [f"step-{last:08d}"]
    if not torchrun:
        assert said().count("\n") == 2 and "Traceback" not in said(), said()


def at_a_terminal(recipe: Path, presses: list[str]) -> tuple[int, str]:
    """Exit code and output of a run at a terminal; Ctrl-C is pressed when the output has each of the patterns."""
    terminal, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ndtrain", "run", str(recipe)],
        env={**ENV, "TERM": "xterm", "COLUMNS": "200"},
        stdin=own,
        stdout=own,
        stderr=own,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(own)
    said = bytearray()

    def read() -> str:
        with contextlib.suppress(OSError):  # the terminal closes with the process
            while select.select([terminal], [], [], 0.05)[0] and (more := os.read(terminal, 4096)):
                said.extend(more)
        return said.decode(errors="replace")

    try:
        for pattern in presses:
            wait_for(lambda pattern=pattern: re.search(pattern, read()), process)
            os.write(terminal, b"\x03")
        wait_for(lambda: read() and process.poll() is not None)
        return process.returncode, read()
    finally:
        process.kill()
        os.close(terminal)


def test_ctrl_c_at_a_terminal_before_and_after_the_first_step(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, steps=100_000, mesh={"dp_shard": 1}, train=SLOW)
    code, text = at_a_terminal(recipe, ["loading torch"])
    assert "ndtrain: stopped by Ctrl-C before the first step, so there is nothing to save" in text
    assert code == 75 and "Traceback" not in text, text
    code, text = at_a_terminal(recipe, ["1/100,000 ", FIRST])
    assert re.search(ENDED, text) and text.endswith("\x1b[?25h\r\n"), text
    assert code == 130 and "Traceback" not in text, text


def in_a_terminal_of_its_own(hangup: signal.Handlers) -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_terminal_stops_a_run_with_a_save_unless_nohup_started_it(tmp_path: Path, ranks: int) -> None:
    recipe, run = make_recipe(tmp_path, steps=100_000, mesh={"dp_shard": ranks}), tmp_path / "run"
    for hangup, stop in ((signal.SIG_IGN, "SIGTERM"), (signal.SIG_DFL, "SIGHUP")):
        before = len(lines_of(run)) if (run / "metrics.jsonl").exists() else 0
        terminal, own = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "ndtrain", "run", str(recipe)],
            **{"env": ENV, "stdin": own, "stdout": own, "stderr": own, "start_new_session": True},
            preexec_fn=lambda hangup=hangup: in_a_terminal_of_its_own(hangup),
        )
        os.close(own)
        try:
            wait_for(lambda before=before: (run / "metrics.jsonl").exists() and len(lines_of(run)) > before)
            os.close(terminal)
            if stop == "SIGTERM":
                at = len(lines_of(run))
                wait_for(lambda at=at: len(lines_of(run)) > at + 2)
                process.terminate()
            assert process.wait(timeout=100) == 75
        finally:
            process.kill()
        assert checkpoints(run)[-1] == f"step-{lines_of(run)[-1]['step']:08d}"


WAITING = """
import datetime, pathlib, torch.distributed
from ndtrain.runs.stop_signals import Steps, StopSignals
signals = StopSignals(pathlib.Path("."))
signals.listen()
signals.begin(lambda: Steps(complete=7, stop_after=8, saved=4))
store = torch.distributed.TCPStore("localhost", 0, None, True, wait_for_workers=False)
print("waiting", flush=True)
store.wait(["never"], datetime.timedelta(seconds=100))
"""


def test_ctrl_c_is_answered_while_the_main_thread_waits_for_a_peer() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        first = "stopping after step 8 with a save; Ctrl-C again ends now, losing the steps since step 4"
        assert process.stderr.readline() == f"ndtrain: {first}\n"
        process.send_signal(signal.SIGINT)
        lost = "ended by Ctrl-C; steps 5 to 7 are lost; start again to continue from step 4"
        assert process.communicate(timeout=20)[1] == f"ndtrain: {lost}\n"
        assert process.returncode == 130
    finally:
        process.kill()


def test_second_signal_after_the_workers_ended_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    seen = [[ended.pid], []]
    monkeypatch.setattr(launchers, "children", lambda parent: seen.pop(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch(*command: str) -> None:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda config, command: launch)
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        assert launchers.launch_workers(2, []) == 0 and not seen
        seen = [[]]
        with pytest.raises(Stopped, match="before the first step"):
            launchers.launch_workers(2, [])
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([-signal.SIGUSR1, 75], 75),  # one is ended by a late signal after both have saved
        ([75, -signal.SIGUSR1], 75),
        ([-signal.SIGUSR1, 4], 4),
        ([-signal.SIGKILL, 75], 137),  # not forwarded
        ([-signal.SIGUSR1, -signal.SIGUSR1], None),  # neither handled it yet
    ],
)
def test_a_worker_that_a_forwarded_signal_killed_hides_no_exit_code_of_another(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], code: int | None
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setattr(launchers, "children", lambda parent: [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch(*command: str) -> None:
        with contextlib.suppress(Stopped):  # without a worker it would end at once
            signal.raise_signal(signal.SIGUSR1)
        found = {}
        for rank, exitcode in enumerate(codes):
            found[rank] = ProcessFailure(rank, 1, exitcode, "none")
            found[rank].timestamp = rank
        raise ChildFailedError("ndtrain", found)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda config, command: launch)
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        if code is None:
            with pytest.raises(Stopped, match="before the first step"):
                launchers.launch_workers(2, [])
        else:
            assert launchers.launch_workers(2, []) == code
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)


def prepared(path: str) -> Any:
    """Return a trainer of this rank, not yet prepared, that handles signals."""
    from ndtrain.recipe import load_recipe
    from tests.trainers import trainer_of

    stop_signals = StopSignals(Path(load_recipe(Path(path)).run.dir))
    stop_signals.listen()
    return trainer_of(path, stop_signals=stop_signals)


def stop_message(path: str, how: str) -> str:
    """Return the message with which this rank ends after it was asked to stop during its second step.

    The ranks know of it one step later.
    """
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    trainer = prepared(path)

    def ask() -> None:
        if how == "file":
            (trainer.run_dir / "stop").touch()
        elif trainer.runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    def build(*args: Any, **kwargs: Any) -> Any:
        if trainer.runtime.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    try:
        if how == "tokenizing":
            with mock.patch("ndtrain.train.inputs.build_cache", build):
                trainer.prepare()
        with proofs.remembered():
            trainer.prepare()
        backward = trainer.engine.loss_model.backward

        def asking(*args: Any, **kwargs: Any) -> Any:
            if trainer.step == 1:
                ask()
            return backward(*args, **kwargs)

        trainer.engine.loss_model.backward = asking
        trainer.train()
    except Stopped as stopped:
        return str(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return "not stopped"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("file", "stopped by the file `stop` after step 3 of 5, which is saved; start again to continue"),
        ("signal on one rank", "stopped by SIGUSR1 after step 3 of 5, which is saved; start again to continue"),
        ("tokenizing", "stopped by SIGTERM before the first step, so there is nothing to save"),
    ],
)
def test_every_rank_stops_at_the_same_step(tmp_path: Path, how: str, message: str) -> None:
    messages = get_pool(2).run(stop_message, str(make_recipe(tmp_path, steps=5)), how)
    assert all(line.removeprefix("rank 0: ") == message for line in messages), messages
    assert checkpoints(tmp_path / "run") == ([] if how == "tokenizing" else ["step-00000003"])
    assert not (tmp_path / "run" / "stop").exists()


def test_a_file_that_cannot_be_removed_counts_once(tmp_path: Path) -> None:
    stop_signals = StopSignals(tmp_path)
    (tmp_path / "save").mkdir()
    assert stop_signals.seen(files=True) == [0, 0]  # a directory is no request
    (tmp_path / "stop").touch()
    assert stop_signals.seen(files=True) == [FILE, 0] and stop_signals.seen(files=False) == [0, 0]
    with mock.patch.object(Path, "unlink", side_effect=PermissionError):
        assert stop_signals.remove_files() == [str(tmp_path / "stop")]
    assert stop_signals.seen(files=True) == [0, 0]


def test_restarts_of_a_stopped_launch_do_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(number: int, *, port: int = 1, agent_store: bool = True) -> Restarts:
        variables = {"USE_AGENT_STORE": agent_store, "RUN_ID": "job 7", "RESTART_COUNT": number, "MAX_RESTARTS": 3}
        for name, value in variables.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
        monkeypatch.setenv("MASTER_PORT", str(port))
        return Restarts.of_process(tmp_path)

    def opened(start: Restarts, *, is_main: bool) -> None:
        start.refuse_stopped()
        if is_main:
            start.forget_others()

    for agent_store in (True, False):
        opened(start(0, agent_store=agent_store), is_main=True)
        start(0, agent_store=agent_store).record_begin(-1)
        opened(start(1, agent_store=agent_store), is_main=True)
        start(1, agent_store=agent_store).record_stop()
        with pytest.raises(Stopped, match="this launch was stopped on request"):
            opened(start(2, agent_store=agent_store), is_main=False)
    opened(start(2, port=2), is_main=False)
    opened(start(0, agent_store=False), is_main=True)  # a later launch of the same name
    opened(start(1, agent_store=False), is_main=True)


@pytest.mark.parametrize(
    ("began", "newest", "requested", "used"),
    [
        (-1, 30, "never", "auto"),
        (-1, None, "never", "never"),
        (100, 100, "other/step-00000100", "other/step-00000100"),
        (100, 50, "other/step-00000100", "other/step-00000100"),
        (100, 150, "other/step-00000100", "auto"),
    ],
)
def test_a_restart_resumes_from_a_checkpoint_of_its_own_launch(
    tmp_path: Path, began: int, newest: int | None, requested: str, used: str
) -> None:
    first, second = Restarts(tmp_path, "a", True, 1), Restarts(tmp_path, "a", False, 1)
    assert second.resume_from(requested, newest) == requested  # if the first start was refused
    first.record_begin(began)
    assert first.resume_from(requested, newest) == requested
    assert second.resume_from(requested, newest) == used


def test_after_a_lost_node_fewer_ranks_continue_with_the_same_losses(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    sections = {"checkpoint": {"every": 5, "resume": "never"}}
    undisturbed = get_pool(2).run(trained, str(make_recipe(whole, steps=40, **sections)), [])[0]["metrics"]
    recipe, run = make_recipe(tmp_path, steps=40, mesh={"dp_shard": -1}, **sections), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "two-nodes"]
    timeouts = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    training = ["-m", "ndtrain", "run", str(recipe), "--set", "run.step_timeout_s=10"]
    nodes = []
    try:
        for is_host in (1, 0):  # the rendezvous must outlive the lost node
            rendezvous = ["--local-addr", "127.0.0.1", "--rdzv-conf", f"is_host={is_host},{timeouts}"]
            node = subprocess.Popen(
                [*command, *rendezvous, *training], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            nodes.append(node)
        left, lost = nodes
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(lines_of(run)) > 6, left)
        of_lost = list(workers(lost.pid).values())
        assert len(of_lost) == len(workers(left.pid)) == 1
        for pid in (lost.pid, *of_lost):
            os.kill(pid, signal.SIGKILL)
        out, err = left.communicate(timeout=200)
    finally:
        for node in nodes:
            node.kill()
    assert left.returncode == 0, err
    assert "resumed from" in out and "(1 x cpu)" in out and "step 40/40" in out, out + err
    ours = {line["step"]: line for line in lines_of(run)}
    for line in undisturbed:
        for key, near in {
            "loss": 1e-4,
            "grad_norm": 1e-2,
        }.items():  # another order of summation; rounding differences grow step by step
            assert ours[line["step"]][key] == pytest.approx(line[key], rel=near), line["step"]
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
