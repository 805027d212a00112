"""Try sequence parallelism, and switch it off if it changes the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist

from ndtrain.engine import Engine
from ndtrain.engine.gradients import sum_over_tp
from ndtrain.errors import PlanError, of_the_machine
from ndtrain.layout import local_part
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import learn
from ndtrain.proof.reference import distance


def try_sequence_parallel(engine: Engine, sequence: SequenceParallel) -> str | None:
    """Switch sequence parallelism off if it changes the model's logits or gradients, or fails. Collective.

    Returns a note that says why, or None if it is kept.
    """
    model, low = engine.model, engine.plan.low_precision
    differences, reason = [], ""
    model.train(not dropouts(model))
    with engine.context.off() if engine.context is not None else nullcontext():
        try:
            with sequence.off():
                logits = learn(engine)
                sum_over_tp(model, engine.tp_summed(), engine.meshes.tp.get_group())
            before = {n: local_part(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=True)
            differences.append(distance(learn(engine), logits))
            sum_over_tp(model, engine.tp_summed(), engine.meshes.tp.get_group())
            floor = (5e-2 if low else 1e-3) * max(float(g.float().norm()) for g in before.values())
            for n, p in model.named_parameters():
                if n in before:
                    ours = torch.zeros_like(before[n]) if p.grad is None else local_part(p.grad)
                    differences.append(distance(ours, before[n], floor).to(engine.device))
        except Exception as error:
            if of_the_machine(error):
                raise
            reason = " ".join(str(error).split())[:150]
            differences = [torch.full((), torch.inf, device=engine.device)]
            if not hasattr(model, "reset_iter_state"):  # torch < 2.13
                failure = f"{engine.plan.model_type} does not run with sequence parallelism ({reason})"
                raise PlanError(f"{failure}; set tp.sequence_parallel = false") from error
            cast(Any, model).reset_iter_state()
    model.zero_grad(set_to_none=True)
    model.train()
    worst = torch.stack(differences).nan_to_num(torch.inf).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not float(worst) < (0.2 if low else 1e-2):
        sequence.enabled = False
        name = engine.plan.model_type
        if reason:
            return f"no sequence parallelism: {name} does not run with it ({reason})"
        difference = f"relative difference {float(worst):.0e}"
        return f"no sequence parallelism: {name}'s logits or gradients change with it ({difference})"
    return None
