"""Read prepared tokens where they lie: nothing is tokenized, and what can be mapped is not copied.

A layout (`layouts.py`, a file each) yields a file's tokens block by block; `Index` looks at them once and stores, in
the cache, where documents begin and which tokens carry loss; a `TokenFile` maps both. Only what cannot be mapped
(parquet, compressed Arrow, padded rows) is stored again, as plain tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ndtrain.data.cache import Progress, key_of, not_written
from ndtrain.data.corpus import Corpus
from ndtrain.data.files import stamp_of
from ndtrain.data.tokens.block import CHUNK, Reading
from ndtrain.data.tokens.find import find_token_files, holds_tokens
from ndtrain.data.tokens.layouts import LAYOUTS, layout_of
from ndtrain.data.tokens.token_file import TokenFile, open_file
from ndtrain.errors import RecipeError

__all__ = ["LAYOUTS", "Reading", "TokenCorpus", "check_ids", "find_token_files", "holds_tokens", "notes", "open_tokens"]


class TokenCorpus(Corpus):
    """The tokens of all files, one file after another."""

    def __init__(self, files: Sequence[TokenFile], key: str):
        super().__init__(files, key)
        self.files = files


def open_tokens(files: Sequence[Path], reading: Reading, *, cache_dir: Path, progress: Progress = None) -> TokenCorpus:
    """Return the tokens of these files, one file after another; looks once at those without an index in `cache_dir`.

    Its key is that of all tokens, bounds and losses, whatever the names and layouts of the files. Ranks and runs may
    race, as in `build_cache`. `progress(done, total)` is called with bytes of the files. Raises `DamagedError` for a
    file that contradicts itself or changes, `RecipeError` for one that is not read, for tokens without a target, and if
    the cache cannot be written.
    """
    layouts = [layout_of(file) for file in files]
    total, before, opened = sum(stamp_of(file)[0] for file in files), 0, []

    def report(done: int) -> None:
        if progress:
            progress(before + done, total)

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for file, layout in zip(files, layouts, strict=True):
            opened.append(open_file(file, layout, reading=reading, cache_dir=cache_dir, progress=report))
            before += stamp_of(file)[0]
    except OSError as error:
        raise not_written(cache_dir, error) from error
    if not sum(file.targets for file in opened):
        count = f"{files[0]} has" if len(files) == 1 else f"the {len(files)} files, the first is {files[0]}, have"
        raise RecipeError(f"data.path: {count} no token that carries loss and comes after another one")
    return TokenCorpus(opened, key_of([reading.key, *(file.key for file in opened)]))


def check_ids(corpus: TokenCorpus, vocabulary: int) -> None:
    """Raise `RecipeError`, with the place, if there is a token that a model of `vocabulary` tokens lacks."""
    part = next((part for part in corpus.files if part.largest >= vocabulary), None)
    if part is None:
        return
    chunks = ((low, part.tokens[low : low + CHUNK] >= vocabulary) for low in range(0, len(part.tokens), CHUNK))
    place = next(low + int(beyond.argmax()) for low, beyond in chunks if beyond.any())
    document = int(np.searchsorted(part.docs, place, side="right")) - 1
    raw = f" (read as {part.tokens.dtype.name}; is data.token_dtype another?)" if part.layout == "raw" else ""
    raise RecipeError(
        f"{part.file}: token {place:,}, in document {document:,}, is {part.tokens[place : place + 1][0]}{raw}, but the "
        f"model embeds tokens 0 to {vocabulary - 1}; the tokens are of another tokenizer"
    )


def notes(corpus: TokenCorpus, reading: Reading) -> Iterator[str]:
    """Yield a line that counts the tokens, and one for each thing about them that may not be as it was meant."""
    targets, total = sum(part.targets for part in corpus.files), corpus.n_tokens
    yield f"prepared tokens: {total:,} in {corpus.n_docs:,} documents; {100 * targets / total:.1f} % are targets"
    wording = {
        "whole": (
            f"files without an end token (id {reading.eos})",
            "each is one document; if it holds several, the tokens are of another tokenizer",
        ),
        "empty": ("documents without a token", "they are skipped"),
        "single": ("documents of one token", "they train nothing"),
        "padding": (f"tokens of padding (id {reading.pad})", "they train nothing, but fill rows"),
        "ended": (
            f"end tokens (id {reading.eos}) inside rows",
            'a row is one document; if rows hold several, which see each other so, set data.documents = "eos"',
        ),
    }
    for kind, (what, then) in wording.items():
        found = [(part.counts[kind], part.file) for part in corpus.files if kind in part.counts]
        if found:
            (_, document), file = found[0]
            count = sum(own for (own, _), _ in found)
            yield f"{what}: {count:,}, first at document {document:,} of {file}; {then}"
    if ignored := sorted({name for part in corpus.files for name in part.ignored}):
        yield f"columns that are not read: {', '.join([*ignored[:12], *(['...'] if len(ignored) > 12 else [])])}"
    if corpus.largest_id >= reading.vocab_size:
        yield (
            f"the largest token is {corpus.largest_id}, but the tokenizer has only the ids 0 to "
            f"{reading.vocab_size - 1}; it may not be the one that the tokens are of"
        )
