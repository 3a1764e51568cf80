"""The benchmarks, beside their peers, in one run: what | ours | peer | ratio | products alone | floor | % of floor.

    python bench.py                     # against plain PyTorch: nanoGPT's step, a forward a response, one padded forward, full logits
    python bench.py --peers             # and against transformers and TRL (bench/requirements.txt), as `make bench` does
    python bench.py pretrain sampling   # some of them; --help names all
    python bench.py profile             # where our time goes, and how near the products come to the large one's rate
    python bench.py growth              # bench/growth.png: how the cost grows with K, prompt, vocabulary and model
    python bench.py shakespeare         # time to nanoGPT's validation loss, three seeds

One thread, processor time. Ours and the peer take turns; a time is the median of the repeats, the ratio that of the paired
repeats with its range. "Products alone" is what it would be if nothing of our time but the matrix products, as slow as they
were, was left (their share by the profiler). The floor is the FLOPs that the work needs, at the rate of a large product
(2048^3) in the same turn, and the bytes of a cache at that of a copy. Both sides have the same allocator settings; ours has
the library that parallel.tune chooses for float32 products, a peer PyTorch's default.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from nanospin import distributed
from data.batch import INPUTS, batch_rows, count_row_tokens, split_by_tokens
from eval import response_logprobs
from loss import linear_logprobs, preference_loss, sequence_logprobs
from model import GPT, GPTConfig
from bench.baselines import (
    ROWS,
    SHAPE,
    Plain,
    hf_generate,
    padded_step,
    plain_logps,
    plain_optimizer,
    plain_step,
    prompts_of,
    ragged_rows,
    random_row,
    requests,
    transformers_model,
    trl_step,
    trl_trainer,
    update,
    windows,
    work_of,
    work_of_requests,
    work_of_windows,
)
from sample import generate
from train import backward, make_optimizers

REPEATS = 5
BUDGET = distributed.MICRO_BATCH_TOKENS["cpu"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------ measuring


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def take_turns(ours, peer, need, repeats=None):
    """(times of ours, times of the peer, floors, [products' share of ours]), each at its own precision of float32 products; need: what
    `floor` takes. The machine's rates are measured before each turn, since they change while others use the machine."""
    times = [], [], []
    for repeat in range(-1, repeats or REPEATS):  # the first turn warms up
        torch.set_float32_matmul_precision(OURS)
        least, mine = floor(*need), seconds(ours)
        torch.set_float32_matmul_precision("highest")
        theirs = seconds(peer)
        if repeat >= 0:
            for kept, value in zip(times, (mine, theirs, least)):
                kept.append(value)
    torch.set_float32_matmul_precision(OURS)
    spent, total = by_operation(ours)
    return *times, [sum(spent[name] for name in PRODUCTS) / total]


OPERATIONS = {
    "products with weights": (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "mkldnn::_linear_pointwise",
    ),
    "attention's products": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::amax"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}
PRODUCTS = list(OPERATIONS)[:2]


def by_operation(work):
    """({seconds of each of OPERATIONS}, of all)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    return {
        name: sum(times.get(operation, 0.0) for operation in operations)
        for name, operations in OPERATIONS.items()
    }, sum(times.values())


@functools.cache
def material(name):
    """What a rate is measured with: two 2048 x 2048 matrices in a dtype, or two buffers of 256 MiB."""
    return tuple(
        torch.randn(2048, 2048, dtype=DTYPES[name]) if name in DTYPES else torch.ones(1 << 26)
        for _ in "xy"
    )


def rate(name):
    """FLOPs a second of a 2048^3 product in a dtype, or bytes a second of a copy, on one thread, now: the best of three."""
    x, y = material(name)
    if name in DTYPES:
        return 2 * 2048**3 / min(seconds(lambda: x @ y) for _ in range(3))
    return 2 * x.nbytes / min(seconds(lambda: y.copy_(x)) for _ in range(3))


def floor(n_flops, dtype="fp32", n_bytes=0):
    """Seconds that the FLOPs take at the large product's rate, and the bytes at a copy's."""
    return n_flops / rate(dtype) + (n_bytes and n_bytes / rate("bytes"))


def line(what, peer_name, times, tokens):
    """One row of the table, of a work of so many tokens; medians."""
    ours, peer, floor, products = (statistics.median(t) for t in times)
    ratios, shares = [b / a for a, b in zip(*times[:2])], [c / a for a, _, c in zip(*times[:3])]
    ratio = statistics.median(ratios)
    print(
        f"| {what} | {tokens / ours:8,.0f} tok/s | {tokens / peer:8,.0f} tok/s, {peer_name} | {ratio:.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) | {ratio / products:.2f}x | "
        f"{1000 * floor:.0f} ms | {100 * statistics.median(shares):.0f} % ({100 * min(shares):.0f}-{100 * max(shares):.0f}) |",
        flush=True,
    )


def flops(model, work, backward=3):
    """backward 3 is a training step, 1 a forward pass."""
    c = model.config
    block = sum(p.numel() for p in model.h[-1].parameters() if p.dim() == 2)
    kv = 2 * c.n_kv_head * c.head_dim * c.n_embd
    weights = (
        (c.n_layer - 1) * block * work.tokens
        + kv * work.tokens
        + (block - kv) * work.places
        + c.padded_vocab * c.n_embd * work.asked
    )
    return (
        2
        * backward
        * (weights + 2 * c.n_head * c.head_dim * ((c.n_layer - 1) * work.pairs + work.place_pairs))
    )


# ----------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """A model and a step over micro-batches as the trainer takes it."""

    def __init__(self, dtype, **shape):
        from nanospin.config import Config

        self.model = distributed.set_autocast_dtype(GPT(GPTConfig(**SHAPE | shape)), dtype)
        self.optimizers = make_optimizers(self.model, Config(), 1e-4, torch.device("cpu"))

    def step(self, batches, loss):
        losses = (
            loss(self.model(**{name: batch[name] for name in INPUTS if name in batch}), batch)
            for batch in batches
        )  # each made when it is its turn
        update(self.model, losses, self.optimizers)


def mean_loss(logps, batch):
    return -logps.mean()


def ranking_loss(rows):
    def loss(logps, batch):
        B, K = batch["present"].shape
        scores = sequence_logprobs(logps, batch["seq"], B * K).view(B, K)
        return preference_loss(scores, torch.zeros(B, K), batch["present"])[0] * B / rows

    return loss


def micro_batches(rows, layout="packed"):
    """As the trainer makes them."""
    rows = sorted(rows, key=count_row_tokens)
    sizes = [count_row_tokens(row, layout) for row in rows]
    return [
        batch_rows([rows[i] for i in part], layout)
        for part in split_by_tokens(sizes, min(len(rows), -(-sum(sizes) // BUDGET)))
    ]


# ----------------------------------------------------------------------------------------------------------- benchmarks


def pretrain(peers):
    """A pretraining step of 8 x 256 tokens."""
    idx, targets = windows()
    for name, dtype in DTYPES.items():
        ours = Ours(dtype)

        def step():
            ours.step([{"idx": idx, "targets": targets}], mean_loss)

        need = flops(ours.model, work_of_windows(idx)), name
        plain = Plain(**SHAPE)
        optimizer = plain_optimizer(plain)

        def loss(model):
            return F.cross_entropy(model(idx).float().view(-1, 8192), targets.view(-1))

        line(
            f"pretraining step, {name}",
            "nanoGPT's step",
            take_turns(step, lambda: plain_step(plain, optimizer, loss, dtype), need),
            idx.numel(),
        )
        if peers:
            hf = transformers_model()
            optimizer = plain_optimizer(hf)
            times = take_turns(
                step,
                lambda: plain_step(hf, optimizer, lambda model: model(idx, labels=idx).loss, dtype),
                need,
            )
            line(f"pretraining step, {name}", "transformers", times, idx.numel())


def preference(peers):
    """A preference step of full-length rows, against a forward pass a response with full logits."""
    for K in (2, 3, 8):
        for P, R in ((128, 128), (256, 64)):
            n = max(2, 16 // K)
            line(
                f"preference step, K={K}, prompt:response {P}:{R}",
                "a forward a response",
                against_one_by_one(K, P, R, n),
                n * K * R,
            )


def against_one_by_one(K, P, R, n, repeats=None, **shape):
    """Times of a float32 step over n rows of a prompt of P and K responses of R tokens."""
    rng, V = np.random.default_rng(0), (SHAPE | shape)["vocab_size"]
    rows = [random_row(rng, P, [R] * K, V) for _ in range(n)]
    ours, batches, loss = Ours(torch.float32, **shape), micro_batches(rows), ranking_loss(len(rows))
    plain, whole = Plain(**SHAPE | shape), batch_rows(rows, "padded")
    optimizer = plain_optimizer(plain)

    def one_by_one(model):
        scores = torch.stack(
            [
                plain_logps(model, whole["idx"][k::K], whole["targets"][k::K]).sum(1)
                for k in range(K)
            ],
            1,
        )
        return preference_loss(scores, torch.zeros_like(scores))[0]

    return take_turns(
        lambda: ours.step(batches, loss),
        lambda: plain_step(plain, optimizer, one_by_one, torch.float32),
        (flops(ours.model, work_of(rows)),),
        repeats,
    )


def ragged(peers):
    """A preference step of rows of real lengths: K = 3 against one padded forward with full logits, K = 2 against TRL (whose default
    batch is 8)."""
    rows = ragged_rows(8)
    for name, dtype in DTYPES.items():
        ours, batches, loss = Ours(dtype), micro_batches(rows), ranking_loss(len(rows))
        plain = Plain(**SHAPE)
        step = padded_step(plain, rows, dtype)
        times = take_turns(
            lambda: ours.step(batches, loss), step, (flops(ours.model, work_of(rows)), name)
        )
        line(f"8 ragged rows, K=3, {name}", "one padded forward", times, work_of(rows).asked)
    for n in (8, 16) if peers else ():  # the larger a batch, the more of it is padding
        rows = ragged_rows(n, K=2)
        ours, batches, loss = Ours(torch.float32), micro_batches(rows), ranking_loss(len(rows))
        times = take_turns(
            lambda: ours.step(batches, loss),
            trl_step(trl_trainer(rows)),
            (flops(ours.model, work_of(rows)),),
        )
        line(f"{n} ragged rows, K=2, fp32", "TRL's DPOTrainer", times, work_of(rows).asked)


def sampling(peers):
    """128 new tokens for 32 prompts of 64 tokens; and 128 requests of real lengths. Against transformers alone."""
    if not peers:
        return
    for what, lengths in requests().items():
        prompts, limits = prompts_of(lengths), [R for _, R in lengths]
        for name, dtype in DTYPES.items():
            model, hf = (
                distributed.set_autocast_dtype(GPT(GPTConfig(**SHAPE)), dtype),
                transformers_model().eval().to(dtype),
            )
            forward, read = need_of_sampling(model, lengths, dtype)
            times = take_turns(
                lambda: generate(model, prompts, limits),
                lambda: hf_generate(hf, prompts, limits),
                (forward, name, read),
            )
            line(f"sampling {what}, {name}", "transformers' generate", times, sum(limits))


def need_of_sampling(model, lengths, dtype):
    """(FLOPs, bytes): at each step the keys and values of what is there are read."""
    c = model.config
    forward = flops(model, work_of_requests(lengths), backward=1)
    return forward, 2 * c.n_layer * c.n_embd * dtype.itemsize * sum(
        P * R + R * R / 2 for P, R in lengths
    )


def spin_round(peers):
    """A round of self-play on 16 prompts: sample, score under the reference, one epoch of K = 2. Against TRL alone."""
    if not peers:
        return
    rows = ragged_rows(16, K=2)
    needed = flops(GPT(GPTConfig(**SHAPE)), work_of(rows), backward=5)
    line(
        "a round of self-play, K=2, fp32",
        "generate + DPOTrainer",
        take_turns(our_round(rows), their_round(rows), (needed,)),
        sum(len(r["responses"][1]) for r in rows),
    )


def our_round(rows):
    prompts, limits = [r["prompt"] for r in rows], [len(r["responses"][1]) for r in rows]
    ours, loss = Ours(torch.float32), ranking_loss(len(rows))

    def round_id():
        sampled = generate(ours.model, prompts, limits)
        played = [row | {"responses": [row["responses"][0], y]} for row, y in zip(rows, sampled)]
        response_logprobs(ours.model, played, BUDGET, torch.device("cpu"))
        ours.step(micro_batches(played), loss)

    return round_id


def their_round(rows):
    prompts, limits = [r["prompt"] for r in rows], [len(r["responses"][1]) for r in rows]
    trainer = trl_trainer(rows)
    hf, step = transformers_model().eval(), trl_step(trainer)

    def round_id():
        hf_generate(hf, prompts, limits)
        with torch.no_grad():
            trainer.compute_ref_log_probs(trainer.model, dict(trainer.batch))
        step()

    return round_id


def memory(peers):
    """Peak memory over idle, each side in a process of its own: of the head, and of a preference step of ragged rows."""
    for V in (8192, 50304, 128256):
        line_of_memory(
            f"head, 2048 tokens, V={V}", "full logits", f"head {V} ours", f"head {V} plain"
        )
    line_of_memory(
        "8 ragged rows, K=3, fp32", "one padded forward", "ragged 3 ours", "ragged 3 plain"
    )
    if peers:
        line_of_memory(
            "8 ragged rows, K=2, fp32", "TRL's DPOTrainer", "ragged 2 ours", "ragged 2 trl"
        )
        line_of_memory(
            "a round of self-play, K=2, fp32",
            "generate + DPOTrainer",
            "round 16 ours",
            "round 16 trl",
        )


def line_of_memory(what, peer_name, ours, peer):
    mib = [
        int(
            subprocess.run(
                [sys.executable, __file__, "--alone", side],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        for side in (ours, peer)
    ]
    print(
        f"| {what}: peak memory | {mib[0]:,} MiB | {mib[1]:,} MiB, {peer_name} | {mib[1] / max(1, mib[0]):.1f}x less | | | |",
        flush=True,
    )


def alone(what, size, side):
    """One side's work in this process; prints the MiB of its peak over what stood before it."""
    size = int(size)
    if what == "head":
        hidden, weight, targets = (
            torch.randn(2048, 256, requires_grad=True),
            torch.empty(size, 256).normal_(0.0, 0.02).requires_grad_(),
            torch.randint(0, size, (2048,)),
        )

        def work():
            logps = (
                linear_logprobs(hidden, weight, targets)
                if side == "ours"
                else torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])
            )
            backward(logps.sum())

        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    elif what == "round":
        work = (our_round if side == "ours" else their_round)(ragged_rows(size, K=2))
    else:
        rows = ragged_rows(8, K=size)
        if side == "ours":
            ours, batches, loss = Ours(torch.float32), micro_batches(rows), ranking_loss(len(rows))
            work = lambda: ours.step(batches, loss)
        else:
            work = (
                padded_step(Plain(**SHAPE), rows, torch.float32)
                if side == "plain"
                else trl_step(trl_trainer(rows))
            )
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    print((resident("VmHWM") - before) // 1024)


def resident(name):
    with open("/proc/self/status") as f:
        return next(int(text.split()[1]) for text in f if text.startswith(name))


def profile(peers):
    """Where our time goes in float32; and the rate of the FLOPs that the work needs in the two kinds of products, as a share of the large one's."""
    print(
        "\n| where the time goes, fp32 | ours | rate of products with weights | of attention's | "
        + " | ".join(OPERATIONS)
        + " | the rest |\n"
        + "|---" * (5 + len(OPERATIONS))
        + "|"
    )
    idx, targets = windows()
    pretraining, model, rng = Ours(torch.float32), GPT(GPTConfig(**SHAPE)), np.random.default_rng(0)
    works = {
        "pretraining step": (
            lambda: pretraining.step([{"idx": idx, "targets": targets}], mean_loss),
            work_of_windows(idx),
            3,
        )
    }
    for what, rows in {
        "8 rows, K=2, prompt:response 256:64": [
            random_row(rng, 256, [64] * 2, 8192) for _ in range(8)
        ],
        "8 ragged rows, K=3": ragged_rows(8),
    }.items():
        works[what] = (
            functools.partial(
                Ours(torch.float32).step, micro_batches(rows), ranking_loss(len(rows))
            ),
            work_of(rows),
            3,
        )
    for what, lengths in requests().items():
        prompts, limits = prompts_of(lengths), [R for _, R in lengths]
        works[f"sampling {what}"] = (
            functools.partial(generate, model, prompts, limits),
            work_of_requests(lengths),
            1,
        )
    for what, (work, needed, backward) in works.items():
        work()
        large, weights = (
            rate("fp32"),
            flops(model, needed._replace(pairs=0, place_pairs=0), backward),
        )
        spent, total = by_operation(work)
        reached = (
            weights / spent["products with weights"],
            (flops(model, needed, backward) - weights) / spent["attention's products"],
        )
        shares = [
            f"{100 * t / total:.0f} %" for t in (*spent.values(), total - sum(spent.values()))
        ]
        print(
            f"| {what} | {total:.2f} s | "
            + " | ".join(
                [f"{r / 1e9:.0f} GFLOP/s, {100 * r / large:.0f} %" for r in reached] + shares
            )
            + " |",
            flush=True,
        )


def growth(peers):
    """Seconds of a preference step of four rows, ours and a forward pass a response with full logits, as one size grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    start = dict(K=3, P=128, V=8192, model=(4, 256))
    for ax, (name, sizes, label) in zip(
        axes,
        (
            ("K", (2, 3, 5, 8), "responses K"),
            ("P", (32, 128, 256, 512), "prompt, tokens"),
            ("V", (2048, 8192, 24576, 50304), "vocabulary"),
            ("model", ((2, 128), (4, 256), (4, 384), (6, 512)), "parameters in blocks, millions"),
        ),
    ):
        x, seconds = [], []
        for size in sizes:
            at = start | {name: size}
            shape = dict(vocab_size=at["V"], n_layer=at["model"][0], n_embd=at["model"][1])
            times = against_one_by_one(at["K"], at["P"], 128, 4, repeats=3, **shape)
            x.append(size if name != "model" else 12 * size[0] * size[1] ** 2 / 1e6)
            seconds.append(times)
            ours, peer, floor, _ = (statistics.median(t) for t in times)
            print(
                f"| {label} {x[-1]:g} | {ours:.2f} s | {peer:.2f} s, a forward a response | {peer / ours:.2f}x | {1000 * floor:.0f} ms | {100 * floor / ours:.0f} % |",
                flush=True,
            )
        for i, (what, style) in enumerate(
            (
                ("shared prompt, chunked head", "C0o-"),
                ("a forward a response, full logits", "C1s-"),
                ("floor of the FLOPs", "k:"),
            )
        ):
            points = [[min(s[i]), statistics.median(s[i]), max(s[i])] for s in seconds]
            ax.plot(x, [p[1] for p in points], style, label=what)
            ax.fill_between(
                x,
                [p[0] for p in points],
                [p[2] for p in points],
                color=style[:2] if i < 2 else "k",
                alpha=0.2,
            )
        ax.set_xlabel(label)
        ax.set_ylim(0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a step, one thread")
    axes[0].legend(fontsize=8)
    fig.suptitle(
        "A preference step of 4 rows; elsewhere K = 3, prompts and responses of 128 tokens, V = 8,192, 4 layers of 256; median and range of 3",
        fontsize=10,
    )
    fig.tight_layout()
    fig.savefig(
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench", "growth.png"), dpi=110
    )


def shakespeare(peers):
    """Training time to nanoGPT's validation loss by its own recipe for a CPU, and by ours; both through train.py."""
    text = os.path.join(os.path.dirname(ROWS), "tinyshakespeare.txt")
    if not os.path.exists(text):
        print("| time to nanoGPT's loss | tinyshakespeare.txt is not there | | | | | |")
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "data.shakespeare.prepare", text, f"--out={folder}/data"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times, losses = ([], []), ([], [])
        for seed in (1, 2, 3):
            for which, name in enumerate(("shakespeare", "shakespeare_nanogpt")):
                out = f"{folder}/{name}_{seed}"
                subprocess.run(
                    [
                        sys.executable,
                        "train.py",
                        f"config/{name}.py",
                        f"--data={folder}/data",
                        f"--out_dir={out}",
                        f"--seed={seed}",
                        "--device=cpu",
                    ],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
                with open(f"{out}/metrics.jsonl") as f:
                    records = [json.loads(r) for r in f]
                times[which].append(sum(r["ms"] for r in records if r["kind"] == "step") / 1000)
                losses[which].append([r["val_loss"] for r in records if r["kind"] == "eval"][-1])
        ours, theirs = (
            f"{min(t):.0f}-{max(t):.0f} s to {min(l):.3f}-{max(l):.3f}"
            for t, l in zip(times, losses)
        )
        ratios = [b / a for a, b in zip(*times)]
        print(
            f"| Shakespeare's characters, validation loss | {ours} | {theirs}, nanoGPT's recipe | {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) | | | |",
            flush=True,
        )


BENCHMARKS = {
    f.__name__: f
    for f in (
        pretrain,
        preference,
        ragged,
        sampling,
        spin_round,
        memory,
        profile,
        growth,
        shakespeare,
    )
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", help=", ".join(BENCHMARKS) + "; none: all but the last two"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="and what they are measured against, which bench/requirements.txt installs",
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    for name in set(args.what) - set(BENCHMARKS):
        raise SystemExit(f"{name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1)
    distributed.configure_torch("cpu")
    global OURS
    OURS = torch.get_float32_matmul_precision()
    if args.alone:
        return alone(*args.alone.split())
    fp32, bf16, copy = (rate(name) / 1e9 for name in ("fp32", "bf16", "bytes"))
    print(
        f"one thread of {distributed.cpu_info('model name') or 'an unknown chip'}: {fp32:.0f} GFLOP/s in float32 ({OURS}), {bf16:.0f} in bfloat16, {copy:.1f} GB/s; torch {torch.__version__}"
    )
    if bf16 < fp32:
        del DTYPES["bf16"]
        print("bfloat16 is emulated on this chip: its rows are left out")
    print()
    print(
        "| what | ours | peer | ratio | products alone | floor | of floor |\n|---|---|---|---|---|---|---|"
    )
    for name in args.what or list(BENCHMARKS)[:-2]:
        BENCHMARKS[name](args.peers)


if __name__ == "__main__":
    main()
