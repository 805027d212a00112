"""Dropout under tensor parallelism.

The ranks of a tp group draw the same random numbers, which is right for activations that all of them hold whole. What
they have parts of needs other numbers on each: the attention function, which works on a rank's own heads, gets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ndtrain.parallel.cp.interface import own_attention, take_attention
from ndtrain.plan import Plan
from ndtrain.runs.process import random_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def own_draws(device: torch.device, rank: int) -> Iterator[None]:
    """Random numbers of this rank alone inside; after it every rank goes on with those they share.

    They follow from a number that the ranks' CPUs draw alike, so that a block which is computed again, from the
    generators' old states, drops the same elements again.
    """
    seed = int(torch.randint(2**62, ()))
    generator = _generator(device)
    state = generator.get_state()
    generator.manual_seed(random_seed(seed, rank))
    try:
        yield
    finally:
        generator.set_state(state)


def drop_by_rank(model: PreTrainedModel, plan: Plan, rank: int) -> None:
    """Have the attention of `model` draw numbers of this tp rank alone where the rank has heads of its own.

    Where projections are gathered, every rank has all heads and must drop the same.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    base = str(model.config._attn_implementation)
    cut = {model.get_submodule(name.rpartition(".")[0]) for name, style in plan.tp_rules.items() if style == "colwise"}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        attend = own_attention(base, module)
        if module not in cut or not kwargs.get("dropout"):
            return attend(module, query, key, value, attention_mask, **kwargs)
        with own_draws(query.device, rank):
            return attend(module, query, key, value, attention_mask, **kwargs)

    take_attention(model, attention, ALL_MASK_ATTENTION_FUNCTIONS[base])


class DropoutCheck(TorchFunctionMode):
    """Inside, looks at every dropout of the tp ranks of `group`, which all run the same code.

    `wrong` becomes true where the ranks drop elements of a cut activation by numbers that they share, or elements of
    one that they all hold whole by numbers of their own.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__()
        self.group, self.wrong = group, False
        self._generator = _generator(device)
        self._shared = self._generator.initial_seed()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._drops(func, args, kwargs):
            own = self._generator.initial_seed() != self._shared
            self.wrong |= own != self._differs(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    @staticmethod
    def _drops(func: Any, args: Any, kwargs: Any) -> bool:
        if func is F.scaled_dot_product_attention:
            return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
        if func is F.dropout:
            return bool(kwargs["training"] and kwargs["p"])
        return func is torch.dropout and all(args[1:])

    def _differs(self, tensor: Tensor) -> bool:
        """Whether `tensor` is another one on each rank."""
        size = torch.tensor([tensor.numel(), -tensor.numel()], device=tensor.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self.group)
        if int(size[0]) != -int(size[1]):
            return True
        low, high = tensor.detach().float().clone(), tensor.detach().float().clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        # What all hold was reduced to the same bits on each.
        return bool((high - low).max() > 1e-4 * torch.maximum(high.abs(), low.abs()).max())
