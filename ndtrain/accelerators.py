"""Peaks of accelerators, from their makers' datasheets, and the memory that this process has used.

Bandwidths are in one direction. torch is imported inside the functions.
"""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from ndtrain.errors import RecipeError

if TYPE_CHECKING:
    import torch

GB = 1e9


@dataclass(frozen=True)
class Device:
    """Peaks of one accelerator: dense FLOP/s, bytes, bytes per second."""

    name: str
    bfloat16: float  # FLOP/s of matrix products, also in float16
    float32: float  # FLOP/s, without TF32
    memory: float
    bandwidth: float  # of the device's memory
    intra: float  # to the other ranks of its node
    inter: float  # to other nodes, through the device's own network card
    pcie: float  # to its host's memory, and as much back
    host_bandwidth: float  # of the memory of a node's host, all sockets together
    source: str
    torch_name: str = ""  # a regular expression for the name that torch gives

    @property
    def figures(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in FIGURES}

    def in_tf32(self) -> Device:
        """Return the device with float32 products in TF32, for which datasheets give half the peak of bfloat16."""
        return replace(self, float32=self.bfloat16 / 2)

    def peak(self, dtype: str) -> float:
        return self.float32 if dtype in ("float32", "float64", "int") else self.bfloat16


FIGURES = tuple(field.name for field in fields(Device) if field.type == "float")

# Of a server with such cards, where the maker of the card says nothing: a 100 Gb/s network card each. Ranks of a node
# reach one another over PCIe, since bridges join only some of them.
_SERVER = "a 100 Gb/s network card per device and this host are assumed"
_DDR4, _DDR5 = "16 channels of DDR4-3200", "16 channels of DDR5-4800"
_DESKTOP = "2 channels of DDR5-5600"

# Dense peaks: datasheets give many with sparsity, which doubles them. Names are those of `torch.cuda.get_device_name`.
DEVICES = {
    device.name: device
    for device in (
        Device(
            "a100", 312e12, 19.5e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, 409.6 * GB,
            "NVIDIA A100 80GB SXM datasheet (NVLink 600 GB/s, PCIe 4.0 64 GB/s both ways); DGX A100: one 200 Gb/s card "
            f"per GPU, {_DDR4}",
            r"A100-SXM\d?-80GB",
        ),
        Device(
            "a100-40gb", 312e12, 19.5e12, 40 * GB, 1555 * GB, 300 * GB, 25 * GB, 32 * GB, 409.6 * GB,
            "NVIDIA A100 40GB SXM datasheet (NVLink 600 GB/s, PCIe 4.0 64 GB/s both ways); DGX A100: one 200 Gb/s card "
            f"per GPU, {_DDR4}",
            r"A100-SXM\d?-40GB",
        ),
        Device(
            "a100-pcie", 312e12, 19.5e12, 80 * GB, 1935 * GB, 32 * GB, 12.5 * GB, 32 * GB, 409.6 * GB,
            f"NVIDIA A100 80GB PCIe datasheet (PCIe 4.0 64 GB/s both ways); {_SERVER}, {_DDR4}",
            r"A100 80GB PCIe",
        ),
        Device(
            "a100-pcie-40gb", 312e12, 19.5e12, 40 * GB, 1555 * GB, 32 * GB, 12.5 * GB, 32 * GB, 409.6 * GB,
            f"NVIDIA A100 40GB PCIe datasheet (PCIe 4.0 64 GB/s both ways); {_SERVER}, {_DDR4}",
            r"A100-PCIE-40GB",
        ),
        Device(
            "h100", 989e12, 66.9e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, 614.4 * GB,
            "NVIDIA H100 SXM datasheet (NVLink 900 GB/s, PCIe 5.0 128 GB/s both ways); DGX H100: one 400 Gb/s card per "
            f"GPU, {_DDR5}",
            r"\bH100 (80GB HBM3|SXM)",
        ),
        Device(
            "h100-pcie", 756e12, 51e12, 80 * GB, 2000 * GB, 64 * GB, 12.5 * GB, 64 * GB, 614.4 * GB,
            "NVIDIA H100 PCIe datasheet (1,513 TFLOPS with sparsity, PCIe 5.0 128 GB/s both ways); "
            f"{_SERVER}, {_DDR5}",
            r"\bH100 PCIe",
        ),
        Device(
            "h100-nvl", 835.5e12, 60e12, 94 * GB, 3900 * GB, 64 * GB, 12.5 * GB, 64 * GB, 614.4 * GB,
            "NVIDIA H100 NVL datasheet (1,671 TFLOPS with sparsity, PCIe 5.0 128 GB/s both ways); "
            f"{_SERVER}, {_DDR5}",
            r"\bH100 NVL",
        ),
        Device(
            "h200", 989e12, 66.9e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, 614.4 * GB,
            "NVIDIA H200 SXM datasheet (NVLink 900 GB/s, PCIe 5.0 128 GB/s both ways); DGX H200: one 400 Gb/s card per "
            f"GPU, {_DDR5}",
            r"\bH200$",
        ),
        Device(
            "h200-nvl", 835.5e12, 60e12, 141 * GB, 4800 * GB, 64 * GB, 12.5 * GB, 64 * GB, 614.4 * GB,
            "NVIDIA H200 NVL datasheet (1,671 TFLOPS with sparsity, PCIe 5.0 128 GB/s both ways); "
            f"{_SERVER}, {_DDR5}",
            r"\bH200 NVL",
        ),
        Device(
            "b200", 2250e12, 75e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 64 * GB, 716.8 * GB,
            "NVIDIA DGX B200 datasheet (NVLink 1.8 TB/s, PCIe 5.0 128 GB/s both ways, one 400 Gb/s card per GPU); 16 "
            "channels of DDR5-5600",
            r"\bB200$",
        ),
        Device(
            "mi300x", 1307.4e12, 163.4e12, 192 * GB, 5300 * GB, 448 * GB, 50 * GB, 64 * GB, 921.6 * GB,
            "AMD Instinct MI300X datasheet (Infinity Fabric 128 GB/s both ways to each of 7, PCIe 5.0 128 GB/s both "
            "ways); a 400 Gb/s card each, 24 channels of DDR5-4800",
            r"\bMI300X\b",
        ),
        Device(
            "l40s", 362.05e12, 91.6e12, 48 * GB, 864 * GB, 32 * GB, 12.5 * GB, 32 * GB, 614.4 * GB,
            f"NVIDIA L40S datasheet (PCIe 4.0 64 GB/s both ways); {_SERVER}, {_DDR5}",
            r"\bL40S$",
        ),
        Device(
            "a10", 125e12, 31.2e12, 24 * GB, 600 * GB, 32 * GB, 12.5 * GB, 32 * GB, 409.6 * GB,
            f"NVIDIA A10 datasheet (PCIe 4.0 64 GB/s both ways); {_SERVER}, {_DDR4}",
            r"\bA10$",
        ),
        Device(
            "rtx6000ada", 364.25e12, 91.1e12, 48 * GB, 960 * GB, 32 * GB, 12.5 * GB, 32 * GB, 614.4 * GB,
            "NVIDIA RTX 6000 Ada datasheet (1,457 TFLOPS in FP8 with sparsity, a quarter of it in bfloat16; PCIe 4.0 "
            f"64 GB/s both ways); {_SERVER}, {_DDR5}",
            r"RTX 6000 Ada",
        ),
        Device(
            "rtx4090", 165.2e12, 82.6e12, 24 * GB, 1008 * GB, 32 * GB, 12.5 * GB, 32 * GB, 89.6 * GB,
            "NVIDIA Ada GPU architecture, appendix A (with float32 sums; PCIe 4.0 64 GB/s both ways); "
            f"{_SERVER}, {_DESKTOP}",
            r"RTX 4090$",
        ),
        Device(
            "rtx5090", 209.5e12, 104.8e12, 32 * GB, 1792 * GB, 64 * GB, 12.5 * GB, 64 * GB, 89.6 * GB,
            "NVIDIA RTX Blackwell GPU architecture, appendix A (with float32 sums; PCIe 5.0 128 GB/s both ways); "
            f"{_SERVER}, {_DESKTOP}",
            r"RTX 5090$",
        ),
    )
}  # fmt: skip


