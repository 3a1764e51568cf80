"""The benchmarks: nanoSPIN beside plain PyTorch, transformers and TRL, in one run.

    python -m bench.bench                    # against plain PyTorch
    python -m bench.bench --peers            # and transformers and TRL (bench/requirements.txt)
    python -m bench.bench pretrain sampling  # some of them; --help names all
    python -m bench.bench profile            # where our time goes
    python -m bench.bench online --peers     # GRPO and online DPO beside TRL; log_online.txt
    python -m bench.bench growth             # bench/growth.png: cost against K, prompt, V, model
    python -m bench.bench shakespeare        # time to nanoGPT's validation loss, three seeds

One thread, processor time. nanoSPIN and the baseline take turns on the same work. Times are medians
of the repeats; the ratio is the median of the paired repeats, with its range. The columns:

    matmuls only  the ratio if all of our time but the matmuls vanished (by the profiler); in older
                  logs "products alone"
    floor         time for the FLOPs that the work needs at the rate of a 2048^3 matmul, measured in
                  the same turn; for sampling also for the cache's bytes at the rate of a copy
    of floor      the floor as a share of our time

Both sides have the same allocator settings. nanoSPIN uses the library that configure_torch chooses
for float32 matmuls, the baseline PyTorch's default.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines import (
    GRPO_KL_COEF,
    ROOT,
    SHAPE,
    PlainGPT,
    equal_size,
    number_reward,
    number_text,
    padded_step,
    plain_logprobs,
    plain_optimizer,
    plain_step,
    ragged_rows,
    ragged_size,
    random_prompts,
    random_row,
    random_windows,
    sampling_requests,
    transformers_generate,
    transformers_model,
    trl_grpo_step,
    trl_online_round,
    trl_sampling_parts,
    trl_step,
    trl_trainer,
    uniform_logps,
    update,
    work_of_requests,
    work_of_rows,
    work_of_windows,
)
from data import cli
from data.batch import batch_rows, count_row_tokens, ppo_batch, split_by_tokens
from data.files import read_json, write_json
from eval import row_logps
from loss import linear_logprobs, preference_loss, sequence_logprobs
from model import GPT, GPTConfig
from nanospin import distributed
from nanospin.config import Config
from nanospin.optim import make_optimizers
from ppo import group_advantages, token_scores
from sample import generate
from train import backward, ppo_objective, ranking_objective

REPEATS = 5
MICRO_BATCH_TOKENS = distributed.MICRO_BATCH_TOKENS["cpu"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLE_HEADER = """\
| what | nanoSPIN | baseline | ratio | matmuls only | floor | of floor |
|---|---|---|---|---|---|---|"""


# --------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Need:
    """What a work cannot do without."""

    flops: float
    dtype: str = "fp32"  # of the matmuls: a key of DTYPES
    num_bytes: float = 0  # read from the key-value cache


@dataclass
class Timing:
    """Seconds of each paired repeat."""

    ours: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    matmul_share: float = 0.0  # of our time


def cpu_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def take_turns(ours, baseline, need, repeats=REPEATS):
    """Run both in turns -> Timing. Each side has its own precision of float32 matmuls.

    The floor is measured before each turn: its rates change while others use the machine.
    """
    our_precision = torch.get_float32_matmul_precision()
    timing = Timing()
    for repeat in range(-1, repeats):  # repeat -1 warms up
        floor = floor_seconds(need)
        our_seconds = cpu_seconds(ours)
        torch.set_float32_matmul_precision("highest")
        baseline_seconds = cpu_seconds(baseline)
        torch.set_float32_matmul_precision(our_precision)
        if repeat >= 0:
            timing.floor.append(floor)
            timing.ours.append(our_seconds)
            timing.baseline.append(baseline_seconds)
    profile = profile_operations(ours)
    timing.matmul_share = sum(profile.seconds[name] for name in MATMULS) / profile.total
    return timing


OPERATIONS = {
    "matmuls with weights": (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "mkldnn::_linear_pointwise",
    ),
    "attention matmuls": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::amax"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}
MATMULS = ("matmuls with weights", "attention matmuls")


@dataclass
class Profile:
    seconds: dict[str, float]  # of each of OPERATIONS
    total: float


def profile_operations(work):
    """Run work under PyTorch's profiler -> Profile."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profiler:
        work()
    times = {}
    for event in profiler.key_averages():
        times[event.key] = event.self_cpu_time_total / 1e6
    seconds = {}
    for name, operations in OPERATIONS.items():
        seconds[name] = sum(times.get(operation, 0.0) for operation in operations)
    return Profile(seconds, sum(times.values()))


@functools.cache
def rate_operands(name):
    """Two 2048 x 2048 matrices of a dtype, or for "bytes" two buffers of 256 MiB."""
    if name == "bytes":
        return torch.ones(1 << 26), torch.ones(1 << 26)
    dtype = DTYPES[name]
    return torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)


