"""What the checks and measurements of bench/gpu.py share: sizes, a clock, the models."""

import contextlib
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch

from bench.baselines import PlainGPT
from model import GPT, GPTConfig
from nanospin import decoding, distributed
from nanospin.config import Config
from nanospin.optim import make_optimizers


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


def random_heads(bench: Bench, n, heads, kv_heads, width, dtype):
    """q, k, v (n, heads, width) as views of one projection, as in the model."""
    x = torch.randn(n, heads + 2 * kv_heads, width, device=bench.device, dtype=dtype)
    return x.requires_grad_().split([heads, kv_heads, kv_heads], 1)


def decode_attention(q, k, v, first, last):
    """The kernel of a decoding step, without gradients. q (B, H, D); k, v (B, Hkv, columns, D). Row
    b sees the columns from first[b], (B,), to last, (1,), whose key and value are written again."""
    from nanospin import gpu_kernels

    new_k, new_v = k[:, :, last.item()].clone(), v[:, :, last.item()].clone()
    return lambda: gpu_kernels.decode_attention(q, new_k, new_v, k, v, first, last)


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
