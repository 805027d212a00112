"""Check that a model computes in eval mode, in which its held-out loss is measured, what it computes in training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ndtrain.engine import Engine
from ndtrain.errors import PlanError
from ndtrain.layout import local_part
from ndtrain.parallel.fsdp import end_of_forward
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import forward, row_length, tokens
from ndtrain.torch_compat import foreach_norm

LIMIT = 1e-3


def check_eval_mode(engine: Engine) -> None:
    """Raise `PlanError` if the model changes its weights in eval mode, or if its logits differ from those in training.

    The other checks run a model without dropout as in training, so eval mode has to give the same. One with dropout
    they run in eval mode, so there is nothing to compare. Collective.
    """
    model, length = engine.model, row_length(engine)
    row, positions = tokens(engine, length)[None], torch.arange(length, device=engine.device)
    weights = [local for p in model.parameters() if (local := local_part(p)).numel()]
    model.train(not dropouts(model))
    with torch.no_grad():
        before, trained = foreach_norm(weights, 2.0), forward(engine, row, positions).float()
        end_of_forward(model)
        model.train()
        with engine.evaluating():
            logits = forward(engine, row, positions).float()
        changed = any(not torch.equal(a, b) for a, b in zip(before, foreach_norm(weights, 2.0), strict=True))
    difference = (logits - trained).abs().max() / trained.abs().max()
    found = torch.stack([difference, torch.full_like(difference, float(changed))])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    name = engine.plan.model_type
    if found[1]:
        raise PlanError(f"{name} changes its weights in eval mode, which a run must not; leave out [eval]")
    if not float(found[0]) < LIMIT:
        raise PlanError(
            f"{name} computes something else in eval mode than in training, though its config has no dropout (relative "
            f"difference of logits {float(found[0]):.1e}), so its held-out loss would not be checked; leave out [eval]"
        )