def measure_rate(name):
    """FLOPs per second of a 2048^3 matmul of a dtype, or bytes per second of a copy.

    On one thread, now: the best of three.
    """
    x, y = rate_operands(name)
    if name == "bytes":
        return 2 * x.nbytes / min(cpu_seconds(lambda: y.copy_(x)) for _ in range(3))
    return 2 * 2048**3 / min(cpu_seconds(lambda: x @ y) for _ in range(3))


def floor_seconds(need):
    seconds = need.flops / measure_rate(need.dtype)
    if need.num_bytes:
        seconds += need.num_bytes / measure_rate("bytes")
    return seconds


def format_range(values, digits=2):
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def print_speed(what, baseline_name, timing, tokens):
    """Print one row of the table, for a work of so many tokens."""
    ours = statistics.median(timing.ours)
    baseline = statistics.median(timing.baseline)
    ratios = [b / a for a, b in zip(timing.ours, timing.baseline)]
    percents = [100 * f / a for a, f in zip(timing.ours, timing.floor)]
    ratio = statistics.median(ratios)
    cells = [
        what,
        f"{tokens / ours:8,.0f} tok/s",
        f"{tokens / baseline:8,.0f} tok/s, {baseline_name}",
        f"{ratio:.2f}x ({format_range(ratios)})",
        f"{ratio / timing.matmul_share:.2f}x",
        f"{1000 * statistics.median(timing.floor):.0f} ms",
        f"{statistics.median(percents):.0f} % ({format_range(percents, 0)})",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def count_flops(model, work, passes=3):
    """FLOPs that the work needs. passes: 3 for a training step, 1 for a forward pass."""
    config = model.config
    block = sum(p.numel() for p in model.h[-1].parameters() if p.dim() == 2)
    keys_values = 2 * config.n_kv_head * config.head_dim * config.n_embd
    head = config.padded_vocab_size * config.n_embd
    other_layers = config.n_layer - 1  # the last block computes its output positions alone
    with_weights = (
        other_layers * block * work.tokens
        + keys_values * work.tokens
        + (block - keys_values) * work.outputs
        + head * work.targets
    )
    pairs = other_layers * work.pairs + work.output_pairs
    attention = 2 * config.n_head * config.head_dim * pairs  # q k^T, and the weights times v
    return 2 * passes * (with_weights + attention)


# ---------------------------------------------------------------------------------------- nanoSPIN


class OurTrainer:
    """A model, and a step over micro-batches as train.py takes it."""

    def __init__(self, dtype=torch.float32, **shape):
        self.model = GPT(GPTConfig(**SHAPE | shape))
        distributed.set_autocast_dtype(self.model, dtype)
        self.optimizers = make_optimizers(self.model, Config(), 1e-4, torch.device("cpu"))

    def pretraining_step(self, idx, targets):
        loss = -self.model(idx, targets).mean()
        update(self.model, [loss], self.optimizers)

    def preference_step(self, batches):
        num_rows = sum(len(batch.response_mask) for batch in batches)
        losses = (self.preference_loss(batch) / num_rows for batch in batches)
        update(self.model, losses, self.optimizers)

    def preference_loss(self, batch):
        """Plackett-Luce, summed over the rows of a micro-batch; the reference is uniform."""
        B, K = batch.response_mask.shape
        logps = self.model(batch.idx, batch.targets, **batch.layout())
        scores = sequence_logprobs(logps, batch.response_index, B * K).view(B, K)
        ref = uniform_logps(batch.lengths, self.model.config.vocab_size)
        loss, _ = preference_loss(scores, ref, batch.response_mask)
        return loss * B


def micro_batches(rows, layout="packed", make_batch=batch_rows):
    """Batches of similar rows, as train.py makes them."""
    rows = sorted(rows, key=count_row_tokens)
    sizes = [count_row_tokens(row, layout) for row in rows]
    num_batches = min(len(rows), -(-sum(sizes) // MICRO_BATCH_TOKENS))
    batches = []
    for part in split_by_tokens(sizes, num_batches):
        batches.append(make_batch([rows[i] for i in part], layout))
    return batches


GRPO = Config(
    stage="ppo",
    advantage="grpo",
    samples_per_prompt=8,
    kl_in="loss",
    kl_coef=GRPO_KL_COEF,
    loss_average="token",
)
ONLINE_PL = Config(stage="spin", players=["self:2"], ranked_by="bench.baselines:number_reward")


class OnlineTrainer(OurTrainer):
    """Online rounds with the parts that a run of train.py is made of, without its files."""

    def __init__(self, size):
        super().__init__(**size.shape)
        self.size = size
        self.reference = copy.deepcopy(self.model)
        self.prompts = [row["prompt"] for row in size.rows()]

    def sample(self):
        """(rows of K samples, scores (n, K)) of the policy."""
        K = self.size.K
        repeated = []
        for prompt in self.prompts:
            repeated += [prompt] * K
        sampled = generate(self.model, repeated, self.size.limits())
        rows, scores = [], []
        for i, prompt in enumerate(self.prompts):
            responses = sampled[i * K : (i + 1) * K]
            scores.append([number_reward(number_text(response)) for response in responses])
            rows.append({"prompt": prompt, "responses": responses, "ranks": [0] * K})
        return rows, np.array(scores)

    def token_scores(self, model, rows):
        return token_scores(model, rows, GRPO, torch.device("cpu"))["logps"]

    def grpo_round(self):
        rows, scores = self.sample()
        add_token_arrays(
            rows,
            group_advantages(scores, "grpo"),
            self.token_scores(self.model, rows),
            self.token_scores(self.reference, rows),
        )
        self.grpo_step(micro_batches(rows, make_batch=ppo_batch))

    def grpo_step(self, batches):
        self.step_of(ppo_objective, GRPO, batches, sum(b.num_targets for b in batches))

    def pl_round(self):
        """Plackett-Luce, the reference is the policy that sampled. At K = 2 this is online DPO."""
        rows, scores = self.sample()
        refs = row_logps(self.model, rows, MICRO_BATCH_TOKENS, torch.device("cpu"))
        order = (-scores).argsort(1)
        for row, its_order, its_refs in zip(rows, order, refs):
            row["responses"] = [row["responses"][k] for k in its_order]
            row["ref"] = its_refs[its_order].tolist()
            row["ranks"] = list(range(self.size.K))
        self.step_of(ranking_objective, ONLINE_PL, micro_batches(rows), len(rows))

    def step_of(self, objective, cfg, batches, num_units):
        losses = (objective(self.model, batch, cfg)[0] / num_units for batch in batches)
        update(self.model, losses, self.optimizers)


def add_token_arrays(rows, advantages, logps, refs):
    """Give each row "advantages", "logps" and "refs", (tokens,) float32. advantages (n, K)."""
    for row, its_advantages, its_logps, its_refs in zip(rows, advantages, logps, refs):
        lengths = [len(response) for response in row["responses"]]
        row["advantages"] = np.repeat(its_advantages, lengths).astype(np.float32)
        row["logps"] = its_logps
        row["refs"] = its_refs


def scored_rows(rows):
    """Rows as of a round of GRPO, with random scores and log-probabilities."""
    rng = np.random.default_rng(0)
    K = len(rows[0]["responses"])
    advantages = group_advantages(rng.normal(size=(len(rows), K)), "grpo")
    logps = []
    for row in rows:
        num_tokens = sum(len(response) for response in row["responses"])
        logps.append(np.full(num_tokens, -9.0, dtype=np.float32))
    add_token_arrays(rows, advantages, logps, logps)
    return rows


# -------------------------------------------------------------------------------------- benchmarks


@dataclass
class Options:
    """Of the command line and the machine."""

    peers: bool = False  # also transformers and TRL
    dtypes: dict = field(default_factory=DTYPES.copy)


def pretrain(options):
    """A pretraining step of 8 x 256 tokens."""
    idx, targets = random_windows()
    work = work_of_windows(idx)

    def plain_loss(model):
        return F.cross_entropy(model(idx).float().view(-1, 8192), targets.view(-1))

    def transformers_loss(model):
        return model(idx, labels=idx).loss

    for name, dtype in options.dtypes.items():
        ours = OurTrainer(dtype)
        step = functools.partial(ours.pretraining_step, idx, targets)
        need = Need(count_flops(ours.model, work), name)
        baselines = {"nanoGPT's step": (PlainGPT(**SHAPE), plain_loss)}
        if options.peers:
            baselines["transformers"] = transformers_model(), transformers_loss
        for baseline_name, (model, loss) in baselines.items():
            baseline = functools.partial(plain_step, model, plain_optimizer(model), loss, dtype)
            timing = take_turns(step, baseline, need)
            print_speed(f"pretraining step, {name}", baseline_name, timing, work.tokens)


def preference(options):
    """A preference step of rows of equal length, against one forward pass for each response."""
    for K in (2, 3, 8):
        for P, R in ((128, 128), (256, 64)):
            n = max(2, 16 // K)
            what = f"preference step, K={K}, prompt:response {P}:{R}"
            timing = time_preference_step(K, P, R, n)
            print_speed(what, "a forward pass per response", timing, n * K * R)


def time_preference_step(K, P, R, n, repeats=REPEATS, **shape):
    """Time a float32 step over n rows with a prompt of P tokens and K responses of R tokens."""
    rng = np.random.default_rng(0)
    vocab_size = (SHAPE | shape)["vocab_size"]
    rows = [random_row(rng, P, [R] * K, vocab_size) for _ in range(n)]
    ours = OurTrainer(**shape)
    batches = micro_batches(rows)
    plain = PlainGPT(**SHAPE | shape)
    optimizer = plain_optimizer(plain)
    padded = batch_rows(rows, "padded")

    def plain_loss(model):
        of_response = []
        for k in range(K):
            logps = plain_logprobs(model, padded.idx[k::K], padded.targets[k::K])
            of_response.append(logps.sum(1))
        scores = torch.stack(of_response, 1)
        return preference_loss(scores, torch.zeros_like(scores))[0]

    return take_turns(
        functools.partial(ours.preference_step, batches),
        functools.partial(plain_step, plain, optimizer, plain_loss, torch.float32),
        Need(count_flops(ours.model, work_of_rows(rows))),
        repeats,
    )


def ragged(options):
    """A preference step of rows with real lengths.

    K = 3 against one padded forward pass with full logits, K = 2 against TRL. TRL's default batch
    size is 8; the larger a batch, the more of it is padding.
    """
    rows = ragged_rows(8)
    work = work_of_rows(rows)
    batches = micro_batches(rows)
    for name, dtype in options.dtypes.items():
        ours = OurTrainer(dtype)
        timing = take_turns(
            functools.partial(ours.preference_step, batches),
            padded_step(PlainGPT(**SHAPE), rows, dtype),
            Need(count_flops(ours.model, work), name),
        )
        print_speed(f"8 ragged rows, K=3, {name}", "one padded forward", timing, work.targets)
    if options.peers:
        for n in (8, 16):
            time_against_trl(n)


def time_against_trl(n):
    rows = ragged_rows(n, K=2)
    work = work_of_rows(rows)
    ours = OurTrainer()
    batches = micro_batches(rows)
    timing = take_turns(
        functools.partial(ours.preference_step, batches),
        trl_step(trl_trainer(rows)),
        Need(count_flops(ours.model, work)),
    )
    print_speed(f"{n} ragged rows, K=2, fp32", "TRL's DPOTrainer", timing, work.targets)


def sampling(options):
    """128 new tokens for 32 prompts of 64 tokens; and 128 requests with real lengths."""
    if not options.peers:
        return  # transformers is the only baseline
    for what, requests in sampling_requests().items():
        prompts = random_prompts(requests)
        limits = [request.new_tokens for request in requests]
        for name, dtype in options.dtypes.items():
            model = GPT(GPTConfig(**SHAPE))
            distributed.set_autocast_dtype(model, dtype)
            baseline = transformers_model().eval().to(dtype)
            timing = take_turns(
                functools.partial(generate, model, prompts, limits),
                functools.partial(transformers_generate, baseline, prompts, limits),
                sampling_need(model, requests, name),
            )
            what_dtype = f"sampling {what}, {name}"
            print_speed(what_dtype, "transformers' generate", timing, sum(limits))


def sampling_need(model, requests, dtype):
    """A forward pass over all tokens; each step reads the keys and values of those before it."""
    config = model.config
    cached = sum(r.new_tokens * (r.prompt_length + r.new_tokens / 2) for r in requests)
    num_bytes = 2 * config.n_layer * config.n_embd * DTYPES[dtype].itemsize * cached
    return Need(count_flops(model, work_of_requests(requests), passes=1), dtype, num_bytes)


def spin_round(options):
    """A round of self-play on 16 prompts: sample, score under the reference, one epoch at K = 2."""
    if not options.peers:
        return  # TRL is the only baseline
    rows = ragged_rows(16, K=2)
    # training, the reference's forward pass, and about as much again for sampling
    flops = count_flops(GPT(GPTConfig(**SHAPE)), work_of_rows(rows), passes=5)
    timing = take_turns(our_round(rows), trl_round(rows), Need(flops))
    num_sampled = sum(len(row["responses"][1]) for row in rows)
    what = "a round of self-play, K=2, fp32"
    print_speed(what, "generate + DPOTrainer", timing, num_sampled)


def our_round(rows):
    """-> function: a round of self-play on these rows, whose second response is sampled anew."""
    prompts = [row["prompt"] for row in rows]
    limits = [len(row["responses"][1]) for row in rows]
    ours = OurTrainer()

    def play():
        sampled = generate(ours.model, prompts, limits)
        ranked = []
        for row, response in zip(rows, sampled):
            ranked.append(row | {"responses": [row["responses"][0], response]})
        row_logps(ours.model, ranked, MICRO_BATCH_TOKENS, torch.device("cpu"))
        ours.preference_step(micro_batches(ranked))

    return play


def trl_round(rows):
    """-> function: the same with transformers' generate and TRL's trainer."""
    prompts = [row["prompt"] for row in rows]
    limits = [len(row["responses"][1]) for row in rows]
    model = transformers_model().eval()
    trainer = trl_trainer(rows)
    step = trl_step(trainer)

    def play():
        transformers_generate(model, prompts, limits)
        with torch.no_grad():
            trainer.compute_ref_log_probs(trainer.model, dict(trainer.batch))
        step()

    return play


# ---- online: GRPO and online DPO


def online_size(prompts, K):
    """64 samples at K = 8, and 32 at K = 2. prompts: "ragged", or their length; then the samples
    have 64 tokens."""
    if prompts == "ragged":
        return ragged_size()
    return equal_size(8 if K == 8 else 16, int(prompts), 64, K)


def online(options):
    """GRPO's step, and whole rounds of GRPO (K = 8) and online DPO (K = 2), beside TRL's trainers.

    A round samples, scores by a Python function, takes the reference's log-probabilities and one
    optimizer step. Prompts are long or short beside the responses, which have 64 tokens on both
    sides; ragged ones and their responses have the lengths of real rows.
    """
    if not options.peers:
        return  # TRL is the only baseline
    for prompts in ("256", "32", "ragged"):
        time_grpo_step(online_size(prompts, 8))
    for prompts in ("256", "32", "ragged"):
        time_online_round("GRPO", online_size(prompts, 8))
    for prompts in ("256", "32"):
        time_online_round("OnlineDPO", online_size(prompts, 2))
    online_memory()
    online_profile()


def time_grpo_step(size):
    rows = scored_rows(size.rows())
    work = work_of_rows(rows)
    ours = OnlineTrainer(size)
    batches = micro_batches(rows, make_batch=ppo_batch)
    timing = take_turns(
        functools.partial(ours.grpo_step, batches),
        trl_grpo_step(rows, size),
        Need(count_flops(ours.model, work)),
    )
    print_speed(f"GRPO step, {size.name}", "TRL's GRPOTrainer", timing, work.targets)


def time_online_round(trainer_name, size):
    timing = take_turns(
        our_online_round(trainer_name, size),
        trl_online_round(trainer_name, size),
        online_need(size),
    )
    method = {"GRPO": "GRPO", "OnlineDPO": "Plackett-Luce"}[trainer_name]
    what = f"{method} round, {size.name}"
    print_speed(what, f"TRL's {trainer_name}Trainer", timing, sum(size.limits()))


def our_online_round(trainer_name, size):
    ours = OnlineTrainer(size)
    return ours.grpo_round if trainer_name == "GRPO" else ours.pl_round


def online_need(size):
    """Training, the reference's forward pass, and one for sampling, each prompt once.

    A step of sampling reads the keys and values of a prompt once for all its samples. The
    log-probabilities of the policy that sampled come with the samples.
    """
    model = GPT(GPTConfig(**size.shape))
    flops = count_flops(model, work_of_rows(size.rows()), passes=5)
    cached = 0
    for prompt_length, lengths in size.lengths:
        cached += max(lengths) * prompt_length + sum(length**2 / 2 for length in lengths)
    num_bytes = 2 * model.config.n_layer * model.config.n_embd * 4 * cached
    return Need(flops, num_bytes=num_bytes)


def online_memory():
    """TRL with its default micro-batch; its step also with gradient checkpointing, and with one
    micro-batch for all samples."""
    for prompts in ("256", "32", "ragged"):
        for what in ("grpo_step", "grpo_round", "dpo_round"):
            if what == "dpo_round" and prompts == "ragged":
                continue  # TRL's trainer has no lengths to end at
            sides = {"trl": "TRL"}
            if what == "grpo_step":
                sides["checkpointing"] = "TRL, gradient checkpointing"
                sides["whole"] = "TRL, one micro-batch"
            name = what.replace("_", " ").replace("grpo", "GRPO").replace("dpo", "Plackett-Luce")
            name += f", {online_memory_size(what, prompts).name}"
            our_mib = peak_mib(f"{what} {prompts} ours")
            for side, baseline_name in sides.items():
                baseline_mib = peak_mib(f"{what} {prompts} {side}")
                print_memory(name, baseline_name, our_mib, baseline_mib)


def online_memory_size(what, prompts):
    return online_size(prompts, 2 if what == "dpo_round" else 8)


def online_memory_work(what, prompts, side):
    """-> function. what: grpo_step, grpo_round or dpo_round."""
    size = online_memory_size(what, prompts)
    options = {"gradient_checkpointing": side == "checkpointing"}
    if side == "whole":
        options["batch"] = len(size.limits())
    trainer_name = "OnlineDPO" if what == "dpo_round" else "GRPO"
    if what != "grpo_step":
        if side == "ours":
            return our_online_round(trainer_name, size)
        return trl_online_round(trainer_name, size, **options)
    rows = scored_rows(size.rows())
    if side == "ours":
        batches = micro_batches(rows, make_batch=ppo_batch)
        return functools.partial(OnlineTrainer(size).grpo_step, batches)
    return trl_grpo_step(rows, size, **options)


def online_profile():
    """Seconds of the parts of a round of GRPO, on both sides, and the operations of our parts."""
    print("\n| part of a round of GRPO, K=8 | nanoSPIN | TRL | ratio |\n|---|---|---|---|")
    for prompts in ("256", "32", "ragged"):
        size = online_size(prompts, 8)
        ours = our_online_parts(size)
        baseline = trl_online_parts(size)
        seconds = {name: ([], []) for name in ours}
        for repeat in range(-1, 3):  # repeat -1 warms up
            for name, times in seconds.items():
                pair = cpu_seconds(ours[name]), cpu_seconds(baseline[name])
                if repeat >= 0:
                    times[0].append(pair[0])
                    times[1].append(pair[1])
        for name, (our_times, trl_times) in seconds.items():
            a, b = statistics.median(our_times), statistics.median(trl_times)
            ratio = f"{b / a:.2f}x" if b > 0.001 else ""  # TRL has no such part
            cells = [f"{name}, prompts {prompts}", f"{a:.2f} s", f"{b:.2f} s", ratio]
            print("| " + " | ".join(cells) + " |", flush=True)
    print_profile_header()
    for prompts in ("256", "32"):
        size = online_size(prompts, 8)
        trainer = OnlineTrainer(size)
        rows = scored_rows(size.rows())
        work = work_of_rows(rows)
        step = functools.partial(trainer.grpo_step, micro_batches(rows, make_batch=ppo_batch))
        print_profile(f"GRPO step, {size.name}", step, trainer.model, work, passes=3)
        print_profile(f"its sampling, {size.name}", trainer.sample, trainer.model, work, passes=1)


def our_online_parts(size):
    trainer = OnlineTrainer(size)
    rows = scored_rows(size.rows())
    batches = micro_batches(rows, make_batch=ppo_batch)
    return {
        "sample and score": trainer.sample,
        "log-probabilities of the reference": lambda: trainer.token_scores(trainer.reference, rows),
        "log-probabilities of the policy": lambda: trainer.token_scores(trainer.model, rows),
        "optimizer step": lambda: trainer.grpo_step(batches),
    }


def trl_online_parts(size):
    rows = scored_rows(size.rows())
    sample, reference = trl_sampling_parts(size, rows)
    return {
        "sample and score": sample,
        "log-probabilities of the reference": reference,
        "log-probabilities of the policy": lambda: None,
        "optimizer step": trl_grpo_step(rows, size),
    }


def memory(options):
    """Peak memory over idle, of each side in its own process."""
    for V in (8192, 50304, 128256):
        what = f"head, 2048 tokens, V={V}"
        measure_memory(what, "full logits", f"head {V} ours", f"head {V} plain")
    what = "8 ragged rows, K=3, fp32"
    measure_memory(what, "one padded forward", "ragged 3 ours", "ragged 3 plain")
    if options.peers:
        what = "8 ragged rows, K=2, fp32"
        measure_memory(what, "TRL's DPOTrainer", "ragged 2 ours", "ragged 2 trl")
        what = "a round of self-play, K=2, fp32"
        measure_memory(what, "generate + DPOTrainer", "round 16 ours", "round 16 trl")


def measure_memory(what, baseline_name, ours, baseline):
    """ours, baseline: arguments of `measure_peak`."""
    print_memory(what, baseline_name, peak_mib(ours), peak_mib(baseline))


def print_memory(what, baseline_name, our_mib, baseline_mib):
    print(
        f"| {what}: peak memory | {our_mib:,} MiB | {baseline_mib:,} MiB, {baseline_name} "
        f"| {baseline_mib / max(1, our_mib):.1f}x less | | | |",
        flush=True,
    )


def peak_mib(spec):
    """Peak memory of `measure_peak` in a process of its own. spec: its arguments, as text."""
    command = [sys.executable, "-m", "bench.bench", "--alone", spec]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def measure_peak(what, size, side):
    """Do one side's work in this process; print the MiB of its peak over what it held before."""
    work = memory_work(what, size, side)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak
    before = memory_kib("VmRSS")
    work()
    print((memory_kib("VmHWM") - before) // 1024)


def memory_work(what, size, side):
    """-> function. size: vocabulary of the head, K of the ragged rows, rows of the round, or the
    prompts of an online round."""
    if what in ("grpo_step", "grpo_round", "dpo_round"):
        return online_memory_work(what, size, side)
    size = int(size)
    if what == "head":
        return head_work(size, side)
    if what == "round":
        rows = ragged_rows(size, K=2)
        return our_round(rows) if side == "ours" else trl_round(rows)
    rows = ragged_rows(8, K=size)
    if side == "ours":
        ours = OurTrainer()
        batches = micro_batches(rows)
        return functools.partial(ours.preference_step, batches)
    if side == "plain":
        return padded_step(PlainGPT(**SHAPE), rows, torch.float32)
    return trl_step(trl_trainer(rows))


def head_work(vocab_size, side):
    """-> function: log-probabilities of 2,048 targets and their gradients."""
    hidden = torch.randn(2048, 256, requires_grad=True)
    weight = torch.empty(vocab_size, 256).normal_(0.0, 0.02).requires_grad_()
    targets = torch.randint(0, vocab_size, (2048,))
    hidden.grad = torch.zeros_like(hidden)
    weight.grad = torch.zeros_like(weight)

    def work():
        if side == "ours":
            logps = linear_logprobs(hidden, weight, targets)
        else:
            logps = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])
        backward(logps.sum())

    return work


def memory_kib(name):
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name))


def profile(options):
    """Where our time goes in float32, and how near the matmuls come to the large one's rate.

    The rates count the FLOPs that the work needs, so what masks hide counts against them.
    """
    print_profile_header()
    idx, targets = random_windows()
    ours = OurTrainer()
    step = functools.partial(ours.pretraining_step, idx, targets)
    print_profile("pretraining step", step, ours.model, work_of_windows(idx), passes=3)
    rng = np.random.default_rng(0)
    ranked = {
        "8 rows, K=2, prompt:response 256:64": [
            random_row(rng, 256, [64] * 2, 8192) for _ in range(8)
        ],
        "8 ragged rows, K=3": ragged_rows(8),
    }
    for what, rows in ranked.items():
        ours = OurTrainer()
        step = functools.partial(ours.preference_step, micro_batches(rows))
        print_profile(what, step, ours.model, work_of_rows(rows), passes=3)
    model = GPT(GPTConfig(**SHAPE))
    for what, requests in sampling_requests().items():
        limits = [request.new_tokens for request in requests]
        step = functools.partial(generate, model, random_prompts(requests), limits)
        print_profile(f"sampling {what}", step, model, work_of_requests(requests), passes=1)


def print_profile_header():
    columns = [
        "where the time goes, fp32",
        "nanoSPIN",
        "rate of matmuls with weights",
        "rate of attention matmuls",
        *OPERATIONS,
        "other",
    ]
    print("\n| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")


def print_profile(what, step, model, work, passes):
    step()  # warm up
    large = measure_rate("fp32")
    without_attention = replace(work, pairs=0, output_pairs=0)
    weight_flops = count_flops(model, without_attention, passes)
    attention_flops = count_flops(model, work, passes) - weight_flops
    found = profile_operations(step)
    rates = [
        weight_flops / found.seconds["matmuls with weights"],
        attention_flops / found.seconds["attention matmuls"],
    ]
    parts = [*found.seconds.values(), found.total - sum(found.seconds.values())]
    cells = [what, f"{found.total:.2f} s"]
    cells += [f"{rate / 1e9:.0f} GFLOP/s, {100 * rate / large:.0f} %" for rate in rates]
    cells += [f"{100 * seconds / found.total:.0f} %" for seconds in parts]
    print("| " + " | ".join(cells) + " |", flush=True)


# ------------------------------------------------------------------------------------------ growth


def growth(options):
    """Time of a preference step of four rows as one size grows -> bench/growth.json, growth.png."""
    start = {"K": 3, "P": 128, "R": 128, "n": 4}
    panels = {
        "responses K": [(K, {"K": K}) for K in (2, 3, 5, 8)],
        "prompt (tokens)": [(P, {"P": P}) for P in (32, 128, 256, 512)],
        "vocabulary": [(V, {"vocab_size": V}) for V in (2048, 8192, 24576, 50304)],
        "parameters in blocks (millions)": [
            (12 * n_layer * n_embd**2 / 1e6, {"n_layer": n_layer, "n_embd": n_embd})
            for n_layer, n_embd in ((2, 128), (4, 256), (4, 384), (6, 512))
        ],
    }
    measured = {}
    for label, sizes in panels.items():
        measured[label] = []
        for x, size in sizes:
            timing = time_preference_step(**start | size, repeats=3)
            measured[label].append({"x": x} | asdict(timing))
            ours = statistics.median(timing.ours)
            baseline = statistics.median(timing.baseline)
            floor = statistics.median(timing.floor)
            cells = [
                f"{label} {x:g}",
                f"{ours:.2f} s",
                f"{baseline:.2f} s, a forward pass per response",
                f"{baseline / ours:.2f}x",
                "",
                f"{1000 * floor:.0f} ms",
                f"{100 * floor / ours:.0f} %",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
    path = os.path.join(ROOT, "bench", "growth.json")
    write_json(path, measured)
    draw_growth(path)


def draw_growth(path):
    """Draw growth.json as growth.png and growth.svg beside it."""
    from tools.plot import BAND_ALPHA, GREY, PALETTE, figure_legend, plt, save_figure, style

    sides = {
        # key -> (label, colour, line style)
        "ours": ("nanoSPIN: shared prompt, chunked head", PALETTE[0], "o-"),
        "baseline": ("a forward pass per response, full logits", PALETTE[1], "s-"),
        "floor": ("floor of the FLOPs", GREY, ":"),
    }
    panels = read_json(path)
    with style():
        fig, axes = plt.subplots(1, len(panels), figsize=(11, 3.1))
        for ax, (label, points) in zip(axes, panels.items()):
            x = [point["x"] for point in points]
            for key, (name, color, line) in sides.items():
                seconds = [point[key] for point in points]
                ax.plot(x, list(map(statistics.median, seconds)), line, color=color, label=name)
                low = list(map(min, seconds))
                high = list(map(max, seconds))
                if low != high:
                    band = {"color": color, "alpha": BAND_ALPHA, "lw": 0}
                    ax.fill_between(x, low, high, label="range of the repeats", **band)
            ax.set(xlabel=label, ylim=(0, None))
        axes[0].set_ylabel("seconds per step, one thread")
        figure_legend(fig)
        save_figure(fig, path.removesuffix(".json") + ".png")


# ------------------------------------------------------------------------------------- shakespeare

# https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a/data/tinyshakespeare/input.txt
SHAKESPEARE = os.path.join(ROOT, "data", "shakespeare", "input.txt")


def shakespeare(options):
    """Training time to nanoGPT's validation loss, by its CPU recipe and by ours; three seeds."""
    if not os.path.exists(SHAKESPEARE):
        print(f"| Shakespeare's characters | no {SHAKESPEARE} | | | | | |")
        return
    names = ("shakespeare", "shakespeare_nanogpt")
    seconds = {name: [] for name in names}
    losses = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        run_python("-m", "data.shakespeare.prepare", SHAKESPEARE, f"--out={data}")
        for seed in (1, 2, 3):
            for name in names:
                out_dir = f"{folder}/{name}_{seed}"
                run_python(
                    "train.py",
                    f"config/{name}.py",
                    f"--data={data}",
                    f"--out_dir={out_dir}",
                    f"--seed={seed}",
                    "--device=cpu",
                )
                with open(f"{out_dir}/metrics.jsonl") as f:
                    records = [json.loads(line) for line in f]
                steps = [record["ms"] for record in records if record["kind"] == "step"]
                evals = [record["val_loss"] for record in records if record["kind"] == "eval"]
                seconds[name].append(sum(steps) / 1000)
                losses[name].append(evals[-1])
    ours, nanogpt = (
        f"{format_range(seconds[name], 0)} s to {format_range(losses[name], 3)}" for name in names
    )
    ratios = [b / a for a, b in zip(*seconds.values())]
    print(
        f"| Shakespeare's characters, validation loss | {ours} | {nanogpt}, nanoGPT's recipe "
        f"| {statistics.median(ratios):.2f}x ({format_range(ratios)}) | | | |",
        flush=True,
    )


def run_python(*args):
    """A command of the repository, on one thread and without its output."""
    subprocess.run(
        [sys.executable, *args],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


# --------------------------------------------------------------------------------- the command line


BENCHMARKS = {
    "pretrain": pretrain,
    "preference": preference,
    "ragged": ragged,
    "sampling": sampling,
    "spin_round": spin_round,
    "online": online,
    "memory": memory,
    "profile": profile,
    "growth": growth,
    "shakespeare": shakespeare,
}
ON_REQUEST = ("online", "growth", "shakespeare")  # not run unless named


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        help=f"{', '.join(BENCHMARKS)}; default: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument(
        "--peers", action="store_true", help="also transformers and TRL (bench/requirements.txt)"
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"
    for name in args.what:
        if name not in BENCHMARKS:
            names = ", ".join(BENCHMARKS)
            raise SystemExit(f"{name}: no such benchmark, expected one of {names}")
    torch.set_num_threads(1)
    distributed.configure_torch("cpu")
    if args.alone:
        return measure_peak(*args.alone.split())

    options = Options(peers=args.peers)
    rates = {name: measure_rate(name) / 1e9 for name in ("fp32", "bf16", "bytes")}
    print(
        f"one thread of {distributed.cpu_info('model name') or 'an unknown chip'}: "
        f"{rates['fp32']:.0f} GFLOP/s in float32 ({torch.get_float32_matmul_precision()}), "
        f"{rates['bf16']:.0f} in bfloat16, {rates['bytes']:.1f} GB/s; torch {torch.__version__}"
    )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, this run not counted")
    if rates["bf16"] < rates["fp32"]:
        del options.dtypes["bf16"]
        print("This chip emulates bfloat16: its rows are left out.")
    print(f"\n{TABLE_HEADER}")
    usual = [name for name in BENCHMARKS if name not in ON_REQUEST]
    for name in args.what or usual:
        BENCHMARKS[name](options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
