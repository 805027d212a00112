"""Optimizer state in bfloat16: computed in float32, and rounded up or down at random, so that means are kept.

Rounded to nearest, an average that moves by less than 1/256 of itself a step would stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from ndtrain.layout import held_boxes


class Rounding:
    """Stores float32 values in tensors of less; the same for the same parameter, part and update on every rank."""

    def __init__(self, seed: int) -> None:
        self.update = 0  # the number of the update that is computed
        self._seed = seed
        self._parts: dict[Tensor, int] = {}

    def name(self, fqn: str, param: Tensor) -> None:
        """Make the part of `param` that this rank holds known; replicas hold the same."""
        at = [box.offsets for box in held_boxes(param)]
        self._parts[param] = int.from_bytes(blake2b(f"{self._seed} {fqn} {at}".encode(), digest_size=7).digest())

    def store(self, param: Tensor, into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Store `values` in the state `into` of `param`, both this rank's parts."""
        for number, (kept, value) in enumerate(zip(into, values, strict=True)):
            if kept.dtype == value.dtype:
                kept.copy_(value)
                continue
            generator = torch.Generator(value.device).manual_seed(
                (self._parts[param] + 2 * self.update + number) % (1 << 63)
            )
            # A float32 is a bfloat16 and 16 more bits: what they are carries with the chance that they stand for.
            noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
            rounded = ((value.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
            kept.copy_(torch.where(value.isfinite(), rounded, value))
