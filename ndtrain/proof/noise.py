"""Run an engine's model on short rows of noise, as a training step would."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ndtrain.data.batches import documents_of
from ndtrain.engine import Engine
from ndtrain.errors import PlanError, of_the_machine, one_line
from ndtrain.mesh import AXES
from ndtrain.parallel.fsdp import end_of_forward
from ndtrain.plan.refuse import dropouts


def probe(engine: Engine, rows: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Return float32 logits `[B, S, V]` of B rows `[S]`, without dropout, which differs between meshes."""
    ids = torch.stack(rows)
    engine.model.train(not dropouts(engine.model))
    with torch.no_grad():
        logits = forward(engine, ids, positions).float()
    engine.model.train()
    if engine.context is not None and engine.context.enabled:
        logits = engine.context.gather(logits)
    # Undo the joining of all rows into one, and the padding at the end.
    joined = logits.shape[0] < len(rows)
    logits = logits[:, : ids.numel()].view(*ids.shape, -1) if joined else logits[:, : ids.shape[1]]
    end_of_forward(engine.model)
    return logits


def forward(engine: Engine, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return this rank's logits of ids `[B, S]` whose rows all have these positions `[S]`, as a step computes them."""
    torch.manual_seed(0)
    batch = engine.shape({"input_ids": ids, "labels": ids, "position_ids": positions.expand_as(ids)})
    inputs = {"input_ids": batch["input_ids"]}
    packed = bool(engine.recipe.data.packing)
    if packed or (engine.context is not None and engine.context.enabled):
        inputs["position_ids"] = batch["position_ids"]
    marked = engine.marks_documents
    documents = documents_of(positions.expand_as(ids).numpy(force=True)) if marked else None
    with engine.apart(torch.from_numpy(documents) if documents is not None else None):
        logits: torch.Tensor = engine.model(**inputs, use_cache=False).logits
    return logits


def row_length(engine: Engine) -> int:
    return max(2, min(32, engine.recipe.data.seq_len))


def one_row(engine: Engine) -> torch.Tensor:
    """Return this rank's logits of a short row."""
    length = row_length(engine)
    return forward(engine, tokens(engine, length)[None], torch.arange(length, device=engine.device))


def learn(engine: Engine) -> torch.Tensor:
    """Return the logits of a short row, after a backward pass from random gradients.

    Raises `PlanError` for a gradient that is not sharded.
    """
    logits = one_row(engine)
    torch.manual_seed(1)
    whole = torch.randn(1, row_length(engine), logits.shape[-1], device=engine.device)
    split = engine.context is not None and engine.context.enabled
    weights = engine.context.part_of(whole) if engine.context is not None and split else whole
    (logits * weights.view_as(logits)).sum().backward()
    for name, param in engine.model.named_parameters():
        if param.grad is not None and not isinstance(param.grad, DTensor):
            raise PlanError(
                f"{engine.plan.model_type} uses {name} outside its FSDP unit, so its gradient is not sharded; set "
                "mesh.tp = 1"
            )
    return logits.detach()


def check_recomputation(engine: Engine, *, low: bool = False) -> None:
    """Raise `PlanError` if the backward pass cannot compute again what the plan says; `low` as `models_own_errors`."""
    if engine.plan.recomputation is not None:
        with models_own_errors(engine, low=low):
            learn(engine)
        engine.model.zero_grad(set_to_none=True)


@contextmanager
def models_own_errors(engine: Engine, *, low: bool = False) -> Iterator[None]:
    """Raise what a model's own code raises inside as the `PlanError` of `_does_not_run`.

    `low` says that the model has run in float32 before and computes in less now.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
        if of_the_machine(error):
            raise
        raise _does_not_run(engine, error, low) from error


def _does_not_run(engine: Engine, error: Exception, low: bool) -> PlanError:
    """Return the error for a model whose own code raised `error` on its part of the work."""
    reason = one_line(error)
    if module := _module_of(error):
        reason = f"in {module}: {reason}"
    name, sizes, fsdp = engine.plan.model_type, engine.sizes, engine.recipe.fsdp
    if low:
        every = " and every mixed_precision in [fsdp.modules]" if fsdp.modules else ""
        return PlanError(
            f'{name} runs in float32, but not in {fsdp.param_dtype} ({reason}); set fsdp.param_dtype = "float32"{every}'
        )
    if "has been mutated" in reason and (how := engine.plan.recomputation) is not None and how.kind == "selective":
        return PlanError(
            f"{name} changes results of matrix products in place, which train.activation_checkpointing = "
            '"selective" keeps; set it to "full"'
        )
    what = f"{name} does not run on {sizes.describe()}"
    if fsdp.mode == "manual":
        return PlanError(
            f"{what} with these [fsdp.modules] ({reason}): a unit's weights exist only during its own forward; list "
            'the modules that contain those which read each other\'s weights, or set fsdp.mode = "auto"'
        )
    if sizes.cp == sizes.tp == sizes.ep == 1:
        return PlanError(
            f"{what} ({reason}), where none of its layers is cut; change [model.config] or model.attn, or report it if "
            "plain transformers runs this config"
        )
    return PlanError(f"{what} ({reason}); {way_out(engine)[1]}")


def way_out(engine: Engine) -> tuple[str, str]:
    """Return the mesh axes with more than one rank, and what to set instead, for a message."""
    axes = [axis for axis in (*AXES, "ep") if getattr(engine.sizes, axis) > 1]
    under = ", ".join(f"mesh.{axis} = {getattr(engine.sizes, axis)}" for axis in axes)
    cuts = [axis for axis in axes if axis in ("cp", "tp", "ep")] or axes
    plans = " and ".join(f"[{axis}.plan]" for axis in ("tp", "ep") if getattr(engine.recipe, axis).plan)
    mended = f"correct {plans}, or " if plans else ""
    return under, f"{mended}set " + " and ".join(f"mesh.{axis} = 1" for axis in cuts)


def _module_of(error: Exception) -> str | None:
    """Return the class name of the innermost module that was running when `error` was raised."""
    running = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((type(m).__name__.removeprefix("FSDP") for m in reversed([*running]) if isinstance(m, nn.Module)), None)


def tokens(engine: Engine, count: int) -> torch.Tensor:
    """Return `[count]` ids that differ from their neighbours, without the first ids, often padding, if possible."""
    first = 3 if engine.vocabulary > 6 else 0
    return first + torch.arange(count, device=engine.device) % min(97, engine.vocabulary - first)
