"""Process group, FSDP2, means over ranks, signals, lost ranks: all that knows of ranks. One process needs none of it and
is not wrapped.

The parallel code stands beside the model: `wrap` shards the blocks of a GPT built on the meta device, `copy_` fills a
parameter, sharded or not, from a whole tensor, and `whole` gathers a plain copy for sampling.
"""
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(cfg):
    """Join torchrun's process group if there is one, choose device and precision. Returns the device."""
    if (cfg.device or "cuda") == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif cfg.device == "cuda":
        raise SystemExit("device is cuda, and torch sees no GPU")
    else:
        device = torch.device("cpu")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "RANK" in os.environ and not dist.is_initialized():
        join("nccl" if device.type == "cuda" else "gloo", cfg.timeout)
    tune(device, cfg.matmul_precision)
    return device


def join(backend, timeout):
    """The process group of torchrun's ranks, and beside it the one that saves use and the pulse.

    torchrun's agent keeps a store that outlives its workers: a restarted one would be handed the dead ones' addresses. So
    rank 0 opens a store for each start and leaves its address with the agent's; an address that nobody answers at, or that
    another start answers at, is an old one.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent = dist.TCPStore(address, port, is_master=False)
        if rank == 0:
            store = dist.TCPStore(own_address(address, port), 0, is_master=True, wait_for_workers=False)
            name = f"{store.host}:{store.port}:{time.time_ns()}"
            store.set("name", name)
            agent.set("nanospin", name)
        else:
            store = found_store(agent, time.monotonic() + timeout)
    else:
        store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=timedelta(seconds=2 * timeout))
    group["saves"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout))
    group["store"] = store
    threading.Thread(target=pulse, args=(store.clone(), timeout), daemon=True).start()


group = {}      # "saves": the process group of checkpoint.py's thread; "store": this start's


def own_address(address, port):
    """The address by which the others, who reach the master at `address`, reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, port))
        return s.getsockname()[0]


def found_store(agent, deadline):
    """The store of rank 0 of this start."""
    while time.monotonic() < deadline:
        name = agent.get("nanospin").decode()
        host, port, _ = name.rsplit(":", 2)
        with contextlib.suppress(dist.DistError):
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
            if store.get("name").decode() == name:
                store.set_timeout(timedelta(minutes=5))
                return store
        time.sleep(0.1)
    raise SystemExit("rank 0 opened no store")


def tune(device, precision=""):
    """Process-wide settings. "medium" takes oneDNN for float32 products on a CPU, twice as fast as the default on some, and
    still float32 unless the chip has AMX, which would round to bfloat16; "high" is TF32 on a GPU. Where the C library is
    glibc, freed memory stays with the process: by default each step's large buffers go back to the system and are faulted
    in again, a fifth of a small model's step."""
    torch.set_float32_matmul_precision(precision or ("high" if torch.device(device).type == "cuda" else "highest" if has_amx() else "medium"))
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def has_amx():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return "amx_bf16" in f.read()
    except OSError:
        return False


