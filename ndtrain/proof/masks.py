"""Proof of masks and of context parallelism: what each token's logits depend on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ndtrain.data import micro_batches
from ndtrain.engine import Engine
from ndtrain.errors import PlanError
from ndtrain.proof.noise import does_not_run, probe, tokens


def check_masks(engine: Engine) -> bool:
    """Raise `PlanError` if logits depend on later tokens, or on the document packed before theirs.

    Returns False if these weights give no finite logits, so that nothing can be said.

    The plan has read the model's source; this asks the model itself, on two rows of one shape that differ only
    where it must not matter. The logits are then equal to the bit, but for experts: the shapes of their products
    depend on the routing.
    """
    half = max(1, min(16, engine.recipe.data.seq_len // 2))
    device, packed = engine.device, engine.recipe.data.packing
    row = tokens(engine, 2 * half)
    other = tokens(engine, 4 * half)[2 * half :]
    # Attention kernels for one row and for several can differ.
    train = engine.recipe.train
    rows, _ = micro_batches(train.global_batch_size, engine.sizes.batch, train.micro_batch_size)
    more = [row] if rows > 1 else []
    positions = torch.arange(half, device=device).repeat(2) if packed else torch.arange(2 * half, device=device)
    try:
        plain = probe(engine, [row, *more], positions)
    except (RuntimeError, AssertionError, IndexError) as error:
        if engine.sizes.cp == engine.sizes.tp == 1 and engine.recipe.fsdp.mode == "auto":
            raise
        raise does_not_run(engine, error) from error
    later = probe(engine, [torch.cat([row[:half], other[half:]]), *more], positions)
    zero = plain.new_zeros(())
    moved = [(plain[0, :half] - later[0, :half]).abs().max(), zero, zero]
    if packed:
        before = probe(engine, [torch.cat([other[:half], row[half:]]), *(other for _ in more)], positions)
        moved[1] = (plain[0, half:] - before[0, half:]).abs().max()
    if engine.context is not None:
        with engine.context.off():
            moved[2] = (plain - probe(engine, [row, *more], positions)).abs().max()
    leaks = torch.stack([*moved, zero]) / plain.abs().max()
    leaks[-1] = float(not leaks.isfinite().all())
    # One decision for all ranks, so that none goes on alone.
    dist.all_reduce(leaks, op=dist.ReduceOp.MAX)
    if leaks[-1]:
        return False
    routed = any("experts" in p.fqn for p in engine.plan.params) and engine.plan.low_precision
    limit = 2e-2 if routed else 1e-4
    what = engine.plan.model_type
    if not float(leaks[0]) < limit:
        raise PlanError(
            f"{what}: tokens see later tokens (logits move by {float(leaks[0]):.1e}); "
            "set model.config.is_decoder = true if it has that key, or choose a causal model"
        )
    if not float(leaks[1]) < limit:
        raise PlanError(
            f"{what}: packed documents see each other (logits move by {float(leaks[1]):.1e}); set data.packing = false"
        )
    if not float(leaks[2]) < (5e-2 if engine.plan.low_precision else 1e-3):
        raise PlanError(
            f"{what} under mesh.cp = {engine.sizes.cp} differs from the whole sequence (logits by "
            f"{float(leaks[2]):.1e}): it mixes tokens outside its attention, or counts positions its own way; "
            "set mesh.cp = 1"
        )
    return True
