"""Model FLOPs utilization: the share of a GPU's peak that a training step reaches."""

import re

import torch

from nanospin.distributed import world_size

# Dense bfloat16, by the first of these names whose words the device's name has. A GPU that is not
# listed has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090 D": None,
    "RTX 4090 Laptop": None,
    "RTX 4090": 165e12,
}


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """flops: of a step over all ranks. None on a CPU and on a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return flops / seconds / peak / world_size() if peak else None


def peak_flops(device_name: str) -> float | None:
    """None if the peak is not known, such as that of a MIG slice, which is a part of a GPU."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for chip, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{chip}\b", device_name):  # an RTX A1000 is no A100
            return peak
    return None
