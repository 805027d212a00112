"""The checkpoints of a run: published as a whole, pruned, found again.

On a file system a checkpoint gets its name when it is complete. In an object store, which cannot rename, it is one as
soon as it has its manifest, which is written last and removed first.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ndtrain.checkpoint.manifest import MANIFEST, check_files, check_hashes, is_tensor_file, write_manifest
from ndtrain.checkpoint.staging import Staging
from ndtrain.checkpoint.tensors import Files, check_coverage, files_of, listing, write_files
from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.runs.limits import WAIT_TIMEOUT
from ndtrain.runs.messages import gather_json, of_rank0, on_rank0, together
from ndtrain.runs.process import rank, world_size
from ndtrain.storage.paths import is_local, local_copy_to, os_errors, remove_tree, sync, to_path

_STEP = re.compile(r"step-(\d{8,})")
# What a checkpoint has beside its tensors, headers included, is less than this and a share of the tensors' bytes.
_SPARE_BYTES, _SPARE_SHARE = 1 << 20, 0.01


def read_state(directory: Path) -> dict[str, Any]:
    """train_state.json. DamagedError."""
    try:
        state = json.loads((directory / "train_state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{directory}: train_state.json cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{directory}: train_state.json holds no object")
    return state


def check(directory: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises DamagedError, naming the file or the tensor.

    Every file has its size, the headers of tensor files say where every value of every tensor is, and all other files
    have their hash. `check_hashes` reads the tensors too.
    """
    manifest = check_files(directory)
    for part, listed in manifest["tensors"].items():
        check_coverage(directory / part, listed)
    return manifest


@dataclass(frozen=True)
class _Job:
    """What one checkpoint is made of."""

    step: int
    files: Mapping[str, Files]
    listed: Mapping[str, Any]
    state: Mapping[str, Any]
    extra_files: Callable[[Path], None] | None


class _Background:
    """A job that a thread of its own writes."""

    def __init__(self, write: Callable[[], Path]) -> None:
        self.path: Path | None = None
        self.error: BaseException | None = None

        def work() -> None:
            try:
                self.path = write()
            except BaseException as error:
                self.error = error

        # A daemon: a rank that fails elsewhere must not wait here for one that is gone.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Path:
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.path is not None
        return self.path


