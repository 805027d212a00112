"""Sequence parallelism: splits the residual stream of the blocks along the sequence over the tp ranks.

Norms and residuals work on a rank's share of all tokens, `[1, B S/tp, H]`; a region gets `[B, S, H]`, gathered, and its
output is scattered. An all-gather and a reduce-scatter replace the all-reduce after each split layer and send the same
number of bytes; as tokens of all rows are cut as one row, both begin and end in place. Where tp does not divide the
tokens, they are padded at their end inside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.mesh import Meshes
from ndtrain.parallel.exchange import GatherRows, ScatterRows, Sum, SumOfGradients, replaced
from ndtrain.plan import Plan
from ndtrain.plan.sequence import Region, SequencePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SequenceParallel:
    """Splits and gathers the residual stream of one model by hooks, while `enabled` and outside `off()`."""

    def __init__(self, model: PreTrainedModel, plan: SequencePlan, group: dist.ProcessGroup):
        self.group = group
        self.enabled = True
        self._rows, self._length = 0, 0
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
            self._rows, self._length = x.shape[:2]
            part: Tensor = ScatterRows.apply(x, self.group, False)
            return part

        return replaced(split, args, kwargs, "hidden_states")

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        return _first_of(output, lambda x: self._gathered(x, partial=False)) if self.enabled else None

    def _gathered(self, x: Tensor, *, partial: bool) -> Tensor:
        return GatherRows.apply(x, self._rows, self._length, self.group, partial)  # type: ignore[no-any-return]

    def _before(self, region: Region) -> Any:
        def gather(x: Tensor) -> Tensor:
            if self.enabled:
                return self._gathered(x, partial=region.row is not None)
            return SumOfGradients.apply(x, self.group, False) if region.row else x  # type: ignore[no-any-return]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replaced(gather, args, kwargs, region.takes)

        return hook

    def _after(self, region: Region) -> Any:
        def scatter(x: Tensor) -> Tensor:
            if self.enabled:
                x = x[None] if x.ndim == 2 else x  # some experts give tokens `[B S, H]`
                return ScatterRows.apply(x, self.group, region.row is not None)  # type: ignore[no-any-return]
            return Sum.apply(x, self.group, False) if region.row else x  # type: ignore[no-any-return]

        return lambda module, args, output: _first_of(output, scatter)


def apply_sequence_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> SequenceParallel:
    """Split the residual stream of `model` (on meta) over the tp axis, in place; return its hooks' owner."""
    assert plan.sequence is not None
    return SequenceParallel(model, plan.sequence, meshes.tp.get_group())


def _first_of(output: Any, change: Any) -> Any:
    """Return `output` with `change` applied to it, or to its first element if it is a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
