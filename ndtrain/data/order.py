"""The endless stream of sample ids."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ndtrain.data.cache import IntArray
from ndtrain.errors import RecipeError


class Order:
    """The endless stream of sample ids: epoch after epoch, each a permutation of its own.

    The permutation sorts raw PCG64 output: numpy keeps that the same in every version, which it does not
    promise of Generator.permutation, and a resumed run must go on in the same order.
    """

    def __init__(self, n_samples: int, *, seed: int, shuffle: bool) -> None:
        if seed < 0:
            raise RecipeError(f"the seed must not be negative, it is {seed}")
        self.n_samples, self.seed, self.shuffle = n_samples, seed, shuffle
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> npt.NDArray[Any]:
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.n_samples)
        return np.argsort(raw, kind="stable").astype(np.uint32 if self.n_samples <= 1 << 32 else np.uint64)

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """The ids [count] at places cursor .. cursor + count - 1 of the stream."""
        parts: list[IntArray] = [np.empty(0, np.int64)]
        while count > 0:
            epoch, place = divmod(cursor, self.n_samples)
            take = min(count, self.n_samples - place)
            ids = self._permutation(epoch)[place : place + take] if self.shuffle else range(place, place + take)
            parts.append(np.asarray(ids, dtype=np.int64))
            cursor, count = cursor + take, count - take
        return np.concatenate(parts)
