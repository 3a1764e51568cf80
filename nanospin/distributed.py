"""FSDP2, and all communication between ranks: collective calls and sums.

A model's forward pass does not know about ranks. `prepare_model` gives storage to a GPT that was
built on the meta device and shards it if there are several ranks, `copy_parameter_` fills a
parameter from a full tensor, and `gather_full_model` makes an unsharded copy for sampling. With one
process the model is not wrapped, and the collective calls return their input.
"""

import contextlib
import ctypes
import functools
import os
import platform
import sys

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from nanospin import decoding, lora
from nanospin.compiling import raise_limit_of_graphs

# Tokens of a micro-batch: about what the caches of a CPU hold, and what keeps a GPU busy.
MICRO_BATCH_TOKENS = {"cpu": 1536, "cuda": 32768}


# Filled by elastic.join_process_group: "saves" is the process group of the thread that writes
# checkpoints, "store" the key-value store that the ranks of this start share.
process_groups = {}


class Heartbeat:
    """What this rank is doing, and that it makes progress. elastic.py watches and reports it."""

    def __init__(self):
        self.stage = "startup"
        self.touches = 0  # another number means progress
        self.collectives = 0  # collective calls: a rank that has made fewer is behind
        self.leaving = False  # the process is about to exit: do not report a loss

    def set_stage(self, text):
        """Record what this rank starts to do now, for example "round 0 step 12"."""
        self.stage = text
        self.touch()

    def touch(self):
        """Record progress."""
        self.touches += 1

    def begin_collective(self):
        """Record that a collective call starts. All ranks make the same ones."""
        self.collectives += 1
        self.touch()


heartbeat = Heartbeat()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# --------------------------------------------------------------------------- device and precision


def setup_device(cfg) -> torch.device:
    """Choose the device and configure torch for it."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("config: device is cuda, but torch finds no GPU")
    if cfg.device != "cpu" and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK") or 0)
        if index >= torch.cuda.device_count():
            raise SystemExit(
                f"LOCAL_RANK is {index}, but torch finds {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", index)
    else:
        device = torch.device("cpu")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    configure_torch(device, cfg.matmul_precision)
    if not cfg.cuda_graphs:
        decoding.GRAPHS.clear()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def configure_torch(device, precision: str = ""):
    """Process-wide settings: output encoding, float32 matmul precision ("": the default of this
    device, see `default_matmul_precision`) and memory allocators. Call it before CUDA starts."""
    device_type = torch.device(device).type
    if hasattr(sys.stdout, "reconfigure"):
        # Text that the terminal cannot encode is escaped: a row's text must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    torch.set_float32_matmul_precision(precision or default_matmul_precision(device_type))
    # Batches and caches have every length, and a freed buffer is too small for a longer one. With
    # expandable segments they share memory. PYTORCH_CUDA_ALLOC_CONF is the older name.
    if device_type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    keep_freed_memory()
    limit_compiled_matmuls()


def default_matmul_precision(device_type: str) -> str:
    """The argument of torch.set_float32_matmul_precision that is fastest here.

    On a GPU "high" is TF32. On a CPU "highest" selects MKL and "medium" oneDNN, which still
    computes in float32 on chips without AMX or the like. On AMD chips, which have none of these,
    oneDNN is up to twice as fast. On Intel chips MKL is faster (Cascade Lake: by a fifth of a
    training step).
    """
    if device_type == "cuda":
        return "high"
    return "medium" if cpu_info("vendor_id") == "AuthenticAMD" else "highest"


def keep_freed_memory():
    """Make glibc keep freed memory in the process. By default the large buffers of each step are
    returned to the system and faulted in again, which costs a fifth of a small model's step."""
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def limit_compiled_matmuls():
    """Bound what oneDNN and torch keep of it. Sampling on a CPU compiles each matmul anew for every
    number of rows, about 0.7 MiB, and by default the last 1,024 of them stay in memory."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")  # read at the first matmul


def cpu_info(key: str) -> str:
    """A field of /proc/cpuinfo, for example "vendor_id" or "model name"; "" if there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith(key):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def compute_dtype(cfg, device) -> torch.dtype:
    """The dtype of matrix products: cfg.dtype, or bfloat16 where the GPU supports it."""
    if cfg.dtype:
        return getattr(torch, cfg.dtype)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def micro_batch_tokens(cfg, device) -> int:
    """How many tokens a rank processes at a time."""
    return cfg.micro_batch_tokens or MICRO_BATCH_TOKENS[torch.device(device).type]


