"""Tokenize, pack, mask and order text into global batches that are the same on every mesh.

files -> Corpus (tokens on disk, memory-mapped) -> Samples (rows of fixed length) -> Order (the endless stream of
sample ids) -> GlobalBatches (the rows of one batch rank). Several sources become one by Mixed and MixedOrder; of a
corpus in windows, Windows has the samples of one or two. Progress in the data is one number, the cursor: how many
samples the whole run has consumed. It does not depend on ranks, so it stays valid on another mesh.
"""

from ndtrain.data.batches import GlobalBatches, labels_count, micro_batches
from ndtrain.data.cache import build_cache, contents_of
from ndtrain.data.corpus import Corpus
from ndtrain.data.files import find_files
from ndtrain.data.mixture import Mixed, MixedOrder
from ndtrain.data.order import Order
from ndtrain.data.samples import IGNORE, Samples, open_samples
from ndtrain.data.text import TextEncoder, Tokenizer
from ndtrain.data.windows import WindowOrder, Windows

__all__ = [
    "IGNORE",
    "Corpus",
    "GlobalBatches",
    "Mixed",
    "MixedOrder",
    "Order",
    "Samples",
    "TextEncoder",
    "Tokenizer",
    "WindowOrder",
    "Windows",
    "build_cache",
    "contents_of",
    "find_files",
    "labels_count",
    "micro_batches",
    "open_samples",
]
