"""FSDP2, means over ranks, collective calls: all that knows of ranks. One process needs none of it and is not wrapped.

The parallel code stands beside the model: `wrap` shards the blocks of a GPT built on the meta device, `copy_` fills a
parameter, sharded or not, from a whole tensor, and `whole` gathers a plain copy for sampling.
"""

import contextlib
import ctypes
import functools
import os
import platform
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

process_groups = {}  # launch.join's: "saves", the process group of checkpoint.py's thread; "store", this start's
heartbeat = {"at": "the start", "since": time.monotonic(), "leaving": False}


def at(text):
    """Note what this rank is about."""
    heartbeat.update(at=text, since=time.monotonic())


def meet():
    """Note that this rank has come as far as the next collective call."""
    heartbeat["since"] = time.monotonic()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_device(cfg):
    """Choose device and precision. Returns the device."""
    if (cfg.device or "cuda") == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    elif cfg.device == "cuda":
        raise SystemExit("device is cuda, and torch sees no GPU")
    else:
        device = torch.device("cpu")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    configure_torch(device, cfg.matmul_precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def configure_torch(device, precision=""):
    """Process-wide settings. On a CPU "highest" takes MKL for float32 products and "medium" oneDNN, which is still float32 but
    on chips with AMX or its like. On AMD's, which have none, oneDNN is up to twice as fast; on Intel's MKL is the faster
    (Cascade Lake: by a fifth of a training step). "high" is TF32 on a GPU. Where the C library is glibc, freed memory stays
    with the process: by default each step's large buffers go back to the system and are faulted in again, a fifth of a small
    model's step. A GPU's memory is taken in segments that grow, unless the environment says, before CUDA starts: a freed buffer is no
    room for a longer one, and batches and caches have every length. What standard output cannot encode is escaped: a row's text must not end a run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    torch.set_float32_matmul_precision(
        precision
        or (
            "high"
            if torch.device(device).type == "cuda"
            else "medium"
            if cpu_info("vendor_id") == "AuthenticAMD"
            else "highest"
        )
    )
    if (
        torch.device(device).type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    ):  # the variable's older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def cpu_info(key):
    """What Linux says of the processor, "vendor_id" or "model name"; "" elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((text.split(":", 1)[1].strip() for text in f if text.startswith(key)), "")
    except OSError:
        return ""


def compute_dtype(cfg, device):
    """The dtype of the products: bfloat16 where the GPU has it, unless the config says."""
    if cfg.dtype:
        return getattr(torch, cfg.dtype)
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def prepare_model(model, device, dtype, cfg):
    """Give a GPT of the meta device its storage, sharded if there are several ranks. Weights and reductions are float32,
    products are `dtype`. The embedding and the head it may be tied to stand in the root unit. With `shards` there is a copy
    of the weights for every so many ranks (HSDP)."""
    for block in (
        model.h[:: cfg.activation_checkpointing or len(model.h)]
        if cfg.activation_checkpointing
        else []
    ):
        block.forward = functools.partial(checkpointed_forward, block.forward)
    if cfg.compile:
        for block in model.h:
            block.compile()
    if world_size() == 1:
        return set_autocast_dtype(model.to_empty(device=device), dtype)
    shards = cfg.hsdp_shard_size or world_size()
    if world_size() % shards:
        raise SystemExit(
            f"config: shards {cfg.hsdp_shard_size} must divide the number of ranks, {world_size()}"
        )
    mesh = (
        init_device_mesh(device.type, (world_size(),))
        if shards == world_size()
        else init_device_mesh(
            device.type, (world_size() // shards, shards), mesh_dim_names=("replicate", "shard")
        )
    )
    # inputs stay as they are: the rotary angles must not become bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.h:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for i in range(len(model.h)) if cfg.prefetch else ():
        model.h[i].set_modules_to_forward_prefetch(list(model.h[i + 1 : i + 1 + cfg.prefetch]))
        model.h[i].set_modules_to_backward_prefetch(
            list(model.h[max(0, i - cfg.prefetch) : i])[::-1]
        )
    return model.to_empty(device=device)


def checkpointed_forward(forward, *args):
    """A forward pass that keeps its inputs alone, where there will be a backward one. (Elsewhere too `checkpoint` would ask for the random
    state, which a GPU that captures a step cannot tell.)"""
    return (
        checkpoint(forward, *args, use_reentrant=False)
        if torch.is_grad_enabled()
        else forward(*args)
    )


def set_autocast_dtype(model, dtype):
    """Products of an unsharded model in `dtype`, by autocast."""
    model.products = dtype if dtype != torch.float32 else None
    return model


@torch.no_grad()
def copy_parameter_(p, tensor):
    """Fill a parameter from the whole tensor, which every rank has; a sharded one takes its part."""
    if isinstance(p, DTensor):
        tensor = distribute_tensor(
            tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None
        )
    p.copy_parameter_(tensor)


def gather_full_model(model, dtype):
    """A plain copy of a sharded model on every rank, in the dtype of its products, which runs without the others; an
    unsharded model itself."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        plain = type(model).__mro__[2](
            model.config
        )  # FSDP2 makes a class of (FSDPModule, the model's own)
    plain.load_state_dict(
        {k: v.full_tensor().to(dtype) for k, v in model.state_dict().items()}, assign=True
    )
    return plain


@contextlib.contextmanager
def lockstep_forward(model):
    """A sharded model that each rank may run as often as it likes: before every forward pass the ranks say that they go on,
    and one that is done runs along, on a token of its own, until all are. Its weights stay sharded between the blocks."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    along = [False]

    def go_on(*_):
        if not along[0]:
            all_reduce_sum([1], model.wte.weight.device)

    hook = model.register_forward_pre_hook(go_on, prepend=True)
    try:
        yield model
        along[0] = True
        while all_reduce_sum([0], model.wte.weight.device)[0]:
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=model.wte.weight.device))
    finally:
        hook.remove()
    reshard(model)


