"""Peaks of devices are found by the names that torch gives, for the dtype of the products."""

from __future__ import annotations

import pytest
import torch

from ndtrain.accelerators import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        # Others, some of whose names contain those above.
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX 6000", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
    ],
)
def test_mfu_counts_with_the_peak_of_the_device_and_the_dtype(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    for dtype in ("bfloat16", "float16", "float32"):
        expected = None if device is None else getattr(DEVICES[device], dtype if dtype == "float32" else "bfloat16")
        assert peak_flops(cuda, dtype) == expected
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_peaks_are_dense() -> None:
    """Half of what the makers give with sparsity, in TFLOP/s of bfloat16."""
    sparse = {"h100": 1979, "h100-pcie": 1513, "h100-nvl": 1671, "h200": 1979, "h200-nvl": 1671, "b200": 4500}
    for name, peak in (sparse | {"a100": 624, "l40s": 724.1, "a10": 250}).items():
        assert DEVICES[name].bfloat16 == pytest.approx(peak / 2 * 1e12, rel=1e-3), name
