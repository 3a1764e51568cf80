"""The code that runs on a GPU, on a CPU: its values, that it never waits for the GPU, and how often
it is compiled."""

import contextlib
import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_model import random_rows
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import train
from data.batch import batch_rows, ppo_batch, reward_batch, stream_batch
from model import GPT, GPTConfig
from nanospin import attention, decoding, distributed, elastic, fused_head, kv_cache
from nanospin.config import Config
from nanospin.decoding import DecodeStep
from sample import generate, prefill

SHAPE = {"vocab_size": 97, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODERN = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True}


class NoHostReads(TorchDispatchMode):
    """Raises where the CPU would wait for a GPU: to read a value, or for the size of a result."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        reads = name.startswith(self.READS) or str(func) == "aten.repeat_interleave.Tensor"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [x for x in args[1] if x is not None]
            reads = any(x.dtype == torch.bool for x in indices)
        if reads:
            raise AssertionError(f"{name} would wait for the GPU")
        return func(*args, **(kwargs or {}))


def refuse(*args, **kwargs):
    raise AssertionError("this would wait for the GPU")


@contextlib.contextmanager
def no_host_reads():
    """NoHostReads, and the methods that read a CPU tensor without an operator."""
    methods = {"tolist": refuse, "numpy": refuse, "cpu": refuse}
    with mock.patch.multiple(torch.Tensor, **methods), NoHostReads():
        yield


def dense_attention(q, k, v, mask, softcap=0.0):
    """What `attention.flex_attention` computes, with all scores in memory: the pairs that a mask
    shows in the blocks that it lists."""
    m, n = len(q), len(k)
    visible = mask.mask_mod(0, 0, torch.arange(m)[:, None], torch.arange(n))
    listed = mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return masked_attention(q, k, v, visible & (listed > 0), softcap)[0].transpose(0, 1)


def masked_attention(q, k, v, visible, softcap=0.0):
    """q (B, H, m, D), k and v (B, Hkv, n, D), visible as (B, H, m, n) -> (B, H, m, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, visible)
    scores = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def plain_decode_attention(q, new_k, new_v, k, v, first, last, softcap=0.0):
    """gpu_kernels.decode_attention in plain PyTorch."""
    k.index_copy_(2, last, new_k[:, :, None])
    v.index_copy_(2, last, new_v[:, :, None])
    column = torch.arange(k.shape[2], device=k.device)
    visible = (column >= first[:, None]) & (column <= last)  # (B, columns)
    return masked_attention(q[:, :, None], k, v, visible[:, None, None], softcap)[:, :, 0]


def plain_log_softmax_(logits, targets, softcap, vocab_size, needs_grad):
    """gpu_kernels.log_softmax_ in plain PyTorch."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.detach().to(dtype).requires_grad_()
    with torch.enable_grad():
        capped = softcap * torch.tanh(x / softcap) if softcap else x
        padding = torch.arange(x.shape[1], device=x.device) >= vocab_size
        capped = capped.masked_fill(padding, -torch.inf)
        logps = capped.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        if needs_grad:
            logits.copy_(torch.autograd.grad(-logps.sum(), x)[0])
    return logps.detach()


@pytest.fixture
def gpu_path(monkeypatch):
    """Take the branches for a GPU, with plain PyTorch for its kernels."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    for module in (attention, fused_head, kv_cache, model_module):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention, "flex_attention", dense_attention)
    monkeypatch.setattr(kv_cache, "decode_attention", plain_decode_attention)
    monkeypatch.setattr(fused_head, "log_softmax_", plain_log_softmax_)
    monkeypatch.setitem(kv_cache.GROUP_SIZE, "cpu", 4096)


def ranked_rows(n=6):
    """Rows of three responses, some absent, with what every stage needs of them."""
    rows = []
    for row in random_rows(3, n, 20, 3):
        row["prompt"] = row["prompt"] or [1]
        row["responses"] = [y or None for y in row["responses"]]
        rows.append(row | {"ref": [-3.0] * len(row["responses"])})
    return rows


def ppo_rows():
    rows = []
    for row in ranked_rows():
        response = row["responses"][0] or [2]
        tokens = len(response)
        arrays = {}
        for name in ("logps", "values", "advantages", "returns"):
            arrays[name] = torch.linspace(-3, -1, tokens).numpy()
        rows.append({"prompt": row["prompt"], "responses": [response], "ranks": [0]} | arrays)
    return rows


def stream(document_end=None):
    tokens = torch.randint(0, 90, (500,), generator=torch.Generator().manual_seed(0)).numpy()
    return stream_batch(tokens, 32, 4, 0, 0, 97, document_end=document_end)


