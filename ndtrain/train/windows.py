"""Open the data of a run, in windows of files where the recipe says so (`data.window`).

A window is prepared by one rank of each node, as all data is, into a directory of the run's own, so that it can be
removed once it is passed. While it is trained on, the next one is prepared by a thread.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ndtrain.data.batches import GlobalBatches
from ndtrain.data.cache import build_cache
from ndtrain.data.files import stamp_of
from ndtrain.data.row import NoRowsError
from ndtrain.data.samples import Samples
from ndtrain.data.windows import FilePlan, WindowOrder, Windows
from ndtrain.errors import DamagedError, Stopped
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe
from ndtrain.recipe.data import window_bytes
from ndtrain.runs.messages import rank0_first, together
from ndtrain.runs.phases import TOKENIZE
from ndtrain.runs.process import Runtime
from ndtrain.runs.watch import Watch
from ndtrain.train.data_files import cache_root
from ndtrain.train.encoding import encoder_of
from ndtrain.train.inputs import data_contents, open_batches, open_source, share_of
from ndtrain.train.report import Reporter

# What a run that was killed leaves is removed after so long.
_STALE_SECONDS = 7 * 24 * 3600


def open_data(
    recipe: Recipe,
    runtime: Runtime,
    sizes: MeshSizes,
    tokenizer: ByteTokenizer | HubTokenizer,
    reporter: Reporter,
    *,
    vocabulary: int,
    state: Mapping[str, Any] | None = None,
    trains: bool = True,
) -> GlobalBatches:
    """Return this rank's share of the data, as `open_batches` does; collective.

    With `data.window` only the windows of the next global batch are prepared, of a run that resumes with the `state`
    in train_state.json. Who only looks at the data and does not train disturbs no run.
    """
    if not recipe.data.window:
        return open_batches(recipe, runtime, sizes, tokenizer, reporter, vocabulary=vocabulary)
    opener = _Opener(recipe, runtime, tokenizer, reporter, vocabulary=vocabulary, trains=trains)
    cursor, (number, first) = (state["samples"], state["window"]) if state is not None else (0, (0, 0))
    windows = Windows(opener.plan, opener.open, opener.drop, opener.close, key=opener.key, number=number, first=first)
    reporter.info(windows.describe())
    windows.reach(cursor, cursor + recipe.train.global_batch_size)
    return share_of(recipe, windows, WindowOrder(windows), runtime, sizes)


def reach(batches: GlobalBatches, watch: Watch, *, since: int, until: int) -> None:
    """Open the windows of the samples before `until`, if the data is taken in windows, and drop those before `since`.

    Collective where a window is to be opened, which follows from `until`.
    """
    windows = batches.samples
    if isinstance(windows, Windows):
        with watch.during(TOKENIZE) if windows.misses(until) else nullcontext():
            windows.reach(since, until)


def data_state(batches: GlobalBatches, cursor: int) -> dict[str, Any]:
    """Return what train_state.json says of the data at `cursor`."""
    found: dict[str, Any] = {"data": batches.fingerprint, "tokens": batches.tokens}
    samples = batches.samples
    if isinstance(samples, Windows):
        # Files are known by name and size alone: what the cursor counts in has to be what it was.
        found |= {"window": samples.at(cursor), "window_tokens": samples.tokens_at(cursor)}
    return found


def close_data(batches: GlobalBatches) -> None:
    """End what prepares the next window, and remove the windows of a run that has ended."""
    if isinstance(batches.samples, Windows):
        batches.samples.close()


class _Opener:
    """Opens the windows of one recipe. All ranks call `open` alike."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        tokenizer: ByteTokenizer | HubTokenizer,
        reporter: Reporter,
        *,
        vocabulary: int,
        trains: bool,
    ) -> None:
        self.recipe, self.runtime, self.tokenizer, self.reporter = recipe, runtime, tokenizer, reporter
        self.vocabulary, self.trains = vocabulary, trains
        ((self.files, contents),) = data_contents(recipe, tokenizer)
        self.key = contents.key
        self.plan = FilePlan(
            [stamp_of(file)[0] for file in self.files],
            window=window_bytes(recipe.data.window),
            seed=recipe.train.seed,
            shuffle=recipe.data.shuffle,
        )
        run = hashlib.blake2b(os.path.abspath(recipe.run.dir).encode(), digest_size=8).hexdigest()
        # Of its own: what a run has passed can be removed only where no other needs it.
        self.folder = cache_root() / "windows" / (f"{run}-{self.key}" if trains else f"{run}-{self.key}-{os.getpid()}")
        self._ahead: _Ahead | None = None
        self._since: int | None = None  # the first window after the last one with rows
        _remove_stale(self.folder.parent, self.folder)

    def open(self, number: int) -> Samples | None:
        """Return the samples of a window, None if it has none, and begin to prepare the one after it; collective.

        Raises `NoRowsError` where the windows of a whole epoch have none.
        """
        found: list[tuple[Samples | NoRowsError, list[str]]] = []

        def build() -> None:
            if self._ahead is not None:
                self._ahead.wait(self.runtime.watch.advance)
            try:
                opened = open_source(
                    self.recipe,
                    self.runtime,
                    self.tokenizer,
                    self.reporter,
                    vocabulary=self.vocabulary,
                    checks=False,
                    files=self._files(number),
                    cache_dir=self._folder(number),
                )
            except NoRowsError as error:  # as one such file among others
                found.append((error, [f"note: left out: {error}"]))
            else:
                found.append(opened)

        rank0_first(self.runtime, build)
        together(None if found else build)
        samples, lines = found[0]
        self._since = number if self._since is None else self._since
        if isinstance(samples, NoRowsError):
            self.drop(number)
            if self.plan.has_all(self._since, number):
                raise samples
        else:
            self._since = number + 1
        for line in lines:
            self.reporter.info(f"window {number}: {line}")
        if self.trains and self.runtime.local_rank == 0:
            self._ahead = _Ahead(lambda check: self._prepare(number + 1, check))
        return None if isinstance(samples, NoRowsError) else samples

    def _prepare(self, number: int, check: Callable[[], None]) -> None:
        """Tokenize a window, so that `open` finds it done. Ends where `check` raises."""
        workers = self.recipe.data.workers or len(os.sched_getaffinity(0))
        build_cache(
            self._files(number),
            encoder_of(self.recipe, self.tokenizer),
            cache_dir=self._folder(number),
            progress=lambda done, total: check(),
            workers=workers,
        )

    def drop(self, number: int) -> None:
        """Remove a window that is passed."""
        if self.runtime.local_rank == 0:
            shutil.rmtree(self._folder(number), ignore_errors=True)

    def close(self) -> None:
        """End the preparation ahead and remove all windows."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
        if self.runtime.local_rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self, number: int) -> list[Path]:
        """Return the files of a window. Raises `DamagedError` if one has not the size by which it was planned."""
        found = self.plan.files(number)
        for file, planned in ((self.files[index], self.plan.sizes[index]) for index in found):
            if (size := stamp_of(file)[0]) != planned:
                raise DamagedError(
                    f"{file} has {size:,} bytes, and had {planned:,} when the run was started; with data.window files "
                    "must stay as they are: restore it, and start the run again"
                )
        return [self.files[index] for index in found]

    def _folder(self, number: int) -> Path:
        return self.folder / str(number)


class _Ahead:
    """A thread that prepares a window. What it raises is met again by who opens the window."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._stopped, self._beats = Event(), 0
        self._thread = Thread(target=self._run, args=(work,), name="window", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[], None]], None]) -> None:
        with suppress(Exception):
            work(self._check)

    def _check(self) -> None:
        self._beats += 1
        if self._stopped.is_set():
            raise Stopped("the run has ended")

    def wait(self, advance: Callable[[], None]) -> None:
        """Wait until it has ended; `advance` is called where it has gone on."""
        seen = self._beats
        while self._thread.is_alive():
            self._thread.join(0.5)
            if seen != self._beats:
                seen = self._beats
                advance()

    def stop(self) -> None:
        """End it, at the next document."""
        self._stopped.set()
        self._thread.join()


def _remove_stale(folder: Path, own: Path) -> None:
    for left in folder.glob("*"):
        with suppress(OSError):
            if left != own and time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)
