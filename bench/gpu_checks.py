"""The checks of bench/gpu.py: is what a GPU computes right? Each is a function of a Bench."""

import contextlib
import functools
import glob
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench.baselines import (
    ROOT,
    random_row,
    update,
)
from bench.gpu_setup import (
    Bench,
    cuda_graphs,
    decode_attention,
    our_model,
    random_heads,
    relative_error,
    require,
)
from data import tokenizer
from data.batch import batch_rows
from data.folder import write_meta, write_stream
from data.rows import write_rows
from loss import preference_loss
from model import GPT, GPTConfig, response_logps
from nanospin import attention, decoding, distributed, flash_attention
from nanospin.config import Config
from nanospin.flash_attention import FlashSequences
from nanospin.optim import make_optimizers
from sample import generate

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
            name = f"{heads}/{kv_heads} heads of {width}, window {window}, {dtype}".replace(
                "torch.", ""
            )
            if positions is not None:
                name += ", some queries"
            works = {name: functools.partial(packed.attend, 0)}
            if bench.on_gpu and dtype == torch.bfloat16 and not window:
                trial = flash_attention.is_right(bench.device, dtype, width, heads // kv_heads)
                require(trial, "FlashAttention's trial failed")
                works[f"{name}, FlashAttention"] = flash_work(batch, positions)
            for name, attend in works.items():
                errors = attention_errors(attend, q, k, v, i, visible)
                print(name, [f"{error:.1e}" for error in errors], flush=True)
                kind = "FlashAttention" if "Flash" in name else str(dtype)[6:]
                worst[kind] = max(worst.get(kind, 0.0), *errors)
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


def flash_work(batch, positions):
    """-> function(q, k, v): attention by FlashAttention, in the order of the batch."""
    sequences = FlashSequences(batch.varlen).with_queries(positions)
    return lambda *heads: sequences.attend(0, *[x[batch.varlen.order] for x in heads])


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
