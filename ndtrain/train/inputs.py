"""Open the inputs of a run: its tokenizer and its batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ndtrain.data.batches import GlobalBatches
from ndtrain.data.cache import Contents, Progress, build_cache, contents_of, key_of
from ndtrain.data.cache import notes as cache_notes
from ndtrain.data.corpus import Corpus
from ndtrain.data.files import Note, stamp_of
from ndtrain.data.mixture import Mixed, MixedOrder
from ndtrain.data.order import Order
from ndtrain.data.preparation import Group
from ndtrain.data.samples import Samples, open_samples
from ndtrain.data.text import TextEncoder
from ndtrain.data.tokens import Reading, check_ids, open_tokens
from ndtrain.data.tokens import notes as token_notes
from ndtrain.data.windows import WindowOrder, Windows
from ndtrain.errors import NdtrainError, RecipeError
from ndtrain.hf.hub import snapshot_directory
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer, tokenizer_source
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe, of_held_out, of_source
from ndtrain.recipe.data import DataSection
from ndtrain.runs.messages import rank0_first, together
from ndtrain.runs.process import Runtime
from ndtrain.train.data_files import (
    cache_root,
    data_files,
    fetch_data,
    names_of,
    naming,
    path_of,
    token_files,
    with_format,
)
from ndtrain.train.encoding import encoder_of, template_of
from ndtrain.train.report import Reporter, Silent
from ndtrain.train.source import on_every_node


def open_tokenizer(recipe: Recipe, runtime: Runtime, vocabulary: int) -> tuple[ByteTokenizer | HubTokenizer, list[str]]:
    """Return the recipe's tokenizer, from one download a node, and notes. Collective.

    Raises `RecipeError` if a model of `vocabulary` tokens lacks one that every document has.
    """
    directory, notes = None, []
    if recipe.data.tokenizer != "bytes":
        key, name, revision = tokenizer_source(recipe)
        found = on_every_node(name, revision, lambda work: rank0_first(runtime, work), key=key)
        if found is not None:
            directory = str(snapshot_directory(name, found.commit))
            notes += [found.note] if found.note and name != recipe.model.name else []
        if recipe.model.trust_remote_code:  # its code is copied too, as the model's is
            rank0_first(runtime, lambda: load_tokenizer(recipe, directory))
    tokenizer = load_tokenizer(recipe, directory)
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None and token >= vocabulary:
            raise RecipeError(_lacking(recipe, tokenizer, token, vocabulary, "begins or ends every document"))
    if tokenizer.pad_id >= vocabulary:
        # Padding is no target and no token attends to it, so any token will do.
        notes.append(f"the model has no token {tokenizer.pad_id}, the tokenizer's padding; {tokenizer.eos_id} pads")
        tokenizer.pad_id = tokenizer.eos_id
    return tokenizer, notes


def _lacking(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, token: int, vocabulary: int, where: str) -> str:
    """Return the refusal of a token that the model does not embed, with what helps."""
    text = f' ("{tokenizer.text_of(token)}")' if isinstance(tokenizer, HubTokenizer) else ""
    wider = (
        f"set model.config.vocab_size = {tokenizer.vocab_size}"
        if recipe.model.init == "random"
        else f"enlarge the model first (transformers: model.resize_token_embeddings({tokenizer.vocab_size}), "
        "save_pretrained) and give that directory"
    )
    return (
        f"the model embeds tokens 0 to {vocabulary - 1}, but token {token}{text} of the tokenizer {where}; {wider}, or "
        "choose the model's own tokenizer"
    )


def open_batches(
    recipe: Recipe,
    runtime: Runtime,
    sizes: MeshSizes,
    tokenizer: ByteTokenizer | HubTokenizer,
    reporter: Reporter,
    *,
    vocabulary: int,
    inherits: DataSection | None = None,
) -> GlobalBatches:
    """Return this rank's share of the data, which one rank of each node prepares if it is not cached; collective.

    Raises `RecipeError` for data with a token that a model of `vocabulary` tokens lacks, and for names in data.columns
    that no row has, unless they are those of `inherits`.
    """
    opened: list[list[Samples]] = []
    reports: list[str] = []

    def build() -> None:
        reports.clear()
        found = []
        for number, part in enumerate(recipe.parts()):
            own = _OfSource(reporter, number) if recipe.data.sources else reporter
            with naming(recipe, number):
                samples, lines = open_source(
                    part, runtime, tokenizer, own, vocabulary=vocabulary, checks=_names_columns(part, recipe, inherits)
                )
            found.append(samples)
            reports.extend(own.named(line) if isinstance(own, _OfSource) else line for line in lines)
        opened.append(found)

    rank0_first(runtime, build)
    # The other ranks compute its keys from the files' digests, which are cached beside it.
    together(None if opened else build)
    for line in reports:
        reporter.info(line)
    samples, order = _joined(recipe, opened[0])
    if isinstance(samples, Mixed) and inherits is None:  # of [eval] all is read once
        reporter.info(samples.describe())
    return share_of(recipe, samples, order, runtime, sizes)


def share_of(
    recipe: Recipe,
    samples: Samples | Mixed | Windows,
    order: Order | MixedOrder | WindowOrder,
    runtime: Runtime,
    sizes: MeshSizes,
) -> GlobalBatches:
    """Return this rank's share of the samples."""
    return GlobalBatches(
        samples,
        order,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        batch_rank=sizes.coordinate(runtime.rank)["batch"],
        batch_ranks=sizes.batch,
    )


