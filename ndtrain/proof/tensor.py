"""Proof of tensor parallelism: cut blocks against whole ones, and the tp ranks against each other."""

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
from ndtrain.proof.noise import does_not_run, learn
from ndtrain.proof.reference import ReferenceBlocks


def check_tensor_parallel(engine: Engine, references: ReferenceBlocks) -> bool:
    """Raise `PlanError` if a cut block does not give or learn what the whole one does, or the tp ranks do not agree.

    Where they do not agree on the gradient of a parameter that each holds whole, each sees a part of what it does, as
    of attention sinks among cut heads, and their sum would be missing. Returns False if these weights give gradients
    that are not finite or follow rounding alone, so that nothing can be said.
    """
    plan, model = engine.plan, engine.model
    limit = 1e-2 if not plan.low_precision else 0.5 if any("experts" in p.fqn for p in plan.params) else 0.2
    model.train(not dropouts(model))
    with ExitStack() as whole_sequences:
        for split in (engine.context, engine.sequence):
            if split is not None:
                whole_sequences.enter_context(split.off())
        try:
            with references.watching(model):
                learn(engine)
            spreads = dict(_replica_spreads(engine))
            sum_over_tp(model, plan.tp_summed, engine.meshes.tp.get_group())
            copies = plan.sizes.world_size // plan.sizes.tp
            differences = dict(references.differences(model, copies=copies, limit=limit))
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise does_not_run(engine, error) from error
    model.zero_grad(set_to_none=True)
    model.train()
    whole = {f"the gradient of {name}, held whole by every tp rank,": d for name, d in spreads.items()}
    found = whole | differences
    if not found:
        return True
    amounts = torch.stack(list(found.values()))
    unknown = (~amounts.isfinite()).any().float()
    dist.all_reduce(unknown, op=dist.ReduceOp.MAX)
    if unknown:
        return False
    dist.all_reduce(amounts, op=dist.ReduceOp.MAX)
    for what, amount in zip(found, amounts.tolist(), strict=True):
        if not amount < limit:
            raise PlanError(
                f"{plan.model_type} under mesh.tp = {plan.sizes.tp}: {what} differs from that of one process (by "
                f"{amount:.1e}); set mesh.tp = 1"
            )
    return True


def _replica_spreads(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """How far the tp ranks are apart in the gradients of what each holds whole, relative to their size."""
    plan, group = engine.plan, engine.meshes.tp.get_group()
    held = {p.fqn for p in plan.params if p.axes[-1] == "fsdp" or isinstance(p.placements[-1], Replicate)}
    # Gradients in host memory are compared on the device, where the groups' collectives are.
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
    # What is zero in exact arithmetic differs by the rounding of what it is made of.
    rounding = 5e-2 if plan.low_precision else 1e-3
    floor = rounding * max((float(size) for size in sizes.values()), default=0.0)
    for name, high in grads.items():
        yield name, (high - lows[name]).norm() / max(float(sizes[name]), floor, 1e-30)
