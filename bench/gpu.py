"""Every check and measurement for one GPU, from one command.

    bash bench/gpu.sh OUT             all of them, in at most seven minutes (--budget)
    bash bench/gpu.sh OUT decode      some of them; --help names all
    bash bench/gpu.sh OUT --small     the same code at toy size on a CPU, to see that it runs

Each check runs in a process of its own with a time limit, and the others go on if it fails. First
the checks of correctness, a few at a time, then the measurements, one after the other. Each prints
one line. OUT receives a log and a JSON file for each, and table.md.

Times are medians, with the GPU synchronized before and after. MFU counts the FLOPs of
GPT.flops_per_token at the card's dense bfloat16 peak, for both sides.
"""

import argparse
import contextlib
import functools
import gc
import glob
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

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

    def seconds(self, work, repeats=None, warmup=3) -> float:
        """Median seconds of work()."""
        for _ in range(warmup):
            work()
        times = []
        for _ in range(repeats or self.size.repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def measure(self, work) -> tuple[float, float]:
        """(seconds, peak GiB) of work(). The memory of everything that is alive is counted."""
        gc.collect()  # what was measured before
        work()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(work, warmup=2)
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0


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


def versions(bench: Bench):
    """The software, the card, and what it reaches."""
    found = {"torch": torch.__version__, "python": sys.version.split()[0]}
    n = 8192 if bench.on_gpu else 256
    x = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    found["matmul TFLOP/s"] = 2 * n**3 / bench.seconds(lambda: x @ x) / 1e12
    found["copy TB/s"] = copy_rate(bench) / 1e12
    if bench.on_gpu:
        found["card"] = torch.cuda.get_device_name()
        found["GiB"] = torch.cuda.mem_get_info()[1] / 2**30
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


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


def decoding_error(bench: Bench) -> float:
    """The largest relative error of a decoding step's attention: ragged rows, shared heads."""
    largest = 0.0
    for kv_heads in (12, 4):
        B, columns, last = 9, 640, 515
        q = torch.randn(B, kv_heads, 12 // kv_heads, 64, device=bench.device, dtype=bench.dtype)
        k, v = torch.randn(2, B, kv_heads, columns, 64, device=bench.device, dtype=bench.dtype)
        first = torch.arange(0, 512, 60, device=bench.device, dtype=torch.int32)
        mask = attention.decode_mask(first, torch.full_like(first, last), columns, q.shape[2])
        column = torch.arange(columns, device=bench.device)
        visible = (column >= first[:, None]) & (column <= last)
        with torch.no_grad():
            y = attention.flex_attention(q, k, v, mask)
            expected = F.scaled_dot_product_attention(
                q.double(), k.double(), v.double(), visible[:, None, None]
            )
        largest = max(largest, relative_error(y, expected))
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
        at = Bench(bench.size, torch.device(device), bench.out)
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
    cpu = Bench(bench.size, torch.device("cpu"), bench.out)
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


def resume(bench: Bench):
    """With `deterministic`, a resumed run has the same weights, bit for bit: pretraining, SPIN."""
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        for stage in ("pretrain", "spin"):
            resumes_bit_for_bit(bench, folder, stage, 4)
    return {"same": "pretrain, spin"}


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
            statuses = [process.wait(80) for process in ranks]
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


def pretrain(bench: Bench):
    """A pretraining step of GPT-2 124M, compiled and not, beside nanoGPT's compiled step."""
    size, found, seconds = bench.size, {}, {}
    T, V = size.shape["block_size"], size.shape["vocab_size"]
    idx, targets = torch.randint(V, (2, size.windows, T), device=bench.device)
    for name, make_step in (
        ("ours", lambda: our_pretraining(bench, idx, targets, bench.on_gpu)),
        ("ours eager", lambda: our_pretraining(bench, idx, targets, False)),
        ("nanoGPT", lambda: plain_pretraining(bench, idx, targets)),
    ):
        seconds[name], found[f"{name} GiB"] = bench.measure(make_step())
    with torch.device("meta"):
        flops = GPT(GPTConfig(**size.shape)).flops_per_token(T) * idx.numel()
    for name, time_of_step in seconds.items():
        found[f"{name} ms"] = 1000 * time_of_step
        found[f"{name} tokens/s"] = idx.numel() / time_of_step
        found[f"{name} MFU %"] = 100 * (mfu(flops, time_of_step, bench.device) or 0.0)
    found["ratio to nanoGPT"] = seconds["nanoGPT"] / seconds["ours"]
    return found


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
    """A K=3 preference step with reference log-probabilities kept: packed rows, beside padded
    forward passes with full logits, of all responses at once and of one response at a time."""
    found, seconds = {}, {}
    rows = preference_rows(bench)
    for name, make_step in (
        ("packed", lambda: packed_preference(bench, rows)),
        ("padded", lambda: padded_preference(bench, rows, each=False)),
        ("a forward each", lambda: padded_preference(bench, rows, each=True)),
    ):
        seconds[name], found[f"{name} GiB"] = bench.measure(make_step())
        found[f"{name} ms"] = 1000 * seconds[name]
    batch = batch_rows(rows)
    with torch.device("meta"):
        model = GPT(GPTConfig(**bench.size.shape))
    context = 2 * float(batch.pos.float().mean()) + 1
    flops = model.flops_per_token(context, batch.num_targets / batch.num_tokens) * batch.num_tokens
    found["MFU %"] = 100 * (mfu(flops, seconds["packed"], bench.device) or 0.0)
    found["target tokens/s"] = batch.num_targets / seconds["packed"]
    found["ratio to padded"] = seconds["padded"] / seconds["packed"]
    found["ratio to a forward each"] = seconds["a forward each"] / seconds["packed"]
    return found


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

    found = {}
    recomputed = functools.partial(linear_logprobs, kept=0)
    for name, function in (
        ("fused", linear_logprobs),
        ("fused, nothing kept", recomputed),
        ("full logits", full_logits),
    ):
        seconds, found[f"{name} GiB"] = bench.measure(functools.partial(work, function))
        found[f"{name} ms"] = 1000 * seconds
    with torch.no_grad(), torch.autocast(bench.device.type, bench.dtype, enabled=bench.on_gpu):
        seconds = bench.seconds(lambda: linear_logprobs(hidden, weight, targets))
    found["fused, no gradient ms"] = 1000 * seconds
    return found


def attention_speed(bench: Bench):
    """Forward and backward of one layer: SDPA's kernels on rectangles, FlexAttention on the packed
    rows of a preference step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size, found = bench.size, {}
    heads, width = size.shape["n_head"], size.shape["n_embd"] // size.shape["n_head"]
    B, T = size.windows, size.shape["block_size"]
    q, k, v = random_heads(bench, B * T, heads, heads, width, bench.dtype)
    kernels = [("default", contextlib.nullcontext)]
    if bench.on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            kernels.append((backend.name, functools.partial(sdpa_kernel, backend)))

    def forward_backward(attend):
        y = attend(q, k, v)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    rectangle = functools.partial(attention.rectangular_attention, shape=(B, T))
    for name, context in kernels:
        with context():
            seconds = bench.seconds(functools.partial(forward_backward, rectangle))
        found[f"{name} ms"] = 1000 * seconds

    batch = cut_rows(preference_rows(bench), size.micro_batch_tokens, "packed")[0]
    batch = batch.to(bench.device)
    q, k, v = random_heads(bench, len(batch.idx), heads, heads, width, bench.dtype)

    def layout(positions=None):
        return attention.PackedSequences(
            batch.sequence_id, batch.response_id, batch.pos, query_positions=positions
        )

    some = batch.logit_positions if bench.on_gpu else batch.logit_positions.unique()
    for name, positions in (("packed", None), ("packed, response positions", some)):
        attend = functools.partial(layout(positions).attend, 0)
        seconds = bench.seconds(functools.partial(forward_backward, attend))
        found[f"{name} ms"] = 1000 * seconds
    if bench.on_gpu:
        seconds = bench.seconds(lambda: attention.flex_mask(layout()))
        found["block mask ms"] = 1000 * seconds
    return found | decoding_speed(bench)


@torch.no_grad()
def decoding_speed(bench: Bench):
    """Attention of one layer in a decoding step, rows of equal and of ragged lengths, by
    FlexAttention, SDPA with a mask, and two matmuls."""
    size, found = bench.size, {}
    B, H, D = size.decode_batch, size.shape["n_head"], size.shape["n_embd"] // size.shape["n_head"]
    last = size.decode_prompt + size.new_tokens // 2
    columns = attention.whole_blocks(last + 1)
    q = torch.randn(B, H, 1, D, device=bench.device, dtype=bench.dtype)
    k, v = torch.randn(2, B, H, columns, D, device=bench.device, dtype=bench.dtype)
    column = torch.arange(columns, device=bench.device)
    for name, first in (
        ("equal", torch.zeros(B, device=bench.device, dtype=torch.int32)),
        ("ragged", torch.linspace(0, last, B, device=bench.device).int()),
    ):
        visible = ((column >= first[:, None]) & (column <= last))[
            :, None, None
        ]  # (B, 1, 1, columns)
        bias = torch.zeros_like(visible, dtype=bench.dtype).masked_fill(~visible, -torch.inf)
        block_mask = attention.decode_mask(first, torch.full_like(first, last), columns, 1)
        works = {
            "SDPA": functools.partial(F.scaled_dot_product_attention, q, k, v, bias),
            "matmuls": lambda bias=bias: torch.softmax(q @ k.mT * D**-0.5 + bias, -1) @ v,
        }
        if bench.on_gpu:
            works["flex"] = functools.partial(attention.flex_attention, q, k, v, block_mask)
        for kernel, work in works.items():
            found[f"decode {name} {kernel} ms"] = 1000 * bench.seconds(work)
    return found


def decode(bench: Bench):
    """`generate` with CUDA graphs and without, beside transformers' generate, in the same dtype.
    The floor is the time to read the weights and the cache once a step, at the rate of a copy."""
    size, found = bench.size, {}
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, size.shape["vocab_size"], (size.decode_batch, size.decode_prompt))
    num_tokens = size.decode_batch * size.new_tokens
    for name, graphs in (("graphs", True), ("no graphs", False)):
        with cuda_graphs(graphs and bench.on_gpu):
            seconds = bench.seconds(our_sampling(bench, prompts.tolist()), repeats=2, warmup=1)
            require(not graphs or not bench.on_gpu or decoding.GRAPHS, "no graph was captured")
        found[f"{name} tokens/s"] = num_tokens / seconds

    with torch.device("meta"):
        model = GPT(GPTConfig(**size.shape))
    c = model.config
    weights = 2 * model.num_params()
    context = size.decode_prompt + size.new_tokens / 2
    cache = 4 * c.n_layer * c.n_kv_head * c.head_dim * context * size.decode_batch
    found["floor tokens/s"] = size.decode_batch * copy_rate(bench) / (weights + cache)
    found["of floor %"] = 100 * found["graphs tokens/s"] / found["floor tokens/s"]
    try:
        peer = transformers_model(size.shape).to(bench.device, bench.dtype).eval()
    except ImportError:
        found["transformers"] = "not installed"
        return found
    limits = [size.new_tokens] * len(prompts)
    work = functools.partial(
        transformers_generate, peer, prompts.tolist(), limits, size.decode_batch
    )
    with torch.no_grad():
        seconds = bench.seconds(work, repeats=1, warmup=0)
    found["transformers tokens/s"] = num_tokens / seconds
    found["ratio to transformers"] = found["graphs tokens/s"] / found["transformers tokens/s"]
    return found


def our_sampling(bench: Bench, prompts):
    """-> function: sample new_tokens for each prompt."""
    model, _ = our_model(bench)
    size = bench.size
    return lambda: generate(model, prompts, size.new_tokens, batch_size=size.decode_batch)


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written."""
    x = torch.ones(1 << (29 if bench.on_gpu else 16), device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / bench.seconds(lambda: y.copy_(x))


def self_play(bench: Bench):
    """A round of self-play by phase: sample, score under the reference, train one epoch."""
    size = bench.size
    model, optimizers = our_model(bench, stage="spin")
    play_round(bench, model, optimizers)  # compiles
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
    prompts = rng.integers(1, size.shape["vocab_size"], (size.decode_batch, size.decode_prompt))
    data = rng.integers(1, size.shape["vocab_size"], (size.decode_batch, R)).tolist()
    laps = [time.perf_counter()]

    def lap():
        bench.synchronize()
        laps.append(time.perf_counter())

    sampled = generate(model, prompts.tolist(), R, batch_size=size.decode_batch)
    lap()
    rows = []
    for prompt, best, sample in zip(prompts.tolist(), data, sampled):
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


KERNELS = {
    "matmuls": ("gemm", "nvjet", "cutlass", "sm90_xmma", "aten::mm", "aten::addmm"),
    "attention": ("flash", "cudnn", "fmha", "flex_attention", "aten::bmm", "TiledAttention"),
    "compiled": ("triton",),
    "optimizer": ("multi_tensor", "adam"),
}


def profile(bench: Bench):
    """Where the time of a pretraining step, a preference step and sampling 32 tokens goes, by kind
    of kernel. The tables of all kernels are in OUT/profile_*.txt."""
    from torch.profiler import ProfilerActivity

    size, found = bench.size, {}
    T, V = size.shape["block_size"], size.shape["vocab_size"]
    short = replace(bench, size=replace(size, new_tokens=min(32, size.new_tokens)))
    prompts = [[1] * size.decode_prompt] * size.decode_batch
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    idx, targets = torch.randint(V, (2, size.windows, T), device=bench.device)
    for kind, make_step in (
        ("pretrain", lambda: our_pretraining(bench, idx, targets, bench.on_gpu)),
        ("preference", lambda: packed_preference(bench, preference_rows(bench))),
        ("decode", lambda: our_sampling(short, prompts)),
    ):
        step = make_step()
        for _ in range(3):
            step()
        bench.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            start = time.perf_counter()
            step()
            bench.synchronize()
            found[f"{kind} wall ms"] = 1000 * (time.perf_counter() - start)
        events = profiler.key_averages()
        key = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
        with open(f"{bench.out}/profile_{kind}.txt", "w") as f:
            f.write(events.table(sort_by=key, row_limit=60, max_name_column_width=100))
        for event in events:
            if bench.on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            name = f"{kind} {kind_of_kernel(event.key)} ms"
            found[name] = found.get(name, 0.0) + getattr(event, key) / 1000
    return found


def kind_of_kernel(name):
    for kind, words in KERNELS.items():
        if any(word in name for word in words):
            return kind
    return "other"


# ------------------------------------------------------------------------------------- running


CHECKS = {  # name -> (function, seconds that it may take)
    "versions": (versions, 40),
    "attention": (attention_values, 120),
    "float32": (float32, 120),
    "sampled_ids": (sampled_ids, 100),
    "resume": (resume, 150),
    "torchrun": (torchrun, 120),
    "fsdp": (fsdp, 100),
    "two_ranks": (two_ranks, 100),
}
MEASUREMENTS = {
    "pretrain": (pretrain, 120),
    "preference": (preference, 120),
    "decode": (decode, 100),
    "head": (head, 60),
    "attention_speed": (attention_speed, 60),
    "self_play": (self_play, 80),
    "profile": (profile, 80),
}
ALL = CHECKS | MEASUREMENTS


def run_check(name: str, args) -> dict:
    """Run one check in a process of its own -> {"ok", "text", "seconds"}."""
    start = time.time()
    command = [sys.executable, "-m", "bench.gpu", args.out, f"--check={name}"]
    if args.small:
        command.append("--small")
    limit = min(ALL[name][1], args.deadline - start)
    log = f"{args.out}/{name}.log"
    result = f"{args.out}/{name}.json"
    if args.deadline - start < 5:
        return report(name, False, "not run: out of time", 0.0)
    with open(log, "w") as f:
        # its own session, so that its children end with it
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()
    seconds = time.time() - start
    if status is None:
        return report(name, False, f"longer than {limit:.0f} s, see {log}", seconds)
    if status or not os.path.exists(result):
        with open(log) as f:
            lines = f.read().split("\n")
        last = [line for line in lines if line.strip()][-1:] or ["no output"]
        return report(name, False, f"{last[0][:200]} (see {log})", seconds)
    with open(result) as f:
        found = json.load(f)
    return report(name, True, ", ".join(f"{k} {show(v)}" for k, v in found.items()), seconds)


def report(name, ok, text, seconds):
    print(f"{'ok  ' if ok else 'FAIL'} {name:<16} {seconds:5.0f} s  {text}", flush=True)
    return {"name": name, "ok": ok, "text": text, "seconds": seconds}


def show(value):
    """A number with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def run_all(args) -> int:
    """All checks, or those that are named. Returns 1 if one failed."""
    os.makedirs(args.out, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor"))
    args.deadline = time.time() + args.budget
    chosen = args.names or list(ALL)
    run = functools.partial(run_check, args=args)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(run, [name for name in CHECKS if name in chosen]))
    results += map(run, [name for name in MEASUREMENTS if name in chosen])
    with open(f"{args.out}/table.md", "w") as f:
        f.write("| check | | seconds | |\n|---|---|---:|---|\n")
        for result in results:
            ok = "ok" if result["ok"] else "FAIL"
            f.write(f"| {result['name']} | {ok} | {result['seconds']:.0f} | {result['text']} |\n")
    failed = [result["name"] for result in results if not result["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} ok; {args.out}/table.md")
    return 1 if failed else 0


def make_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder for the logs and the table")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(ALL)}")
    parser.add_argument("--small", action="store_true", help="at toy size on a CPU")
    parser.add_argument("--budget", type=float, default=420, help="seconds for all; default 420")
    parser.add_argument("--jobs", type=int, default=4, help="checks of correctness at a time")
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
    device = torch.device("cpu" if args.small else "cuda")
    distributed.configure_torch(device)
    torch.manual_seed(0)
    bench = Bench(SMALL if args.small else Size(), device, args.out)
    if args.rank is not None:
        return run_rank(bench, args.rank, args.store)
    found = ALL[args.check][0](bench)
    write_json(f"{args.out}/{args.check}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
