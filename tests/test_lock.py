"""A run directory has one owner: a second run is refused and names the first; a dead one is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ndtrain.errors import RecipeError
from ndtrain.runs import lock as module
from ndtrain.runs.lock import FILE, RunLock


def lock_of(run_dir: Path, launch: str = "", **seconds: float) -> RunLock:
    return RunLock(run_dir, launch=launch, **{"beat_s": 0.05, "stale_s": 0.5, **seconds})


def changed(run_dir: Path, **values: Any) -> None:
    """Change the lock that is there, as if another process had written it."""
    found = json.loads((run_dir / FILE).read_text())
    (run_dir / FILE).write_text(json.dumps({**found, **values}))


def test_the_second_run_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    first = lock_of(tmp_path)
    first.take()
    with pytest.raises(RecipeError, match=rf"in use by process {os.getpid()} on \S+, since 20"):
        lock_of(tmp_path).take()
    first.release()
    second = lock_of(tmp_path)
    second.take()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_never_taken_is_not_released(tmp_path: Path) -> None:
    first = lock_of(tmp_path)
    first.take()
    second = lock_of(tmp_path)
    with pytest.raises(RecipeError):
        second.take()
    second.release()
    assert (tmp_path / FILE).exists()
    first.release()


def dead_process(run_dir: Path) -> dict[str, Any]:
    """Have a process take the lock and die without releasing it; what it wrote."""
    code = (
        "import os, sys; from pathlib import Path; from ndtrain.runs.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), launch='').take(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=Path(__file__).parent.parent)
    found: dict[str, Any] = json.loads((run_dir / FILE).read_text())
    return found


def test_the_lock_of_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    owner = dead_process(tmp_path)
    assert owner["pid"] != os.getpid()
    own = lock_of(tmp_path, stale_s=1e9)
    own.take()
    own.release()


def test_a_later_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    dead_process(tmp_path)
    changed(tmp_path, pid=os.getpid())  # alive, but started at another time
    own = lock_of(tmp_path, stale_s=1e9)
    own.take()
    own.release()


def test_an_owner_elsewhere_is_refused_while_it_beats_and_replaced_when_it_does_not(tmp_path: Path) -> None:
    first = lock_of(tmp_path, beat_s=1e9)
    first.take()
    changed(tmp_path, machine="another", host="elsewhere", token="theirs")
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            changed(tmp_path, beats=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RecipeError, match="on elsewhere"):
        lock_of(tmp_path).take()
    ended.set()
    thread.join()
    started = time.monotonic()
    second = lock_of(tmp_path)
    second.take()
    assert time.monotonic() - started >= 0.5
    second.release()
    first.release()


def test_a_restart_of_the_same_launch_takes_over(tmp_path: Path) -> None:
    first = lock_of(tmp_path, "a launch")
    first.take()
    with pytest.raises(RecipeError):
        lock_of(tmp_path, "another launch").take()
    second = lock_of(tmp_path, "a launch", stale_s=1e9)
    first._ended.set()  # its process would be gone
    second.take()
    assert json.loads((tmp_path / FILE).read_text())["token"] == second._own["token"]
    second.release()


def test_of_many_that_start_together_one_becomes_the_owner(tmp_path: Path) -> None:
    dead_process(tmp_path)  # so that all of them replace a lock
    taken: list[RunLock] = []
    refused: list[RecipeError] = []

    def start() -> None:
        own = lock_of(tmp_path)
        try:
            own.take()
            taken.append(own)
        except RecipeError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    taken[0].release()
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []

    def leave(code: int) -> None:
        ended.append(code)
        own._ended.set()

    monkeypatch.setattr(module.os, "_exit", leave)
    own = lock_of(tmp_path)
    own.take()
    changed(tmp_path, token="theirs", pid=7, host="elsewhere")
    wait_for(lambda: bool(ended))
    assert ended[0] == 1 and "in use by process 7 on elsewhere" in capsys.readouterr().err


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    own = lock_of(tmp_path)
    with pytest.raises(RecipeError, match=r"\.lock\.json cannot be read; remove it"):
        own.take()