# -------------------------------------------------------------------------------- a sharded model


def prepare_model(model, device, dtype, cfg):
    """Give storage to a GPT on the meta device and shard it if there are several ranks. The values
    are uninitialised. Weights and gradient reductions are float32, matrix products `dtype`."""
    compile_blocks(model, device, cfg)
    if world_size() == 1:
        return set_autocast_dtype(model.to_empty(device=device), dtype)
    shard_model(model, device, dtype, cfg)
    return model.to_empty(device=device)


def compile_blocks(model, device, cfg):
    """Compile the embedding and the blocks, and checkpoint the blocks around that: Dynamo does not
    look into a checkpoint.

    Of a block the two halves around attention are compiled, for any layout and length. Windows of a
    stream have one length. If their attention is plain, a block is one graph.
    """
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    dynamic = None if cfg.stage == "pretrain" else True
    if compiled:
        raise_limit_of_graphs()  # all layers count together
        model.block_input = torch.compile(model.block_input, dynamic=dynamic)
    for i, block in enumerate(model.h):
        if compiled and has_plain_attention(model.config, device, cfg):
            block.forward = torch.compile(block.forward, dynamic=dynamic)
        elif compiled:
            before_attention = block.before_attention
            if device.type == "cuda" and cfg.layout == "packed":
                before_attention = contiguous_heads(before_attention)
            block.before_attention = torch.compile(before_attention, dynamic=dynamic)
            block.after_attention = torch.compile(block.after_attention, dynamic=dynamic)
        if cfg.activation_checkpointing and i % cfg.activation_checkpointing == 0:
            block.forward = functools.partial(checkpointed_forward, block.forward)


def contiguous_heads(before_attention):
    """FlexAttention needs contiguous queries, keys and values (FlashAttention does not). Compiled
    with what makes them, the copies read 16 bytes at a time; called alone, they read 2. Sampling,
    which runs eagerly, does not need them."""

    def contiguous(x, rope=None):
        heads = before_attention(x, rope)
        if torch.compiler.is_compiling():
            heads = [y.contiguous() for y in heads]
        return heads

    return contiguous


def has_plain_attention(model_config, device, cfg) -> bool:
    """Whether every batch is windows in which a token sees all before it, so that on a GPU its
    attention is a kernel of PyTorch."""
    other = cfg.document_mask or model_config.sliding_window or model_config.attention_softcap
    return device.type == "cuda" and cfg.stage == "pretrain" and not other


def checkpointed_forward(forward, *args):
    """A block's forward pass that stores only its inputs if there will be a backward pass. (Without
    one, `activation_checkpoint` would still read the random state, which fails during CUDA graph
    capture.)"""
    if torch.is_grad_enabled():
        return activation_checkpoint(forward, *args, use_reentrant=False)
    return forward(*args)


def shard_model(model, device, dtype, cfg):
    """Apply FSDP2 to each block and to the root, which holds the embedding and the LM head: the two
    may be tied. With hsdp_shard_size each group of that many ranks has a copy of the weights."""
    shard_size = cfg.hsdp_shard_size or world_size()
    if world_size() % shard_size:
        raise SystemExit(
            f"config: hsdp_shard_size {cfg.hsdp_shard_size} must divide the number of ranks, "
            f"{world_size()}"
        )
    if shard_size == world_size():
        mesh = init_device_mesh(device.type, (world_size(),))
    else:
        shape = (world_size() // shard_size, shard_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Inputs keep their dtype: the rotary angles must not become bfloat16.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.h:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if hasattr(fsdp, "register_fsdp_forward_method"):
        for name in model.forward_methods:
            fsdp.register_fsdp_forward_method(model, name)
    if cfg.fsdp_prefetch:
        blocks = list(model.h)
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + cfg.fsdp_prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - cfg.fsdp_prefetch) : i][::-1])


