"""What the device can do and holds."""

from __future__ import annotations

import resource

import torch

from ndtrain.accelerators import DEVICES


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known.bfloat16 for key, known in DEVICES.items() if key.upper() in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: the allocator's on CUDA, the resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
