"""Open a recipe's data as a run would, on this process alone and without its model, to look at it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ndtrain.data import IGNORE, GlobalBatches, Mixed, Samples, Windows, open_samples
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.recipe.data import DataSection
from ndtrain.runs.process import Runtime
from ndtrain.train.data_files import fetch_data, path_of, with_data_commit, with_format
from ndtrain.train.inputs import open_tokenizer
from ndtrain.train.report import Silent
from ndtrain.train.source import with_checkpoint, with_commit
from ndtrain.train.windows import open_data

if TYPE_CHECKING:
    from ndtrain.recipe import Recipe

# As many tokens as no model lacks: which ones it has is for the plan to say.
_ANY = 1 << 62


@dataclass
class Notes(Silent):
    """A reporter that keeps what a run would print about its data."""

    lines: list[str] = field(default_factory=list)

    def info(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Preview:
    """The data of `recipe`, whose format is known, and what a run would print about it."""

    recipe: Recipe
    tokenizer: ByteTokenizer | HubTokenizer
    batches: GlobalBatches
    notes: list[str]

    @property
    def samples(self) -> Samples | Mixed:
        """The samples that are shown: all, or those of the first window."""
        samples = self.batches.samples
        return samples.current if isinstance(samples, Windows) else samples

    def rows(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the first rows of a run as JSON: `input_ids`, `labels` (of position t the token after it, -100 where
        none carries loss), `documents` (their first positions, without padding's) and `source`.
        """
        samples = self.samples
        for index in self.batches.order.sample_ids(0, min(count, len(samples))).tolist():
            row = {name: values.tolist() for name, values in samples[index].items()}
            starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
            last = starts[-1]
            if last and set(row["input_ids"][last:]) == {samples.pad_id} and set(row["labels"][last:]) == {IGNORE}:
                starts.pop()
            yield {
                "input_ids": row["input_ids"],
                "labels": row["labels"],
                "documents": starts,
                "source": self._source(index),
            }

    def _source(self, index: int) -> str:
        samples = self.samples
        if not isinstance(samples, Mixed):
            return path_of(self.recipe.data)
        return list(samples.sources)[int(samples.sources_of(np.asarray(index)))]

    def counts(self) -> dict[str, Any]:
        """Return what is in the data and how it fills rows, as JSON; of several sources of each and of all."""
        samples = self.samples
        if not isinstance(samples, Mixed):
            return self._counts(samples, self.recipe.data)
        each = {
            label: self._counts(own, part.data)
            for (label, own), part in zip(samples.sources.items(), self.recipe.parts(), strict=True)
        }
        return {**_together(list(each.values())), "sources": each}

    def _counts(self, samples: Samples, data: DataSection) -> dict[str, Any]:
        corpus = samples.corpus
        lengths: Counter[int] = Counter()
        longest = 0
        for bounds in corpus.bounds_in_blocks():
            sizes = np.diff(bounds)
            longest = max(longest, int(sizes.max(initial=0)))
            found, many = np.unique(np.frexp(sizes - 1)[1], return_counts=True)
            lengths.update(dict(zip((1 << found).tolist(), many.tolist(), strict=True)))
        return {
            "format": data.format,
            "documents": corpus.n_docs,
            "tokens": corpus.n_tokens,
            "targets": corpus.targets,
            "skipped": corpus.skipped,
            "longest": longest,
            "packing": samples.packing,
            "seq_len": samples.seq_len,
            "rows": len(samples),
            "fill": samples.fill,
            # Documents of at most so many tokens, and more than half of that.
            "lengths": {str(size): lengths[size] for size in sorted(lengths)},
            "fills": [_filled(samples, seq_len) for seq_len in self._lengths()],
        }

    def _lengths(self) -> list[int]:
        own = self.recipe.data.seq_len
        return sorted({max(2, own // 4), max(2, own // 2), own, 2 * own, 4 * own})


def _filled(samples: Samples, seq_len: int) -> dict[str, Any]:
    """Return the rows of another length, where documents that are longer are cut."""
    other = open_samples(samples.corpus, seq_len, packing=samples.packing, pad_id=samples.pad_id)
    return {"seq_len": seq_len, "rows": len(other), "fill": other.fill}


def _together(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of several sources as those of one."""
    lengths: Counter[str] = Counter()
    for counts in each:
        lengths.update(counts["lengths"])
    fills = [
        {"seq_len": same[0]["seq_len"], **_filled_together(same)}
        for same in zip(*(counts["fills"] for counts in each), strict=True)
    ]
    names = ("documents", "tokens", "targets", "skipped")
    return {
        **{key: _common([counts[key] for counts in each]) for key in ("format", "packing", "seq_len")},
        **{key: sum(counts[key] for counts in each) for key in names},
        "longest": max(counts["longest"] for counts in each),
        **_filled_together(each),
        "lengths": {size: lengths[size] for size in sorted(lengths, key=int)},
        "fills": fills,
    }


def _filled_together(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = sum(counts["rows"] for counts in each)
    return {"rows": rows, "fill": sum(counts["rows"] * counts["fill"] for counts in each) / rows}


def _common(values: list[Any]) -> Any:
    """Return the value that all are, or all of them in one text."""
    return values[0] if len(set(values)) == 1 else ", ".join(map(str, dict.fromkeys(values)))


def open_preview(recipe: Recipe) -> Preview:
    """Prepare the data of `recipe` and return it. Raises the errors that a run would."""
    notes = Notes()
    runtime = Runtime(0, 0, 1, torch.device("cpu"))

    def once(work: Any) -> None:
        work()

    recipe, found = with_checkpoint(recipe)
    for with_revision in (with_commit, with_data_commit):
        recipe, more = with_revision(recipe, once)
        found += more
    tokenizer, more = open_tokenizer(recipe, runtime, _ANY)
    fetch_data(recipe, once)
    recipe = with_format(recipe)
    batches = open_data(recipe, runtime, MeshSizes(), tokenizer, notes, vocabulary=_ANY, trains=False)
    if isinstance(windows := batches.samples, Windows):
        windows.close()  # what is open stays readable
        notes.info("note: data.window: shown is the first window")
    return Preview(recipe, tokenizer, batches, [*(f"note: {note}" for note in (*found, *more)), *notes.lines])