def open_source(
    recipe: Recipe,
    runtime: Runtime,
    tokenizer: ByteTokenizer | HubTokenizer,
    reporter: Reporter,
    *,
    vocabulary: int,
    checks: bool,
    files: Sequence[Path] | None = None,
    cache_dir: Path | None = None,
) -> tuple[Samples, list[str]]:
    """Return the samples of a [data] with a path, and lines about them; prepares what is not cached.

    `checks` says that names in data.columns which no row has are refused. Where `files` are given, of text or chat, the
    samples are of these alone, and such names are noted: other files may have them.
    """

    def note(line: str) -> None:
        reporter.info(f"note: {line}")

    progress, cache_dir = data_progress(recipe, runtime, reporter), cache_dir or _cache_dir()
    noted = files is not None
    if recipe.data.format == "tokens":
        corpus, notes = _prepared(recipe, tokenizer, note=note, progress=progress, vocabulary=vocabulary)
    else:
        files = data_files(recipe, note) if files is None else files
        corpus, notes = _tokenized(
            recipe, tokenizer, files, cache_dir=cache_dir, progress=progress, vocabulary=vocabulary
        )
    unused = [
        f'data.columns.{name} = "{recipe.data.columns[name]}"' for name in corpus.without_field(recipe.data.columns)
    ]
    if unused and checks:
        raise RecipeError(f"{unused[0]}: no row has such a field; correct the name or leave it out")
    if noted:
        notes = [*notes, *(f"{name}: no row of these files has such a field" for name in unused)]
    samples = open_samples(
        corpus,
        recipe.data.seq_len,
        packing=recipe.data.packing,
        too_long=recipe.data.too_long or "cut",
        pad_id=tokenizer.pad_id,
        folder=cache_dir,
        advance=runtime.watch.advance,
    )
    return samples, [*(f"note: {note}" for note in notes), samples.describe()]


def _joined(recipe: Recipe, found: Sequence[Samples]) -> tuple[Samples | Mixed, Order | MixedOrder]:
    """Return the samples of all sources of [data], and their order."""
    seed, data = recipe.train.seed, recipe.data
    if not data.sources:
        return found[0], Order(len(found[0]), seed=seed, shuffle=data.shuffle)
    labels, weights = [source.label for source in data.sources], [source.weight for source in data.sources]
    mixed = Mixed(dict(zip(labels, found, strict=True)), weights)
    return mixed, MixedOrder(mixed, seed=seed, shuffle=data.shuffle, stop=data.stop)


def _names_columns(part: Recipe, recipe: Recipe, inherits: DataSection | None) -> bool:
    """Return whether the names in data.columns of a source are its own, not those of another section."""
    around = recipe.data if recipe.data.sources else inherits
    return around is None or around.columns != part.data.columns


def open_held_out(
    recipe: Recipe,
    runtime: Runtime,
    sizes: MeshSizes,
    tokenizer: ByteTokenizer | HubTokenizer,
    reporter: Reporter,
    *,
    vocabulary: int,
) -> dict[str, GlobalBatches]:
    """Return this rank's share of the rows of [eval], those of each source in one global batch, in file order.

    The keys are the sources' labels, "" for a path. Collective. Raises what `open_batches` raises; messages name its
    keys as those of [eval].
    """
    assert recipe.eval is not None
    own, most = recipe.held_out(), recipe.eval.rows
    try:
        fetch_data(own, lambda work: rank0_first(runtime, work))
        own = with_format(own, inherits=recipe.data)
        batches = open_batches(
            own, runtime, sizes, tokenizer, _OfHeldOut(reporter), vocabulary=vocabulary, inherits=recipe.data
        )
    except NdtrainError as error:
        error.args = (of_held_out(str(error)),)
        raise
    samples = batches.samples
    assert not isinstance(samples, Windows)  # of held-out data, all of which is read

    def in_file_order(own: Samples) -> GlobalBatches:
        order, rows = Order(len(own), seed=0, shuffle=False), min(len(own), most or len(own))
        micro = recipe.train.micro_batch_size
        return replace(batches, samples=own, order=order, global_batch_size=rows, micro_batch_size=micro)

    sources = samples.sources if isinstance(samples, Mixed) else {"": samples}
    return {label: in_file_order(own) for label, own in sources.items()}