WORK = {
    "windows": (train.token_objective, stream),
    "documents": (train.token_objective, lambda: stream(0)),
    "sft": (train.token_objective, lambda: batch_rows(ranked_rows())),
    "ranking": (train.ranking_objective, lambda: batch_rows(ranked_rows())),
    "padded": (train.ranking_objective, lambda: batch_rows(ranked_rows(), "padded")),
    "reward": (train.reward_objective, lambda: reward_batch(ranked_rows())),
    "ppo": (train.ppo_objective, lambda: ppo_batch(ppo_rows())),
    "padded ppo": (train.ppo_objective, lambda: ppo_batch(ppo_rows(), "padded")),
}


def gradients(model, objective, batch, cfg):
    model.zero_grad()
    loss, metrics = objective(model, batch, cfg)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *metrics.values(), *grads]


GEMMA = MODERN | {
    "sliding_window": 7,
    "full_attention_interval": 2,
    "rope_local_theta": 100.0,
    "attention_softcap": 2.0,
    "norm_position": "both",
    "mlp": "geglu",
    "n_kv_head": 2,
}
LAYOUTS = [{}, MODERN, MODERN | {"sliding_window": 7, "n_kv_head": 2}, GEMMA]


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("name", WORK)
def test_a_micro_batch_never_waits_for_the_gpu(name, options, request):
    """And has the loss, metrics and gradients of the CPU's code."""
    objective, make_batch = WORK[name]
    batch, cfg = make_batch(), Config()
    model = GPT(GPTConfig(**SHAPE | options, scalar_head="ppo" in name or name == "reward"))
    expected = gradients(model, objective, batch, cfg)
    request.getfixturevalue("gpu_path")
    meter = train.Meter()
    with no_host_reads():
        found = gradients(model, objective, batch, cfg)
        meter.add({"loss": found[0]}, 3.0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


LONG = MODERN | {"block_size": 256}
DECODED = [
    {"block_size": 256},
    LONG | {"n_kv_head": 2},
    LONG | {"sliding_window": 7},
    LONG | {"sliding_window": 150},
    LONG | {"sliding_window": 7, "full_attention_interval": 2, "attention_softcap": 2.0},
]


@pytest.mark.parametrize("options", DECODED)
def test_decoding(options, request):
    """The tokens that a CPU samples: prompts of many lengths, rows that leave and join, and a cache
    that grows."""
    model = GPT(GPTConfig(**SHAPE | options)).double()
    generator = torch.Generator().manual_seed(0)
    prompts, limits = [], []
    for length in (1, 9, 140, 3, 120, 64, 9, 2):
        prompts.append(torch.randint(0, 97, (length,), generator=generator).tolist())
        limits.append(30 + length % 5 * 20)
    prompts += prompts[3:5]  # two prompts are shared on a CPU
    limits += [40, 50]
    expected = generate(model, prompts, limits, temperature=0, batch_size=4)
    request.getfixturevalue("gpu_path")
    assert generate(model, prompts, limits, temperature=0, batch_size=4) == expected


def test_a_decoding_step_never_waits_for_the_gpu(gpu_path):
    model = GPT(GPTConfig(**SHAPE | MODERN)).eval()
    with torch.no_grad():
        _, places = prefill(model, [[1, 2, 3], [4], [5, 6]])
        cache = kv_cache.KVCache()
        cache.rebuild(places, [3, 1, 2])
        ids, pos, num_sampled = torch.tensor([[7, 8, 9], [3, 1, 2], [0, 0, 0]])
        step = DecodeStep(model, cache, ids, pos, num_sampled, lambda x, n: x.argmax(-1))
        with no_host_reads():
            step()


def test_regrouping_is_a_few_operations_a_layer(gpu_path):
    """However many rows a batch has: per layer, keys and values, one allocation and two operations
    for each cache that the rows come from."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    model = GPT(GPTConfig(**SHAPE | {"n_layer": 12})).eval()
    with torch.no_grad():
        _, places = prefill(model, [[1] * n for n in range(1, 33)])
        _, more = prefill(model, [[2] * n for n in range(1, 17)])
        cache = kv_cache.KVCache()
        with Count():
            cache.rebuild(places[:16] + more + places[16:], [*range(1, 17)] * 2 + [*range(17, 33)])
    assert len(calls) < 12 * 2 * 5 + 10


def test_the_guard_of_this_test():
    x = torch.tensor([1.0, -1.0])
    reads = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x.unique(),
        lambda: (x > 0).nonzero(),
        lambda: x[x > 0],
        lambda: bool(x.sum()),
        lambda: x.masked_select(x > 0),
        lambda: torch.repeat_interleave(torch.tensor([1, 2])),
    ]
    for read in reads:
        with pytest.raises(AssertionError, match="would wait"), no_host_reads():
            read()


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_six_graphs_are_compiled(checkpointing, monkeypatch):
    """The embedding and two halves of a block, with and without gradients: for every layout and
    length. Also within checkpoints, where an outer compilation would be switched off. The losses
    stay the same."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    cfg = Config(stage="spin", compile=True, activation_checkpointing=checkpointing)
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE | MODERN | {"n_layer": 3}))
    model = distributed.prepare_model(model, torch.device("cpu"), torch.float32, cfg)
    model.init_weights()
    plain = GPT(model.config)
    torch._dynamo.reset()
    for n in range(2, 7):
        for name in ("ranking", "windows"):
            batch = batch_rows(ranked_rows(n)) if name == "ranking" else stream()
            found = gradients(model, WORK[name][0], batch, cfg)
            expected = gradients(plain, WORK[name][0], batch, cfg)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                model(batch.idx, batch.targets, **batch.layout())
    assert len(graphs) == 6


