"""What a run proves of its model before it pays: asked of the model itself, not read from its source."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from ndtrain.errors import NdtrainError, PlanError
from ndtrain.mesh import Meshes

if TYPE_CHECKING:
    from ndtrain.train.trainer import Trainer


def check_masks(trainer: Trainer) -> bool:
    """Raise `PlanError` if logits depend on later tokens, or on the document packed before theirs.

    Returns False if these weights give no finite logits, so that nothing can be said.

    The plan has read the model's source; this asks the model itself, on two rows of one shape that differ only
    where it must not matter. The logits are then equal to the bit, but for experts: the shapes of their products
    depend on the routing.
    """
    half = max(1, min(16, trainer.recipe.data.seq_len // 2))
    device, packed = trainer.runtime.device, trainer.recipe.data.packing
    some = min(97, trainer.vocab_size)
    row = torch.arange(2 * half, device=device) % some
    other = (row + some // 2) % some
    # Attention kernels for one row and for several can differ.
    more = [row] if trainer.batches.micro_batch_size > 1 else []
    positions = torch.arange(half, device=device).repeat(2) if packed else torch.arange(2 * half, device=device)
    plain = _probe(trainer, [row, *more], positions)
    later = _probe(trainer, [torch.cat([row[:half], other[half:]]), *more], positions)
    zero = plain.new_zeros(())
    moved = [(plain[0, :half] - later[0, :half]).abs().max(), zero, zero]
    if packed:
        before = _probe(trainer, [torch.cat([other[:half], row[half:]]), *(other for _ in more)], positions)
        moved[1] = (plain[0, half:] - before[0, half:]).abs().max()
    if trainer.context is not None:
        with trainer.context.off():
            moved[2] = (plain - _probe(trainer, [row, *more], positions)).abs().max()
    leaks = torch.stack([*moved, zero]) / plain.abs().max()
    leaks[-1] = float(not leaks.isfinite().all())
    # One decision for all ranks, so that none goes on alone.
    dist.all_reduce(leaks, op=dist.ReduceOp.MAX)
    if leaks[-1]:
        return False
    routed = any("experts" in p.fqn for p in trainer.plan.params) and trainer.recipe.fsdp.param_dtype != "float32"
    limit = 2e-2 if routed else 1e-4
    what = trainer.plan.model_type
    if not float(leaks[0]) < limit:
        raise PlanError(
            f"{what}: tokens see later tokens (logits move by {float(leaks[0]):.1e}); "
            "set model.config.is_decoder = true if it has that key, or choose a causal model"
        )
    if not float(leaks[1]) < limit:
        raise PlanError(
            f"{what}: packed documents see each other (logits move by {float(leaks[1]):.1e}); set data.packing = false"
        )
    if not float(leaks[2]) < (1e-3 if trainer.recipe.fsdp.param_dtype == "float32" else 5e-2):
        raise PlanError(
            f"{what} under mesh.cp = {trainer.sizes.cp} differs from the whole sequence (logits by "
            f"{float(leaks[2]):.1e}): it mixes tokens outside its attention; set mesh.cp = 1"
        )
    return True


def _probe(trainer: Trainer, rows: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[B, S, V]` of rows `[S]`, with the same dropout every time."""
    torch.manual_seed(0)
    ids = torch.stack(rows)
    batch = trainer.shape({"input_ids": ids, "labels": ids, "position_ids": positions.expand_as(ids)})
    inputs = {"input_ids": batch["input_ids"]}
    if trainer.recipe.data.packing or trainer.context is not None:
        inputs["position_ids"] = batch["position_ids"]
    with torch.no_grad():
        logits = trainer.model(**inputs, use_cache=False).logits.float()
    if trainer.context is not None and trainer.context.enabled:
        logits = trainer.context.gather(logits)
    # One row of all rows where they were joined, and what was padded at its end
    joined = logits.shape[0] < len(rows)
    logits = logits[:, : ids.numel()].view(*ids.shape, -1) if joined else logits[:, : ids.shape[1]]
    # Units that stay gathered for the backward pass would stay so: there is none.
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return logits


def check_same_batch(batch: dict[str, torch.Tensor], meshes: Meshes) -> None:
    """Raise if the tp ranks of a batch rank read different samples: nothing else would show it but the gradient."""
    digest = hashlib.blake2b(batch["input_ids"].cpu().numpy().tobytes(), digest_size=7).digest()
    mine = torch.tensor(int.from_bytes(digest, "big"), dtype=torch.int64, device=batch["input_ids"].device)
    low, high = mine.clone(), mine.clone()
    for group in (meshes.tp.get_group(), meshes.dense["cp"].get_group()):
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise NdtrainError("ranks of one tp or cp group read different samples; this is a bug of ndtrain")