class _OfSource(Silent):
    """Reports what is done to the data of source `number` as such."""

    def __init__(self, reporter: Reporter, number: int):
        self._reporter, self._number = reporter, number

    def named(self, line: str) -> str:
        """Return the line, with the source's name if no key in it tells that."""
        moved = of_source(line, self._number)
        return moved if moved != line else f"data.sources[{self._number}]: {line}"

    def info(self, line: str) -> None:
        self._reporter.info(self.named(line))

    def progress(self, what: str, done: int, total: int, *, unit: str = "bytes") -> None:
        self._reporter.progress(f"{what} data.sources[{self._number}]", done, total, unit=unit)


class _OfHeldOut(Silent):
    """Reports what is done to held-out data as such."""

    def __init__(self, reporter: Reporter):
        self._reporter = reporter

    def info(self, line: str) -> None:
        line = of_held_out(line)
        self._reporter.info(line if line.startswith("note: ") else f"held-out {line}")

    def progress(self, what: str, done: int, total: int, *, unit: str = "bytes") -> None:
        self._reporter.progress(f"{what} held-out data", done, total, unit=unit)


def data_progress(recipe: Recipe, runtime: Runtime, reporter: Reporter) -> Callable[[int, int], None]:
    """Return what tells watch and user how many bytes of the data are done, of how many."""

    def progress(done: int, total: int) -> None:
        runtime.watch.advance()
        reporter.progress("reading tokens" if recipe.data.format == "tokens" else "tokenizing", done, total)

    return progress


def _tokenized(
    recipe: Recipe,
    tokenizer: ByteTokenizer | HubTokenizer,
    files: Sequence[Path],
    *,
    cache_dir: Path,
    progress: Progress,
    vocabulary: int,
) -> tuple[Corpus, list[str]]:
    """Return the tokens of text or chat in these files, and notes."""
    data, encoder = recipe.data, encoder_of(recipe, tokenizer)
    workers = recipe.data.workers or len(os.sched_getaffinity(0))
    contents = contents_of(files, encoder, cache_dir=cache_dir)
    corpus = build_cache(files, encoder, cache_dir=cache_dir, progress=progress, workers=workers, contents=contents)
    if tokenizer.vocab_size > vocabulary and corpus.largest_id >= vocabulary:
        where = f'is in data.path = "{recipe.data.path}"'
        raise RecipeError(_lacking(recipe, tokenizer, corpus.largest_id, vocabulary, where))
    chat = data.format == "chat"
    notes = cache_notes(corpus, contents, special_tokens="allow" if chat else data.special_tokens)
    return corpus, [*(template_of(recipe, tokenizer).notes() if chat else []), *notes]


def _prepared(
    recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, *, note: Note, progress: Progress, vocabulary: int
) -> tuple[Corpus, list[str]]:
    """Return prepared tokens, and notes."""
    reading = _reading(recipe, tokenizer)
    files = token_files(recipe, note)
    corpus = open_tokens(files, reading, cache_dir=_cache_dir(), progress=progress)
    check_ids(corpus, vocabulary)
    return corpus, list(token_notes(corpus, reading))


def _reading(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> Reading:
    eos, bos = tokenizer.eos_id, tokenizer.bos_id
    return Reading(
        eos=eos,
        bos=bos if bos != eos else None,
        pad=tokenizer.only_pads,
        documents=recipe.data.documents,
        dtype=np.dtype(recipe.data.token_dtype or ("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")),
        vocab_size=tokenizer.vocab_size,
    )


def encoder_key(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, shape: str) -> str:
    """Return the identity of what turns data of this format into tokens, as `data_contents` has it."""
    return _reading(recipe, tokenizer).key if shape == "tokens" else TextEncoder(tokenizer).key


def data_contents(
    recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, progress: Progress = None
) -> list[tuple[list[Path], Contents]]:
    """Return the files of each source and what identifies their tokens. Tokenizes nothing."""
    found = []
    for number, part in enumerate(recipe.parts()):
        with naming(recipe, number):
            found.append(_contents(part, tokenizer, progress))
    return found


def _contents(
    recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, progress: Progress
) -> tuple[list[Path], Contents]:
    if recipe.data.format == "tokens":
        reading, files = _reading(recipe, tokenizer), token_files(recipe)
        corpus = open_tokens(files, reading, cache_dir=_cache_dir(), progress=progress)
        groups = [Group(file.key, [file.file]) for file in corpus.files]
        return files, Contents(corpus.key, groups, reading.key, [file.key for file in corpus.files], [])
    files, encoder = data_files(recipe), encoder_of(recipe, tokenizer)
    if recipe.data.window:
        # Their bytes are not read before their window is: names and sizes have to do.
        sizes = [stamp_of(file)[0] for file in files]
        known = [f"{name} {size}" for name, size in zip(names_of(path_of(recipe.data), files), sizes, strict=True)]
        return files, Contents(key_of(["window", encoder.key, known]), [], TextEncoder(tokenizer).key, known, sizes)
    contents = contents_of(files, encoder, cache_dir=_cache_dir())
    return files, contents._replace(encoder=TextEncoder(tokenizer).key)


def _cache_dir() -> Path:
    return cache_root() / "data"
