"""Memory of training with LoRA and without, on paper and measured on a CPU.

    python -m bench.lora_memory    # SmolLM2-135M's shape, random weights; 10 minutes on one core

Each row is a process of its own: its peak in the second step of AdamW, over what it held before the
model was built. On paper are the tensors that a forward pass ends with and whose size is known:
weights, two moments, and the input of each block where it is recomputed. What is left is the blocks
(one, where they are recomputed), the LM head, and the process's own. Gradients come as activations
go.
"""

import subprocess
import sys

import torch

from bench.baselines import ROOT
from bench.bench import memory_kib
from data import cli
from model import GPT, GPTConfig
from nanospin import distributed, lora
from nanospin.config import Config
from nanospin.optim import make_optimizers
from train import backward

SMOLLM2_135M = {
    "vocab_size": 49152,
    "block_size": 2048,
    "n_layer": 30,
    "n_head": 9,
    "n_kv_head": 3,
    "n_embd": 576,
    "n_inner": 1536,
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
}
TARGETS = Config().lora_targets
# (lora_rank, dtype, activation_checkpointing, tokens)
CASES = [
    (0, "float32", 1, 1024),
    (16, "float32", 1, 1024),
    (64, "float32", 1, 1024),
    (16, "bfloat16", 1, 1024),
    (0, "float32", 0, 1024),
    (16, "float32", 0, 1024),
    (16, "float32", 1, 2048),
]
MIB = 2**20


def build(rank: int, dtype: torch.dtype, recomputed: int):
    """(model, optimizers), as train.py builds them, with random weights."""
    cfg = Config(activation_checkpointing=recomputed, compile=False)
    device = torch.device("cpu")
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMOLLM2_135M))
    if rank:
        lora.add(model, rank, 32.0, TARGETS, dtype)
    distributed.prepare_model(model, device, dtype, cfg)
    model.init_weights()
    lora.init_weights(model, seed=0)
    return model, make_optimizers(model, cfg, 1e-4, device)


def on_paper(rank: int, dtype: str, recomputed: int, tokens: int) -> tuple[float, float, float]:
    """MiB of (weights and moments; gradients; inputs of the blocks)."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMOLLM2_135M))
    if rank:
        lora.add(model, rank, 32.0, TARGETS, getattr(torch, dtype))
    weights = gradients = 0
    for p in model.parameters():
        size = p.numel() * p.itemsize
        weights += size
        if p.requires_grad:
            gradients += size
    width = 4 if dtype == "float32" else 2
    inputs = tokens * model.config.n_embd * model.config.n_layer * width if recomputed else 0
    return (weights + 2 * gradients) / MIB, gradients / MIB, inputs / MIB


def measure(rank: int, dtype: str, recomputed: int, tokens: int):
    """Two steps in this process; print the MiB of the peak over what it held before."""
    distributed.configure_torch("cpu")
    torch.set_num_threads(1)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak
    before = memory_kib("VmRSS")
    model, optimizers = build(rank, getattr(torch, dtype), recomputed)
    idx = torch.randint(0, 49152, (tokens // 512, 513), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        logps = model(idx[:, :-1], idx[:, 1:])
        backward(-logps.mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    print((memory_kib("VmHWM") - before) // 1024)


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="measure one: rank,dtype,recomputed,tokens")
    args = parser.parse_args(argv)
    if args.case:
        rank, dtype, recomputed, tokens = args.case.split(",")
        measure(int(rank), dtype, int(recomputed), int(tokens))
        return
    print("| training | tokens | weights, moments | block inputs | measured | left | gradients |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for rank, dtype, recomputed, tokens in CASES:
        case = f"--case={rank},{dtype},{recomputed},{tokens}"
        command = [sys.executable, "-m", "bench.lora_memory", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        measured = int(done.stdout.split()[-1])
        fixed, gradients, inputs = on_paper(rank, dtype, recomputed, tokens)
        what = f"LoRA, rank {rank}" if rank else "all weights"
        what += f", {dtype}" + (", recomputed" if recomputed else "")
        left = measured - fixed - inputs
        print(
            f"| {what} | {tokens:,} | {fixed:,.0f} MiB | {inputs:,.0f} MiB "
            f"| {measured:,} MiB | {left:,.0f} MiB | {gradients:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
