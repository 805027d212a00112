"""Compare every part of the model on its mesh with the part alone, and the tp ranks with each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

from ndtrain.engine import Engine
from ndtrain.engine.gradients import sum_over_tp
from ndtrain.errors import PlanError
from ndtrain.layout import local_part
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import learn, models_own_errors, way_out
from ndtrain.proof.reference import References

LIMIT = 1e-2


def check_parts(engine: Engine, references: References) -> bool:
    """Raise `PlanError` if a part's outputs or gradients differ from those of the part alone, or between tp ranks.

    If tp ranks differ in the gradient of a parameter that each holds whole, each has only its part of the gradient, as
    of attention sinks beside cut heads, and their sum would be missing. Returns False if these weights give gradients
    that are not finite, or that follow rounding alone, so that nothing can be checked. Collective.
    """
    plan, model = engine.plan, engine.model
    model.train(not dropouts(model))
    with ExitStack() as whole_sequences:
        # Also off is attention by documents, which has been compared already: the parts alone take masks.
        for part in (engine.context, engine.sequence, engine.documents):
            if part is not None:
                whole_sequences.enter_context(part.off())
        with models_own_errors(engine):
            with references.recording(model):
                learn(engine)
            spreads = dict(_replica_spreads(engine)) if plan.sizes.tp > 1 else {}
            sum_over_tp(map(model.get_parameter, plan.tp_summed), engine.meshes.tp.get_group())
            copies = plan.sizes.world_size // plan.sizes.tp
            differences = dict(references.differences(model, copies=copies, limit=LIMIT))
    model.zero_grad(set_to_none=True)
    model.train()
    replicated = {f"the gradient of {name}, held whole by every tp rank,": d for name, d in spreads.items()}
    found = replicated | differences
    if not found:
        return True
    amounts = torch.stack(list(found.values()))
    unknown = (~amounts.isfinite()).any().float()
    dist.all_reduce(unknown, op=dist.ReduceOp.MAX)
    if unknown:
        return False
    dist.all_reduce(amounts, op=dist.ReduceOp.MAX)
    for what, amount in zip(found, amounts.tolist(), strict=True):
        if not amount < LIMIT:
            under, change = way_out(engine)
            raise PlanError(
                f"{plan.model_type} under {under}: {what} differs from that of one process "
                f"(relative difference {amount:.1e}); {change}"
            )
    return True


def _replica_spreads(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, relative difference between the tp ranks) of gradients of parameters that each holds whole."""
    plan, group = engine.plan, engine.meshes.tp.get_group()
    held = {p.fqn for p in plan.params if p.axes[-1] == "fsdp" or isinstance(p.placements[-1], Replicate)}
    # Gradients in host memory are compared on the device, which the groups' collectives need.
    grads = {
        name: local_part(param.grad).to(engine.device, torch.float32, copy=True)
        for name, param in engine.model.named_parameters()
        if name in held - set(plan.tp_summed) and param.grad is not None
    }
    lows = {name: grad.clone() for name, grad in grads.items()}
    for name in grads:
        dist.all_reduce(lows[name], op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(grads[name], op=dist.ReduceOp.MAX, group=group)
    sizes = {name: torch.maximum(g.norm(), lows[name].norm()) for name, g in grads.items()}
    # A gradient that is zero in exact arithmetic differs by the rounding of its terms.
    floor = 1e-3 * max((float(size) for size in sizes.values()), default=0.0)
    for name, high in grads.items():
        yield name, (high - lows[name]).norm() / max(float(sizes[name]), floor, 1e-30)
