"""Take the files of a corpus in windows: the samples of one window after another, each shuffled by itself.

Which window comes when is a function of the files' number and sizes, of seed and window size alone, and where in the
stream a window begins follows from the numbers of samples in those before it. So only one or two windows need be
tokenized at a time, and a run that resumes in a window needs none of those before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from ndtrain.data.order import permuted
from ndtrain.data.row import IntArray
from ndtrain.data.samples import Sample, Samples
from ndtrain.errors import counted

# A sample's id is its place in its window, and the window's number in the bits above.
_PLACE_BITS = 40


class FilePlan:
    """Which files are in which window: in each epoch all of them, in an order of its own (with `shuffle`), cut into
    windows where the next file would make one larger than `window` bytes. A larger file is a window of its own.
    """

    def __init__(self, sizes: Sequence[int], *, window: int, seed: int, shuffle: bool) -> None:
        self.sizes, self.window, self.seed, self.shuffle = list(sizes), window, seed, shuffle
        self._firsts = [0]  # the number of the first window of each epoch

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Return the files of each window of an epoch."""
        count = len(self.sizes)
        places = np.arange(count, dtype=np.uint64)
        order = permuted(places, count, key=f"{self.seed} files {epoch}") if self.shuffle else places
        windows: list[list[int]] = [[]]
        size = 0
        for file in map(int, order):
            if windows[-1] and size + self.sizes[file] > self.window:
                windows.append([])
                size = 0
            windows[-1].append(file)
            size += self.sizes[file]
        return windows

    def place(self, number: int) -> tuple[int, int]:
        """Return the epoch of a window, and its number in it."""
        while self._firsts[-1] <= number:
            self._firsts.append(self._firsts[-1] + len(self._epoch(len(self._firsts) - 1)))
        epoch = bisect_right(self._firsts, number) - 1
        return epoch, number - self._firsts[epoch]

    def count(self) -> int:
        """Return the windows of the first epoch; others may have a few more or less."""
        self.place(0)
        return self._firsts[1]

    def files(self, number: int) -> list[int]:
        """Return the indices of the files of a window, in the order in which they are read."""
        epoch, own = self.place(number)
        return self._epoch(epoch)[own]

    def has_all(self, first: int, last: int) -> bool:
        """Return whether the windows from `first` to `last` have the files of a whole epoch."""
        epoch, own = self.place(first)
        return self.place(last + 1)[0] > epoch + (own > 0)

    def share(self, number: int) -> tuple[float, float]:
        """Return how many epochs, by bytes, have passed where a window begins, and where it ends."""
        epoch, own = self.place(number)
        sizes = [sum(self.sizes[file] for file in files) for files in self._epoch(epoch)]
        before, total = sum(sizes[:own]), max(1, sum(sizes))
        return epoch + before / total, epoch + (before + sizes[own]) / total


