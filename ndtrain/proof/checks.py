"""What a run proves of its model before it pays: asked of the model itself, not read from its source."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from ndtrain.engine.optimizers import sum_over_tp
from ndtrain.errors import NdtrainError, PlanError
from ndtrain.layout import local_part
from ndtrain.mesh import Meshes
from ndtrain.parallel.dropout import DropoutCheck
from ndtrain.parallel.sequence import SequenceParallel
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.reference import Twins, distance

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
    row = _tokens(trainer, 2 * half)
    other = _tokens(trainer, 4 * half)[2 * half :]
    # Attention kernels for one row and for several can differ.
    more = [row] if trainer.batches.micro_batch_size > 1 else []
    positions = torch.arange(half, device=device).repeat(2) if packed else torch.arange(2 * half, device=device)
    try:
        plain = _probe(trainer, [row, *more], positions)
    except (RuntimeError, AssertionError, IndexError) as error:
        if trainer.sizes.cp == trainer.sizes.tp == 1 and trainer.recipe.fsdp.mode == "auto":
            raise
        raise _does_not_run(trainer, error) from error
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
    routed = any("experts" in p.fqn for p in trainer.plan.params) and trainer.plan.low_precision
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
    if not float(leaks[2]) < (5e-2 if trainer.plan.low_precision else 1e-3):
        raise PlanError(
            f"{what} under mesh.cp = {trainer.sizes.cp} differs from the whole sequence (logits by "
            f"{float(leaks[2]):.1e}): it mixes tokens outside its attention, or counts positions its own way; "
            "set mesh.cp = 1"
        )
    return True


def _probe(trainer: Trainer, rows: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[B, S, V]` of rows `[S]`, without dropout, which differs between meshes."""
    ids = torch.stack(rows)
    trainer.model.train(not dropouts(trainer.model))
    with torch.no_grad():
        logits = _forward(trainer, ids, positions).float()
    trainer.model.train()
    if trainer.context is not None and trainer.context.enabled:
        logits = trainer.context.gather(logits)
    # One row of all rows where they were joined, and what was padded at its end
    joined = logits.shape[0] < len(rows)
    logits = logits[:, : ids.numel()].view(*ids.shape, -1) if joined else logits[:, : ids.shape[1]]
    _reshard(trainer)
    return logits