def compute_dtype(cfg, device):
    """The dtype of the products: bfloat16 where the GPU has it, unless the config says."""
    if cfg.dtype:
        return getattr(torch, cfg.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def wrap(model, device, dtype, cfg):
    """Give a GPT of the meta device its storage, sharded if there are several ranks. Weights and reductions are float32,
    products are `dtype`. The embedding and the head it may be tied to stand in the root unit. With `shards` there is a copy
    of the weights for every so many ranks (HSDP)."""
    for block in model.h[::cfg.recompute or len(model.h)] if cfg.recompute else []:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if cfg.compile:
        for block in model.h:
            block.compile()
    if world() == 1:
        return cast(model.to_empty(device=device), dtype)
    shards = cfg.shards or world()
    if world() % shards:
        raise SystemExit(f"config: shards {cfg.shards} must divide the number of ranks, {world()}")
    mesh = init_device_mesh(device.type, (world(),)) if shards == world() else \
        init_device_mesh(device.type, (world() // shards, shards), mesh_dim_names=("replicate", "shard"))
    # inputs stay as they are: the rotary angles must not become bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for i in range(len(model.h)) if cfg.prefetch else ():
        model.h[i].set_modules_to_forward_prefetch(list(model.h[i + 1:i + 1 + cfg.prefetch]))
        model.h[i].set_modules_to_backward_prefetch(list(model.h[max(0, i - cfg.prefetch):i])[::-1])
    return model.to_empty(device=device)


def cast(model, dtype):
    """Products of an unsharded model in `dtype`, by autocast."""
    model.products = dtype if dtype != torch.float32 else None
    return model


@torch.no_grad()
def copy_(p, tensor):
    """Fill a parameter from the whole tensor, which every rank has; a sharded one takes its part."""
    if isinstance(p, DTensor):
        tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(tensor)


def whole(model, dtype):
    """A plain copy of a sharded model on every rank, in the dtype of its products, which runs without the others; an
    unsharded model itself."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        plain = type(model).__mro__[2](model.config)        # FSDP2 makes a class of (FSDPModule, the model's own)
    plain.load_state_dict({k: v.full_tensor().to(dtype) for k, v in model.state_dict().items()}, assign=True)
    return plain


@contextlib.contextmanager
def in_step(model):
    """A sharded model that each rank may run as often as it likes: before every forward pass the ranks say that they go on,
    and one that is done runs along, on a token of its own, until all are. Its weights stay sharded between the blocks."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    along = [False]
    def meet(*_):
        if not along[0]:
            total([1], model.wte.weight.device)
    hook = model.register_forward_pre_hook(meet, prepend=True)
    try:
        yield model
        along[0] = True
        while total([0], model.wte.weight.device)[0]:
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


MICRO_BATCH_TOKENS = {"cpu": 1536, "cuda": 32768}     # on a CPU about what its caches hold, on a GPU what fills it


def micro_batch_tokens(cfg, device):
    """How many tokens a rank takes at a time."""
    return cfg.micro_batch_tokens or MICRO_BATCH_TOKENS[torch.device(device).type]


def sync_gradients(model, on):
    """Whether the next backward pass reduces gradients over the ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def total(values, device):
    """Sum a list of numbers or 0-dim tensors over the ranks, in float64, with one message. Returns floats."""
    t = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(device).detach() for v in values])
    if world() > 1:
        meet()
        dist.all_reduce(t)
    return t.tolist()


def clip_(parameters, max_norm):
    """Clip by the global norm (0: do not). Returns the norm before, a 0-dim tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather(value):
    """[value of each rank], on every rank."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        meet()
        dist.all_gather_object(values, value)
    return values


def agree(value):
    """Rank 0's value, on every rank: what is on disk is asked once, or ranks that look at different instants part ways."""
    values = [value]
    if world() > 1:
        meet()
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier():
    if world() > 1:
        meet()
        dist.barrier()


def shard(batches):
    """This rank's part of a list of batches (lists). Every rank gets the same number, so that they may run a sharded model
    together; where the batches run out a rank gets one of the first one's again."""
    for i in range(0, len(batches), world()):
        yield batches[i + rank()] if i + rank() < len(batches) else batches[0][:1]


def merge(n, results):
    """{index: value} of each rank -> the n values, on every rank."""
    everything = {i: v for part in gather(results) for i, v in part.items()}
    return [everything[i] for i in range(n)]


# -------------------------------------------------------------------------------------------- coming, going, being lost


def run(main, argv):
    """main(argv) as a program: heed signals, run, leave. Returns the exit status. What a user can mend is one line, said
    by one rank; so is the loss of another rank."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, heed)
    status, alone = 1, False
    try:
        main(argv)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1 if e.code else 0
        if isinstance(e.code, str):
            say_once(e.code)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            traceback.print_exc()
        else:
            say_once(f"{e.filename or 'a file'}: {e.strerror}; what was saved before is there")
    except Exception as e:
        if world() > 1 and isinstance(e, RuntimeError) and any(word in str(e) for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout", "peer")):
            say_once(lost())
            alone = True
        else:
            traceback.print_exc()
    if dist.is_initialized():       # gloo's threads sometimes abort an interpreter that winds down
        place["leaving"] = True
        if status == 0:
            dist.barrier()
            dist.destroy_process_group()
        elif not alone:
            go_last()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def go_last():
    """Rank 0, which holds the store, stays some seconds for the others to leave."""
    with contextlib.suppress(dist.DistError):
        group["store"].set(f"left/{rank()}", "")
        deadline = time.monotonic() + 5 * (rank() == 0)
        while time.monotonic() < deadline and not group["store"].check([f"left/{r}" for r in range(world())]):
            time.sleep(0.02)


signals = []            # what asked this process to leave


def heed(number, frame):
    """A signal is heard at the end of the step or of the part that is being sampled; a second Ctrl-C ends at once."""
    if number == signal.SIGINT and signal.SIGINT in signals:
        raise KeyboardInterrupt
    signals.append(number)


def stop_if_asked():
    """End all ranks if one was sent a signal, with the status that a shell gives it."""
    number = max(gather(signals[-1] if signals else 0))
    if number:
        if rank() == 0:
            print(f"{signal.Signals(number).name}: nothing is lost; the same command goes on from here", flush=True)
        raise SystemExit(128 + number)


def say_once(text):
    """An error's line, on standard error, from the first rank that comes with it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if group:
        try:
            me = f"{rank()}"
            first = group["store"].compare_set(hashlib.sha256(text.encode()).hexdigest(), "", me).decode() == me
        except dist.DistError:      # rank 0 is gone, and its store with it
            first = True
    if first:
        print(text, file=sys.stderr, flush=True)


place = {"at": "the start", "since": time.monotonic(), "leaving": False}


def at(text):
    """Note what this rank is about."""
    place.update(at=text, since=time.monotonic())


def meet():
    """Note that this rank has come as far as the next collective call."""
    place["since"] = time.monotonic()


def pulse(store, timeout):
    """A thread's work: leave a sign of life in the store every second, and end this process with the name of the rank that is
    waited for when nothing has moved for `timeout` seconds."""
    def beat():
        store.set(f"pulse/{rank()}", json.dumps([time.monotonic(), *standing()]))
        time.sleep(1)
    try:
        while True:
            beat()
            if time.monotonic() - place["since"] > timeout:
                end(lost(f"nothing has moved for {timeout:.0f} seconds", store, beat))
    except dist.DistError:
        time.sleep(5)
        end("rank 0 is gone, and its store with it")


def end(text):
    if not place["leaving"]:
        say_once(text)
        sys.stderr.flush()
        os._exit(1)


def lost(why="the connection broke", store=None, wait=lambda: time.sleep(1)):
    """A line that names the ranks that are gone, stand still or are behind."""
    def look():
        return {r: json.loads(store.get(f"pulse/{r}")) for r in range(world()) if store.check([f"pulse/{r}"])}
    try:
        store = store or group["store"].clone()
        before = look()
        for _ in range(3):
            wait()
        now = look()
    except dist.DistError:
        return f"{why}: rank 0 is gone, and its store with it"
    still = [r for r in now if r != rank() and now[r][0] == before.get(r, [None])[0]]
    busy = [r for r in now if not now[r][1]]
    names = ", ".join(f"rank {r} ({now[r][2]})" for r in still or busy)
    return f"{why}: " + (f"{names} {'is gone or stands still' if still else 'does not come'}" if names else f"all ranks wait at {place['at']}")


def standing():
    """(whether this rank waits for others, where it is): of the main thread or, while that waits for a save, of the save's."""
    frames, mine = sys._current_frames(), threading.main_thread()
    if frames[mine.ident].f_code.co_filename == threading.__file__:
        mine = next((t for t in threading.enumerate() if t.name.startswith("save") and t.ident in frames), mine)
    waits = frames[mine.ident].f_code.co_filename in (dist.distributed_c10d.__file__, __file__)
    ours = (f for f, _ in traceback.walk_stack(frames[mine.ident]) if os.path.dirname(f.f_code.co_filename) == os.path.dirname(__file__) and f.f_code.co_filename != __file__)
    at = next((f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno}" for f in ours), "")
    return waits, f"{place['at']}{', ' * bool(at)}{at}"
