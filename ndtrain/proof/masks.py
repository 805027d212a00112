"""Check masks and context parallelism: which tokens each token's logits depend on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ndtrain.data import micro_batches
from ndtrain.engine import Engine
from ndtrain.errors import PlanError, one_line
from ndtrain.parallel import AttentionByDocuments
from ndtrain.parallel.documents import under_masks
from ndtrain.proof.noise import models_own_errors, probe, tokens


def try_by_documents(engine: Engine, documents: AttentionByDocuments, *, low: bool) -> str | None:
    """Switch attention by documents off where packed documents get other logits than alone; return a note.

    Collective. Alone they attend as the model does by itself. Whether its masks keep documents apart is left to
    `check_masks`. If `low`, only the kernels are compared, since rounding can send tokens to other experts.
    """
    half = max(1, min(16, engine.recipe.data.seq_len // 2))
    row, positions = tokens(engine, 2 * half), torch.arange(half, device=engine.device)
    different, reason = 0.0, "by documents this model would compute something else"
    try:
        # Kernels are proved in what the run computes in.
        with models_own_errors(engine, low=low), documents.proving(low == engine.plan.low_precision):
            packed = probe(engine, [row], positions.repeat(2)).view(2, half, -1)
        if not low:
            with models_own_errors(engine), documents.off():
                alone = probe(engine, [row[:half], row[half:]], positions)
            different = float((packed - alone).abs().max() / alone.abs().max())
    except PlanError as error:  # which `check_masks` meets too, if it is not for this
        different, reason = 1.0, one_line(error)
    # All ranks decide alike. Weights without finite logits show nothing.
    largest = torch.tensor(different if different == different else 0.0, device=engine.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    documents.enabled = float(largest) < 1e-3
    if not documents.enabled:
        return f"attention works under masks, since {reason}"
    return f"packed documents attend by {' and '.join(sorted(documents.kernels))}" if documents.kernels else None


def why_masks(engine: Engine) -> str | None:
    """Return a note where packed documents attend under masks, though the recipe leaves it open."""
    is_open = engine.recipe.model.attn == "auto" and engine.recipe.data.packing and engine.plan.cp != "ring"
    if engine.documents is not None or not is_open:
        return None
    reason = under_masks(engine.model, engine.plan, engine.recipe, kernels_of=engine.kernels_of)
    return f"attention works under masks: {reason}"


def check_masks(engine: Engine, *, low: bool) -> bool:
    """Raise `PlanError` if logits depend on later tokens or on a document packed before theirs, or differ under cp.

    Returns False if these weights give no finite logits, so that nothing can be checked. Collective.

    The plan was made from the model's source; this runs the model, on two rows of one shape that differ only where it
    must not matter. Their logits are then equal to the bit, except with experts: the shapes of their matrix products
    depend on the routing. `low` says that the engine computes in less than float32.
    """
    half = max(1, min(16, engine.recipe.data.seq_len // 2))
    device, packed = engine.device, engine.recipe.data.packing
    row = tokens(engine, 2 * half)
    other = tokens(engine, 4 * half)[2 * half :]
    # Attention may use other kernels for several rows than for one.
    train = engine.recipe.train
    rows, _ = micro_batches(train.global_batch_size, engine.sizes.batch, train.micro_batch_size)
    more = [row] if rows > 1 else []
    positions = torch.arange(half, device=device).repeat(2) if packed else torch.arange(2 * half, device=device)
    with models_own_errors(engine, low=low):
        plain = probe(engine, [row, *more], positions)
    later = probe(engine, [torch.cat([row[:half], other[half:]]), *more], positions)
    zero = plain.new_zeros(())
    changes = [(plain[0, :half] - later[0, :half]).abs().max(), zero, zero]
    if packed:
        before = probe(engine, [torch.cat([other[:half], row[half:]]), *(other for _ in more)], positions)
        changes[1] = (plain[0, half:] - before[0, half:]).abs().max()
    if engine.context is not None:
        with engine.context.off():
            changes[2] = (plain - probe(engine, [row, *more], positions)).abs().max()
    relative = torch.stack([*changes, zero]) / plain.abs().max()
    relative[-1] = float(not relative.isfinite().all())
    # All ranks must decide alike, so that none continues alone.
    dist.all_reduce(relative, op=dist.ReduceOp.MAX)
    if relative[-1]:
        return False
    limit = 2e-2 if low and any("experts" in p.fqn for p in engine.plan.params) else 1e-4
    name = engine.plan.model_type
    if not float(relative[0]) < limit:
        raise PlanError(
            f"{name}: tokens see later tokens (relative change of logits {float(relative[0]):.1e}); "
            "set model.config.is_decoder = true if it has that key, or choose a causal model"
        )
    if not float(relative[1]) < limit:
        raise PlanError(
            f"{name}: packed documents see each other (relative change of logits {float(relative[1]):.1e}); set "
            "data.packing = false"
        )
    if not float(relative[2]) < (5e-2 if low else 1e-3):
        raise PlanError(
            f"{name} under mesh.cp = {engine.sizes.cp} differs from the whole sequence (relative difference of logits "
            f"{float(relative[2]):.1e}): it mixes tokens outside its attention, or computes its own positions; set "
            "mesh.cp = 1"
        )
    return True
