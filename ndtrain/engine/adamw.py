"""AdamW on local tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ndtrain.engine.rounding import Rounding
from ndtrain.layout import local_part

# What it keeps for each parameter.
ADAMW_STATE = ("exp_avg", "exp_avg_sq")


# Elements of which state is in float32 at once, where it is kept in less.
_AT_ONCE = 1 << 25


class AdamW(torch.optim.AdamW):
    """Torch's AdamW, whose kernel gets this rank's parts: for DTensors it takes the host as long as a few layers."""

    def __init__(self, groups: list[dict[str, Any]], *, rounding: Rounding, **more: Any) -> None:
        super().__init__(groups, **more)
        self.rounding = rounding

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            adamw_step(group, self.state, self.rounding, found_inf=getattr(self, "found_inf", None))


def adamw_step(
    group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], rounding: Rounding, *, found_inf: Tensor | None
) -> None:
    """Make a step of AdamW for the parameters of a group that have a gradient, with torch's fused kernel.

    Where `found_inf`, a scalar, is 1, nothing changes. State that is kept in less than float32 is rounded.
    """
    params = [param for param in group["params"] if param.grad is not None]
    dtype = group["state_dtype"]
    for param in params:
        if not states[param]:
            states[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            states[param] |= {name: torch.zeros_like(param, dtype=dtype) for name in ADAMW_STATE}
    for some in [params] if dtype == torch.float32 else _few_at_once(params):
        own = [states[param] for param in some]
        averages, squares = ([local_part(state[name]) for state in own] for name in ADAMW_STATE)
        # Themselves if they are float32.
        used, used_squares = ([part.float() for part in parts] for parts in (averages, squares))
        if some:
            adam(
                [local_part(param) for param in some],
                [local_part(param.grad) for param in some if param.grad is not None],
                used,
                used_squares,
                [],
                [state["step"] for state in own],
                fused=True,
                found_inf=found_inf,
                decoupled_weight_decay=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        if dtype != torch.float32:
            for param, *parts in zip(some, averages, squares, used, used_squares, strict=True):
                rounding.store(param, parts[:2], parts[2:])


def _few_at_once(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters in lists of which each has at most `_AT_ONCE` elements, or one parameter."""
    some: list[Tensor] = []
    held = 0
    for param in params:
        size = local_part(param).numel()
        if some and held + size > _AT_ONCE:
            yield some
            some, held = [], 0
        some.append(param)
        held += size
    yield some
