"""Model FLOPs utilization: the share of a GPU's peak that a training step reaches."""

import torch

from nanospin.distributed import world_size

# dense bfloat16; a GPU that is not listed has no MFU rather than a wrong one
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """flops: of a step over all ranks. None on a CPU and on a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for chip, peak in PEAK_FLOPS.items():
        if chip in name:
            return flops / seconds / peak / world_size()
    return None
