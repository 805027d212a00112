"""Sequence parallelism: splits the residual stream of the blocks along the sequence over the tp ranks.

Norms and residuals work on `[B, S/tp, H]`; a region gets `[B, S, H]`, gathered, and its output is scattered. An
all-gather and a reduce-scatter replace the all-reduce after each split layer and send the same number of bytes. Where
tp does not divide a sequence, it is padded at its end inside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.mesh import Meshes
from ndtrain.parallel.gather import Gather, Scatter
from ndtrain.plan import Plan
from ndtrain.plan.sequence import Region, SequencePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Sum(torch.autograd.Function):
    """Adds up the ranks' partial sums `[...]` on every rank; the gradients of the ranks are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """Passes on `[...]`, the same on every rank, and adds up its gradients, which are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SequenceParallel:
    """Splits and gathers the residual stream of one model by hooks, while `enabled` and outside `off()`."""

    def __init__(self, model: PreTrainedModel, plan: SequencePlan, group: dist.ProcessGroup):
        self.group = group
        self.enabled = True
        self._length = 0
        first, last = model.get_submodule(plan.blocks[0]), model.get_submodule(plan.blocks[-1])
        first.register_forward_pre_hook(self._enter, with_kwargs=True)
        last.register_forward_hook(self._leave)
        for region in plan.regions:
            module = model.get_submodule(region.name)
            module.register_forward_pre_hook(self._before(region), with_kwargs=True)
            module.register_forward_hook(self._after(region))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let every rank work on whole sequences inside."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return None

        def split(x: Tensor) -> Tensor:
            self._length = x.shape[1]
            part: Tensor = Scatter.apply(x, self.group, False)
            return part

        return _replace(split, args, kwargs, "hidden_states")

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        return _first_of(output, lambda x: Gather.apply(x, self._length, self.group, False)) if self.enabled else None

    def _before(self, region: Region) -> Any:
        def gather(x: Tensor) -> Tensor:
            if self.enabled:
                return Gather.apply(x, self._length, self.group, region.row is not None)  # type: ignore[no-any-return]
            return _SumOfGradients.apply(x, self.group) if region.row else x  # type: ignore[no-any-return]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _replace(gather, args, kwargs, region.takes)

        return hook

    def _after(self, region: Region) -> Any:
        def scatter(x: Tensor) -> Tensor:
            if self.enabled:
                return Scatter.apply(x, self.group, region.row is not None)  # type: ignore[no-any-return]
            return _Sum.apply(x, self.group) if region.row else x  # type: ignore[no-any-return]

        return lambda module, args, output: _first_of(output, scatter)


def apply_sequence_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> SequenceParallel:
    """Split the residual stream of `model` (on meta) over the tp axis, in place; return its hooks' owner."""
    assert plan.sequence is not None
    return SequenceParallel(model, plan.sequence, meshes.tp.get_group())


def _replace(change: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """Return the arguments with `change` applied to the first positional one, or else to the keyword `name`."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def _first_of(output: Any, change: Any) -> Any:
    """Return `output` with `change` applied to it, or to its first element if it is a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
