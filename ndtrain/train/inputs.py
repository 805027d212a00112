"""Open the inputs of a run: its tokenizer and its batches."""

from __future__ import annotations

import os
from pathlib import Path

from ndtrain.data.batches import GlobalBatches
from ndtrain.data.cache import TokenCache, build_cache
from ndtrain.data.files import find_files
from ndtrain.data.order import Order
from ndtrain.data.samples import Samples
from ndtrain.errors import RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import rank0_first, together
from ndtrain.runs.process import Runtime
from ndtrain.train.report import Reporter


def open_tokenizer(recipe: Recipe, vocabulary: int) -> ByteTokenizer | HubTokenizer:
    """Return the recipe's tokenizer. Raises `RecipeError` if it has more tokens than the model's `vocabulary`."""
    tokenizer = load_tokenizer(recipe)
    if tokenizer.vocab_size > vocabulary:
        raise RecipeError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, but the model only {vocabulary}; "
            f"set model.config.vocab_size = {tokenizer.vocab_size} or choose the model's tokenizer"
        )
    return tokenizer


def open_batches(
    recipe: Recipe,
    runtime: Runtime,
    sizes: MeshSizes,
    tokenizer: ByteTokenizer | HubTokenizer,
    reporter: Reporter,
) -> GlobalBatches:
    """Return this rank's share of the data, which one rank of each node tokenizes if it is not cached; collective."""
    directories: list[Path] = []

    def build() -> None:
        files = find_files(recipe.data.path)

        def progress(done: int, total: int) -> None:
            runtime.watch.advance()
            reporter.progress("tokenizing", done, total)

        directories.append(build_cache(files, tokenizer, cache_dir=cache_root() / "data", progress=progress))

    rank0_first(runtime, build)
    # The other ranks compute its key from the files' digests, which are cached beside it.
    caches: list[TokenCache] = []

    def open_cache() -> None:
        if not directories:
            build()
        caches.append(TokenCache.open(directories[0]))

    together(open_cache)
    samples = Samples(caches[0], recipe.data.seq_len, packing=recipe.data.packing, pad_id=tokenizer.pad_id)
    return GlobalBatches(
        samples,
        Order(len(samples), seed=recipe.train.seed, shuffle=recipe.data.shuffle),
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        batch_rank=sizes.coordinate(runtime.rank)["batch"],
        batch_ranks=sizes.batch,
    )


def cache_root() -> Path:
    """Return the directory of the token caches: $NDTRAIN_CACHE, or `ndtrain` in the user's cache directory."""
    if given := os.environ.get("NDTRAIN_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndtrain"
