"""Load the rows of each global batch that belong to one batch rank."""

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch

from ndtrain.data.mixture import Mixed, MixedOrder
from ndtrain.data.order import Order
from ndtrain.data.row import IntArray
from ndtrain.data.samples import IGNORE, Samples
from ndtrain.data.windows import WindowOrder, Windows

_ALIGN = 128


def micro_batches(global_batch_size: int, batch_ranks: int, most: int) -> tuple[int, int]:
    """Return (rows of a micro batch, at most `most`; forwards per optimizer step), the same on every rank."""
    rows = min(most, -(-global_batch_size // batch_ranks))
    return rows, -(-global_batch_size // (batch_ranks * rows))


@dataclass
class GlobalBatches:
    """Load one batch rank's micro batches of each global batch.

    Row k of the global batch goes to micro step k // (R * m), batch rank k // m % R, row k % m of the micro batch (R
    batch ranks, m rows). Rows past the last one are fillers without targets, so that every rank runs the same number of
    equally shaped forwards. The global batch has the same rows in the same order for every R and m.
    """

    samples: Samples | Mixed | Windows
    order: Order | MixedOrder | WindowOrder
    _: KW_ONLY
    global_batch_size: int
    micro_batch_size: int  # at most this; less where a rank's share of the global batch is smaller
    batch_rank: int
    batch_ranks: int
    micro_steps: int = field(init=False)
    marks_targets: bool = False  # whether micro batches say which rows a model's head can leave out
    marks_documents: bool = False  # whether they say of which document each token is

    def __post_init__(self) -> None:
        if self.order.n_samples != len(self.samples) or not 0 <= self.batch_rank < self.batch_ranks:
            raise ValueError(f"{self.order.n_samples=}, {len(self.samples)=}, {self.batch_rank=}")
        self.micro_batch_size, self.micro_steps = micro_batches(
            self.global_batch_size, self.batch_ranks, self.micro_batch_size
        )

    @property
    def fingerprint(self) -> str:
        """Text that identifies the data and its order; a cursor is valid only where it is equal."""
        return f"{self.samples.fingerprint} {self.order.fingerprint}"

    @property
    def tokens(self) -> str | None:
        """The identity of the tokens alone, whatever gave them (`Corpus.digest`)."""
        return self.samples.digest

    def sample_ids(self, cursor: int) -> IntArray:
        """Return the ids `[G]` of the whole global batch at the cursor; the next batch is at cursor + G."""
        return self.order.sample_ids(cursor, self.global_batch_size)

    def sources_of(self, cursor: int) -> IntArray | None:
        """Return the source of each of this rank's rows `[micro_steps, m]`; None without sources. Fillers have any."""
        if not isinstance(self.samples, Mixed):
            return None
        ids = self.samples.sources_of(self.sample_ids(cursor))
        padded = np.resize(ids, self.micro_steps * self.batch_ranks * self.micro_batch_size)
        return padded.reshape(self.micro_steps, self.batch_ranks, self.micro_batch_size)[:, self.batch_rank]

    def load(self, cursor: int) -> list[dict[str, torch.Tensor]]:
        """Return this rank's micro batches in order: int64 `[m, S]` input_ids, labels and position_ids each.

        With `marks_targets` also `target_rows` of the labels as `targets`, where it is not None, and with
        `marks_documents` the `documents_of` its tokens.
        """
        return list(self.each(cursor))

    def each(self, cursor: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what `load` returns, each micro batch when it is asked for."""
        ids, micro = self.sample_ids(cursor), self.micro_batch_size
        for step in range(self.micro_steps):
            first = (step * self.batch_ranks + self.batch_rank) * micro
            rows = [self.samples[int(ids[k if k < len(ids) else 0])] for k in range(first, first + micro)]
            for filler in rows[max(0, len(ids) - first) :]:
                filler["labels"].fill(IGNORE)
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            if self.marks_targets and (targets := target_rows(batch["labels"])) is not None:
                batch["targets"] = targets
            if self.marks_documents:
                batch["documents"] = documents_of(batch["position_ids"])
            yield {name: torch.from_numpy(values) for name, values in batch.items()}


def target_rows(labels: IntArray) -> IntArray | None:
    """Return which of the flattened labels are targets, `[n]` in order; None where hardly any is not.

    Labels that are none fill `n` up to a multiple of `_ALIGN`, so that it takes few values.
    """
    is_target = (labels != IGNORE).ravel()
    count = max(1, -(-int(is_target.sum()) // _ALIGN)) * _ALIGN
    if count >= len(is_target):
        return None
    targets, others = np.flatnonzero(is_target), np.flatnonzero(~is_target)
    return np.sort(np.concatenate([targets, others[: count - len(targets)]]))


def documents_of(position_ids: IntArray) -> IntArray:
    """Return the document `[B, S]` of each token, counted from 0 in each row; `[B, 0]` if each row is one."""
    found = np.cumsum(np.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1, axis=1)
    return found if found[:, -1].any() else found[:, :0]


def labels_count(batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """Return the number of targets in these micro batches of one rank; sum it over the batch ranks."""
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
