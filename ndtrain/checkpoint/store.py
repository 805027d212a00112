"""The checkpoints of a run: published by rename, pruned, found again."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ndtrain.checkpoint.manifest import check, sync, write_manifest
from ndtrain.checkpoint.tensors import listing, save_tensors
from ndtrain.errors import DamagedError, NdtrainError
from ndtrain.runtime import broadcast_json, on_rank0, rank

_STEP = re.compile(r"step-(\d{8,})")


def read_state(directory: Path) -> dict[str, Any]:
    """train_state.json. DamagedError."""
    try:
        state = json.loads((directory / "train_state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{directory}: train_state.json cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{directory}: train_state.json holds no object")
    return state


class CheckpointStore:
    """The checkpoints of one run, on a file system that all ranks share."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, it has to be at least 1")
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _steps(self) -> list[tuple[int, Path]]:
        found = [(_STEP.fullmatch(p.name), p) for p in self.root.iterdir()] if self.root.is_dir() else []
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def _clean(self) -> None:
        """Removes what a crash left; rank 0. A replaced checkpoint whose successor never came is put back."""
        for path in self.root.glob(".old-step-*") if self.root.is_dir() else ():
            with contextlib.suppress(OSError, DamagedError):
                final = self.root / path.name.removeprefix(".old-")
                if not final.exists():
                    check(path)
                    path.rename(final)
        for pattern in (".tmp-step-*", ".old-step-*", ".del-step-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optim: Mapping[str, Tensor],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes the checkpoint beside, then renames it: the final name is complete or absent; collective.

        `state` is JSON; `extra_files(directory)` runs on rank 0 alone. Then all but the `keep` newest up to
        this step are removed; later ones, which a resume has gone back behind, stay. Where any rank fails,
        all raise NdtrainError with its message, nothing is left of this checkpoint, and the older ones stay.
        """
        final = self.path(step)
        work = self.root / f".tmp-{final.name}"
        groups = {"model": model, "optim": optim}

        def prepare() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            for part in groups:
                (work / part).mkdir(parents=True)

        def publish() -> None:
            (work / "train_state.json").write_text(json.dumps(state, indent=1))
            if extra_files is not None:
                extra_files(work)
            write_manifest(work, {part: listing(work / part, group) for part, group in groups.items()})
            if final.exists():
                # os.rename cannot replace a directory; aside, the old one can be put back after a crash
                final.rename(self.root / f".old-{final.name}")
            work.rename(final)
            sync(self.root)

        try:
            on_rank0(prepare)
            for part, group in groups.items():
                save_tensors(work / part, group)
            on_rank0(publish)
        except BaseException as error:
            # every rank is here, or was interrupted by its user: on_rank0 and save_tensors have made them agree
            if rank() == 0:
                shutil.rmtree(work, ignore_errors=True)
                self._clean()
            if isinstance(error, NdtrainError):
                raise type(error)(f"{final} was not written, older checkpoints stay: {error}") from error
            raise
        if rank() == 0:
            with contextlib.suppress(OSError):  # the checkpoint is there: room not freed is no reason to fail
                for old in [path for number, path in self._steps() if number <= step][: -self.keep]:
                    # renamed first, so that a half removed one is never taken for a checkpoint
                    old.rename(self.root / f".del-{old.name}")
                self._clean()
        return final

    def newest_step(self) -> int | None:
        """Number of the newest published step, whole or not; None where there is none."""
        steps = self._steps()
        return steps[-1][0] if steps else None

    def newest_valid(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest whole checkpoint, and (path, reason) of newer ones that are not; for rank 0."""
        refused: list[tuple[Path, str]] = []
        for _, path in reversed(self._steps()):
            try:
                check(path)
            except DamagedError as error:
                refused.append((path, str(error)))
            else:
                return path, refused
        return None, refused

    def find(self, resume: str | Path) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and messages for the user; collective, rank 0 decides.

        `resume` is "never", "auto" (the newest whole one; none where there are no checkpoints) or a
        checkpoint's path. DamagedError on all ranks where the named one, or every one, is damaged.
        """
        answer: dict[str, Any] = {"path": None, "messages": []}

        def decide() -> None:
            if str(resume) == "never":
                return
            self._clean()
            if str(resume) != "auto":
                path = Path(resume)
                if not path.is_dir():
                    raise DamagedError(f"{path}: there is no such checkpoint")
                check(path)
                answer["path"] = str(path)
                return
            newest, refused = self.newest_valid()
            if newest is None and refused:
                raise DamagedError(f"no checkpoint is whole: {refused[0][1]}")
            answer["path"] = None if newest is None else str(newest)
            answer["messages"] = [f"{reason}; going back to {newest}" for _, reason in refused]

        on_rank0(decide)
        answer = broadcast_json(answer)
        return (Path(answer["path"]) if answer["path"] else None), answer["messages"]
