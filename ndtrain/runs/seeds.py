"""Derive random seeds from what they are used for."""

from __future__ import annotations

import hashlib


def random_seed(*parts: object) -> int:
    """Return a seed in [0, 2^63) that depends on `parts` alone, the same in every process."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
