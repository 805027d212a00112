"""Trial of sequence parallelism: left out where it changes the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist

from ndtrain.engine import Engine
from ndtrain.engine.gradients import sum_over_tp
from ndtrain.errors import PlanError
from ndtrain.layout import local_part
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import learn
from ndtrain.proof.reference import distance


def try_sequence_parallel(engine: Engine, sequence: SequenceParallel) -> str | None:
    """Do without sequence parallelism where it changes the logits or the gradients that the model has without.

    Returns why, in words, or None where it is kept.
    """
    model, low = engine.model, engine.plan.low_precision
    amounts, reason = [], ""
    model.train(not dropouts(model))
    with engine.context.off() if engine.context is not None else nullcontext():
        try:
            with sequence.off():
                logits = learn(engine)
                sum_over_tp(model, engine.tp_summed(), engine.meshes.tp.get_group())
            before = {n: local_part(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=True)
            amounts.append(distance(learn(engine), logits))
            sum_over_tp(model, engine.tp_summed(), engine.meshes.tp.get_group())
            floor = (5e-2 if low else 1e-3) * max(float(g.float().norm()) for g in before.values())
            for n, p in model.named_parameters():
                if n in before:
                    ours = torch.zeros_like(before[n]) if p.grad is None else local_part(p.grad)
                    amounts.append(distance(ours, before[n], floor).to(engine.device))
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
            amounts = [torch.full((), torch.inf, device=engine.device)]
            if not hasattr(model, "reset_iter_state"):  # torch < 2.13
                what = f"{engine.plan.model_type} does not run with sequence parallelism ({reason})"
                raise PlanError(f"{what}; set tp.sequence_parallel = false") from error
            cast(Any, model).reset_iter_state()
    model.zero_grad(set_to_none=True)
    model.train()
    worst = torch.stack(amounts).nan_to_num(torch.inf).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not float(worst) < (0.2 if low else 1e-2):
        sequence.enabled = False
        how = (
            f"does not run with it ({reason})" if reason else f"computes something else with it (by {float(worst):.0e})"
        )
        return f"no sequence parallelism: {engine.plan.model_type} {how}"
    return None