def reshard(model):
    """After a forward pass without a backward one: FSDP2 would leave the root unit's weights whole, as other tensors than
    the optimizer's, and the blocks' if they are not resharded after forward."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


MICRO_BATCH_TOKENS = {
    "cpu": 1536,
    "cuda": 32768,
}  # on a CPU about what its caches hold, on a GPU what fills it


def micro_batch_tokens(cfg, device):
    """How many tokens a rank takes at a time."""
    return cfg.micro_batch_tokens or MICRO_BATCH_TOKENS[torch.device(device).type]


def all_reduce_sum(values, device):
    """Sum a list of numbers or 0-dim tensors over the ranks, in float64, with one message. Returns floats."""
    t = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(device).detach() for v in values])
    if world_size() > 1:
        meet()
        dist.all_reduce(t)
    return t.tolist()


def clip_grad_norm_(parameters, max_norm):
    """Clip by the global norm (0: do not). Returns the norm before, a 0-dim tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_gather_object(value):
    """[value of each rank], on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        meet()
        dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value):
    """Rank 0's value, on every rank: what is on disk is asked once, or ranks that look at different instants part ways."""
    values = [value]
    if world_size() > 1:
        meet()
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier():
    if world_size() > 1:
        meet()
        dist.barrier()


def batches_of_rank(batches):
    """This rank's part of a list of batches (lists). Every rank gets the same number, so that they may run a sharded model
    together; where the batches run out a rank gets one of the first one's again."""
    for i in range(0, len(batches), world_size()):
        yield batches[i + rank()] if i + rank() < len(batches) else batches[0][:1]


def merge_results(n, results):
    """{index: value} of each rank -> the n values, on every rank."""
    everything = {i: v for part in all_gather_object(results) for i, v in part.items()}
    return [everything[i] for i in range(n)]