def set_autocast_dtype(model, dtype):
    """Matrix products of an unsharded model in `dtype`, by autocast. Returns the model."""
    model.autocast_dtype = dtype if dtype != torch.float32 else None
    return model


@torch.no_grad()
def copy_parameter_(p, tensor):
    """Fill a parameter from a full tensor, which every rank has. A sharded one takes its part."""
    if isinstance(p, DTensor):
        tensor = distribute_tensor(
            tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None
        )
    p.copy_(tensor)


def gather_full_model(model, dtype):
    """An unsharded copy of a sharded model on every rank, its weights in `dtype`, LoRA's merged.
    Each rank can run it without the others. An unsharded model without LoRA is returned as it is.
    """
    if isinstance(model, FSDPModule):
        model_class = type(model).__mro__[2]  # FSDP2's class has bases (FSDPModule, the model's)
    elif lora.is_added(model):
        model_class = type(model)
    else:
        return model
    with torch.device("meta"):
        full_model = model_class(model.config)
    weights = {name: lora.full(p).to(dtype) for name, p in lora.merged_weights(model)}
    full_model.load_state_dict(weights, assign=True)
    return full_model


@contextlib.contextmanager
def lockstep_forward(model):
    """Let each rank run a sharded model as often as it needs to; the weights stay sharded.

    A sharded forward pass needs all ranks. So before each one the ranks tell each other that they
    go on, and a rank that is done runs the model on one dummy token until all are done.
    """
    if not isinstance(model, FSDPModule):
        yield model
        return
    device = model.wte.weight.device

    def announce(*_):
        all_reduce_sum([1], device)

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield model
    finally:
        hook.remove()
    while all_reduce_sum([0], device)[0] > 0:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    reshard(model)


def reshard(model):
    """Call this after forward passes without a backward pass. FSDP2 would leave the root's weights
    unsharded (and the blocks', without reshard_after_forward), as tensors that are not the
    optimizer's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_grad_norm_(parameters, max_norm: float) -> torch.Tensor:
    """Clip the gradients by their global norm (0: do not clip). Returns the norm before, ()."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ------------------------------------------------------------------------------- collective calls


def all_reduce_sum(values, device) -> list[float]:
    """Sum a list of numbers or 0-dim tensors over the ranks, in float64, in one message. With one
    process numbers are not sent to the device, from which reading them would have to wait."""
    values = [torch.as_tensor(v, dtype=torch.float64).detach() for v in values]
    if world_size() > 1 or any(v.device.type != "cpu" for v in values):
        values = [v.to(device, non_blocking=True) for v in values]
    sums = torch.stack(values)
    if world_size() > 1:
        heartbeat.begin_collective()
        dist.all_reduce(sums)
    return sums.tolist()


def all_gather_object(value) -> list:
    """[the value of each rank], on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        heartbeat.begin_collective()
        dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value):
    """Rank 0's value, on every rank. Use it for what is read from disk: ranks that look at
    different times could take different decisions."""
    values = [value]
    if world_size() > 1:
        heartbeat.begin_collective()
        dist.broadcast_object_list(values, src=0)
    return values[0]


def run_on_rank0(function, *args):
    """function(*args) of rank 0, on every rank. If it exits or cannot use the disk, all ranks
    raise the same."""
    result = error = None
    if rank() == 0:
        try:
            result = function(*args)
        except (SystemExit, OSError) as e:
            error = e
    result, error = broadcast_from_rank0((result, error))
    if error is not None:
        raise error
    return result


def barrier():
    if world_size() > 1:
        heartbeat.begin_collective()
        dist.barrier()


def batches_of_rank(batches):
    """Yield this rank's share of a list of batches (lists). Every rank gets the same number, so
    that all can run a sharded model together. A rank without a batch gets one item of the first."""
    for start in range(0, len(batches), world_size()):
        i = start + rank()
        yield batches[i] if i < len(batches) else batches[0][:1]


def merge_results(n: int, results: dict) -> list:
    """{index: value} of each rank -> the n values in order, on every rank."""
    merged = {}
    for part in all_gather_object(results):
        merged.update(part)
    return [merged[i] for i in range(n)]
