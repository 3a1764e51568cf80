"""The GPT. The defaults are GPT-2: learned positions, LayerNorm, GELU, biases, tied embeddings.
Options: rotary positions, RMSNorm, SwiGLU or squared ReLU, grouped-query attention, QK-norm, and
what else Llama, GPT-NeoX, OLMo 2, SmolLM3 and Gemma have.

Outside attention the model works on a flat list of tokens (n, C). nanospin/attention.py knows which
tokens attend to which.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.varlen import VarlenLayout
from loss import sequence_logprobs
from nanospin import checkpoint, distributed, flash_attention
from nanospin.attention import PackedSequences, on_gpu, round_up
from nanospin.config import model_config_from
from nanospin.flash_attention import FlashSequences
from nanospin.fused_head import linear_logprobs
from nanospin.kv_cache import KVCache
from nanospin.rotary import is_rope_scaling, rotary_angles, rotate


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # the tokenizer's; the tables are padded to a multiple of 64
    block_size: int = 1024  # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # heads of keys and values (GQA, arXiv 2305.13245); 0: n_head
    n_embd: int = 768
    head_dim: int = 0  # 0: n_embd / n_head
    n_inner: int = 0  # MLP width; 0: 4 n_embd, if gated 8/3 n_embd rounded up to a multiple of 64
    position: str = "learned"  # learned | rotary (arXiv 2104.09864, half-split as in Llama)
    rope_theta: float = 10000.0
    rope_scaling: list[float] = field(default_factory=list)  # see nanospin/rotary.py
    rope_scaling_type: str = "llama3"  # linear (2306.15595) | llama3 | yarn (2309.00071)
    rope_local_theta: float = 0.0  # of layers with a window, unscaled (Gemma 3); 0: rope_theta
    rotary_dim: int = 0  # rotated dimensions of each head, the first ones (GPT-NeoX); 0: all
    no_rope_layer_interval: int = 0  # every so many layers one has no positions (SmolLM3)
    sliding_window: int = 0  # a token attends to this many, itself included; 0: all
    full_attention_interval: int = 0  # every so many layers one has no window (Gemma 2, 3)
    attention_softcap: float = 0.0  # c > 0: scores become c tanh(scores / c) (Gemma 2)
    query_pre_attn_scalar: float = 0.0  # scores are divided by its root (Gemma); 0: head_dim
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    norm_position: str = "before"  # before attention and MLP | after (OLMo 2) | both (Gemma 2)
    parallel_residual: bool = False  # attention and MLP have the same input (GPT-J, GPT-NeoX)
    scale_embeddings: bool = False  # multiply them by the root of n_embd (Gemma)
    # gelu (tanh form) | gelu_erf | relu | relu2 (2109.08668) | swiglu, geglu (2002.05202)
    mlp: str = "gelu"
    bias: bool = True  # in linear layers and LayerNorms
    qkv_bias: bool = False  # in queries, keys and values when bias is False (Qwen 2)
    tie_embeddings: bool = True  # the LM head shares the token embedding
    qk_norm: bool = False  # RMSNorm on queries and keys
    qk_norm_over: str = "head"  # head | projection: all heads together (OLMo 2)
    logit_softcap: float = 0.0  # c > 0: logits become c tanh(logits / c) (Gemma 2)
    dropout: float = 0.0  # on the embedding and the outputs of attention and MLP
    scalar_head: bool = False  # a reward model's score, or PPO's value

    CHOICES: ClassVar[dict[str, list[str]]] = {
        "position": ["learned", "rotary"],
        "rope_scaling_type": ["linear", "llama3", "yarn"],
        "norm": ["layernorm", "rmsnorm"],
        "norm_position": ["before", "after", "both"],
        "mlp": ["gelu", "gelu_erf", "relu", "relu2", "swiglu", "geglu"],
        "qk_norm_over": ["head", "projection"],
    }

    # upper bounds of sizes; of those not listed 2**24
    MOST: ClassVar[dict[str, int]] = {
        "block_size": 2**28,
        "n_layer": 10_000,
        "n_head": 4096,
        "n_kv_head": 4096,
        "head_dim": 2**16,
    }

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.rope_scaling = list(self.rope_scaling)
        if not self.head_dim and min(self.n_embd, self.n_head) > 0:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}; "
                    "or set head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if not self.n_inner and self.mlp in GATED:
            self.n_inner = round_up(-(-8 * self.n_embd // 3), 64)
        elif not self.n_inner:
            self.n_inner = 4 * self.n_embd
        self.check()

    def check(self):
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        sizes = ["vocab_size", "block_size", "n_layer", "n_head", "n_kv_head"]
        for name in [*sizes, "n_embd", "n_inner", "head_dim"]:
            value, most = getattr(self, name), self.MOST.get(name, 2**24)
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, not {value}")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        self.check_rotary()
        for name in ("no_rope_layer_interval", "full_attention_interval"):
            if not 0 <= getattr(self, name) <= self.n_layer:
                raise ValueError(f"{name} must be from 0 to n_layer, not {getattr(self, name)}")
        for name in ("sliding_window", "attention_softcap", "query_pre_attn_scalar"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    def check_rotary(self):
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim {self.head_dim}, "
                f"not {self.rotary_dim}"
            )
        if self.rope_scaling and not is_rope_scaling(self.rope_scaling, self.rope_scaling_type):
            raise ValueError(
                "rope_scaling must be empty, or [factor, low turns, high turns, length] (linear: "
                "[factor]; yarn: and the attention factor at the end) "
                f"with low < high and all above 0, not {self.rope_scaling}"
            )
        for name in ("rope_theta", "rope_local_theta"):
            value = getattr(self, name)
            if not value > 1 and not (value == 0 and name == "rope_local_theta"):
                raise ValueError(f"{name} must be above 1, got {value}")

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, 64)

    def window(self, layer: int) -> int:
        """The sliding window of a layer, or 0."""
        return 0 if is_nth(layer, self.full_attention_interval) else self.sliding_window


GATED = ("swiglu", "geglu")


def is_nth(layer: int, interval: int) -> bool:
    """Whether a layer is the last of `interval` layers; interval 0: none is."""
    return interval > 0 and (layer + 1) % interval == 0


# ---------------------------------------------------------------------------------- the blocks


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x). On a GPU in the dtype of x, weights included, as under FSDP2's mixed precision: one
    kernel, which computes in float32. Autocast would convert x to float32 and back."""
    is_known = isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.weight is not None
    if not on_gpu(x) or not is_known:
        return norm(x)
    weight = norm.weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(x, norm.normalized_shape, weight, norm.eps)
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def norm_heads(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm of each head of x (n, H, D), or of all together if the norm is so wide, in the dtype
    of x."""
    if norm.normalized_shape[0] > x.shape[-1]:
        return norm_heads(norm, x.flatten(1)).view(x.shape)
    return normalize(norm, x).to(x.dtype)


class Attention(nn.Module):
    """The projections around attention. Which tokens attend to which, and softmax(q k) v itself, is
    `sequences.attend` in Block.forward, see nanospin/attention.py."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        qkv_width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, qkv_width, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:
            whole = config.qk_norm_over == "projection"
            q_heads, k_heads = (config.n_head, config.n_kv_head) if whole else (1, 1)
            self.q_norm = nn.RMSNorm(q_heads * config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(k_heads * config.head_dim, eps=config.norm_eps)

    def queries_keys_values(self, x: Tensor, rope=None) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads = self.c_attn(x).view(len(x), -1, c.head_dim)  # (n, H + 2 Hkv, D)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        if c.qk_norm:
            q = norm_heads(self.q_norm, q)
            k = norm_heads(self.k_norm, k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if c.query_pre_attn_scalar:  # attention itself divides by the root of head_dim
            q = q * (c.head_dim / c.query_pre_attn_scalar) ** 0.5
        return q, k, v

    def output(self, y: Tensor) -> Tensor:
        """The heads' outputs y (m, H, D) -> (m, C)."""
        return F.dropout(self.c_proj(y.flatten(1)), self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        width = 2 * config.n_inner if config.mlp in GATED else config.n_inner
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def inner(self, x: Tensor) -> Tensor:
        if self.config.mlp == "gelu":
            return self.fc_gelu(x)
        x = self.c_fc(x)
        if self.config.mlp == "gelu_erf":
            return F.gelu(x)
        if self.config.mlp == "relu":
            return F.relu(x)
        if self.config.mlp == "relu2":
            return F.relu(x).square()
        gate, x = x.chunk(2, dim=-1)
        if self.config.mlp == "geglu":
            return F.gelu(gate, approximate="tanh") * x
        return F.silu(gate) * x

    def fc_gelu(self, x: Tensor) -> Tensor:
        """One fused kernel while sampling on a CPU: nanospin/decoding.py replaces this method."""
        return F.gelu(self.c_fc(x), approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.inner(x)), self.config.dropout, self.training)


class Block(nn.Module):
    """Norms, attention and MLP. `sequences` knows the layout: PackedSequences or FlashSequences for
    whole sequences, KVCache while decoding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        before = config.norm_position != "after"
        after = config.norm_position != "before"
        self.parallel_residual = config.parallel_residual
        self.ln_1 = make_norm(config) if before else nn.Identity()
        self.attn = Attention(config)
        self.ln_1_post = make_norm(config) if after else nn.Identity()
        self.ln_2 = make_norm(config) if before else nn.Identity()
        self.mlp = MLP(config)
        self.ln_2_post = make_norm(config) if after else nn.Identity()

    def forward(
        self,
        x: Tensor,
        sequences: PackedSequences | FlashSequences | KVCache,
        layer: int,
        rope=None,
    ) -> Tensor:
        """x (n, C) -> (m, C): the tokens whose output is needed, see `sequences.select`."""
        q, k, v = self.before_attention(x, rope)
        y = sequences.attend(layer, q, k, v)
        return self.after_attention(sequences.select(x), y)

    # distributed.compile_blocks compiles these two, for any layout and length, or all of forward.

    def before_attention(self, x: Tensor, rope=None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.queries_keys_values(normalize(self.ln_1, x), rope)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        attended = x + normalize(self.ln_1_post, self.attn.output(y)).to(x.dtype)
        mlp_input = x if self.parallel_residual else attended
        out = self.mlp(normalize(self.ln_2, mlp_input))
        return attended + normalize(self.ln_2_post, out).to(x.dtype)


# ----------------------------------------------------------------------------------- the model


class GPT(nn.Module):
    """GPT(config) is initialised. Built under `torch.device("meta")` it has only shapes, and gets
    storage by `to_empty` and values by `init_weights` or from a checkpoint.

    Tokens come in one of three layouts:

        rows     idx (B, T), right-padded
        packed   idx (n,): sequences one after the other, K responses sharing their prompt, as pos,
                 sequence_id and response_id (n,) say; see nanospin/attention.py
        decode   idx (B,) and pos (B,): one more token of each row of a KV cache
    """

    config_class = GPTConfig
    forward_methods = ("values", "logps_and_values")  # beside forward; FSDP2 has to know them

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.autocast_dtype = None  # dtype of the matrix products; None: that of the weights
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(self.make_block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.scalar_head:
            self.scalar_head = nn.Linear(config.n_embd, 1, bias=False)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    def make_block(self, config: GPTConfig) -> nn.Module:
        return Block(config)

    # ---- initialisation and checkpoints

    @torch.no_grad()
    def init_weights(self, seed: int = 0, copy_=torch.Tensor.copy_):
        """Draw every weight from (seed, its name), so that neither order nor sharding changes it.

        copy_(parameter, full tensor) may keep only this rank's shard of the tensor.
        """
        for name, p in self.named_parameters():
            mean, std = self.init_mean_std(name, p.shape)
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(key)
            copy_(p, torch.empty(p.shape).normal_(mean, std, generator=generator))

    def init_mean_std(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """Mean and standard deviation of a parameter at initialisation: GPT-2's table.

        norm weights                1, 0
        biases                      0, 0
        output projections          0, 0.02 / sqrt(2 n_layer)     added to the residual stream
        other matrices, embeddings  0, 0.02

        A parameter that you add gets its value here, not from its module. Raises ValueError for a
        vector or scalar that is none of these: a norm or a gate drawn from N(0, 0.02) would only
        train badly.
        """
        if name.endswith("bias"):
            return 0.0, 0.0
        if "ln_" in name or "_norm." in name:
            return 1.0, 0.0
        if name.endswith("c_proj.weight"):
            return 0.0, 0.02 / math.sqrt(2 * self.config.n_layer)
        if len(shape) < 2:
            raise ValueError(f"{name}: give its initial mean and deviation in init_mean_std")
        return 0.0, 0.02

    @classmethod
    def from_checkpoint(cls, path: str, device="cpu", dtype: torch.dtype = torch.float32):
        """(model in evaluation mode, tokenizer, meta) of a run folder or a checkpoint, unsharded.

        The matrix products are in `dtype`. The scalar head is loaded for reward models only. Exits
        with one line if there is no readable checkpoint.
        """
        path = checkpoint.resolve(path)
        meta = distributed.run_on_rank0(checkpoint.read_meta, path)
        settings = meta["model"] | {"scalar_head": meta["config"]["stage"] == "reward"}
        with torch.device("meta"):
            model = cls(model_config_from(settings, cls.config_class, f"{path}/meta.json"))
        checkpoint.check_weights(path, model)
        model.to_empty(device=device)
        checkpoint.load_weights(path, model)
        distributed.set_autocast_dtype(model, dtype)
        return model.eval(), checkpoint.read_tokenizer(path, meta), meta

    # ---- forward

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        logit_positions: Tensor | None = None,
        **layout,
    ) -> Tensor:
        """Log-probabilities of the targets, float32, 0 where the target is -1. Without targets the
        logits (..., V), float32.

        logit_positions (m,): compute only these positions of the flat list of tokens, which may
        repeat (a prompt's last token predicts the first token of each response). targets are then
        (m,), else of the shape of idx.
        layout: pos, sequence_id, response_id, varlen and cache, see `hidden`.
        """
        with self.autocast(idx.device):
            x = self.hidden_at(logit_positions, idx, **layout)
            return self.logits(x) if targets is None else self.logprobs(x, targets)

    def values(self, idx: Tensor, value_positions: Tensor, **layout) -> Tensor:
        """The scalar head at value_positions (r,) of the flat list of tokens -> (r,) float32."""
        with self.autocast(idx.device):
            return self.scalars(self.hidden_at(value_positions, idx, **layout))

    def logps_and_values(
        self,
        idx: Tensor,
        targets: Tensor,
        value_positions: Tensor,
        *,
        logit_positions: Tensor | None = None,
        **layout,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with targets and `values` in one pass."""
        with self.autocast(idx.device):
            if logit_positions is None:
                x = self.hidden(idx, **layout)
                values = self.scalars(x.flatten(0, -2).index_select(0, value_positions))
                return self.logprobs(x, targets), values
            positions = torch.cat((logit_positions, value_positions))
            x = self.hidden_at(positions, idx, **layout)
            m = len(logit_positions)
            return self.logprobs(x[:m], targets), self.scalars(x[m:])

    def autocast(self, device: torch.device):
        dtype = self.autocast_dtype or torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.autocast_dtype is not None)

    def hidden_at(self, positions: Tensor | None, idx: Tensor, **layout) -> Tensor:
        """`hidden` at positions (m,) of the flat list of tokens, in any order, which may repeat ->
        (m, C); at all positions if it is None."""
        if positions is None:
            return self.hidden(idx, **layout)
        if on_gpu(idx):
            # Few are repeated. To find them, the CPU would have to wait for the GPU.
            return self.hidden(idx, **layout, query_positions=positions)
        computed, where = positions.unique(return_inverse=True)
        return self.hidden(idx, **layout, query_positions=computed).index_select(0, where)

    def hidden(
        self,
        idx: Tensor,
        *,
        pos: Tensor | None = None,
        sequence_id: Tensor | None = None,
        response_id: Tensor | None = None,
        varlen: VarlenLayout | None = None,
        cache: KVCache | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """The normalized output of the last block (..., C).

        pos, sequence_id, response_id (n,): of packed tokens, see `data.batch.Batch`. pos alone: of
        rows (B, T) that do not begin at 0, or of decoded tokens (B,).
        varlen: the lengths of packed tokens, for FlashAttention on a GPU.
        cache: a KVCache, filled from rows or extended by one token a row.
        query_positions (m,): only at these positions of the flat list, (m, C), which on a CPU must
        be ascending. For the other tokens, mostly prompts, the last block computes queries, keys
        and values only, and FlashAttention also the attention.
        """
        c = self.config
        shape = None
        if idx.dim() == 2:
            B, T = idx.shape
            if T > c.block_size:
                raise ValueError(f"{T} tokens do not fit block_size {c.block_size}")
            pos = torch.arange(T, device=idx.device).expand(B, T) if pos is None else pos
            pos = pos.expand(B, T).flatten()
            sequence_id = torch.arange(B, device=idx.device)[:, None].expand(B, T).flatten()
            response_id = torch.zeros_like(sequence_id)
            shape = (B, T)
        windows = [c.window(layer) for layer in range(c.n_layer)]
        dtype = self.autocast_dtype or self.wte.weight.dtype
        flash = flash_attention.can_attend(varlen, c, idx.device, dtype)
        if flash:
            idx, pos = idx.index_select(0, varlen.order), pos.index_select(0, varlen.order)
            by_window = {0: FlashSequences(varlen)}
        elif sequence_id is None:  # decode
            cache.begin_step(pos, windows, c.n_head // c.n_kv_head, c.attention_softcap)
            by_window = dict.fromkeys(windows, cache)
        else:
            packed = PackedSequences(
                sequence_id,
                response_id,
                pos,
                shape=shape,
                kv_cache=cache,
                softcap=c.attention_softcap,
            )
            by_window = {window: packed.with_window(window) for window in set(windows)}

        x = self.block_input(idx.flatten(), pos)  # (n, C)
        rope = rotary_angles(c, pos) if c.position == "rotary" else None
        local_rope = rotary_angles(c, pos, local=True) if c.rope_local_theta else rope
        for layer, (block, window) in enumerate(zip(self.h, windows)):
            sequences = by_window[window]
            if layer == c.n_layer - 1 and (flash or query_positions is not None):
                sequences = sequences.with_queries(query_positions)
            angles = local_rope if window else rope
            if is_nth(layer, c.no_rope_layer_interval):
                angles = None
            x = block(x, sequences, layer, angles)
        # a scalar head wants float32
        x = self.ln_f(x) if c.scalar_head else normalize(self.ln_f, x)
        return x if query_positions is not None else x.view(*idx.shape, c.n_embd)

    def block_input(self, idx: Tensor, pos: Tensor) -> Tensor:
        """`embed` with dropout, in the dtype of the residual stream. Can be compiled."""
        x = F.dropout(self.embed(idx, pos), self.config.dropout, self.training)
        if on_gpu(x) and self.autocast_dtype:
            x = x.to(self.autocast_dtype)  # as FSDP2's mixed precision has it
        return x

    def embed(self, idx: Tensor, pos: Tensor) -> Tensor:
        """Token embeddings, plus learned positions: idx, pos (n,) -> (n, C)."""
        x = self.wte(idx)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        if self.config.position == "learned":
            x = x + self.wpe(pos)
        return x

    def head(self, x: Tensor) -> Tensor:
        """The LM head: x (..., C) -> logits (..., padded V), before the soft cap.

        While sampling on a CPU, nanospin/decoding.py replaces this method by the same product with
        prepacked weights. To change the head, change `logits` and `logprobs`.
        """
        if self.config.tie_embeddings:
            return F.linear(x, self.wte.weight)
        return self.lm_head(x)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V) float32, without the padding of the vocabulary."""
        c = self.config
        logits = self.head(x).float()[..., : c.vocab_size]
        if c.logit_softcap:
            logits = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
        return logits

    def logprobs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of targets (...) at x (..., C), a chunk of logits at a time."""
        c = self.config
        weight = self.wte.weight if c.tie_embeddings else self.lm_head.weight
        return linear_logprobs(x, weight, targets, c.logit_softcap, c.vocab_size)

    def scalars(self, x: Tensor) -> Tensor:
        """The scalar head: x (r, C) -> (r,), float32 or wider. Autocast would round a matmul."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * self.scalar_head.weight.to(x.dtype)).sum(-1)

    # ---- sizes

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context_length=None, target_fraction: float = 1.0) -> float:
        """FLOPs of a training step per token: 6 per multiplied weight, plus attention's 12 L C T
        (PaLM, arXiv 2204.02311, appendix B) with T = context_length, or block_size.

        target_fraction: share of the tokens that have a target. Only they reach the LM head, and in
        the last block more than keys and values.
        """
        c = self.config
        block = sum(p.numel() for p in self.h[-1].parameters() if p.dim() == 2)
        only_for_targets = block - 2 * c.n_kv_head * c.head_dim * c.n_embd
        weights = c.n_layer * block - (1 - target_fraction) * only_for_targets
        weights += target_fraction * c.padded_vocab_size * c.n_embd
        layers = c.n_layer - 1 + target_fraction
        context_length = context_length or c.block_size
        return 6 * weights + 12 * layers * c.n_head * c.head_dim * context_length


# ------------------------------------------------------------------------- a batch of responses


def response_logps(model: GPT, batch) -> Tensor:
    """log pi(y_k|x) of every response of a Batch (data/batch.py) -> (B, K), 0 where it is absent.
    Preference and spin train with it; their reference and evaluation use it too."""
    B, K = batch.response_mask.shape
    logps = model(batch.idx, batch.targets, **batch.layout())
    return sequence_logprobs(logps, batch.response_index, B * K).view(B, K)


def response_scores(model: GPT, batch) -> Tensor:
    """A reward model's score of every response -> (B, K), 0 where it is absent."""
    B, K = batch.response_mask.shape
    scores = model.values(batch.idx, batch.value_positions, **batch.layout())
    return scores.new_zeros(B * K).index_put((batch.value_response_index,), scores).view(B, K)
