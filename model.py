"""The GPT: configuration, blocks, initialisation. One class, two blocks by config:

the classic one (GPT-2: learned positions, LayerNorm, GELU, biases, tied embeddings), which the defaults give, and the
modern one (rotary positions, RMSNorm, SwiGLU or squared ReLU, grouped-query attention, QK-norm, untied head, soft cap).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanospin.attention import Packed
from loss import linear_logprobs


@dataclass
class GPTConfig:
    vocab_size: int = (
        50257  # of the tokenizer, end-of-text included; the tables are padded to a multiple of 64
    )
    block_size: int = 1024  # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # key/value heads of grouped-query attention (arXiv 2305.13245); 0: n_head
    n_embd: int = 768
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    n_inner: int = (
        0  # width inside the MLP; 0: 4 n_embd, for swiglu 8/3 n_embd to the next multiple of 64
    )
    position: str = "learned"  # learned | rotary (arXiv 2104.09864, half-split as in Llama) | sinusoidal (1706.03762)
    rope_theta: float = 10000.0
    rope_scaling: list[
        float
    ] = ()  # Llama 3's: factor, low and high turns, length; a frequency of few turns in that length is divided by factor
    sliding_window: int = 0  # a token sees so many of its text, itself the last (sliding window, arXiv 2310.06825); 0: all before it
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = (
        "gelu"  # gelu (tanh form) | relu | relu2 (arXiv 2109.08668) | swiglu (arXiv 2002.05202)
    )
    bias: bool = True  # in linear layers and LayerNorms
    qkv_bias: bool = False  # in queries, keys and values, where bias is False (Qwen 2)
    tie_embeddings: bool = True  # one table for embedding and head
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    logit_softcap: float = 0.0  # c > 0: logits become c tanh(logits / c)
    dropout: float = 0.0  # of the embedding and of what is added to the residual stream
    scalar_head: bool = False  # a scalar beside the head: a reward model's score, PPO's value of a state

    # habits of the block that config/tn_shp_*.py reproduce
    head_bias: bool = False  # a bias in the untied head
    attn_proj: bool = True  # attention's output projection
    attn_scale: str = (
        "head"  # scores are divided by the square root of the width of: head | embd (all heads)
    )
    mlp_alone: bool = False  # the MLP takes attention's norm again, and nothing is added around it
    init_scheme: str = "gpt2"  # gpt2 (init_mean_std's table) | glorot: N(0, 2 / (fan_in + fan_out)) for every matrix
    init_noise: float = (
        0.0  # standard deviation of what is added to every parameter, norms and biases too
    )

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.rope_scaling = list(self.rope_scaling)
        if not self.head_dim and min(self.n_embd, self.n_head) > 0:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, or head_dim be given"
                )
            self.head_dim = self.n_embd // self.n_head
        if not self.n_inner:
            self.n_inner = (
                -(-8 * self.n_embd // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.n_embd
            )
        for name, choices in [
            ("position", ["learned", "rotary", "sinusoidal"]),
            ("norm", ["layernorm", "rmsnorm"]),
            ("mlp", ["gelu", "relu", "relu2", "swiglu"]),
            ("attn_scale", ["head", "embd"]),
            ("init_scheme", ["gpt2", "glorot"]),
        ]:
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        for name in [
            "vocab_size",
            "block_size",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "n_inner",
            "head_dim",
        ]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        if self.rope_scaling and not (
            len(self.rope_scaling) == 4
            and min(self.rope_scaling) > 0
            and self.rope_scaling[1] < self.rope_scaling[2]
        ):
            raise ValueError(
                f"rope_scaling must be empty or factor, low < high turns, length, all above 0, not {self.rope_scaling}"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if not self.attn_proj and self.n_head * self.head_dim != self.n_embd:
            raise ValueError("attn_proj = False needs heads that are together as wide as the model")
        if self.head_bias and self.tie:
            raise ValueError("head_bias needs a head of its own: tie_embeddings = False")
        if self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if self.init_noise < 0:
            raise ValueError(f"init_noise must not be negative, got {self.init_noise}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def padded_vocab(self):
        return -(-self.vocab_size // 64) * 64


def make_norm(config, width):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rotate(x, cos, sin):
    """Rotary positions on x (n, H, D), half-split; cos, sin (n, 1, D/2) float32."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(
            config.n_embd,
            (config.n_head + 2 * config.n_kv_head) * config.head_dim,
            bias=config.bias or config.qkv_bias,
        )
        if config.attn_proj:
            self.c_proj = nn.Linear(
                config.n_head * config.head_dim, config.n_embd, bias=config.bias
            )
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x, texts, layer, rope=None):
        c = self.config
        q, k, v = (
            self.c_attn(x)
            .view(len(x), -1, c.head_dim)
            .split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        )
        if c.qk_norm:
            q, k = (
                self.q_norm(q).to(v.dtype),
                self.k_norm(k).to(v.dtype),
            )  # a GPU's autocast may norm in float32
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if c.attn_scale == "embd":
            q = q * c.n_head**-0.5  # attend divides by the square root of the head width
        y = texts.attend(layer, q, k, v).flatten(1)
        return F.dropout(self.c_proj(y) if c.attn_proj else y, c.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def inner(self, x):
        x = self.c_fc(x)
        if self.config.mlp == "gelu":
            return F.gelu(x, approximate="tanh")
        if self.config.mlp == "relu":
            return F.relu(x)
        if self.config.mlp == "relu2":
            return F.relu(x).square()
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x

    def forward(self, x):
        return F.dropout(self.c_proj(self.inner(x)), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = Attention(config)
        if not config.mlp_alone:
            self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, texts, layer, rope=None):
        y = self.attn(self.ln_1(x), texts, layer, rope)
        x = (x if texts.asked is None else x.index_select(0, texts.asked)) + y
        if self.config.mlp_alone:
            return self.mlp(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT(config) is initialised at once; built under `torch.device("meta")` it has shapes alone, and takes storage by
    `to_empty` and values by `init_weights` or a checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.products = None  # dtype of the matrix products, by autocast; None: the weights'
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab, bias=config.head_bias)
        if config.scalar_head:
            self.scalar = nn.Linear(
                config.n_embd, 1, bias=False
            )  # a ranking leaves a bias to the gradient's rounding
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=0, copy_=torch.Tensor.copy_):
        """Draw every weight from (seed, its name), so that neither the order nor a sharding changes it.
        copy_(parameter, whole tensor) may keep only a part of it."""
        for name, p in self.named_parameters():
            mean, std = init_mean_std(name, p.shape, self.config)
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            copy_(
                p,
                torch.empty(p.shape).normal_(
                    mean, std, generator=torch.Generator().manual_seed(key)
                ),
            )

    def forward(
        self, idx, targets=None, *, pos=None, doc=None, branch=None, at=None, read=None, cache=None
    ):
        """idx (B, T): rows, right padding only; or (n,): packed texts with pos, doc, branch (n,), as `Packed` says.
        With targets, -1 where nothing is asked: their logps, float32. Without: logits (..., V) float32, V without the padding.
        at (m,): only of these places in the flat list of tokens, which may come more than once; targets are (m,) then.
        read (r,): places of that list whose scalar (r,), float32, is asked for: alone, or after the logps if there are targets.
        cache: a KVCache to write the rows into, or, with pos (B,) and idx (B,), to go on from by one token.
        """
        c = self.config
        if idx.dim() == 2 and idx.shape[1] > c.block_size:
            raise ValueError(f"{idx.shape[1]} tokens do not fit block_size {c.block_size}")
        with torch.autocast(
            idx.device.type, self.products or torch.bfloat16, enabled=self.products is not None
        ):
            asked = None
            if at is not None or read is not None and targets is None:
                asked = torch.cat([places for places in (at, read) if places is not None]).unique()
                at, read = (
                    None if places is None else torch.searchsorted(asked, places)
                    for places in (at, read)
                )
            x = self.hidden(idx, pos, doc, branch, cache, asked)
            scalars = None if read is None else self.scalars(x.flatten(0, -2).index_select(0, read))
            if read is not None and targets is None:
                return scalars
            if at is not None:
                x = x.flatten(0, -2).index_select(0, at)
            if targets is None:
                logits = self.head(x).float()[..., : c.vocab_size]
                return (
                    c.logit_softcap * torch.tanh(logits / c.logit_softcap)
                    if c.logit_softcap
                    else logits
                )
            weight = self.wte.weight if c.tie_embeddings else self.lm_head.weight
            if c.head_bias:  # one more column of weights, whose input is 1
                x, weight = (
                    F.pad(x, (0, 1), value=1.0),
                    torch.cat((weight, self.lm_head.bias[:, None]), 1),
                )
            logps = linear_logprobs(x, weight, targets, c.logit_softcap, c.vocab_size)
            return logps if read is None else (logps, scalars)

    def head(self, x):
        """(..., C) -> (..., padded V): logits before the soft cap."""
        return F.linear(x, self.wte.weight) if self.config.tie_embeddings else self.lm_head(x)

    def hidden(self, idx, pos=None, doc=None, branch=None, cache=None, asked=None):
        """The last layer's normalised output (..., C). asked (m,), rising: of these places alone (m, C); of the others, prompts
        mostly, the last block takes no more than keys and values (c_attn makes their queries too, which nobody reads)."""
        c = self.config
        if idx.dim() == 2:
            B, T = idx.shape
            pos = (
                torch.arange(T, device=idx.device).expand(B, T) if pos is None else pos.expand(B, T)
            )
            doc = torch.arange(B, device=idx.device).repeat_interleave(T)
            texts = Packed(
                doc, torch.zeros_like(doc), pos.flatten(), c.sliding_window, (B, T), cache
            )
        elif cache is not None:
            texts = cache
            cache.at(pos, c.sliding_window)
        else:
            texts = Packed(doc, branch, pos, c.sliding_window)
        pos = pos.flatten()
        x = self.wte(idx.flatten())  # (n, C)
        rope = None
        if c.position == "learned":
            x = x + self.wpe(pos)
        elif c.position == "sinusoidal":
            angle = pos[:, None] * 10000.0 ** (
                -torch.arange(0, c.n_embd, 2, device=idx.device) / c.n_embd
            )  # (n, C/2)
            x = x + torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(x.dtype)
        else:
            freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=idx.device) / c.head_dim)
            if c.rope_scaling:
                factor, low, high, length = c.rope_scaling
                kept = ((length * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
                freq = freq * (kept + (1 - kept) / factor)
            angle = (pos[:, None] * freq)[:, None]  # (n, 1, D/2)
            rope = angle.cos(), angle.sin()
        x = F.dropout(x, c.dropout, self.training)
        for layer, block in enumerate(self.h):
            if asked is not None and layer == c.n_layer - 1:
                texts = texts.only(asked)
            x = block(x, texts, layer, rope)
        return self.ln_f(x).view(*(idx.shape if asked is None else asked.shape), c.n_embd)

    def scalars(self, x):
        """The scalar head on (r, C) -> (r,), float32 or wider; no matrix product, which autocast would round."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * self.scalar.weight.to(x.dtype)).sum(-1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length=None, asked=1.0):
        """FLOPs of a training step a token: 6 a weight that is multiplied, and attention's 12 L C T
        (PaLM, arXiv 2204.02311, appendix B), T = `length` or block_size; `asked` is the share of tokens with a target,
        which alone reach the head, and in the last block more than keys and values."""
        c = self.config
        block = sum(p.numel() for p in self.h[-1].parameters() if p.dim() == 2)
        last = block - 2 * c.n_kv_head * c.head_dim * c.n_embd
        weights = c.n_layer * block - (1 - asked) * last + asked * c.padded_vocab * c.n_embd
        return 6 * weights + 12 * (c.n_layer - 1 + asked) * c.n_head * c.head_dim * (
            length or c.block_size
        )


def init_mean_std(name, shape, config):
    """Mean and standard deviation of a parameter by its name: 1 for a norm's weight and 0 for biases, with no deviation but
    `init_noise`. GPT-2's table: what is added to the residual stream is scaled down by the number of additions."""
    if name.endswith("bias"):
        mean, std = 0.0, 0.0
    elif ".ln_" in "." + name or "_norm." in name:
        mean, std = 1.0, 0.0
    elif config.init_scheme == "glorot":
        fans = (
            2 * config.n_embd if name.endswith("c_attn.weight") else sum(shape)
        )  # queries, keys and values are a matrix each
        mean, std = 0.0, math.sqrt(2 / fans)
    else:
        mean, std = (
            0.0,
            0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02,
        )
    return mean, math.hypot(std, config.init_noise)
