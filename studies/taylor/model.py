"""The transformers of the T_n write-up, both versions, as subclasses of the shared GPT.

With `write_up` empty, the default, the model is GPT: same parameter names, and every weight depends
only on (seed, its name).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Block, GPTConfig
from nanospin.fused_head import linear_logprobs


@dataclass
class TaylorGPTConfig(GPTConfig):
    """position may also be "sinusoidal", and then has the write-up's angles."""

    write_up: str = ""  # the model of the write-up's figure: first | later; "": GPT
    init_noise: float = 0.0  # standard deviation of noise added to every parameter, norms included

    CHOICES = GPTConfig.CHOICES | {
        "position": ["learned", "rotary", "sinusoidal"],
        "write_up": ["", "first", "later"],
    }

    def check(self):
        super().check()
        if self.init_noise < 0:
            raise ValueError(f"init_noise must not be negative, got {self.init_noise}")
        if not self.write_up:
            return
        for name, value in (
            ("position", "sinusoidal"),
            ("mlp", "relu"),
            ("norm", "layernorm"),
            ("bias", True),
            ("tie_embeddings", False),
            ("n_kv_head", self.n_head),
            ("head_dim", self.n_embd // self.n_head),
        ):
            if getattr(self, name) != value:
                raise ValueError(f"write_up = {self.write_up!r} needs {name} = {value!r}")


class LaterBlock(Block):
    """Normalization after each part, and no output projection in attention:

    x = ln_1(x + attention(x)), then ln_2(x + mlp(x)).
    """

    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        self.attn.c_proj = nn.Identity()

    def before_attention(self, x: Tensor, rope=None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.queries_keys_values(x, rope)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn.output(y))
        return self.ln_2(x + self.mlp(x))


class FirstBlock(LaterBlock):
    """As the later block, with one LayerNorm used twice, no residual connection around the MLP, and
    attention scores divided by the square root of n_embd instead of head_dim."""

    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        del self.ln_2

    def before_attention(self, x: Tensor, rope=None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().before_attention(x, rope)
        # attention itself divides by sqrt(head_dim)
        return q * self.attn.config.n_head**-0.5, k, v

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ln_1(self.mlp(self.ln_1(x + self.attn.output(y))))


BLOCKS = {"": Block, "first": FirstBlock, "later": LaterBlock}


class TaylorGPT(GPT):
    config_class = TaylorGPTConfig

    def __init__(self, config: TaylorGPTConfig):
        super().__init__(config)
        if config.write_up:
            self.ln_f = nn.Identity()  # a block ends in its own norm
            bias = torch.zeros(config.padded_vocab_size, device=self.wte.weight.device)
            self.lm_head.bias = nn.Parameter(bias)
            if bias.device.type != "meta":
                self.init_weights()

    def make_block(self, config: TaylorGPTConfig) -> nn.Module:
        return BLOCKS[config.write_up](config)

    def init_mean_std(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """GPT-2's table, or the write-up's; with the standard deviation of `init_noise` added.

        norm weights            0, 1 / sqrt(n_embd)
        biases                  0, 0
        matrices, embeddings    0, sqrt(2 / (rows + columns))   Glorot's; q, k, v are one matrix
        """
        c = self.config
        mean, std = super().init_mean_std(name, shape)
        if c.write_up and not name.endswith("bias"):
            mean = 0.0
            std = c.n_embd**-0.5 if "ln_" in name else math.sqrt(2 / sum(shape))
        return mean, math.hypot(std, c.init_noise)

    def embed(self, idx: Tensor, pos: Tensor) -> Tensor:
        x = super().embed(idx, pos)
        if self.config.position == "sinusoidal":
            x = x + sinusoidal_positions(pos, self.config.n_embd).to(x.dtype)
        return x

    def logprobs(self, x: Tensor, targets: Tensor) -> Tensor:
        if not self.config.write_up:
            return super().logprobs(x, targets)
        # the bias as one more input, which is 1
        x = F.pad(x, (0, 1), value=1.0)
        weight = torch.cat((self.lm_head.weight, self.lm_head.bias[:, None]), 1)
        c = self.config
        return linear_logprobs(x, weight, targets, c.logit_softcap, c.vocab_size)


def sinusoidal_positions(pos: Tensor, width: int) -> Tensor:
    """The write-up's positions: pos (n,) -> (n, width).

    Channel i has the angle pos 100^(-i / width), of which it is the sine if i is even and the
    cosine if i is odd. Unlike arXiv 1706.03762, a pair of channels does not share its angle.
    """
    channel = torch.arange(width, device=pos.device)
    angle = pos[:, None] * 100.0 ** (-channel / width)  # (n, C)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
