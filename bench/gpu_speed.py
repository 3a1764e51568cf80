"""The measurements of bench/gpu.py: times, memory and profiles. Each is a function of a Bench."""

import contextlib
import functools
import sys
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines import (
    padded_scores,
    plain_optimizer,
    plain_step,
    random_row,
    transformers_generate,
    transformers_model,
    update,
)
from bench.gpu_setup import (
    Bench,
    cuda_graphs,
    decode_attention,
    our_model,
    plain_model,
    random_heads,
    require,
)
from data.batch import batch_rows, count_row_tokens, split_by_tokens
from eval import row_logps
from loss import linear_logprobs, preference_loss
from model import GPT, GPTConfig, response_logps
from nanospin import attention, decoding
from nanospin.flash_attention import FlashSequences
from nanospin.mfu import mfu
from sample import generate


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


def preference_flex(bench: Bench):
    """The same with FlexAttention in place of FlashAttention."""
    rows = preference_rows(bench)
    return preference_speed(bench, rows, packed_preference(bench, rows, flash=False))


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


def packed_preference(bench: Bench, rows, flash=True):
    """-> function: our step."""
    model, optimizers = our_model(bench, stage="spin")
    batches = cut_rows(rows, bench.size.micro_batch_tokens, "packed")
    if not flash:
        batches = [replace(batch, varlen=None) for batch in batches]

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
    """Attention of one layer. Forward and backward: SDPA's kernels on rectangles, FlashAttention
    and FlexAttention on the packed rows of a preference step. Without gradients: a decoding
    step."""
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
        attend = functools.partial(FlashSequences(batch.varlen).attend, 0)
        works["packed, flash"] = functools.partial(forward_backward, attend, *heads_of_qkv)
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
