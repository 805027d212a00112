"""Trial of sequence parallelism: left out where it changes the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from ndtrain.engine.gradients import sum_over_tp
from ndtrain.errors import PlanError
from ndtrain.layout import local_part
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.reference import distance

if TYPE_CHECKING:
    from ndtrain.train.trainer import Trainer
from ndtrain.proof.noise import learn


def try_sequence_parallel(trainer: Trainer, sequence: SequenceParallel) -> None:
    """Do without sequence parallelism where it changes the logits or the gradients that the model has without."""
    model, low = trainer.model, trainer.plan.low_precision
    amounts, reason = [], ""
    model.train(not dropouts(model))
    with trainer.context.off() if trainer.context is not None else nullcontext():
        try:
            with sequence.off():
                logits = learn(trainer)
                sum_over_tp(model, trainer.tp_summed(), trainer.meshes.tp.get_group())
            before = {n: local_part(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=True)
            amounts.append(distance(learn(trainer), logits))
            sum_over_tp(model, trainer.tp_summed(), trainer.meshes.tp.get_group())
            floor = (5e-2 if low else 1e-3) * max(float(g.float().norm()) for g in before.values())
            for n, p in model.named_parameters():
                if n in before:
                    ours = torch.zeros_like(before[n]) if p.grad is None else local_part(p.grad)
                    amounts.append(distance(ours, before[n], floor).to(trainer.runtime.device))
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
            amounts = [torch.full((), torch.inf, device=trainer.runtime.device)]
            if not hasattr(model, "reset_iter_state"):  # torch < 2.13
                what = f"{trainer.plan.model_type} does not run with sequence parallelism ({reason})"
                raise PlanError(f"{what}; set tp.sequence_parallel = false") from error
            cast(Any, model).reset_iter_state()
    model.zero_grad(set_to_none=True)
    model.train()
    worst = torch.stack(amounts).nan_to_num(torch.inf).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not float(worst) < (0.2 if low else 1e-2):
        sequence.enabled = False
        trainer.reporter.info(
            f"note: no sequence parallelism: {trainer.plan.model_type} "
            + (f"does not run with it ({reason})" if reason else f"does other things with it (by {float(worst):.0e})")
        )
