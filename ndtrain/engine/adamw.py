"""AdamW on local tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ndtrain.layout import local_part

# What it keeps for each parameter.
ADAMW_STATE = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """Torch's AdamW, whose kernel gets this rank's parts: for DTensors it takes the host as long as a few layers."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            adamw_step(group, self.state, found_inf=getattr(self, "found_inf", None))


def adamw_step(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], *, found_inf: Tensor | None) -> None:
    """Make a step of AdamW for the parameters of a group that have a gradient, with torch's fused kernel.

    Where `found_inf`, a scalar, is 1, nothing changes.
    """
    params = [param for param in group["params"] if param.grad is not None]
    own = [states[param] for param in params]
    for param, state in zip(params, own, strict=True):
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    if not params:
        return
    adam(
        [local_part(param) for param in params],
        [local_part(param.grad) for param in params],
        [local_part(state["exp_avg"]) for state in own],
        [local_part(state["exp_avg_sq"]) for state in own],
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
