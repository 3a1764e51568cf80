"""Every check and measurement for one GPU, from one command.

    bash bench/gpu.sh OUT             all of them, within --budget seconds
    bash bench/gpu.sh OUT decode      some of them; --help names all
    bash bench/gpu.sh OUT --small     the same code at toy size on a CPU, to see that it runs

Each check and each measurement is a process of its own with a time limit, and the others go on if
it fails. --jobs of them run at a time: the checks, and the preparation of the measurements, which
build and compile a model. A measurement that is ready leaves its place to the next and waits. When
all are ready, they measure one after the other. Each prints one line. OUT receives a log and a
JSON file for each, ratios.json and table.md.

Times are medians, with the GPU synchronized before and after. MFU counts the FLOPs of
GPT.flops_per_token at the card's dense bfloat16 peak, for both sides.
"""

import argparse
import contextlib
import faulthandler
import functools
import gc
import glob
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench.baselines import (
    ROOT,
    PlainGPT,
    padded_scores,
    plain_optimizer,
    plain_step,
    random_row,
    transformers_generate,
    transformers_model,
    update,
)
from data import cli, tokenizer
from data.batch import batch_rows, count_row_tokens, split_by_tokens
from data.files import write_json
from data.folder import write_meta, write_stream
from data.rows import write_rows
from eval import row_logps
from loss import linear_logprobs, preference_loss
from model import GPT, GPTConfig, response_logps
from nanospin import attention, decoding, distributed
from nanospin.config import Config
from nanospin.mfu import mfu
from nanospin.optim import make_optimizers
from sample import generate


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shape: dict = field(
        default_factory=lambda: {
            "vocab_size": 50304,
            "block_size": 1024,
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
        }
    )
    windows: int = 32  # of block_size, in a pretraining step
    prompts: int = 64  # of a preference step
    prompt: int = 512  # tokens
    response: int = 128  # tokens
    decode_batch: int = 256
    decode_prompt: int = 384  # with new_tokens / 2 a mean context of 512
    new_tokens: int = 256
    micro_batch_tokens: int = 32768
    repeats: int = 10


SMALL = Size(
    shape={"vocab_size": 256, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 32},
    windows=2,
    prompts=4,
    prompt=20,
    response=8,
    decode_batch=4,
    decode_prompt=12,
    new_tokens=6,
    micro_batch_tokens=128,
    repeats=2,
)


@dataclass(frozen=True)
class Bench:
    """What a check is given. It returns {name: number or text} and raises if something is wrong."""

    size: Size
    device: torch.device
    name: str  # of the check
    out: str  # folder of the logs

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def compile(self, function):
        """A baseline, compiled on a GPU."""
        return torch.compile(function) if self.on_gpu else function

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def wait_for_turn(self):
        """A measurement calls this once, when all is compiled and warm. It returns when no other
        process measures or compiles."""
        gc.collect()
        self.synchronize()
        if self.on_gpu:
            torch.cuda.empty_cache()  # for the others
        parent = os.getppid()
        open(f"{self.out}/{self.name}.ready", "w").close()
        while not os.path.exists(f"{self.out}/{self.name}.go"):
            if os.getppid() != parent:
                sys.exit("the program that gives the turns has ended")
            time.sleep(0.02)
        print(f"turn begins at {time.time():.3f}", flush=True)

    def seconds(self, work, repeats=None, warmup=3, calls=1) -> float:
        """Median seconds of work(). calls: between two synchronizations, for short kernels."""
        for _ in range(warmup):
            work()
        times = []
        for _ in range(repeats or self.size.repeats):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            self.synchronize()
            times.append((time.perf_counter() - start) / calls)
        return statistics.median(times)

    def measure(self, work) -> tuple[float, float]:
        """(seconds, peak GiB) of work(). The memory of everything that is alive is counted."""
        gc.collect()  # what was measured before
        work()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(work, warmup=2)
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0

    def measure_step(self, step) -> tuple[float, float]:
        """Compile step(), wait for the turn and measure it -> (seconds, peak GiB)."""
        for _ in range(3):
            step()
        self.wait_for_turn()
        return self.measure(step)


def our_model(bench: Bench, dtype=None, shape=None, **settings):
    """(model, optimizers) as train.py makes them."""
    cfg = Config(**settings)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{"bias": False} | (shape or bench.size.shape)))
    model = distributed.prepare_model(model, bench.device, dtype or bench.dtype, cfg)
    model.init_weights()
    return model, make_optimizers(model, cfg, 1e-4, bench.device)


def plain_model(bench: Bench):
    """nanoGPT's model, whose defaults have no biases."""
    return PlainGPT(**bench.size.shape, bias=False).to(bench.device)


