"""Publish, prune and find the checkpoints of a run.

On a file system a directory gets its checkpoint name once it is complete. In an object store, which cannot rename, a
directory counts as a checkpoint while it has a manifest, which is written last and removed first.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ndtrain.checkpoint import best
from ndtrain.checkpoint.index import INDEX, check_headers, tables_of, write_index
from ndtrain.checkpoint.manifest import (
    MANIFEST,
    check_files,
    check_hashes,
    is_tensor_file,
    read_manifest,
    write_manifest,
)
from ndtrain.checkpoint.staging import Staging
from ndtrain.checkpoint.tensors import Files, check_coverage, files_of, listing, pieces_of, rows_of, write_files
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.runs.limits import WAIT_TIMEOUT
from ndtrain.runs.messages import gather_json, gather_rows, of_rank0, on_rank0, together
from ndtrain.runs.process import rank, world_size
from ndtrain.storage.paths import is_local, local_copy_to, os_errors, read_object, remove_tree, sync, to_path
from ndtrain.storage.table import Pieces

_STEP = re.compile(r"step-(\d{8,})")
# Everything in a checkpoint but its tensors' values takes less than this many bytes plus this share of theirs.
_SPARE_BYTES, _SPARE_SHARE = 1 << 20, 0.01


def read_state(directory: Path) -> dict[str, Any]:
    """Return the content of train_state.json. Raises `DamagedError`."""
    return read_object(directory / "train_state.json")


def _as_os_errors(path: Path, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return `work` with the errors of the object store of `path` raised as `OSError`."""

    def wrapped(*args: Any) -> Any:
        with os_errors(path):
            return work(*args)

    return wrapped


