"""What a model does with short rows of noise, as a step would compute it."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ndtrain.errors import PlanError
from ndtrain.plan.refuse import dropouts

if TYPE_CHECKING:
    from ndtrain.train.trainer import Trainer


def probe(trainer: Trainer, rows: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[B, S, V]` of rows `[S]`, without dropout, which differs between meshes."""
    ids = torch.stack(rows)
    trainer.model.train(not dropouts(trainer.model))
    with torch.no_grad():
        logits = forward(trainer, ids, positions).float()
    trainer.model.train()
    if trainer.context is not None and trainer.context.enabled:
        logits = trainer.context.gather(logits)
    # One row of all rows where they were joined, and what was padded at its end
    joined = logits.shape[0] < len(rows)
    logits = logits[:, : ids.numel()].view(*ids.shape, -1) if joined else logits[:, : ids.shape[1]]
    reshard(trainer)
    return logits


def forward(trainer: Trainer, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """This rank's logits of `[B, S]` ids whose rows all have these positions `[S]`, as a step would compute them."""
    torch.manual_seed(0)
    batch = trainer.shape({"input_ids": ids, "labels": ids, "position_ids": positions.expand_as(ids)})
    inputs = {"input_ids": batch["input_ids"]}
    if trainer.recipe.data.packing or (trainer.context is not None and trainer.context.enabled):
        inputs["position_ids"] = batch["position_ids"]
    logits: torch.Tensor = trainer.model(**inputs, use_cache=False).logits
    return logits


def one_row(trainer: Trainer) -> torch.Tensor:
    """This rank's logits of a short row."""
    length = max(2, min(32, trainer.recipe.data.seq_len))
    return forward(trainer, tokens(trainer, length)[None], torch.arange(length, device=trainer.runtime.device))


def learn(trainer: Trainer) -> torch.Tensor:
    """Logits of a short row, after a backward pass from random gradients of them."""
    logits = one_row(trainer)
    torch.manual_seed(1)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, param in trainer.model.named_parameters():
        if param.grad is not None and not isinstance(param.grad, DTensor):
            raise PlanError(f"{trainer.plan.model_type} gives {name} a gradient past its FSDP unit; set mesh.tp = 1")
    return logits.detach()


def reshard(trainer: Trainer) -> None:
    """Units that stay gathered for the backward pass would stay so where there is none."""
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def does_not_run(trainer: Trainer, error: Exception) -> PlanError:
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


def tokens(trainer: Trainer, count: int) -> torch.Tensor:
    """`[count]` ids that differ from their neighbours; the first ids, which often mean padding, only where needed."""
    first = 3 if trainer.vocab_size > 6 else 0
    return first + torch.arange(count, device=trainer.runtime.device) % min(97, trainer.vocab_size - first)