def relative_error(found, expected) -> float:
    """|found - expected| / |expected|, NaN included."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def require(condition, text):
    if not condition:
        raise AssertionError(text)


# ----------------------------------------------------------------------------------- correctness


ATTENTION_CASES = [
    # heads, heads of keys and values, head dim, window, dtype, largest error
    (12, 12, 64, 0, torch.bfloat16, 2e-2),
    (12, 4, 64, 200, torch.bfloat16, 2e-2),
    (4, 4, 48, 0, torch.float32, 1e-4),
    (8, 8, 128, 0, torch.bfloat16, 2e-2),
]


def attention_values(bench: Bench):
    """Output and gradients of packed, rectangular and decoding attention against dense float64."""
    torch.set_float32_matmul_precision("highest")
    rng = np.random.default_rng(0)
    lengths = (300, [140, 20, 77]), (30, [200]), (5, [9, 130, 1])
    if not bench.on_gpu:
        lengths = (30, [14, 2, 7]), (5, [9])
    rows = [random_row(rng, prompt, responses) for prompt, responses in lengths]
    batch = batch_rows(rows).to(bench.device)
    n = len(batch.idx)
    worst = {}
    for heads, kv_heads, width, window, dtype, bound in ATTENTION_CASES:
        dtype = dtype if bench.on_gpu else torch.float32
        q, k, v = random_heads(bench, n, heads, kv_heads, width, dtype)
        some = batch.logit_positions if bench.on_gpu else batch.logit_positions.unique()
        for positions in (None, some):
            packed = attention.PackedSequences(
                batch.sequence_id,
                batch.response_id,
                batch.pos,
                window,
                query_positions=positions,
            )
            i = torch.arange(n, device=bench.device) if positions is None else positions
            visible = attention.is_visible(
                batch.sequence_id,
                batch.response_id,
                i[:, None],
                torch.arange(n, device=bench.device),
                batch.pos,
                window,
            )
            errors = attention_errors(functools.partial(packed.attend, 0), q, k, v, i, visible)
            name = f"{heads}/{kv_heads} heads of {width}, window {window}, {dtype}".replace(
                "torch.", ""
            )
            if positions is not None:
                name += ", some queries"
            print(name, [f"{error:.1e}" for error in errors], flush=True)
            worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0.0), *errors)
            require(max(errors) < bound, f"{name}: errors {errors}")

    B, T = (4, 512) if bench.on_gpu else (2, 16)
    row = torch.arange(B, device=bench.device).repeat_interleave(T)
    rectangle = attention.PackedSequences(row, row * 0, None, shape=(B, T))
    for kv_heads in (12, 4):
        q, k, v = random_heads(bench, B * T, 12, kv_heads, 64, bench.dtype)
        i = torch.arange(B * T, device=bench.device)
        visible = attention.is_visible(row, row * 0, i[:, None], i)
        errors = attention_errors(functools.partial(rectangle.attend, 0), q, k, v, i, visible)
        print(f"rectangle 12/{kv_heads}", [f"{error:.1e}" for error in errors], flush=True)
        require(max(errors) < 2e-2, f"rectangle 12/{kv_heads}: errors {errors}")
        worst["rectangle"] = max(worst.get("rectangle", 0.0), *errors)
    if bench.on_gpu:
        worst["decoding"] = decoding_error(bench)
    return {f"error {name}": value for name, value in worst.items()}


def random_heads(bench: Bench, n, heads, kv_heads, width, dtype):
    """q, k, v (n, heads, width) as views of one projection, as in the model."""
    x = torch.randn(n, heads + 2 * kv_heads, width, device=bench.device, dtype=dtype)
    return x.requires_grad_().split([heads, kv_heads, kv_heads], 1)


def attention_errors(attend, q, k, v, positions, visible) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v."""
    y = attend(q, k, v)
    upstream = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (q, k, v), upstream)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    dense_k, dense_v = (x.repeat_interleave(repeats, 1) for x in wide[1:])
    scores = torch.einsum("ihd,jhd->hij", wide[0][positions], dense_k) / q.shape[-1] ** 0.5
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    dense = torch.einsum("hij,jhd->ihd", probs, dense_v)
    expected = [dense, *torch.autograd.grad(dense, wide, upstream.double())]
    return [relative_error(a.detach(), b.detach()) for a, b in zip(found, expected)]


def decode_attention(q, k, v, first, last):
    """The kernel of a decoding step, without gradients. q (B, H, D); k, v (B, Hkv, columns, D). Row
    b sees the columns from first[b], (B,), to last, (1,), whose key and value are written again."""
    from nanospin import gpu_kernels

    new_k, new_v = k[:, :, last.item()].clone(), v[:, :, last.item()].clone()
    return lambda: gpu_kernels.decode_attention(q, new_k, new_v, k, v, first, last)


@torch.no_grad()
def decoding_error(bench: Bench) -> float:
    """The largest relative error of a decoding step's attention: ragged rows, shared heads."""
    largest = 0.0
    for kv_heads in (12, 4):
        B, columns = 9, 640
        q = torch.randn(B, 12, 64, device=bench.device, dtype=bench.dtype)
        k, v = torch.randn(2, B, kv_heads, columns, 64, device=bench.device, dtype=bench.dtype)
        first = torch.arange(0, 512, 60, device=bench.device, dtype=torch.int32)
        last = torch.tensor([515], device=bench.device, dtype=torch.int32)
        column = torch.arange(columns, device=bench.device)
        visible = (column >= first[:, None]) & (column <= last)
        y = decode_attention(q, k, v, first, last)()
        grouped = q.view(B, kv_heads, -1, 64).double()
        expected = F.scaled_dot_product_attention(
            grouped, k.double(), v.double(), visible[:, None, None]
        )
        largest = max(largest, relative_error(y.view(expected.shape), expected))
    require(largest < 1e-2, f"decoding: error {largest}")
    return largest


FLOAT32_SHAPE = {"vocab_size": 2048, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}


