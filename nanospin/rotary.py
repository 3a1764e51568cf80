"""Rotary positions (arXiv 2104.09864), half-split as in Llama, and how they are stretched to longer
texts: `rope_scaling_type` and `rope_scaling` of GPTConfig.

    linear  [factor]                             2306.15595: all frequencies are divided by factor
    llama3  [factor, low, high, length]          2407.21783
    yarn    [factor, low, high, length, scale]   2309.00071; cos and sin are multiplied by scale

llama3 and yarn divide the frequencies of fewer than `low` turns in `length` tokens, keep those of
more than `high` turns, and interpolate between them: llama3 over the turns, yarn over the index of
the pair of dimensions, between whole numbers.
"""

import math

import torch

NUM_VALUES = {"linear": 1, "llama3": 4, "yarn": 5}


def is_rope_scaling(values: list[float], scaling_type: str) -> bool:
    """Whether the values of a type of scaling are as many as they should be, and in range."""
    if len(values) != NUM_VALUES[scaling_type] or not min(values) > 0:
        return False
    return scaling_type == "linear" or values[1] < values[2]


def rotary_frequencies(config, device: torch.device, local: bool = False) -> torch.Tensor:
    """Rotation of each pair of dimensions per position, in radians (R/2,), where R is rotary_dim,
    or head_dim if that is 0. local: with rope_local_theta and without scaling."""
    dim = config.rotary_dim or config.head_dim
    theta = config.rope_local_theta if local else config.rope_theta
    freq = theta ** (-torch.arange(0, dim, 2, device=device) / dim)
    if not config.rope_scaling or local:
        return freq

    factor = config.rope_scaling[0]
    if config.rope_scaling_type == "linear":
        return freq / factor
    low, high, length = config.rope_scaling[1:4]
    if config.rope_scaling_type == "llama3":
        turns = length * freq / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first = math.floor(pair_with_turns(high, length, dim, theta))
        last = math.ceil(pair_with_turns(low, length, dim, theta))
        first, last = max(first, 0), min(last, dim - 1)
        pair = torch.arange(dim // 2, device=device)
        kept = 1 - ((pair - first) / ((last - first) or 0.001)).clamp(0, 1)
    return freq * (kept + (1 - kept) / factor)


def pair_with_turns(turns: float, length: float, dim: int, theta: float) -> float:
    """The index, not whole, of the pair that turns so often in `length` tokens."""
    return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))


def rotary_angles(config, pos: torch.Tensor, local: bool = False):
    """cos and sin (n, 1, R/2) float32 of the rotary angles at pos (n,)."""
    angles = (pos[:, None] * rotary_frequencies(config, pos.device, local))[:, None]
    cos, sin = angles.cos(), angles.sin()
    if config.rope_scaling and config.rope_scaling_type == "yarn" and not local:
        scale = config.rope_scaling[4]
        return scale * cos, scale * sin
    return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of each head of x (n, H, D); cos and sin are (n, 1, R/2)
    float32."""
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        rotated = rotate(x[..., :rotary_dim], cos, sin)
        return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
