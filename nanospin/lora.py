"""LoRA (arXiv 2106.09685): W x becomes W x + (alpha / r) B A x. W is frozen, A and B are trained.

`add` puts an adapter into linear layers of a GPT's blocks and freezes everything else but a scalar
head. A fused matrix has an A and a B for each of its parts: queries, keys and values; gate and up.
So the adapters are those of PEFT, which has these parts as layers of their own.

Sampling and checkpoints use merged weights, W + (alpha / r) B A. A run resumes from W, A and B:
merging rounds, so W could not be had back exactly.
"""

import contextlib
import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor


class LoRALinear(nn.Linear):
    """A linear layer with an adapter.

    lora_A (parts r, in): drawn from U(-1, 1) / sqrt(in), as in PEFT. lora_B (out, r): 0.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, rows: list[int]):
        """rows: of each part of a fused matrix; their sum is `out`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows = rows
        self.scale = alpha / rank
        self.enabled = True
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        options = {"device": linear.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(len(rows) * rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **options))

    def forward(self, x):
        y = super().forward(x)
        if not self.enabled:
            return y
        parts = F.linear(x, self.lora_A).chunk(len(self.rows), dim=-1)  # (n, r) each
        changes = [F.linear(h, B) for h, B in zip(parts, self.lora_B.split(self.rows))]
        return y + self.scale * torch.cat(changes, dim=-1)

    def merge(self, weight, A, B):
        """W + (alpha / r) B A, float32 or wider, sharded as W. weight, A and B are the layer's, as
        a state dict has them. All ranks call this together."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        parts = zip(full(A).chunk(len(self.rows)), full(B).split(self.rows))
        change = self.scale * torch.cat([b @ a for a, b in parts])
        if isinstance(weight, DTensor):
            mesh, placements = weight.device_mesh, weight.placements
            change = distribute_tensor(change, mesh, placements, src_data_rank=None)
        return weight + change


def full(tensor):
    """A tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add(model, rank: int, alpha: float, targets: list[str], dtype=torch.float32):
    """Put adapters into the linear layers of a GPT's blocks that `targets` name, and freeze its
    weights. Frozen matrices and embeddings are stored in `dtype`, that of the matrix products.

    A target is the end of a name: c_proj, or mlp.c_proj. Exits with one line if one fits no layer,
    or if the rank exceeds a side of a matrix. Values: `init_weights`.
    """
    for name, p in model.named_parameters():
        if name.startswith("scalar_head."):
            continue
        p.requires_grad_(False)
        if p.dim() > 1:
            p.data = p.data.to(dtype)
    linears = {}
    for name, module in model.h.named_modules():
        if type(module) is nn.Linear:
            linears[name] = module
    used = set()
    for name, linear in linears.items():
        fitting = {target for target in targets if f".{name}".endswith(f".{target}")}
        used |= fitting
        if not fitting:
            continue
        rows = part_rows(name, linear.out_features, model.config)
        limit = min(linear.in_features, *rows)
        if rank > limit:
            raise SystemExit(f"config: lora_rank {rank} exceeds {limit}, a side of h.{name}")
        parent, _, attribute = name.rpartition(".")
        adapted = LoRALinear(linear, rank, alpha, rows)
        setattr(model.h.get_submodule(parent), attribute, adapted)
    unused = sorted(set(targets) - used)
    if unused:
        names = sorted({name.partition(".")[2] for name in linears})
        raise SystemExit(
            f"config: lora_targets {', '.join(unused)} fit no linear layer; "
            f"there are {', '.join(names)}"
        )


def part_rows(name: str, width: int, config) -> list[int]:
    """The rows of each part of a matrix with `width` rows: queries, keys and values; gate, up."""
    kv_width = config.n_kv_head * config.head_dim
    qkv = [config.n_head * config.head_dim, kv_width, kv_width]
    if name.endswith("attn.c_attn") and sum(qkv) == width:
        return qkv
    if name.endswith("mlp.c_fc") and 2 * config.n_inner == width:
        return [config.n_inner, config.n_inner]
    return [width]


@torch.no_grad()
def init_weights(model, seed: int, copy_=torch.Tensor.copy_):
    """Draw each A from (seed, its name), and set each B to 0. copy_: as in GPT.init_weights."""
    for name, p in model.named_parameters():
        if name.endswith(".lora_A"):
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(key)
            bound = p.shape[1] ** -0.5
            copy_(p, torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        elif name.endswith(".lora_B"):
            copy_(p, torch.zeros(p.shape))


def is_added(model) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an A or a B."""
    return name.endswith((".lora_A", ".lora_B"))


@contextlib.contextmanager
def disabled(model):
    """The model without its adapters, inside this context: the base, the reference of PPO."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


@torch.no_grad()
def merged_weights(model):
    """Yield (name, tensor) of every parameter of the model without adapters: merged, float32, where
    there was one, else as it is. All ranks iterate together."""
    state = model.state_dict()
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer, _, kind = name.rpartition(".")
        module = model.get_submodule(layer)
        if kind == "weight" and isinstance(module, LoRALinear):
            tensor = module.merge(tensor, state[f"{layer}.lora_A"], state[f"{layer}.lora_B"])
        yield name, tensor


@torch.no_grad()
def trained_weights(model) -> dict:
    """{name: tensor} of what a model with adapters trains: A, B and a scalar head, whole and on the
    CPU. All ranks call this together."""
    trained = {}
    for name, tensor in model.state_dict().items():
        if is_adapter(name) or name.startswith("scalar_head."):
            trained[name] = full(tensor).to("cpu", copy=True)
    return trained
