"""Show the rows that a model gets, and what is in the data."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndtrain.data import IGNORE
from ndtrain.errors import counted
from ndtrain.train.preview import Preview, open_preview

if TYPE_CHECKING:
    from ndtrain.recipe import Recipe

# Around text that carries loss, where there is no colour.
_MARKS = ("⟦", "⟧")
_BAR = 30


def data_text(recipe: Recipe, *, rows: int, as_json: bool) -> str:
    """Return the first `rows` rows of a run on the recipe's data, or for 0 a table of counts. Raises a run's errors."""
    preview = open_preview(recipe)
    if as_json:
        return json.dumps({"rows": list(preview.rows(rows)), "counts": preview.counts()})
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as captured:
        for note in preview.notes:
            console.print(note, markup=False)
        if rows:
            for number, row in enumerate(preview.rows(rows)):
                console.print()
                _show_row(console, preview, number, row)
        else:
            _show_counts(console, preview.counts())
    return captured.get().rstrip("\n")


def _show_row(console: Console, preview: Preview, number: int, row: dict[str, Any]) -> None:
    ids, labels, starts = row["input_ids"], row["labels"], row["documents"]
    # A token carries loss if it is the label of the one before it.
    trained = [False, *(label != IGNORE for label in labels[:-1])]
    carry = sum(label != IGNORE for label in labels)
    end = _filled(preview, row)
    origin = f" of {row['source']}" if preview.recipe.data.sources else ""
    filled = f"{end:,} of {len(ids):,} tokens, {carry:,} carry loss"
    head = f"row {number}{origin}: {counted(len(starts), 'document')}, {filled}"
    console.print(Text(head, style="bold"))
    for index, (first, stop) in enumerate(pairwise([*starts, end])):
        if len(starts) > 1:
            console.print(Text(f"--- document {index + 1}, position {first}", style="dim"))
        text, at = Text(), first
        while at < stop:
            after = next((other for other in range(at, stop) if trained[other] != trained[at]), stop)
            piece = preview.tokenizer.decode(ids[at:after])
            if not trained[at]:
                text.append(piece)
            elif console.color_system is None:
                text.append(f"{_MARKS[0]}{piece}{_MARKS[1]}")
            else:
                text.append(piece, style="green")
            at = after
        console.print(text)
    if labels[-1] != IGNORE:
        console.print(
            Text(f"--- the target after the last token: {preview.tokenizer.decode([labels[-1]])!r}", style="dim")
        )


def _filled(preview: Preview, row: dict[str, Any]) -> int:
    """Return how many tokens of a row are not padding at its end."""
    ids, labels = row["input_ids"], row["labels"]
    pad, end = preview.batches.samples.pad_id, len(ids)
    # The end token may pad too: there it is the target of the token before it, or begins a document.
    while end > 1 and ids[end - 1] == pad and labels[end - 2] == IGNORE and end - 1 not in row["documents"]:
        end -= 1
    return end


def _show_counts(console: Console, counts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in (
        ("format", counts["format"]),
        ("documents", f"{counts['documents']:,}"),
        ("rows left out", f"{counts['skipped']:,}"),
        ("tokens", f"{counts['tokens']:,}"),
        ("tokens that carry loss", f"{counts['targets']:,} ({counts['targets'] / max(1, counts['tokens']):.1%})"),
        ("longest document", f"{counts['longest']:,} tokens"),
        ("packing", str(counts["packing"]).lower()),
        (f"rows of {counts['seq_len']:,} tokens", f"{counts['rows']:,}, {counts['fill']:.1%} filled"),
    ):
        table.add_row(name, value)
    console.print(table)
    if "sources" in counts:
        names = ("format", "documents", "tokens", "targets", "rows")
        each = Table("source", *names, box=None, title="sources", title_justify="left")
        for label, own in counts["sources"].items():
            each.add_row(label, *(f"{own[name]:,}" if isinstance(own[name], int) else own[name] for name in names))
        console.print(each)
    lengths = Table("tokens of a document", "documents", "", box=None, title="lengths", title_justify="left")
    most = max(counts["lengths"].values())
    for size, many in counts["lengths"].items():
        lengths.add_row(f"to {int(size):,}", f"{many:,}", "█" * max(1, round(_BAR * many / most)))
    console.print(lengths)
    fills = Table("seq_len", "rows", "filled", box=None, title="fill, longer documents cut", title_justify="left")
    for one in counts["fills"]:
        fills.add_row(f"{one['seq_len']:,}", f"{one['rows']:,}", f"{one['fill']:.1%}")
    console.print(fills)
