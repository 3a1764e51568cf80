"""Model FLOPs utilization: the share of a GPU's peak that a training step reaches."""

import torch

from nanospin.distributed import world_size

# Dense bfloat16, by the first of these names that is part of the device's. A GPU that is not listed
# has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """flops: of a step over all ranks. None on a CPU and on a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return flops / seconds / peak / world_size() if peak else None


def peak_flops(device_name: str) -> float | None:
    for chip, peak in PEAK_FLOPS.items():
        if chip in device_name:
            return peak
    return None