def _forward(trainer: Trainer, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """This rank's logits of `[B, S]` ids whose rows all have these positions `[S]`, as a step would compute them."""
    torch.manual_seed(0)
    batch = trainer.shape({"input_ids": ids, "labels": ids, "position_ids": positions.expand_as(ids)})
    inputs = {"input_ids": batch["input_ids"]}
    if trainer.recipe.data.packing or (trainer.context is not None and trainer.context.enabled):
        inputs["position_ids"] = batch["position_ids"]
    logits: torch.Tensor = trainer.model(**inputs, use_cache=False).logits
    return logits


def check_tensor_parallel(trainer: Trainer, twins: Twins) -> bool:
    """Raise `PlanError` if a cut block does not give or learn what the whole one does, or the tp ranks do not agree.

    Where they do not agree on the gradient of a parameter that each holds whole, each sees a part of what it does, as
    of attention sinks among cut heads, and their sum would be missing. Returns False if these weights give no finite
    gradients, so that nothing can be said.
    """
    plan, model = trainer.plan, trainer.model
    model.train(not dropouts(model))
    with ExitStack() as whole_sequences:
        for split in (trainer.context, trainer.sequence):
            if split is not None:
                whole_sequences.enter_context(split.off())
        try:
            with twins.watching(model):
                _learn(trainer)
            spreads = dict(_replica_spreads(trainer))
            sum_over_tp(model, plan.tp_summed, trainer.meshes.tp.get_group())
            differences = dict(twins.differences(model, copies=plan.sizes.world_size // plan.sizes.tp))
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise _does_not_run(trainer, error) from error
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
    limit = 1e-2 if not plan.low_precision else 0.5 if any("experts" in p.fqn for p in plan.params) else 0.2
    for what, amount in zip(found, amounts.tolist(), strict=True):
        if not amount < limit:
            raise PlanError(
                f"{plan.model_type} under mesh.tp = {plan.sizes.tp}: {what} differs from that of one process (by "
                f"{amount:.1e}); set mesh.tp = 1"
            )
    return True


def _one_row(trainer: Trainer) -> torch.Tensor:
    """This rank's logits of a short row."""
    length = max(2, min(32, trainer.recipe.data.seq_len))
    return _forward(trainer, _tokens(trainer, length)[None], torch.arange(length, device=trainer.runtime.device))


def _learn(trainer: Trainer) -> torch.Tensor:
    """Logits of a short row, after a backward pass from random gradients of them."""
    logits = _one_row(trainer)
    torch.manual_seed(1)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, param in trainer.model.named_parameters():
        if param.grad is not None and not isinstance(param.grad, DTensor):
            raise PlanError(f"{trainer.plan.model_type} gives {name} a gradient past its FSDP unit; set mesh.tp = 1")
    return logits.detach()


def try_sequence_parallel(trainer: Trainer, sequence: SequenceParallel) -> None:
    """Do without sequence parallelism where it changes the logits or the gradients that the model has without."""
    model, low = trainer.model, trainer.plan.low_precision
    amounts, reason = [], ""
    model.train(not dropouts(model))
    with trainer.context.off() if trainer.context is not None else nullcontext():
        try:
            with sequence.off():
                logits = _learn(trainer)
                sum_over_tp(model, trainer.tp_summed(), trainer.meshes.tp.get_group())
            before = {n: local_part(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=True)
            amounts.append(distance(_learn(trainer), logits))
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


def _replica_spreads(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """How far the tp ranks are apart in the gradients of what each holds whole, relative to their size."""
    plan, group = trainer.plan, trainer.meshes.tp.get_group()
    held = {p.fqn for p in plan.params if p.axes[-1] == "fsdp" or isinstance(p.placements[-1], Replicate)}
    # Gradients in host memory are compared on the device, where the groups' collectives are.
    grads = {
        name: local_part(param.grad).to(trainer.runtime.device, torch.float32, copy=True)
        for name, param in trainer.model.named_parameters()
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


def check_dropout(trainer: Trainer) -> None:
    """Raise `PlanError` if elements of a cut activation are dropped by random numbers that all tp ranks share."""
    torch.manual_seed(0)
    with DropoutCheck(trainer.meshes.tp.get_group(), trainer.runtime.device) as dropout, torch.no_grad():
        _one_row(trainer)
    _reshard(trainer)
    wrong = torch.tensor(dropout.wrong, dtype=torch.float32, device=trainer.runtime.device)
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if wrong:
        keys = ", ".join(f"model.config.{key}" for key in dropouts(trainer.model)) or "not a key of its config"
        raise PlanError(
            f"{trainer.plan.model_type} under mesh.tp = {trainer.sizes.tp} drops elements of an activation that tp "
            f"cuts, where every rank would drop the same ones; set the dropout that does it to 0.0 ({keys}), or "
            "mesh.tp = 1"
        )


def _reshard(trainer: Trainer) -> None:
    """Units that stay gathered for the backward pass would stay so where there is none."""
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _does_not_run(trainer: Trainer, error: Exception) -> PlanError:
    """The model's own code fails on its part of the work, with an error about shapes or views."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if where := _module_of(error):
        reason = f"in {where}: {reason}"
    what = f"{trainer.plan.model_type} does not run on {trainer.sizes.describe()}"
    if trainer.recipe.fsdp.mode == "manual":
        return PlanError(
            f"{what} with these [fsdp.modules] ({reason}): a unit's weights are there in its own forward alone; name "
            'the modules around those that read each other\'s weights, or set fsdp.mode = "auto"'
        )
    ways = " or ".join(f"mesh.{axis} = 1" for axis in ("cp", "tp") if getattr(trainer.sizes, axis) > 1)
    return PlanError(f"{what} ({reason}); set {ways}")


def _module_of(error: Exception) -> str | None:
    """The innermost module that was at work when `error` was raised."""
    working = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((type(m).__name__.removeprefix("FSDP") for m in reversed([*working]) if isinstance(m, nn.Module)), None)


def _tokens(trainer: Trainer, count: int) -> torch.Tensor:
    """`[count]` ids that differ from their neighbours; the first ids, which often mean padding, only where needed."""
    first = 3 if trainer.vocab_size > 6 else 0
    return first + torch.arange(count, device=trainer.runtime.device) % min(97, trainer.vocab_size - first)


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
