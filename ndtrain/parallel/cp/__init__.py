"""Context parallelism: every rank of the cp axis works on its own part of each sequence.

Around the model's own attention function either heads are traded for sequence (`ulysses`), or keys and values travel
round the ranks (`ring`). Everything else in a causal LM works token by token and needs no communication; `Trainer`
proves that for the model at hand before its weights are read.
"""

from ndtrain.parallel.cp.interface import ContextParallel
from ndtrain.parallel.cp.ring import Ring
from ndtrain.parallel.cp.ulysses import Ulysses

KINDS: dict[str, type[ContextParallel]] = {"ulysses": Ulysses, "ring": Ring}

__all__ = ["KINDS", "ContextParallel", "Ring", "Ulysses"]