def test_heads_are_contiguous_where_they_are_compiled(gpu_path, monkeypatch):
    """The copies are part of the graph. Sampling runs eagerly, and copies nothing."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = GPT(GPTConfig(**SHAPE))
    block = model.h[0]
    distributed.compile_blocks(model, torch.device("cuda"), Config(stage="spin"))
    torch._dynamo.reset()
    x = torch.randn(5, model.config.n_embd)
    compiled = block.before_attention(x)
    assert [y.is_contiguous() for y in compiled] == [True] * 3
    assert graphs[0].code.count("contiguous()") == 3
    with torch.compiler.set_stance("force_eager"):
        eager = block.before_attention(x)
    assert [y.is_contiguous() for y in eager] == [False] * 3
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_a_block_is_one_graph_in_pretraining(gpu_path, checkpointing, monkeypatch):
    """For every layer. With the embedding, with and without gradients, and for batches of another
    size these are a few graphs. The losses and gradients stay the same."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    cfg = Config(stage="pretrain", activation_checkpointing=checkpointing)
    model = GPT(GPTConfig(**SHAPE | MODERN | {"n_layer": 5}))
    plain = GPT(model.config)
    distributed.compile_blocks(model, torch.device("cuda"), cfg)
    torch._dynamo.reset()
    for windows in (4, 4, 3, 2):
        tokens = torch.randint(0, 90, (windows, 33), generator=torch.Generator().manual_seed(0))
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        found, expected = model(idx, targets), plain(idx, targets)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.mean().backward()
        expected.mean().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(idx, targets), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 8
    assert sum("scaled_dot_product" in graph.code for graph in graphs) == 4


COMPILED = [  # settings, how it is compiled, how often for two layers
    (Config(stage="pretrain"), {"dynamic": None}, 1 + 2),
    (Config(stage="pretrain", document_mask=True), {"dynamic": None}, 1 + 2 * 2),
    (Config(stage="spin"), {"dynamic": True}, 1 + 2 * 2),
]


@pytest.mark.parametrize("cfg, options, times", COMPILED)
def test_compile_is_on_by_default_on_a_gpu(cfg, options, times, monkeypatch):
    """And never by default on a CPU."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or f)
    monkeypatch.setattr(distributed, "set_autocast_dtype", lambda model, dtype: model)
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE))
    monkeypatch.setattr(model, "to_empty", lambda device: model)
    for device in ("cpu", "cuda"):
        distributed.prepare_model(model, torch.device(device), torch.float32, cfg)
        assert len(calls) == (times if device == "cuda" else 0)
    assert calls[0] == options
    distributed.prepare_model(model, torch.device("cuda"), None, replace(cfg, compile=False))
    assert len(calls) == times


def test_numbers_of_one_process_are_not_sent_to_the_device():
    """A tensor on the meta device could not be read."""
    assert distributed.all_reduce_sum([1, 2.5], torch.device("meta")) == [1.0, 2.5]


@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_whose_gpu_has_work_is_waiting(busy, monkeypatch):
    """Its line may read a result of a collective call that waits for another rank."""
    monkeypatch.setattr(elastic, "gpu_is_busy", lambda: busy)
    waiting, _ = elastic.current_location()
    assert waiting == busy


def test_cuda_graphs_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(decoding, "GRAPHS", {"cuda"})
    distributed.setup_device(Config(device="cpu"))
    assert decoding.GRAPHS == {"cuda"}
    distributed.setup_device(Config(device="cpu", cuda_graphs=False))
    assert not decoding.GRAPHS
