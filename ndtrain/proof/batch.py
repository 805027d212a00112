"""Check that the ranks of one batch rank read the same samples."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from ndtrain.errors import NdtrainError
from ndtrain.mesh import Meshes


def check_same_batch(batch: dict[str, torch.Tensor], meshes: Meshes) -> None:
    """Raise `NdtrainError` if tp or cp ranks of a batch rank read different samples, which no other check shows."""
    digest = hashlib.blake2b(batch["input_ids"].cpu().numpy().tobytes(), digest_size=7).digest()
    mine = torch.tensor(int.from_bytes(digest, "big"), dtype=torch.int64, device=batch["input_ids"].device)
    low, high = mine.clone(), mine.clone()
    for group in (meshes.tp.get_group(), meshes.dense["cp"].get_group()):
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise NdtrainError(
            "the ranks of one tp or cp group read different samples; this is a bug in ndtrain, please report it"
        )