def check(directory: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint. Raises `DamagedError`, naming the file or the tensor.

    Checks the size of every file, that the headers of tensor files cover every value of every tensor exactly once, and
    the hash of all other files. `check_hashes` also reads the tensors.
    """
    manifest, indexed = _check_sizes_and_coverage(directory)
    for part, stored in indexed.items():
        check_headers(stored, directory / part, lambda number, file: True)
    return manifest


def check_together(directory: Path, *, verify: bool = False, progress: Callable[[], None] = lambda: None) -> None:
    """Do what `check` does with each rank reading a share of the headers; with `verify` also of all hashes. Collective.

    `progress` is called after each file. Raises `DamagedError` on all ranks.
    """

    def check_share() -> None:
        files = read_manifest(directory)["files"]
        for part in {name.split("/")[0] for name in files if name.endswith(f"/{INDEX}")}:
            check_headers(pieces_of(directory / part), directory / part, lambda i, file: i % world_size() == rank())
        if verify:
            names = sorted(name for name in files if is_tensor_file(name))

            def mine() -> Iterator[str]:
                for name in names[rank() :: world_size()]:
                    yield name
                    progress()

            check_hashes(directory, files, mine())

    on_rank0(_as_os_errors(directory, lambda: _check_sizes_and_coverage(directory)))  # all headers without an index
    together(_as_os_errors(directory, check_share))


def _check_sizes_and_coverage(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Pieces]]]:
    """Return the manifest and the pieces of the parts that have an index, whose headers were not read.

    Raises `DamagedError`.
    """
    manifest = check_files(directory)
    stored = {part: check_coverage(directory / part, listed) for part, listed in manifest["tensors"].items()}
    return manifest, {part: pieces for part, pieces in stored.items() if f"{part}/{INDEX}" in manifest["files"]}


@dataclass(frozen=True)
class _Job:
    """The content of one checkpoint."""

    step: int
    files: Mapping[str, Files]
    listed: Mapping[str, Any]
    state: Mapping[str, Any]
    extra_files: Callable[[Path], None] | None
    best_step: int | None


class _Background:
    """Run `write` in a thread of its own and hold its outcome."""

    def __init__(self, write: Callable[[], Path]) -> None:
        self.path: Path | None = None
        self.error: BaseException | None = None

        def work() -> None:
            try:
                self.path = write()
            except BaseException as error:
                self.error = error

        # A daemon, so that a rank that fails elsewhere does not wait here for one that is gone.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Path:
        """Wait for the thread; return its path or raise its error."""
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.path is not None
        return self.path


class CheckpointStore:
    """Save and find the checkpoints of one run, on a file system that all ranks share.

    With `background` a save returns once this rank's part is copied to host memory, and `settle` gives its outcome. At
    most one save is in flight. `progress` is called after each file that is written or verified.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, background: bool = False, progress: Callable[[], None] = lambda: None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.root = run_dir / "checkpoints"
        self.keep, self.background, self.progress = keep, background, progress
        self.local = is_local(run_dir)
        self.staging = Staging()
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
        """Remove what a crash left, and put back a checkpoint whose replacement was never published; for rank 0."""
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
        best_step: int | None = None,
    ) -> Path | None:
        """Write the checkpoint to a temporary directory, rename it and return its path; collective.

        `state` is JSON; `extra_files(directory)` writes more files, on rank 0 alone. The file `best` then names the
        checkpoint of `best_step`, this or an earlier step, if given. All but that one and the `keep` newest up to this
        step are removed; later ones, left by a run that was resumed from an older step, stay. If any rank fails, all
        raise `NdtrainError` with its message, nothing is left of this checkpoint, and older ones stay.

        With `background` only the copies are made here and None is returned; `settle` returns or raises the rest.
        """
        groups = {"model": model, "optim": optim}
        job = _Job(
            step,
            {part: files_of(group) for part, group in groups.items()},
            {part: listing(group) for part, group in groups.items()},
            state,
            extra_files,
            best_step,
        )
        if not self.background:
            return self._write(job, None)
        if self._flight is not None:
            raise RuntimeError("a save is in flight; settle it first")
        if self._group is None and world_size() > 1:
            # A group of its own, since training's collectives go on meanwhile, and without a deadline for slow disks.
            self._group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        job = replace(job, files=self.staging.copy(job.files))
        self._flight = _Background(lambda: self._write(job, self._group))
        return None

    @property
    def in_flight(self) -> bool:
        """Whether a background save still has to be settled; the same on every rank."""
        return self._flight is not None

    @property
    def written(self) -> bool:
        """Whether `settle` would return at once on this rank."""
        return self._flight is None or not self._flight.running

    def settle(self) -> Path | None:
        """Wait for the save in flight and return its path, None without one. Raises what `save` would have raised."""
        flight, self._flight = self._flight, None
        return flight.result() if flight is not None else None

    def _write(self, job: _Job, group: dist.ProcessGroup | None) -> Path:
        final = self.path(job.step)
        work = self.root / f".tmp-{final.name}" if self.local else final
        written: dict[str, Any] = {}
        rows: dict[str, Tensor] = {}

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
                raise NdtrainError(f"it needs {needed:,} bytes, but only {free:,} are free")
            for part in job.files:
                (work / part).mkdir(parents=True)

        def write() -> None:
            for part, files in job.files.items():
                written.update(
                    {f"{part}/{name}": entry for name, entry in write_files(work / part, files, self.progress).items()}
                )
                rows[part] = rows_of(files, job.listed[part])

        def publish() -> None:
            (work / "train_state.json").write_text(json.dumps(job.state, indent=1))
            if job.extra_files is not None:
                with local_copy_to(work) as folder:
                    job.extra_files(folder)
            for part, listed in job.listed.items():
                names = [[n.removeprefix(f"{part}/") for n in mine if n.startswith(f"{part}/")] for mine in files]
                write_index(work / part, tables_of(all_rows[part], names, listed, work / part))
            write_manifest(work, dict(job.listed), {name: entry for mine in files for name, entry in mine.items()})
            _check_sizes_and_coverage(work)
            if not self.local:
                return
            if final.exists():
                # os.rename cannot replace a directory; under this name `_clean` can put the old one back after a crash
                final.rename(self.root / f".old-{final.name}")
            work.rename(final)
            sync(self.root)

        try:
            pieces = [piece for part in job.files.values() for f in part.values() for piece, _ in f.values()]
            sizes = [piece.nbytes + 16 * (1 + piece.ndim) for piece in pieces]  # and its row in the index
            everyone = gather_json(sum(sizes), group)
            on_rank0(_as_os_errors(self.root, prepare), group)
            together(_as_os_errors(self.root, write), group)
            files = gather_json(written, group)
            all_rows = {part: gather_rows(rows[part], group) for part in job.files}
            on_rank0(_as_os_errors(self.root, publish), group)
        except BaseException as error:
            # on_rank0 and together raise on all ranks, so every rank is here, unless its user interrupted it
            if rank() == 0:
                with contextlib.suppress(OSError):
                    _as_os_errors(self.root, self._undo)(work)
            if isinstance(error, NdtrainError):
                told = type(error)(f"{final} was not written, older checkpoints are kept: {error}")
                told.rank = error.rank
                raise told from error
            raise
        if (step := job.best_step) is not None:
            # Before older ones go: whenever the process ends, `best` names a complete checkpoint.
            on_rank0(_as_os_errors(self.root, lambda: self.name_best(step)), group)
        if rank() == 0:
            self.prune(job.step)
        return final

    def _undo(self, work: Path) -> None:
        remove_tree(work, first=MANIFEST)
        self._clean()

    def name_best(self, step: int) -> bool:
        """Let the file `best` name the checkpoint of `step`; return whether it exists. For rank 0. Raises `OSError`."""
        exists = step in dict(self._steps())
        if exists:
            best.name(self.path(step))
        return exists

    def _prune(self, newest: int) -> None:
        kept = best.named(self.root)
        for _, old in [item for item in self._steps() if item[0] <= newest][: -self.keep]:
            if old.name == kept:
                continue
            if self.local:
                # renamed first, so that a partly removed directory is never taken for a checkpoint
                old.rename(self.root / f".del-{old.name}")
            else:
                remove_tree(old, first=MANIFEST)
        self._clean()

    def prune(self, newest: int) -> None:
        """Keep the best and the `keep` newest checkpoints up to step `newest`, which is complete; for rank 0.

        One that cannot be removed stays: disk space that is not freed is no reason to fail.
        """
        with contextlib.suppress(OSError):
            _as_os_errors(self.root, self._prune)(newest)

    # ---- finding

    def newest_step(self) -> int | None:
        """Return the newest published step, damaged or not; None if there is none."""
        steps = self._steps()
        return steps[-1][0] if steps else None

    def newest_valid(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """Return the newest checkpoint that passes `check`, and (path, reason) of newer, damaged ones; for rank 0."""
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
        """Return the checkpoint to resume from, and messages for the user; collective, rank 0 decides.

        `resume` is "never", "auto" (the newest undamaged one; None if there are no checkpoints) or a checkpoint's path.
        With `verify` the ranks read every file and compare its hash. Raises `RecipeError` on all ranks for a path
        that is no checkpoint's, `DamagedError` if the given one, or every one, is damaged.
        """
        if str(resume) == "never":
            return None, []
        if str(resume) != "auto":
            directory = to_path(str(resume))

            def require_directory() -> None:
                if problem := _no_checkpoint(directory):
                    raise RecipeError(
                        f'checkpoint.resume = "{resume}" {problem}; give a checkpoint like '
                        'RUN_DIR/checkpoints/step-00000100, "auto" or "never"'
                    )

            on_rank0(_as_os_errors(self.root, require_directory))
            check_together(directory, verify=verify, progress=self.progress)
            return directory, []
        on_rank0(_as_os_errors(self.root, self._clean))
        refused: list[str] = []
        for name in of_rank0(_as_os_errors(self.root, lambda: [path.name for _, path in reversed(self._steps())])):
            directory = self.root / name
            try:
                check_together(directory, verify=verify, progress=self.progress)
            except DamagedError as error:
                refused.append(str(error))
            else:
                return directory, [f"{reason}; resuming from {directory} instead" for reason in refused]
        if refused:
            raise DamagedError(
                f"every checkpoint in {self.root} is damaged; move them away to train anew. The newest: {refused[0]}"
            )
        return None, []


def _no_checkpoint(path: Path) -> str | None:
    """Return why `path` is not even a damaged checkpoint; None if it may be one."""
    if not path.exists():
        return f"does not exist (looked from {Path.cwd()})"
    if (path / "checkpoints").is_dir():
        return "is a run's directory"
    has_part = any((path / name).exists() for name in ("manifest.json", "model", "optim"))
    return None if has_part else "is no checkpoint"
