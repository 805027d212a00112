"""Order the samples in an endless stream of ids."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import IntArray
from ndtrain.errors import RecipeError


class Order:
    """The endless stream of sample ids: epoch after epoch, each with its own permutation.

    The permutation sorts raw PCG64 output, which numpy keeps the same in every version. It does not promise that of
    Generator.permutation, and a resumed run must continue in the same order.
    """

    def __init__(self, n_samples: int, *, seed: int, shuffle: bool) -> None:
        if seed < 0:
            raise RecipeError(f"the seed must not be negative, but is {seed}")
        self.n_samples, self.seed, self.shuffle = n_samples, seed, shuffle
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> npt.NDArray[Any]:
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.n_samples)
        return np.argsort(raw, kind="stable").astype(np.uint32 if self.n_samples <= 1 << 32 else np.uint64)

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """Return the ids `[count]` of the stream from `cursor` to cursor + count - 1."""
        parts: list[IntArray] = [np.empty(0, np.int64)]
        while count > 0:
            epoch, start = divmod(cursor, self.n_samples)
            take = min(count, self.n_samples - start)
            ids = self._permutation(epoch)[start : start + take] if self.shuffle else range(start, start + take)
            parts.append(np.asarray(ids, dtype=np.int64))
            cursor, count = cursor + take, count - take
        return np.concatenate(parts)
