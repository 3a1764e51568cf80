"""The transformer of the T_n write-up, as subclasses of the shared GPT.

Parameter names are those of GPT, and every weight depends only on (seed, its name). So the GPT-2
settings, which are the defaults here, give the same model as GPT.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Attention, Block, GPTConfig
from nanospin.fused_head import linear_logprobs


@dataclass
class TaylorGPTConfig(GPTConfig):
    """position may also be "sinusoidal" (arXiv 1706.03762, section 3.5)."""

    head_bias: bool = False  # a bias in the LM head, which must be untied
    attn_proj: bool = True  # attention has an output projection
    attn_scale: str = "head"  # scores are divided by the square root of: head_dim | n_embd (embd)
    mlp_alone: bool = False  # the MLP uses ln_1 again and has no residual connection
    init_scheme: str = "gpt2"  # gpt2 | glorot: N(0, 2 / (fan_in + fan_out)) for every matrix
    init_noise: float = 0.0  # standard deviation of noise added to every parameter, norms included

    CHOICES = GPTConfig.CHOICES | {
        "position": ["learned", "rotary", "sinusoidal"],
        "attn_scale": ["head", "embd"],
        "init_scheme": ["gpt2", "glorot"],
    }

    def check(self):
        super().check()
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if not self.attn_proj and self.n_head * self.head_dim != self.n_embd:
            raise ValueError("attn_proj = False needs n_head x head_dim = n_embd")
        if self.head_bias and self.tie_embeddings:
            raise ValueError("head_bias needs an untied LM head: tie_embeddings = False")
        if self.init_noise < 0:
            raise ValueError(f"init_noise must not be negative, got {self.init_noise}")


class TaylorAttention(Attention):
    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        if not config.attn_proj:
            self.c_proj = nn.Identity()

    def queries_keys_values(self, x: Tensor, rope=None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().queries_keys_values(x, rope)
        if self.config.attn_scale == "embd":
            # attention itself divides by sqrt(head_dim)
            q = q * self.config.n_head**-0.5
        return q, k, v


class TaylorBlock(Block):
    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        self.attn = TaylorAttention(config)
        self.mlp_alone = config.mlp_alone
        if config.mlp_alone:
            del self.ln_2

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.mlp_alone:
            return super().after_attention(x, y)
        return self.mlp(self.ln_1(x + self.attn.output(y)))


class TaylorGPT(GPT):
    config_class = TaylorGPTConfig

    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        if config.head_bias:
            bias = torch.zeros(config.padded_vocab_size, device=self.wte.weight.device)
            self.lm_head.bias = nn.Parameter(bias)
            if bias.device.type != "meta":
                self.init_weights()

    def make_block(self, config: TaylorGPTConfig) -> nn.Module:
        return TaylorBlock(config)

    def init_mean_std(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """GPT-2's or Glorot's standard deviation, with `init_noise` added."""
        c = self.config
        mean, std = super().init_mean_std(name, shape)
        is_matrix = std > 0
        if is_matrix and c.init_scheme == "glorot":
            # queries, keys and values count as separate matrices
            fans = 2 * c.n_embd if name.endswith("c_attn.weight") else sum(shape)
            std = math.sqrt(2 / fans)
        return mean, math.hypot(std, c.init_noise)

    def embed(self, idx: Tensor, pos: Tensor) -> Tensor:
        x = super().embed(idx, pos)
        if self.config.position == "sinusoidal":
            x = x + sinusoidal_positions(pos, self.config.n_embd).to(x.dtype)
        return x

    def logprobs(self, x: Tensor, targets: Tensor) -> Tensor:
        if not self.config.head_bias:
            return super().logprobs(x, targets)
        # the bias as one more input, which is 1
        x = F.pad(x, (0, 1), value=1.0)
        weight = torch.cat((self.lm_head.weight, self.lm_head.bias[:, None]), 1)
        c = self.config
        return linear_logprobs(x, weight, targets, c.logit_softcap, c.vocab_size)


def sinusoidal_positions(pos: Tensor, width: int) -> Tensor:
    """sin and cos of pos (n,), interleaved -> (n, width)."""
    channel = torch.arange(0, width, 2, device=pos.device)
    angle = pos[:, None] * 10000.0 ** (-channel / width)  # (n, C/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
