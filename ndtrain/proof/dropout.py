"""Check dropout under tp: ranks must not drop elements of a cut activation by the same random numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ndtrain.engine import Engine
from ndtrain.errors import PlanError
from ndtrain.parallel.dropout import generator_of
from ndtrain.parallel.fsdp import end_of_forward
from ndtrain.plan.refuse import dropouts
from ndtrain.proof.noise import one_row


class DropoutCheck(TorchFunctionMode):
    """Check every dropout in the body on the tp ranks of `group`, which all run the same code.

    `wrong` becomes True if the ranks drop elements of a cut activation by random numbers that they share, or elements
    of an activation that all hold whole by random numbers of their own.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__()
        self.group, self.wrong = group, False
        self._generator = generator_of(device)
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
        """Return whether `tensor` differs between the ranks."""
        size = torch.tensor([tensor.numel(), -tensor.numel()], device=tensor.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self.group)
        if int(size[0]) != -int(size[1]):
            return True
        low, high = tensor.detach().float().clone(), tensor.detach().float().clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        # An activation that all ranks hold whole was reduced, to the same bits on each.
        return bool((high - low).max() > 1e-4 * torch.maximum(high.abs(), low.abs()).max())


def check_dropout(engine: Engine) -> None:
    """Raise `PlanError` if `DropoutCheck` finds a wrong dropout in the engine's model. Collective."""
    torch.manual_seed(0)
    with DropoutCheck(engine.meshes.tp.get_group(), engine.device) as dropout, torch.no_grad():
        one_row(engine)
    end_of_forward(engine.model)
    wrong = torch.tensor(dropout.wrong, dtype=torch.float32, device=engine.device)
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if wrong:
        keys = ", ".join(f"model.config.{key}" for key in dropouts(engine.model)) or "no key of its config sets it"
        raise PlanError(
            f"{engine.plan.model_type} under mesh.tp = {engine.sizes.tp} drops elements of an activation that tp "
            f"cuts, and every rank would drop the same ones; set that dropout to 0.0 ({keys}), or mesh.tp = 1"
        )
