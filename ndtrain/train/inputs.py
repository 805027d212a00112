"""Open the inputs of a run: its tokenizer and its batches."""

from __future__ import annotations

import os
from pathlib import Path

from ndtrain.data.batches import GlobalBatches
from ndtrain.data.cache import build_cache, contents_of, notes
from ndtrain.data.corpus import Corpus
from ndtrain.data.order import Order
from ndtrain.data.rows import find_shape
from ndtrain.data.samples import Samples
from ndtrain.data.text import TextEncoder
from ndtrain.errors import RecipeError
from ndtrain.hf.hub import snapshot_directory
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer, tokenizer_source
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import rank0_first, together
from ndtrain.runs.process import Runtime
from ndtrain.train.data_files import cache_root, data_files
from ndtrain.train.report import Reporter
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
) -> GlobalBatches:
    """Return this rank's share of the data, which one rank of each node tokenizes if it is not cached; collective.

    Raises `RecipeError` for text with a token that a model of `vocabulary` tokens lacks.
    """
    files: list[Path] = []
    corpora: list[Corpus] = []
    encoder = TextEncoder(tokenizer, recipe.data.columns)

    def build() -> None:
        files[:] = data_files(recipe, note=lambda line: reporter.info(f"note: {line}"))
        shape = find_shape(files, format=recipe.data.format, columns=recipe.data.columns)
        if shape != encoder.shape:
            raise RecipeError(
                f'data.path = "{recipe.data.path}": its first row is one of data.format = "{shape}", which is not '
                "available in this version; give rows of text"
            )

        def progress(done: int, total: int) -> None:
            runtime.watch.advance()
            reporter.progress("tokenizing", done, total)

        corpora.append(
            build_cache(
                files,
                encoder,
                cache_dir=cache_root() / "data",
                progress=progress,
                workers=recipe.data.workers or len(os.sched_getaffinity(0)),
            )
        )

    rank0_first(runtime, build)
    # The other ranks compute its keys from the files' digests, which are cached beside it.
    together(None if corpora else build)
    corpus = corpora[0]
    contents = contents_of(files, encoder, cache_dir=cache_root() / "data")
    for note in notes(corpus, contents, special_tokens=recipe.data.special_tokens):
        reporter.info(f"note: {note}")
    if tokenizer.vocab_size > vocabulary and corpus.largest_id >= vocabulary:
        where = f'is in data.path = "{recipe.data.path}"'
        raise RecipeError(_lacking(recipe, tokenizer, corpus.largest_id, vocabulary, where))
    samples = Samples(corpus, recipe.data.seq_len, packing=recipe.data.packing, pad_id=tokenizer.pad_id)
    return GlobalBatches(
        samples,
        Order(len(samples), seed=recipe.train.seed, shuffle=recipe.data.shuffle),
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        batch_rank=sizes.coordinate(runtime.rank)["batch"],
        batch_ranks=sizes.batch,
    )