def find_device(text: str) -> Device:
    """Return a device by name, or from figures: `bfloat16=5e14,memory=48e9,bandwidth=9e11,...`.

    Figures after a name replace some of its own: `h100,memory=94e9`. Those of the host (`pcie`, `host_bandwidth`) may
    be left out: they are an h100's then. Raises `RecipeError`.
    """
    first, *rest = text.split(",")
    given: dict[str, float] = {}
    base = None
    for number, part in enumerate([first, *rest]):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            if number or key.lower() not in DEVICES:
                raise RecipeError(
                    f"--device {text}: {key} is not KEY=NUMBER, nor is it a device's name at the beginning, "
                    f"one of {', '.join(DEVICES)}"
                )
            base = DEVICES[key.lower()]
            continue
        try:
            given[key] = float(value)
        except ValueError:
            raise RecipeError(f"--device {text}: {value!r} is not a number") from None
        if key not in FIGURES or not 0 < given[key] < float("inf"):
            raise RecipeError(
                f"--device {text}: {key}={value} must be a positive number for one of {', '.join(FIGURES)}"
            )
    if base is not None:
        name, source = base.name, base.source
        values = base.figures | given
    else:
        assumed = {key: DEVICES["h100"].figures[key] for key in ("pcie", "host_bandwidth") if key not in given}
        name, values = "your device", assumed | given
        source = "given" + (f", but {' and '.join(assumed)}, which are those of an h100's host" if assumed else "")
    missing = [key for key in FIGURES if key not in values]
    if missing:
        raise RecipeError(
            f"--device {text} lacks {', '.join(missing)}; add them, or begin with a device's name to use its figures"
        )
    source = f"{source}; {', '.join(given)} given" if given and base is not None else source
    return Device(name=name, source=source, torch_name="", **values)


def memory_bytes(device: torch.device) -> float | None:
    """Return the memory of `device` in bytes, or None for a CPU, whose memory is others' too."""
    import torch

    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def has_tf32(device: torch.device) -> bool:
    """Return whether `device` can multiply float32 in TF32."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def peak_flops(device: torch.device, dtype: str, *, tf32: bool = False) -> float | None:
    """Return the dense peak of `device` for products in `dtype`, in FLOP/s, or None if the device is not known."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # A part of a device (MIG) has a part of its peak.
    found = None if " MIG " in name else next((d for d in DEVICES.values() if re.search(d.torch_name, name)), None)
    return None if found is None else (found.in_tf32() if tf32 else found).peak(dtype)


# Instructions for bfloat16 products, as torch names them, of x86 and of ARM.
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether `device` is known to have no instructions for bfloat16, so that float32 is faster on it."""
    import torch

    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and not any(found.get(name) for name in _CPU_BFLOAT16)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far, in bytes: the allocator's on CUDA, the process's resident set on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