class Windows:
    """The samples of all windows, and their order. `open_` returns the samples of a window, None if it has none,
    `drop` forgets them, and `close` forgets all.

    The stream begins, for this process, with window `number`, whose first sample is at the cursor `first`. `reach` must
    have opened the windows that are asked for; it is called on every rank alike, and is the only one to open any.
    """

    def __init__(
        self,
        plan: FilePlan,
        open_: Callable[[int], Samples | None],
        drop: Callable[[int], None],
        close: Callable[[], None],
        *,
        key: str,
        number: int = 0,
        first: int = 0,
    ) -> None:
        self.plan, self._open, self._drop, self.close, self._key = plan, open_, drop, close, key
        self._number = number
        self._firsts = [first]  # where the windows from `number` on begin; the last one is not opened yet
        self._opened: dict[int, Samples] = {}

    # ---- windows

    def reach(self, since: int, until: int) -> None:
        """Drop the windows that end before `since`, and open those of the cursors before `until`."""
        for number in [number for number in self._opened if self._firsts[number - self._number + 1] <= since]:
            del self._opened[number]
            self._drop(number)
        while self._firsts[-1] < until:
            number = self._number + len(self._firsts) - 1
            samples = self._open(number)
            if samples is not None:
                self._opened[number] = samples
            self._firsts.append(self._firsts[-1] + (0 if samples is None else len(samples)))

    def misses(self, until: int) -> bool:
        """Return whether `reach` has a window to open."""
        return self._firsts[-1] < until

    def at(self, cursor: int) -> tuple[int, int]:
        """Return the number of the window that a cursor is in, and where it begins: what a resume has to know."""
        index = bisect_right(self._firsts, cursor) - 1
        if index < 0:
            raise ValueError(f"cursor {cursor} is before {self._firsts[0]}, where this process begins")
        return self._number + index, self._firsts[index]

    def tokens_at(self, cursor: int) -> str | None:
        """Return the identity of the tokens of the window that a cursor is in; None if it is not open."""
        samples = self._opened.get(self.at(cursor)[0])
        return None if samples is None else samples.digest

    def size(self, number: int) -> int:
        """Return how many samples a window has, 0 if it was not opened."""
        index = number - self._number
        return self._firsts[index + 1] - self._firsts[index] if index + 1 < len(self._firsts) else 0

    @property
    def current(self) -> Samples:
        """The samples of the first window that is open."""
        return self._opened[min(self._opened)]

    # ---- samples

    def __len__(self) -> int:
        """Return how many samples are known so far."""
        return self._firsts[-1]

    def __getitem__(self, id: int) -> Sample:
        return self._opened[id >> _PLACE_BITS][id & ((1 << _PLACE_BITS) - 1)]

    @property
    def seq_len(self) -> int:
        return self.current.seq_len

    @property
    def pad_id(self) -> int:
        return self.current.pad_id

    @property
    def digest(self) -> None:
        """The identity of all tokens is not known."""

    @property
    def fingerprint(self) -> str:
        """Text that identifies the samples."""
        own = self.current
        return f"{self._key} seq_len={own.seq_len} packing={own.packing} window={self.plan.window}"

    def describe(self) -> str:
        """Return what is known of the windows before they are prepared."""
        count = counted(self.plan.count(), "window")
        return f"data.window: {count} an epoch, of at most {self.plan.window:,} bytes or one file"


class WindowOrder:
    """The stream of ids of `Windows`: window after window, each in an order of its own."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    @property
    def n_samples(self) -> int:
        """The number of samples that are known so far."""
        return len(self.windows)

    @property
    def fingerprint(self) -> str:
        """Text that identifies the order."""
        plan = self.windows.plan
        return f"seed={plan.seed} shuffle={plan.shuffle}" + (" order=2" if plan.shuffle else "")

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """Return the ids `[count]` of the stream from `cursor` to cursor + count - 1, all in windows that were open."""
        parts: list[IntArray] = [np.empty(0, np.int64)]
        while count > 0:
            number, first = self.windows.at(cursor)
            size = self.windows.size(number)
            take = min(count, first + size - cursor)
            places = np.arange(cursor - first, cursor - first + take, dtype=np.uint64)
            plan = self.windows.plan
            own = permuted(places, size, key=f"{plan.seed} window {number}") if plan.shuffle else places
            parts.append((number << _PLACE_BITS) + own.astype(np.int64))
            cursor, count = cursor + take, count - take
        return np.concatenate(parts)

    def end(self, epochs: int) -> int:
        """Raise `ValueError`: how many samples an epoch has is known once all windows were open."""
        raise ValueError("the number of samples in an epoch is not known")

    def epoch(self, cursor: int) -> float:
        """Return how many epochs have passed at the cursor, by bytes of files."""
        number, first = self.windows.at(cursor)
        begins, ends = self.windows.plan.share(number)
        size = self.windows.size(number)
        return begins + (ends - begins) * (cursor - first) / size if size else begins
