"""Compare sequences that are split, over the ranks of tp or of cp, with whole ones: equal logits and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.engine import Engine
from ndtrain.engine.gradients import sum_over_tp
from ndtrain.errors import PlanError, of_the_machine, one_line
from ndtrain.layout import local_part
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import learn, models_own_errors
from ndtrain.proof.reference import distance


class Limits(NamedTuple):
    """The largest relative difference, and the share of the largest gradient that is rounding."""

    difference: float
    rounding: float


FLOAT32, LOW = Limits(1e-2, 1e-3), Limits(0.2, 5e-2)


def try_sequence_parallel(engine: Engine, sequence: SequenceParallel, limits: Limits) -> str | None:
    """Switch sequence parallelism off if it changes the model's logits or gradients, or fails. Collective.

    Returns a note that says why, or None if it is kept.
    """
    model, name, reason = engine.model, engine.plan.model_type, ""
    with engine.context.off() if engine.context is not None else nullcontext():
        try:
            worst = _largest(engine, sequence.off(), copies=1, limits=limits)
        except Exception as error:
            if of_the_machine(error):
                raise
            reason = one_line(error)
            worst = torch.full((), torch.inf, device=engine.device)
            if not hasattr(model, "reset_iter_state"):  # torch < 2.13
                failure = f"{name} does not run with sequence parallelism ({reason})"
                raise PlanError(f"{failure}; set tp.sequence_parallel = false") from error
            model.zero_grad(set_to_none=True)  # of gathered parameters, whose gradients were not reduced yet
            cast(Any, model).reset_iter_state()
            model.zero_grad(set_to_none=True)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if float(worst) < limits.difference:
        return None
    sequence.enabled = False
    if reason:
        return f"no sequence parallelism: {name} does not run with it ({reason})"
    return (
        f"no sequence parallelism: {name}'s logits or gradients change with it (relative difference {float(worst):.0e})"
    )


def check_context_parallel(engine: Engine) -> None:
    """Raise `PlanError` if gradients of sequences split over cp differ from those of whole ones. Collective."""
    assert engine.context is not None
    with models_own_errors(engine):
        worst = _largest(engine, engine.context.off(), copies=engine.sizes.cp, limits=FLOAT32)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not float(worst) < FLOAT32.difference:
        raise PlanError(
            f"{engine.plan.model_type} under mesh.cp = {engine.sizes.cp} differs from the whole sequence (relative "
            f"difference of gradients {float(worst):.1e}); set mesh.cp = 1"
        )


def _largest(engine: Engine, off: AbstractContextManager[None], *, copies: int, limits: Limits) -> Tensor:
    """Return the largest relative difference of this rank's gradients, and of logits that it has both ways.

    Inside `off` the sequence is whole, and each of `copies` ranks adds the gradient of all of it.
    """
    model = engine.model
    model.train(not dropouts(model))
    with off:
        logits, before = _gradients(engine)
    before = {name: grad / copies for name, grad in before.items()}
    again, after = _gradients(engine)
    differences = [distance(again, logits)] if again.shape == logits.shape else []
    floor = limits.rounding * max((float(grad.float().norm()) for grad in before.values()), default=0.0)
    for name, grad in before.items():
        ours = after[name] if name in after else torch.zeros_like(grad)
        differences.append(distance(ours, grad, floor).to(engine.device))
    model.train()
    return torch.stack(differences).nan_to_num(torch.inf).max()


def _gradients(engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this rank's logits of a short row, and its shards of the gradients, which the model no longer has."""
    logits = learn(engine)
    sum_over_tp(map(engine.model.get_parameter, engine.tp_summed()), engine.meshes.tp.get_group())
    found = dict(_taken(engine))
    engine.model.zero_grad(set_to_none=True)
    return logits, found


def _taken(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for name, param in engine.model.named_parameters():
        if param.grad is not None:
            yield name, local_part(param.grad)
