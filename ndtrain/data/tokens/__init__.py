"""Read prepared tokens where they lie: nothing is tokenized, and what can be mapped is not copied.

A layout (`layouts.py`, a file each) yields a file's tokens block by block; `Index` looks at them once and stores, in
the cache, where documents begin and which tokens carry loss; a `TokenFile` maps both. Only what cannot be mapped
(parquet, compressed Arrow, padded rows) is stored again, as plain tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ndtrain.data.cache import Contents, Progress, digests_of, key_of, not_written
from ndtrain.data.corpus import Corpus
from ndtrain.data.files import stamp_of
from ndtrain.data.preparation import FORMAT_VERSION, Group
from ndtrain.data.tokens.block import CHUNK, Reading
from ndtrain.data.tokens.find import find_token_files
from ndtrain.data.tokens.identity import sampled_digest
from ndtrain.data.tokens.layouts import LAYOUTS, layout_of
from ndtrain.data.tokens.token_file import TokenFile, companions, open_file
from ndtrain.errors import RecipeError

__all__ = ["LAYOUTS", "Reading", "check_ids", "contents_of_tokens", "find_token_files", "notes", "open_tokens"]

_MEMO_NAME = ".token-digests.json"


class TokenCorpus(Corpus):
    """The tokens of all files, one file after another."""

    def __init__(self, files: Sequence[TokenFile], key: str):
        super().__init__(files, key)
        self.files = files


def contents_of_tokens(files: Sequence[Path], reading: Reading, *, cache_dir: Path) -> Contents:
    """Return what identifies the tokens of these files, without reading all of them (`sampled_digest`)."""
    layouts = [layout_of(file) for file in files]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        parts = [companions(file, layout) for file, layout in zip(files, layouts, strict=True)]
        digests = iter(digests_of(list(chain(*parts)), cache_dir, sampled_digest, memo_name=_MEMO_NAME))
    except OSError as error:
        raise not_written(cache_dir, error) from error
    names = [" ".join([layout, *(next(digests) for _ in own)]) for layout, own in zip(layouts, parts, strict=True)]
    groups = [
        Group(key_of([FORMAT_VERSION, reading.key, name, reading.dtype.name if layout == "raw" else ""]), [file])
        for name, layout, file in zip(names, layouts, files, strict=True)
    ]
    return Contents(key_of([group.key for group in groups]), groups, reading.key, names)


def open_tokens(files: Sequence[Path], reading: Reading, *, cache_dir: Path, progress: Progress = None) -> TokenCorpus:
    """Return the tokens of these files, one file after another; looks once at those without an index in `cache_dir`.

    Ranks and runs may race, as in `build_cache`. `progress(done, total)` is called with bytes of the files. Raises
    `DamagedError` for a file that contradicts itself or changes, `RecipeError` for one that is not read, for tokens
    without a target, and if the cache cannot be written.
    """
    contents = contents_of_tokens(files, reading, cache_dir=cache_dir)
    total, before, parts = sum(stamp_of(file)[0] for file in files), 0, []
    for file, group, name in zip(files, contents.groups, contents.files, strict=True):

        def report(done: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        try:
            part = open_file(
                file, name.split()[0], key=group.key, reading=reading, cache_dir=cache_dir, progress=report
            )
        except OSError as error:
            raise not_written(cache_dir, error) from error
        parts.append(part)
        before += stamp_of(file)[0]
    if not sum(part.targets for part in parts):
        count = f"{files[0]} has" if len(files) == 1 else f"the {len(files)} files, the first is {files[0]}, have"
        raise RecipeError(f"data.path: {count} no token that carries loss and comes after another one")
    return TokenCorpus(parts, contents.key)


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
