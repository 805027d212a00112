"""Order the samples in an endless stream of ids, without holding any of it in memory."""

import hashlib

import numpy as np
import numpy.typing as npt

from ndtrain.data.row import IntArray
from ndtrain.errors import RecipeError

_ROUNDS = 10


class Order:
    """The endless stream of sample ids: epoch after epoch, each with its own permutation.

    The permutation is a cipher of the ids, keyed by seed and epoch. Any part of it is computed alone, and from integers
    alone, so that it is the same in every version of numpy and on every machine.
    """

    def __init__(self, n_samples: int, *, seed: int, shuffle: bool) -> None:
        if seed < 0:
            raise RecipeError(f"the seed must not be negative, but is {seed}")
        self.n_samples, self.seed, self.shuffle = n_samples, seed, shuffle

    @property
    def fingerprint(self) -> str:
        """Text that identifies the order of a number of samples."""
        # Before the cipher there was another order, whose fingerprint had no version.
        return f"seed={self.seed} shuffle={self.shuffle}" + (" order=2" if self.shuffle else "")

    def sample_ids(self, cursor: int, count: int) -> IntArray:
        """Return the ids `[count]` of the stream from `cursor` to cursor + count - 1."""
        parts: list[IntArray] = [np.empty(0, np.int64)]
        while count > 0:
            epoch, start = divmod(cursor, self.n_samples)
            take = min(count, self.n_samples - start)
            parts.append(self._ids(epoch, start, take))
            cursor, count = cursor + take, count - take
        return np.concatenate(parts)

    def end(self, epochs: int) -> int:
        """Return the cursor at which so many epochs end."""
        return epochs * self.n_samples

    def epoch(self, cursor: int) -> float:
        """Return how many epochs have passed at the cursor: 1.5 is the middle of the second."""
        return cursor / self.n_samples

    def _ids(self, epoch: int, start: int, count: int) -> IntArray:
        if not self.shuffle:
            return np.arange(start, start + count, dtype=np.int64)
        return permuted(np.arange(start, start + count, dtype=np.uint64), self.n_samples, key=f"{self.seed} {epoch}")


def permuted(places: npt.NDArray[np.uint64], n: int, *, key: str) -> IntArray:
    """Return the numbers below `n` at `places` of the permutation of all of them that `key` selects.

    Each round multiplies by an odd number, adds, and xors the high half of the bits to the low half, all modulo the
    next power of two, which can be undone and so permutes; a result of `n` or more is ciphered again until it is
    below (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = max(1, (n - 1).bit_length())
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    drawn = np.frombuffer(hashlib.shake_256(key.encode()).digest(16 * _ROUNDS), "<u8").astype(np.uint64)
    factors, terms = drawn[:_ROUNDS] | np.uint64(1), drawn[_ROUNDS:]

    def cipher(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        for factor, term in zip(factors, terms, strict=True):
            x = (x * factor + term) & mask  # wraps modulo 2^64, a multiple of the power of two
            x ^= x >> half
        return x

    found = cipher(places)
    while len(outside := np.flatnonzero(found >= n)):
        found[outside] = cipher(found[outside])
    return found.astype(np.int64)