def float32(bench: Bench):
    """Five steps of pretraining and of a K=3 preference loss: the losses of the GPU and the CPU.
    After the first step nothing in a micro-batch may wait for the GPU."""
    torch.set_float32_matmul_precision("highest")
    shape = FLOAT32_SHAPE if bench.on_gpu else bench.size.shape
    rng = np.random.default_rng(0)
    R = shape["block_size"] // 4
    lengths = [(R, [R, R // 2, R // 3])] * 4 + [(R // 2, [R // 2, 3, R])] * 4
    rows = [
        random_row(rng, prompt, responses, shape["vocab_size"]) for prompt, responses in lengths
    ]
    tokens = torch.from_numpy(rng.integers(0, shape["vocab_size"], (2, 4, shape["block_size"])))
    losses = {}
    for device in ("cpu", bench.device.type):
        at = replace(bench, device=torch.device(device))
        for kind in ("pretrain", "spin"):
            compiled = bench.on_gpu and device == "cuda"
            model, optimizers = our_model(at, torch.float32, shape, stage=kind, compile=compiled)
            batch = batch_rows(rows).to(device)
            idx, targets = tokens.to(device)
            history = []
            for step in range(5):
                with no_synchronization(at.on_gpu and step > 0):
                    if kind == "pretrain":
                        loss = -model(idx, targets).mean()
                    else:
                        logps = response_logps(model, batch)
                        loss = preference_loss(logps, logps.detach() * 0, batch.response_mask)[0]
                    update(model, [loss])
                update(model, [], optimizers)
                history.append(loss.item())
            losses[kind, device] = history
    found = {}
    for kind in ("pretrain", "spin"):
        ours, cpu = losses[kind, bench.device.type], losses[kind, "cpu"]
        print(kind, ours, cpu, flush=True)
        off = max(abs(a - b) / abs(b) for a, b in zip(ours, cpu))
        require(off < 1e-4, f"{kind}: losses {ours} and on the CPU {cpu}")
        found[f"{kind} off"] = off
    return found


@contextlib.contextmanager
def no_synchronization(enabled):
    """Raise where the CPU waits for the GPU."""
    if enabled:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if enabled:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def cuda_graphs(enabled):
    """Whether decoding steps are replayed as CUDA graphs."""
    before = set(decoding.GRAPHS)
    decoding.GRAPHS.clear()
    if enabled:
        decoding.GRAPHS.add("cuda")
    try:
        yield
    finally:
        decoding.GRAPHS.clear()
        decoding.GRAPHS.update(before)


def sampled_ids(bench: Bench):
    """Ragged prompts, greedy and sampled: the ids are the same with and without CUDA graphs. In
    float32 most greedy ones are those of the CPU."""
    torch.set_float32_matmul_precision("highest")
    shape = FLOAT32_SHAPE if bench.on_gpu else bench.size.shape
    shape = shape | {"n_head": 4, "n_kv_head": 2, "position": "rotary", "qk_norm": True}
    model, _ = our_model(bench, torch.float32, shape)
    rng = np.random.default_rng(1)
    longest = shape["block_size"] // 2
    prompts = []
    for length in rng.integers(1, longest, 24 if bench.on_gpu else 6):
        prompts.append(rng.integers(0, shape["vocab_size"], length).tolist())
    limits = rng.integers(1, longest, len(prompts)).tolist()

    def sample(model, temperature, graphs):
        with cuda_graphs(graphs):
            generator = torch.Generator().manual_seed(0)
            ids = generate(model, prompts, limits, temperature, generator=generator, batch_size=16)
            require(not graphs or decoding.GRAPHS, "a step could not be captured")
            return ids

    for temperature in (0, 1.0):
        with_graphs = sample(model, temperature, bench.on_gpu)
        require(
            with_graphs == sample(model, temperature, False),
            f"temperature {temperature}: other ids",
        )
    cpu = replace(bench, device=torch.device("cpu"))
    on_cpu, _ = our_model(cpu, torch.float32, shape)
    greedy, expected = sample(model, 0, bench.on_gpu), sample(on_cpu, 0, False)
    same = [a == b for a, b in zip(greedy, expected)]
    require(np.mean(same) > 0.7, f"only {sum(same)} of {len(same)} greedy samples equal the CPU's")
    return {"tokens": sum(limits), "greedy as on the CPU": f"{sum(same)} of {len(same)}"}


WORDS = "the loss of a model falls when it reads what people write and stops at the end".split()


def make_data(folder):
    """A data folder of random words, in bytes: streams and rows of one response."""
    rng, enc = random.Random(0), tokenizer.load("bytes")
    os.makedirs(folder)

    def text(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for split in ("train", "val"):
        write_stream(f"{folder}/{split}.bin", [text(60) for _ in range(100)], enc)
        rows = [{"prompt": f"{i} {text(3)}", "responses": [text(4)]} for i in range(32)]
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, "bytes", "random words")


def run_program(*args, timeout=200, **environment):
    """Run a Python program from the project's folder. Its output goes to the log."""
    command = [sys.executable, *args]
    env = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, stderr=subprocess.STDOUT)
    require(done.returncode == 0, f"{args[0]}: exit status {done.returncode}")


def train_arguments(bench: Bench, folder, stage, steps):
    """Of a small run of train.py that saves in the middle."""
    settings = [
        f"--stage={stage}",
        f"--out_dir={folder}/{stage}",
        f"--data={folder}/data",
        f"--device={bench.device.type}",
        f"--max_steps={steps}",
        f"--save_interval={steps // 2}",
        "--batch_size=8",
        "--eval_rows=8",
        "--eval_batches=2",
        "--lr=1e-3",
    ]
    if stage == "pretrain":
        sizes = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=128"]
        return settings + sizes
    return settings + [f"--init={folder}/pretrain", "--max_response=16", "--template={prompt} "]


def last_weights(run):
    """(folder, bytes of its weights) of the newest checkpoint."""
    newest = sorted(glob.glob(f"{run}/round_*/step_*"))[-1]
    with open(f"{newest}/model.safetensors", "rb") as f:
        return newest, f.read()


def resumes_bit_for_bit(bench, folder, stage, steps, *launcher):
    """Run train.py, remove its last checkpoint, and let it go on from the one before."""
    arguments = [*launcher, "train.py", *train_arguments(bench, folder, stage, steps)]
    arguments.append("--deterministic=True")
    run_program(*arguments)
    newest, weights = last_weights(f"{folder}/{stage}")
    shutil.rmtree(newest)
    run_program(*arguments)
    again, resumed = last_weights(f"{folder}/{stage}")
    require(again == newest and resumed == weights, f"{stage}: the resumed weights differ")


def resume_pretrain(bench: Bench):
    """With `deterministic`, a resumed run of pretraining has the same weights, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        resumes_bit_for_bit(bench, folder, "pretrain", 4)
    return {"same": "yes"}


def resume_spin(bench: Bench):
    """The same for SPIN, which samples."""
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        first = train_arguments(bench, folder, "pretrain", 2)
        run_program("train.py", *first, "--compile=False")
        resumes_bit_for_bit(bench, folder, "spin", 4)
    return {"same": "yes"}


def torchrun(bench: Bench):
    """One rank under torchrun, with NCCL on a GPU: train, save, exit, resume."""
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        resumes_bit_for_bit(bench, folder, "pretrain", 4, *launcher)
    return {"backend": "nccl" if bench.on_gpu else "gloo"}


def fsdp_losses(bench: Bench, ranks=1):
    """Losses of five steps: (unsharded, sharded by FSDP2). Needs a process group."""
    shape = FLOAT32_SHAPE if bench.on_gpu else bench.size.shape
    cfg = Config(stage="pretrain", activation_checkpointing=2)
    generator = torch.Generator().manual_seed(0)
    size = (2, 4, shape["block_size"])
    idx, targets = torch.randint(shape["vocab_size"], size, generator=generator).to(bench.device)
    losses = []
    for sharded in (False, True):
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape))
        distributed.compile_blocks(model, bench.device, cfg)
        if sharded:
            distributed.shard_model(model, bench.device, torch.float32, cfg)
        model.to_empty(device=bench.device)
        model.init_weights(copy_=distributed.copy_parameter_)
        optimizers = make_optimizers(model, cfg, 1e-3, bench.device)
        history = []
        for _ in range(5):
            loss = -model(idx, targets).mean()
            update(model, [loss], optimizers)
            history.append(loss.item())
        losses.append(history)
    return losses


def fsdp(bench: Bench):
    """FSDP2 on one rank has the losses of the unsharded model, compiled and checkpointed."""
    torch.set_float32_matmul_precision("highest")
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if bench.on_gpu else "gloo", **options)
    plain, sharded = fsdp_losses(bench)
    dist.destroy_process_group()
    off = max(abs(a - b) / abs(b) for a, b in zip(plain, sharded))
    require(off < 1e-5, f"losses {plain} and sharded {sharded}")
    return {"off": off}


def two_ranks(bench: Bench):
    """Two ranks on one device over gloo. NCCL refuses that; whether gloo can is reported only."""
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for rank in range(2):
            options = [f"--rank={rank}", f"--store={folder}/store"]
            if not bench.on_gpu:
                options.append("--small")
            commands.append([sys.executable, "-m", "bench.gpu", bench.out, *options])
        ranks = [subprocess.Popen(command, cwd=ROOT) for command in commands]
        try:
            statuses = [process.wait(100) for process in ranks]
        except subprocess.TimeoutExpired:
            statuses = ["timeout"]
        finally:
            for process in ranks:
                process.kill()
    return {"works": "yes" if statuses == [0, 0] else f"no, {statuses}"}


def run_rank(bench: Bench, rank: int, store: str):
    """One of the two ranks."""
    torch.set_float32_matmul_precision("highest")
    store = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    plain, sharded = fsdp_losses(bench)
    off = max(abs(a - b) / abs(b) for a, b in zip(plain, sharded))
    print(f"rank {rank}: losses {plain}, sharded {sharded}", flush=True)
    require(off < 1e-5, f"off by {off}")
    sys.stdout.flush()
    os._exit(0)


# ---------------------------------------------------------------------------------- measurements


def versions(bench: Bench):
    """The software, the card, and what it reaches."""
    found = {"torch": torch.__version__, "python": sys.version.split()[0]}
    n = 8192 if bench.on_gpu else 256
    x = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    bench.seconds(lambda: x @ x)
    bench.wait_for_turn()
    found["matmul TFLOP/s"] = 2 * n**3 / bench.seconds(lambda: x @ x) / 1e12
    found["copy TB/s"] = copy_rate(bench) / 1e12
    if bench.on_gpu:
        found["card"] = torch.cuda.get_device_name()
        found["GiB"] = torch.cuda.mem_get_info()[1] / 2**30
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written."""
    x = torch.ones(1 << (29 if bench.on_gpu else 16), device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / bench.seconds(lambda: y.copy_(x))


def pretrain(bench: Bench):
    """A pretraining step of GPT-2 124M, compiled."""
    return pretraining_speed(bench, functools.partial(our_pretraining, compiled=bench.on_gpu))


def pretrain_eager(bench: Bench):
    """The same without `compile`."""
    return pretraining_speed(bench, functools.partial(our_pretraining, compiled=False))


def pretrain_nanogpt(bench: Bench):
    """nanoGPT's compiled step."""
    return pretraining_speed(bench, plain_pretraining)


def pretraining_speed(bench: Bench, make_step):
    idx, targets = random_batch(bench)
    seconds, gib = bench.measure_step(make_step(bench, idx, targets))
    with torch.device("meta"):
        model = GPT(GPTConfig(**bench.size.shape))
    flops = model.flops_per_token(bench.size.shape["block_size"]) * idx.numel()
    return {
        "ms": 1000 * seconds,
        "tokens/s": idx.numel() / seconds,
        "MFU %": 100 * (mfu(flops, seconds, bench.device) or 0.0),
        "GiB": gib,
    }


def random_batch(bench: Bench):
    """(idx, targets) of a pretraining step, each (windows, block_size)."""
    shape = (2, bench.size.windows, bench.size.shape["block_size"])
    return torch.randint(bench.size.shape["vocab_size"], shape, device=bench.device)


def our_pretraining(bench: Bench, idx, targets, compiled):
    """-> function: a step."""
    model, optimizers = our_model(bench, stage="pretrain", compile=compiled)
    return lambda: update(model, [-model(idx, targets).mean()], optimizers)


def plain_pretraining(bench: Bench, idx, targets):
    """-> function: nanoGPT's step, its loss compiled with the model."""
    model = plain_model(bench)
    optimizer = plain_optimizer(model)

    @bench.compile
    def loss(model):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    return lambda: plain_step(model, optimizer, loss, bench.dtype)


def preference_rows(bench: Bench, K=3):
    size, rng = bench.size, np.random.default_rng(0)
    rows = []
    for _ in range(size.prompts):
        rows.append(random_row(rng, size.prompt, [size.response] * K, size.shape["vocab_size"]))
    return rows


def cut_rows(rows, tokens, layout):
    """Batches of about so many tokens."""
    sizes = [count_row_tokens(row, layout) for row in rows]
    parts = split_by_tokens(sizes, min(len(rows), -(-sum(sizes) // tokens)))
    batches = []
    for part in parts:
        batches.append(batch_rows([rows[i] for i in part], layout))
    return batches


def preference(bench: Bench):
    """A K=3 preference step with reference log-probabilities kept: packed rows."""
    rows = preference_rows(bench)
    found = preference_speed(bench, rows, packed_preference(bench, rows))
    batch = batch_rows(rows)
    with torch.device("meta"):
        model = GPT(GPTConfig(**bench.size.shape))
    context = 2 * float(batch.pos.float().mean()) + 1
    flops = model.flops_per_token(context, batch.num_targets / batch.num_tokens) * batch.num_tokens
    found["MFU %"] = 100 * (mfu(flops, found["ms"] / 1000, bench.device) or 0.0)
    return found


def preference_padded(bench: Bench):
    """The step of a plain model: padded forward passes with full logits, of all responses at
    once."""
    rows = preference_rows(bench)
    return preference_speed(bench, rows, padded_preference(bench, rows, each=False))


def preference_each(bench: Bench):
    """The same with a forward pass for each response."""
    rows = preference_rows(bench)
    return preference_speed(bench, rows, padded_preference(bench, rows, each=True))


def preference_speed(bench: Bench, rows, step):
    seconds, gib = bench.measure_step(step)
    num_targets = batch_rows(rows).num_targets
    return {"ms": 1000 * seconds, "target tokens/s": num_targets / seconds, "GiB": gib}


def packed_preference(bench: Bench, rows):
    """-> function: our step."""
    model, optimizers = our_model(bench, stage="spin")
    batches = cut_rows(rows, bench.size.micro_batch_tokens, "packed")

    def loss(batch):
        batch = batch.to(bench.device)
        return ranking_loss(response_logps(model, batch), len(rows))

    return lambda: update(model, map(loss, batches), optimizers)


def ranking_loss(logps, num_rows):
    """The share of these rows in the mean loss over num_rows; the reference gives 0."""
    return preference_loss(logps, torch.zeros_like(logps))[0] * len(logps) / num_rows


def padded_preference(bench: Bench, rows, each):
    """-> function: nanoGPT's model on padded rows, compiled, with full logits. each: one forward
    pass for each response."""
    model = plain_model(bench)
    optimizer = plain_optimizer(model)
    batches = cut_rows(rows, bench.size.micro_batch_tokens, "padded")
    scores = bench.compile(functools.partial(padded_scores, model))

    def loss(batch):
        batch = batch.to(bench.device)
        K = batch.response_mask.shape[1]
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.on_gpu):
            if each:
                columns = [scores(batch.idx[k::K], batch.targets[k::K]) for k in range(K)]
                logps = torch.stack(columns, 1)
            else:
                logps = scores(batch.idx, batch.targets).view(-1, K)
        return ranking_loss(logps, len(rows))

    return lambda: update(model, map(loss, batches), [optimizer])


def head(bench: Bench):
    """The LM head alone, forward and backward, beside compiled full logits."""
    shape = bench.size.shape
    n, C, V = bench.size.micro_batch_tokens, shape["n_embd"], shape["vocab_size"]
    hidden = torch.randn(n, C, device=bench.device, dtype=bench.dtype, requires_grad=True)
    weight = torch.randn(V, C, device=bench.device, requires_grad=True)
    targets = torch.randint(V, (n,), device=bench.device)

    @bench.compile
    def full_logits(hidden, weight, targets):
        return -F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    def work(function):
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.on_gpu):
            loss = function(hidden, weight, targets).sum()
        torch.autograd.grad(loss, (hidden, weight))

    @torch.no_grad()
    def without_gradient():
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.on_gpu):
            linear_logprobs(hidden, weight, targets)

    works = {
        "fused": functools.partial(work, linear_logprobs),
        "fused, nothing kept": functools.partial(work, functools.partial(linear_logprobs, kept=0)),
        "full logits": functools.partial(work, full_logits),
        "fused, no gradient": without_gradient,
    }
    for function in works.values():
        function()
        function()
    bench.wait_for_turn()
    found = {}
    for name, function in works.items():
        seconds, found[f"{name} GiB"] = bench.measure(function)
        found[f"{name} ms"] = 1000 * seconds
    return found


def attention_speed(bench: Bench):
    """Attention of one layer. Forward and backward: SDPA's kernels on rectangles, FlexAttention on
    the packed rows of a preference step. Without gradients: a decoding step."""
    works = rectangular_works(bench) | packed_works(bench) | decode_works(bench)
    for work in works.values():
        work()
        work()
    bench.wait_for_turn()
    found = {}
    for name, work in works.items():
        found[f"{name} ms"] = 1000 * bench.seconds(work, calls=20 if bench.on_gpu else 1)
    return found


def forward_backward(attend, q, k, v):
    y = attend(q, k, v)
    torch.autograd.grad(y, (q, k, v), torch.ones_like(y))


def rectangular_works(bench: Bench):
    """name -> function: SDPA's kernels, causal, on (windows, block_size)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = bench.size
    heads, width = size.shape["n_head"], size.shape["n_embd"] // size.shape["n_head"]
    B, T = size.windows, size.shape["block_size"]
    heads_of_qkv = random_heads(bench, B * T, heads, heads, width, bench.dtype)
    attend = functools.partial(attention.rectangular_attention, shape=(B, T))

    def work(context):
        with context():
            forward_backward(attend, *heads_of_qkv)

    works = {"default": functools.partial(work, contextlib.nullcontext)}
    if bench.on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            works[backend.name] = functools.partial(work, functools.partial(sdpa_kernel, backend))
    return works


def packed_works(bench: Bench):
    """name -> function: packed rows, also with Inductor's options, and their block mask."""
    size = bench.size
    heads, width = size.shape["n_head"], size.shape["n_embd"] // size.shape["n_head"]
    batch = cut_rows(preference_rows(bench), size.micro_batch_tokens, "packed")[0]
    batch = batch.to(bench.device)
    heads_of_qkv = random_heads(bench, len(batch.idx), heads, heads, width, bench.dtype)

    def layout(positions=None):
        return attention.PackedSequences(
            batch.sequence_id, batch.response_id, batch.pos, query_positions=positions
        )

    works = {}
    some = batch.logit_positions if bench.on_gpu else batch.logit_positions.unique()
    for name, positions in (("packed", None), ("packed, response positions", some)):
        attend = functools.partial(layout(positions).attend, 0)
        works[name] = functools.partial(forward_backward, attend, *heads_of_qkv)
    if bench.on_gpu:
        attend = functools.partial(layout().attend, 0)
        default = functools.partial(forward_backward, attend, *heads_of_qkv)
        works["packed, default options"] = functools.partial(with_default_options, default)
        works["block mask"] = lambda: attention.flex_mask(layout())
    return works


def with_default_options(work):
    """work() without our options for FlexAttention."""
    with mock.patch.object(attention, "kernel_options", lambda q: {}):
        work()


def decode_works(bench: Bench):
    """name -> function: a decoding step, rows of equal and of ragged lengths, by our kernel, SDPA
    with a mask, and two matmuls."""
    size = bench.size
    B, H, D = size.decode_batch, size.shape["n_head"], size.shape["n_embd"] // size.shape["n_head"]
    last = size.decode_prompt + size.new_tokens // 2
    columns = size.decode_prompt + size.new_tokens
    q = torch.randn(B, H, 1, D, device=bench.device, dtype=bench.dtype)
    k, v = torch.randn(2, B, H, columns, D, device=bench.device, dtype=bench.dtype)
    column = torch.arange(columns, device=bench.device)
    works = {}
    for name, first in (
        ("equal", torch.zeros(B, device=bench.device, dtype=torch.int32)),
        ("ragged", torch.linspace(0, last, B, device=bench.device).int()),
    ):
        visible = (column >= first[:, None]) & (column <= last)  # (B, columns)
        bias = torch.zeros_like(visible, dtype=bench.dtype).masked_fill(~visible, -torch.inf)
        bias = bias[:, None, None]
        works[f"decode {name} SDPA"] = functools.partial(
            F.scaled_dot_product_attention, q, k, v, bias
        )
        works[f"decode {name} matmuls"] = functools.partial(two_matmuls, q, k, v, bias)
        if bench.on_gpu:
            last_column = torch.full_like(first[:1], last)
            works[f"decode {name} kernel"] = decode_attention(
                q.squeeze(2), k, v, first, last_column
            )
    return works


def two_matmuls(q, k, v, bias):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def decode(bench: Bench):
    """`generate`, with CUDA graphs and without. tokens/s counts the prompts' time too. Decoding
    alone is the difference between all new tokens and a quarter of them. Its floor is the time to
    read the weights and the cache once a step, at the rate of a copy."""
    size = bench.size
    short = max(1, size.new_tokens // 4)
    sample = our_sampling(bench)
    all_tokens = functools.partial(sample, size.new_tokens)
    few_tokens = functools.partial(sample, short)
    with cuda_graphs(bench.on_gpu):
        all_tokens()
        few_tokens()
        require(not bench.on_gpu or decoding.GRAPHS, "no graph was captured")
    with cuda_graphs(False):
        few_tokens()
    bench.wait_for_turn()
    with cuda_graphs(bench.on_gpu):
        few_seconds = bench.seconds(few_tokens, repeats=3, warmup=1)
        seconds = bench.seconds(all_tokens, repeats=2, warmup=1)
    with cuda_graphs(False):
        without_graphs = bench.seconds(few_tokens, repeats=2, warmup=1)
    steps = size.new_tokens - short
    context = size.decode_prompt + (short + size.new_tokens) / 2
    rate = size.decode_batch * steps / (seconds - few_seconds)
    floor = size.decode_batch * copy_rate(bench) / bytes_per_step(bench, context)
    return {
        "tokens/s": size.decode_batch * size.new_tokens / seconds,
        f"tokens/s of the first {short}": size.decode_batch * short / few_seconds,
        f"tokens/s of the first {short}, no graphs": size.decode_batch * short / without_graphs,
        "decode tokens/s": rate,
        "floor tokens/s": floor,
        "of floor %": 100 * rate / floor,
    }


def bytes_per_step(bench: Bench, context) -> float:
    """Of the weights and of the cache at `context` tokens per row, in bfloat16."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**bench.size.shape))
    c = model.config
    cache = 4 * c.n_layer * c.n_kv_head * c.head_dim * context * bench.size.decode_batch
    return 2 * model.num_params() + cache


def decode_transformers(bench: Bench):
    """transformers' generate for the same prompts, in the same dtype."""
    size = bench.size
    try:
        peer = transformers_model(size.shape).to(bench.device, bench.dtype).eval()
    except ImportError:
        return {"transformers": "not installed"}
    prompts = random_prompts(bench)

    @torch.no_grad()
    def work():
        limits = [size.new_tokens] * len(prompts)
        transformers_generate(peer, prompts, limits, size.decode_batch)

    work()
    bench.wait_for_turn()
    work()  # gets its memory back
    seconds = bench.seconds(work, repeats=1, warmup=0)
    return {"tokens/s": size.decode_batch * size.new_tokens / seconds}


def random_prompts(bench: Bench) -> list[list[int]]:
    size, rng = bench.size, np.random.default_rng(0)
    shape = (size.decode_batch, size.decode_prompt)
    return rng.integers(1, size.shape["vocab_size"], shape).tolist()


def our_sampling(bench: Bench):
    """-> function of a number of new tokens: sample so many for each prompt."""
    model, _ = our_model(bench)
    return functools.partial(
        generate, model, random_prompts(bench), batch_size=bench.size.decode_batch
    )


def self_play(bench: Bench):
    """A round of self-play by phase: sample, score under the reference, train one epoch."""
    size = bench.size
    model, optimizers = our_model(bench, stage="spin")
    play_round(bench, model, optimizers)
    bench.wait_for_turn()
    play_round(bench, model, optimizers)  # gets its memory back
    seconds = play_round(bench, model, optimizers)
    total = sum(seconds.values())
    found = {"seconds": total}
    num_sampled = size.decode_batch * min(size.response, size.new_tokens)
    for phase, time_of_phase in seconds.items():
        num_tokens = num_sampled if phase == "sample" else 2 * num_sampled
        found[f"{phase} response tokens/s"] = num_tokens / time_of_phase
        found[f"{phase} %"] = 100 * time_of_phase / total
    return found


def play_round(bench: Bench, model, optimizers) -> dict[str, float]:
    """The seconds of each phase."""
    size = bench.size
    rng = np.random.default_rng(0)
    R = min(size.response, size.new_tokens)
    prompts = random_prompts(bench)
    data = rng.integers(1, size.shape["vocab_size"], (size.decode_batch, R)).tolist()
    laps = [time.perf_counter()]

    def lap():
        bench.synchronize()
        laps.append(time.perf_counter())

    sampled = generate(model, prompts, R, batch_size=size.decode_batch)
    lap()
    rows = []
    for prompt, best, sample in zip(prompts, data, sampled):
        rows.append({"prompt": prompt, "responses": [best, sample], "ranks": [0, 1]})
    refs = row_logps(model, rows, size.micro_batch_tokens, bench.device)
    for row, ref in zip(rows, refs):
        row["ref"] = ref.tolist()
    lap()
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        for batch in cut_rows(part, size.micro_batch_tokens, "packed"):
            batch = batch.to(bench.device)
            logps = response_logps(model, batch)
            loss = preference_loss(logps, batch.ref_logps, batch.response_mask)[0]
            update(model, [loss * len(logps) / len(part)])
        update(model, [], optimizers)
    lap()
    return dict(zip(("sample", "score", "train"), np.diff(laps).tolist()))


KERNELS = {  # kind -> parts of names; the first kind that fits
    "attention": (
        "flash",
        "cudnn",
        "fmha",
        "flex_attention",
        "decode_kernel",
        "aten::bmm",
        "TiledAttention",
    ),
    "matmuls": ("gemm", "nvjet", "cutlass", "splitK", "aten::mm", "aten::addmm"),
    "compiled": ("triton",),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("Memcpy", "Memset", "copy"),
}


def profile_pretrain(bench: Bench):
    """Where the time of a pretraining step goes, by kind of kernel. OUT/profile_pretrain.txt has
    all kernels; so do the other profiles."""
    return profile(bench, our_pretraining(bench, *random_batch(bench), bench.on_gpu))


def profile_preference(bench: Bench):
    """The same of a preference step."""
    return profile(bench, packed_preference(bench, preference_rows(bench)))


def profile_decode(bench: Bench):
    """The same of sampling 32 tokens per prompt."""
    num_tokens = min(32, bench.size.new_tokens)
    return profile(bench, functools.partial(our_sampling(bench), num_tokens))


def profile(bench: Bench, step):
    """The time of step() without the profiler, and of its kernels under the profiler. The GPU is
    idle in the rest of the time. On a CPU, operators count as kernels."""
    from torch.profiler import ProfilerActivity

    for _ in range(3):
        step()
    bench.wait_for_turn()
    wall = 1000 * bench.seconds(step, repeats=3, warmup=2)
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        bench.synchronize()
    events = profiler.key_averages()
    key = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    with open(f"{bench.out}/{bench.name}.txt", "w") as f:
        f.write(events.table(sort_by=key, row_limit=60, max_name_column_width=100))
    # Ranges around kernels, such as Optimizer.step, are events on both devices.
    ranges = {event.key for event in events if event.is_user_annotation}
    launches, kinds = 0, {}
    for event in events:
        if bench.on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if event.key in ranges:
            continue
        launches += event.count
        kind = f"{kind_of_kernel(event.key)} ms"
        kinds[kind] = kinds.get(kind, 0.0) + getattr(event, key) / 1000
    kernels = sum(kinds.values())
    found = {"wall ms": wall, "kernels ms": kernels, "launches": launches}
    found["idle %"] = 100 * (1 - kernels / wall)
    return found | kinds


def kind_of_kernel(name):
    for kind, words in KERNELS.items():
        if any(word in name for word in words):
            return kind
    return "other"


# ------------------------------------------------------------------------------------- running


CPUS = len(os.sched_getaffinity(0))
JOBS = max(2, min(12, CPUS * 3 // 4))

# name -> (function, seconds that it may take). Those that take long begin first.
CHECKS = {
    "resume_spin": (resume_spin, 150),
    "torchrun": (torchrun, 150),
    "resume_pretrain": (resume_pretrain, 150),
    "attention": (attention_values, 150),
    "float32": (float32, 150),
    "two_ranks": (two_ranks, 130),
    "fsdp": (fsdp, 130),
    "sampled_ids": (sampled_ids, 130),
}
# The seconds are for the preparation and, again, for the turn. Profiles are last: what they compile
# is in Inductor's cache by then.
MEASUREMENTS = {
    "versions": (versions, 60),
    "preference_padded": (preference_padded, 120),
    "preference_each": (preference_each, 120),
    "preference": (preference, 120),
    "pretrain_nanogpt": (pretrain_nanogpt, 120),
    "pretrain": (pretrain, 120),
    "pretrain_eager": (pretrain_eager, 120),
    "self_play": (self_play, 120),
    "attention_speed": (attention_speed, 120),
    "head": (head, 100),
    "decode": (decode, 100),
    "decode_transformers": (decode_transformers, 100),
    "profile_preference": (profile_preference, 120),
    "profile_pretrain": (profile_pretrain, 120),
    "profile_decode": (profile_decode, 120),
}
ALL = CHECKS | MEASUREMENTS

# name -> ((measurement, its number), the same of what it is divided by)
RATIOS = {
    "pretrain to nanoGPT": (("pretrain", "tokens/s"), ("pretrain_nanogpt", "tokens/s")),
    "pretrain, compiled to eager": (("pretrain", "tokens/s"), ("pretrain_eager", "tokens/s")),
    "preference to padded": (
        ("preference", "target tokens/s"),
        ("preference_padded", "target tokens/s"),
    ),
    "preference to a forward each": (
        ("preference", "target tokens/s"),
        ("preference_each", "target tokens/s"),
    ),
    "decode to transformers": (("decode", "tokens/s"), ("decode_transformers", "tokens/s")),
    "decode to the floor": (("decode", "decode tokens/s"), ("decode", "floor tokens/s")),
}


def find_ratios(out) -> dict[str, float]:
    """Of the speeds in the JSON files of the folder `out`. A ratio needs both."""
    ratios = {}
    for name, pair in RATIOS.items():
        rates = [read_number(out, *place) for place in pair]
        if None not in rates:
            ratios[name] = rates[0] / rates[1]
    return ratios


def read_number(out, name, key):
    """None if it was not measured."""
    path = f"{out}/{name}.json"
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f).get(key)


class Job:
    """A check or a measurement in a process of its own."""

    def __init__(self, name, args):
        self.name = name
        self.path = f"{args.out}/{name}"
        self.seconds = 0.0  # in which it ran, without waiting for its turn
        self.problem = ""
        self.has_ended = False
        for ending in (".json", ".ready", ".go"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path + ending)
        command = [sys.executable, "-m", "bench.gpu", args.out, f"--check={name}"]
        if args.small:
            command.append("--small")
        threads = max(1, CPUS // args.jobs)
        with open(f"{self.path}.log", "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def is_ready(self) -> bool:
        return os.path.exists(f"{self.path}.ready")

    def prepare(self, deadline):
        """Wait until it has ended or is ready for its turn."""
        self.wait("", deadline, self.is_ready)

    def take_turn(self, deadline):
        """Let it measure, and wait until it has ended."""
        open(f"{self.path}.go", "w").close()
        self.wait("its turn was ", deadline, lambda: False)

    def wait(self, what, deadline, is_done):
        """Wait until it has ended or is_done(), and end it if that takes too long."""
        start = time.time()
        limit = min(ALL[self.name][1], deadline - start)
        while self.is_alive() and not is_done():
            if time.time() - start > limit:
                self.problem = f"{what}longer than {max(0, limit):.0f} s, see {self.path}.log"
                self.end()
            time.sleep(0.02)
        self.seconds += time.time() - start
        if not self.is_alive():
            self.end()

    def end(self):
        """End the process and its children. A live one writes to its log where it is."""
        if self.has_ended:
            return
        self.has_ended = True
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive():
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(0.3)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict:
        """Prints the line of an ended job -> {"name", "ok", "text", "seconds"}."""
        if self.problem:
            return report(self.name, False, self.problem, self.seconds)
        if self.process.returncode or not os.path.exists(f"{self.path}.json"):
            with open(f"{self.path}.log") as f:
                lines = f.read().split("\n")
            last = [line for line in lines if line.strip()][-1:] or ["no output"]
            text = f"{last[0][:200]} (see {self.path}.log)"
            return report(self.name, False, text, self.seconds)
        with open(f"{self.path}.json") as f:
            found = json.load(f)
        text = ", ".join(f"{key} {show(value)}" for key, value in found.items())
        return report(self.name, True, text, self.seconds)


def report(name, ok, text, seconds):
    print(f"{'ok  ' if ok else 'FAIL'} {name:<19} {seconds:5.0f} s  {text}", flush=True)
    return {"name": name, "ok": ok, "text": text, "seconds": seconds}


def show(value):
    """A number with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def run_all(args) -> int:
    """All checks and measurements, or those that are named. Returns 1 if one failed."""
    os.makedirs(args.out, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor"))
    start = time.time()
    # the rest is for the turns
    ready_by, end_by = start + 0.7 * args.budget, start + args.budget
    chosen = args.names or list(ALL)
    jobs, results = [], []  # jobs: all that were started

    def prepare(name) -> Job | None:
        """The job if it waits for its turn."""
        if ready_by - time.time() < 5:
            results.append(report(name, False, "not run: out of time", 0.0))
            return None
        job = Job(name, args)
        jobs.append(job)
        job.prepare(ready_by)
        if job.is_alive():
            return job
        results.append(job.result())
        return None

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            waiting = list(pool.map(prepare, [name for name in ALL if name in chosen]))
            print(f"     all is ready after {time.time() - start:.0f} s", flush=True)
            for job in waiting:
                if job is not None:
                    job.take_turn(end_by)
                    results.append(job.result())
        finally:
            for job in jobs:  # after Ctrl-C
                job.end()
    results.sort(key=lambda result: list(ALL).index(result["name"]))
    ratios = find_ratios(args.out)
    write_json(f"{args.out}/ratios.json", ratios)
    write_table(args.out, results, ratios)
    failed = [result["name"] for result in results if not result["ok"]]
    done = f"{len(results) - len(failed)} of {len(results)} ok in {time.time() - start:.0f} s"
    print(f"{done}; {args.out}/table.md")
    return 1 if failed else 0


def write_table(out, results, ratios):
    """OUT/table.md. Prints the ratios."""
    lines = ["| check | | seconds | |", "|---|---|---:|---|"]
    for result in results:
        ok = "ok" if result["ok"] else "FAIL"
        lines.append(f"| {result['name']} | {ok} | {result['seconds']:.0f} | {result['text']} |")
    for name, ratio in ratios.items():
        lines.append(f"| {name} | | | {ratio:.3f} |")
        print(f"     {name}: {ratio:.3f}")
    with open(f"{out}/table.md", "w") as f:
        f.write("\n".join(lines) + "\n")


def make_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder for the logs and the table")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(ALL)}")
    parser.add_argument("--small", action="store_true", help="at toy size on a CPU")
    parser.add_argument("--budget", type=float, default=420, help="seconds for all; default 420")
    help_text = f"that check or compile at a time, sharing the GPU's memory; default {JOBS} here"
    parser.add_argument("--jobs", type=int, default=JOBS, help=help_text)
    # what the processes of this program are started with
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser


def main(argv=None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in ALL]
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}")
    if args.check is None and args.rank is None:
        return run_all(args)
    faulthandler.register(signal.SIGUSR1)  # see Job.end
    device = torch.device("cpu" if args.small else "cuda")
    distributed.configure_torch(device)
    torch.manual_seed(0)
    bench = Bench(SMALL if args.small else Size(), device, args.check, args.out)
    if args.rank is not None:
        return run_rank(bench, args.rank, args.store)
    found = ALL[args.check][0](bench)
    write_json(f"{args.out}/{args.check}.json", found)
    print(f"ends at {time.time():.3f}", flush=True)
    os._exit(0)  # the others need not wait until its compile workers have ended


if __name__ == "__main__":
    sys.exit(cli.run(main))