class CheckpointStore:
    """The checkpoints of one run, on a file system that all ranks share.

    With `background` a save returns as soon as this rank's part is copied to host memory; `settle` then gives its
    outcome. At most one save is in flight.
    """

    def __init__(self, run_dir: Path, *, keep: int, background: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, it has to be at least 1")
        self.root = run_dir / "checkpoints"
        self.keep, self.background = keep, background
        self.local = is_local(run_dir)
        self._staging = Staging()
        self._group: dist.ProcessGroup | None = None
        self._flight: _Background | None = None

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _directories(self) -> list[tuple[int, Path]]:
        found = [(_STEP.fullmatch(p.name), p) for p in self.root.iterdir()] if self.root.is_dir() else []
        steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
        return sorted(steps, key=lambda item: item[0])

    def _steps(self) -> list[tuple[int, Path]]:
        return [(n, p) for n, p in self._directories() if self.local or (p / MANIFEST).exists()]

    def _clean(self) -> None:
        """Removes what a crash left; rank 0. A replaced checkpoint whose successor never came is put back."""
        if not self.local:
            for _, path in self._directories():
                if not (path / MANIFEST).exists():
                    remove_tree(path)
            return
        for path in self.root.glob(".old-step-*") if self.root.is_dir() else ():
            with contextlib.suppress(OSError, DamagedError):
                final = self.root / path.name.removeprefix(".old-")
                if not final.exists():
                    check(path)
                    path.rename(final)
        for pattern in (".tmp-step-*", ".old-step-*", ".del-step-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    # ---- saving

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optim: Mapping[str, Tensor],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None = None,
    ) -> Path | None:
        """Writes the checkpoint beside, then renames it: the final name is complete or absent; collective.

        `state` is JSON; `extra_files(directory)` runs on rank 0 alone. Then all but the `keep` newest up to
        this step are removed; later ones, which a resume has gone back behind, stay. Where any rank fails,
        all raise NdtrainError with its message, nothing is left of this checkpoint, and the older ones stay.

        In the background only the copies are made here, and None is returned; the rest is `settle`'s.
        """
        groups = {"model": model, "optim": optim}
        job = _Job(
            step,
            {part: files_of(group) for part, group in groups.items()},
            {part: listing(group) for part, group in groups.items()},
            state,
            extra_files,
        )
        if not self.background:
            return self._write(job, None)
        if self._flight is not None:
            raise RuntimeError("a save is in flight; settle it first")
        if self._group is None and world_size() > 1:
            # Its own, for collectives of training go on meanwhile. A slow file system is no reason to give up.
            self._group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        job = replace(job, files=self._staging.hold(job.files))
        self._flight = _Background(lambda: self._write(job, self._group))
        return None

    @property
    def in_flight(self) -> bool:
        """Whether a save in the background is still to be settled; the same on every rank."""
        return self._flight is not None

    @property
    def written(self) -> bool:
        """Whether `settle` would not wait on this rank."""
        return self._flight is None or not self._flight.running

    def settle(self) -> Path | None:
        """Waits for the save in flight: its checkpoint, None without one. Raises what `save` would have raised."""
        flight, self._flight = self._flight, None
        return flight.result() if flight is not None else None

    def _write(self, job: _Job, group: dist.ProcessGroup | None) -> Path:
        final = self.path(job.step)
        work = self.root / f".tmp-{final.name}" if self.local else final
        written: dict[str, Any] = {}

        def prepare() -> None:
            if not self.local:
                remove_tree(final, first=MANIFEST)
                self._clean()
                return
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            tensors = sum(mine for mine in everyone)
            needed, free = tensors + int(_SPARE_SHARE * tensors) + _SPARE_BYTES, shutil.disk_usage(self.root).free
            if free < needed:
                raise NdtrainError(f"it needs {needed:,} bytes, {free:,} are free")
            for part in job.files:
                (work / part).mkdir(parents=True)

        def write() -> None:
            for part, files in job.files.items():
                written.update({f"{part}/{name}": entry for name, entry in write_files(work / part, files).items()})

        def publish() -> None:
            (work / "train_state.json").write_text(json.dumps(job.state, indent=1))
            if job.extra_files is not None:
                with local_copy_to(work) as beside:
                    job.extra_files(beside)
            write_manifest(work, dict(job.listed), {name: entry for mine in files for name, entry in mine.items()})
            check(work)
            if not self.local:
                return
            if final.exists():
                # os.rename cannot replace a directory; aside, the old one can be put back after a crash
                final.rename(self.root / f".old-{final.name}")
            work.rename(final)
            sync(self.root)

        try:
            sizes = [piece.nbytes for part in job.files.values() for f in part.values() for piece, _ in f.values()]
            everyone = gather_json(sum(sizes), group)
            on_rank0(self._there(prepare), group)
            together(self._there(write), group)
            files = gather_json(written, group)
            on_rank0(self._there(publish), group)
        except BaseException as error:
            # every rank is here, or was interrupted by its user: on_rank0 and together have made them agree
            if rank() == 0:
                with contextlib.suppress(OSError):
                    self._there(self._undo)(work)
            if isinstance(error, NdtrainError):
                raise type(error)(f"{final} was not written, older checkpoints stay: {error}") from error
            raise
        if rank() == 0:
            self.prune(job.step)
        return final

    def _there(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` at this store, its failures as `OSError`s."""

        def done(*args: Any) -> Any:
            with os_errors(self.root):
                return work(*args)

        return done

    def _undo(self, work: Path) -> None:
        remove_tree(work, first=MANIFEST)
        self._clean()

    def _prune(self, newest: int) -> None:
        for old in [path for number, path in self._steps() if number <= newest][: -self.keep]:
            if self.local:
                # renamed first, so that a half removed one is never taken for a checkpoint
                old.rename(self.root / f".del-{old.name}")
            else:
                remove_tree(old, first=MANIFEST)
        self._clean()

    def prune(self, newest: int) -> None:
        """Remove what is beyond `keep` of the checkpoints up to step `newest`, which is whole; for rank 0.

        What cannot be removed stays: room not freed is no reason to fail.
        """
        with contextlib.suppress(OSError):
            self._there(self._prune)(newest)

    # ---- finding

    def newest_step(self) -> int | None:
        """Number of the newest published step, whole or not; None where there is none."""
        steps = self._steps()
        return steps[-1][0] if steps else None

    def newest_valid(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest whole checkpoint by `check`, and (path, reason) of newer ones that are not; for rank 0."""
        refused: list[tuple[Path, str]] = []
        for _, path in reversed(self._steps()):
            try:
                check(path)
            except DamagedError as error:
                refused.append((path, str(error)))
            else:
                return path, refused
        return None, refused

    def find(self, resume: str | Path, *, verify: bool = False) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and messages for the user; collective, rank 0 decides.

        `resume` is "never", "auto" (the newest whole one; none where there are no checkpoints) or a checkpoint's path;
        with `verify` the ranks read every file and compare its hash. DamagedError on all ranks where the named one, or
        every one, is damaged.
        """
        if str(resume) == "never":
            return None, []
        if str(resume) != "auto":
            directory = to_path(str(resume))

            def named() -> None:
                if not directory.is_dir():
                    raise DamagedError(f"{resume}: there is no such checkpoint")

            on_rank0(self._there(named))
            self._check(directory, verify=verify)
            return directory, []
        on_rank0(self._there(self._clean))
        refused: list[str] = []
        for name in of_rank0(self._there(lambda: [path.name for _, path in reversed(self._steps())])):
            directory = self.root / name
            try:
                self._check(directory, verify=verify)
            except DamagedError as error:
                refused.append(str(error))
            else:
                return directory, [f"{reason}; going back to {directory}" for reason in refused]
        if refused:
            raise DamagedError(f"no checkpoint is whole: {refused[0]}")
        return None, []

    def _check(self, directory: Path, *, verify: bool) -> None:
        """`check` on rank 0; with `verify` all ranks hash a share of the tensor files each. Collective."""
        if not verify:
            on_rank0(self._there(lambda: check(directory)))
        else:
            files = of_rank0(self._there(lambda: check(directory)["files"]))
            names = sorted(name for name in files if is_tensor_file(name))
            together(self._there(lambda: check_hashes(directory, files, names[rank() :: world_size()])))
