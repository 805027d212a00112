"""What a run reads: its tokenizer and its batches."""

from __future__ import annotations

import os
from collections.abc import Callable
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


def open_tokenizer(recipe: Recipe, known: int) -> ByteTokenizer | HubTokenizer:
    """The recipe's tokenizer. Raises `RecipeError` where it has more tokens than the `known` of the model."""
    tokenizer = load_tokenizer(recipe)
    if tokenizer.vocab_size > known:
        raise RecipeError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, but the model only {known}; "
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
    """This rank's share of the data, tokenized by the first rank of a node where that was not done yet; collective."""
    where: list[Path] = []

    def build() -> None:
        files = find_files(recipe.data.path)
        progress: Callable[[int, int], None] | None = None
        if runtime.is_main:
            progress = lambda done, total: reporter.progress("tokenizing", done, total)  # noqa: E731
        where.append(build_cache(files, tokenizer, cache_dir=cache_root() / "data", progress=progress))

    rank0_first(runtime, build)
    # The other ranks find the cache by its key; the digests of the files are remembered beside it.
    caches: list[TokenCache] = []

    def open_cache() -> None:
        if not where:
            build()
        caches.append(TokenCache.open(where[0]))

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
    """Directory of the token caches: $NDTRAIN_CACHE, or ndtrain under the user's cache directory."""
    if given := os.environ.get("NDTRAIN_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ndtrain"
