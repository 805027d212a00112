"""Files get their disk space at once and are flushed while they are written."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

import pytest

from ndtrain.storage import paths
from ndtrain.storage.paths import allocate, flushing


def test_files_are_flushed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(paths, "sync", synced.append)
    monkeypatch.setattr(paths, "_FLUSH_S", 0.001)
    begun = [tmp_path / "first"]
    with flushing(lambda: begun):
        deadline = time.monotonic() + 30
        while len(synced) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        begun.append(tmp_path / "second")
        while tmp_path / "second" not in synced and time.monotonic() < deadline:
            time.sleep(0.001)
    assert set(synced) == set(begun)
    count = len(synced)
    time.sleep(0.02)
    assert len(synced) == count


def test_a_disk_error_while_flushing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(paths, "sync", broken)
    monkeypatch.setattr(paths, "_FLUSH_S", 0.001)
    with pytest.raises(OSError, match="Input/output error"), flushing(lambda: [tmp_path]):
        time.sleep(0.1)


def test_allocate_sets_the_size_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("xb") as file:
        allocate(file.fileno(), 10_000)
        file.write(b"abc")
    assert path.read_bytes() == b"abc" + bytes(9_997)
    with path.open("r+b") as file:
        allocate(file.fileno(), 0)
    assert path.stat().st_size == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system that reserves space")
def test_allocate_raises_if_the_disk_is_too_small() -> None:
    whole = os.statvfs("/dev/shm")
    with tempfile.TemporaryFile(dir="/dev/shm") as file, pytest.raises(OSError, match="No space left on device"):
        allocate(file.fileno(), 2 * whole.f_blocks * whole.f_frsize)
