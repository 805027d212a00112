"""Code that mixes devices, makes the host wait, or does neither: what the search for it must tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ndtrain.storage import pieces


def _fill_by_mask(x: Tensor) -> None:
    x[x > 0] = 0.0


def _read_weights(x: Tensor) -> None:
    file = Path("model.safetensors")
    part = pieces._Part("w", x, file, 0, torch.bfloat16, (4, 2), (slice(0, 4), slice(0, 2)))
    pieces._fill(part, torch.zeros(16, dtype=torch.uint8), file, refuse_nan=False)


# name -> code, on a tensor [4, 2] on the device
FAULTS: dict[str, Callable[[Tensor], object]] = {
    "two devices": lambda x: x + torch.ones(2),
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "truth value": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x.clone()),
    "a number": lambda x: torch.tensor(2.0, device="cuda"),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "backward": lambda x: x.requires_grad_().sum().backward(),
    "fill by a mask": _fill_by_mask,
    "full": lambda x: torch.full((), 2.0, device="cuda"),
    "a copy that casts": lambda x: x.copy_(torch.zeros(4, 2, dtype=torch.bfloat16)),
    "a cast after the copy": lambda x: x.copy_(torch.zeros(4, 2, dtype=torch.bfloat16).to("cuda")),
    "weights of a file": _read_weights,
    "pinned copy": lambda x: torch.zeros(2).pin_memory().to("cuda", non_blocking=True),
    "index": lambda x: x[torch.zeros(3, dtype=torch.int64, device="cuda")],
}
