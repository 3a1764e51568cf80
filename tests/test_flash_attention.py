"""FlashAttention over packed sequences, with plain PyTorch for its kernels: values, gradients, and
what they are given."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_gpu_path import SHAPE, WORK, gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batch import batch_rows, stream_batch
from model import GPT, GPTConfig
from nanospin import flash_attention
from nanospin.attention import is_visible
from nanospin.config import Config
from nanospin.flash_attention import FlashSequences


def sequences_of(starts):
    return list(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True))


def plain_forward(q, k, v, lengths, causal):
    """One sequence after the other. As in the kernel, a causal mask ends with the last key, and a
    query without keys gives 0 and an infinite sum."""
    q_starts, k_starts, longest_q, longest_k = lengths
    y, lse = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), torch.inf)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for (i, j), (a, b) in zip(sequences_of(q_starts), sequences_of(k_starts), strict=True):
        assert i < j <= i + longest_q
        assert a < b <= a + longest_k
        scores = torch.einsum("ihd,jhd->hij", q[i:j], k[a:b]) * q.shape[-1] ** -0.5
        if causal:
            visible = torch.ones(j - i, b - a, dtype=torch.bool).tril(b - a - (j - i))
            scores = scores.masked_fill(~visible, -torch.inf)
        y[i:j] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b])
        lse[:, i:j] = scores.logsumexp(-1)
    return y, lse


def plain_backward(dy, q, k, v, y, lse, lengths, causal):
    """The formulas of the kernel (arXiv 2307.08691, algorithm 2): probabilities from lse, and the
    sum of dy y for the softmax."""
    q_starts, k_starts, *_ = lengths
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    total = (dy * y).sum(-1).T  # (H, n)
    for (i, j), (a, b) in zip(sequences_of(q_starts), sequences_of(k_starts), strict=True):
        keys, values = (x[a:b].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[i:j], keys) * scale
        probs = torch.exp(scores - lse[:, i:j, None])
        if causal:
            probs = probs.tril(b - a - (j - i))
        d_probs = torch.einsum("ihd,jhd->hij", dy[i:j], values)
        d_scores = probs * (d_probs - total[:, i:j, None]) * scale
        dq[i:j] = torch.einsum("hij,jhd->ihd", d_scores, keys)
        d_keys = torch.einsum("hij,ihd->jhd", d_scores, q[i:j])
        d_values = torch.einsum("hij,ihd->jhd", probs, dy[i:j])
        dk[a:b] = d_keys.unflatten(1, (-1, groups)).sum(2)
        dv[a:b] = d_values.unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(flash_attention, "flash_forward", plain_forward)
    monkeypatch.setattr(flash_attention, "flash_backward", plain_backward)


@pytest.fixture
def gpu_with_flash(plain_kernels, monkeypatch):
    """The branch for a GPU, in any dtype and for segments of any length."""

    monkeypatch.setattr("model.on_gpu", lambda x: True)
    monkeypatch.setattr(flash_attention, "can_attend", lambda varlen, *_: varlen is not None)


def random_batch(seed=0, rows=7):
    """Rows with and without a prompt, absent responses, and responses of one token, which is not
    read. Some rows have no token but their prompt's, one has none at all."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        lengths = rng.integers(0, 9, 1 + rng.integers(1, 5))
        prompt, *responses = [rng.integers(1, 90, n).tolist() for n in lengths]
        responses = [y or None for y in responses]
        made.append({"prompt": prompt, "responses": responses, "ranks": [0] * len(responses)})
    made.append({"prompt": [3, 4], "responses": [[5], None], "ranks": [0, 1]})
    made.append({"prompt": [], "responses": [[5], None], "ranks": [0, 1]})
    return batch_rows(made)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seed", range(8))
def test_values_and_gradients_are_those_of_dense_attention(seed, kv_heads, plain_kernels):
    batch = random_batch(seed)
    n = len(batch.idx)
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for h in (4, kv_heads, kv_heads):
        x = torch.randn(n, h, 8, generator=generator, dtype=torch.float64)
        heads.append(x.requires_grad_())
    dy = torch.randn(n, 4, 8, generator=generator, dtype=torch.float64)

    sequences = FlashSequences(batch.varlen)
    ordered = [x[batch.varlen.order] for x in heads]
    y = sequences.with_queries(None).attend(0, *ordered)
    assert y.equal(sequences.attend(0, *ordered)[batch.varlen.place])
    found = (y, *torch.autograd.grad(y, heads, dy))

    q, k, v = heads
    k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    i = torch.arange(n)
    visible = is_visible(batch.sequence_id, batch.response_id, i[:, None], i)
    scores = torch.einsum("ihd,jhd->hij", q, k) * 8**-0.5
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    y = torch.einsum("hij,jhd->ihd", probs, v)
    expected = (y, *torch.autograd.grad(y, heads, dy))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_dense_gradients_of_the_trial():
    """They are autograd's, here of two query heads and one head of keys."""
    generator = torch.Generator().manual_seed(0)
    dy, *heads = torch.randn(4, 6, 2, 8, generator=generator, dtype=torch.float64)
    heads = [heads[0].requires_grad_(), *[x[:, :1].requires_grad_() for x in heads[1:]]]
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    found = flash_attention.dense_attention(dy, *[x.detach() for x in heads], visible)
    q, k, v = (x.transpose(0, 1) for x in heads)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
    expected = (y, *torch.autograd.grad(y, heads, dy))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def wrong_lse(*args, causal):
    y, lse = plain_forward(*args, causal)
    return y, lse + 0.5


def without_causality(*args, causal):
    return plain_forward(*args, False)


def other_shape(*args, causal):
    y, lse = plain_forward(*args, causal)
    return y, lse[None]


def refuses(*args, causal):
    raise RuntimeError("no kernel\nfor this card")


def refuses_without_a_word(*args, causal):
    raise RuntimeError


WRONG_KERNELS = {
    "is off by": wrong_lse,
    "off by": without_causality,
    "(no kernel)": refuses,
    "(RuntimeError)": refuses_without_a_word,
    "out of range": other_shape,
}


@pytest.mark.parametrize("message", WRONG_KERNELS)
def test_wrong_kernels_are_not_used(message, plain_kernels, monkeypatch, capsys):
    """They are tried once, and a line says why they are not used. Others are."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash_attention.is_right.cache_clear()
    device = torch.device("cpu")
    assert flash_attention.is_right(device, torch.float32, 64, 1)
    assert flash_attention.is_right(device, torch.bfloat16, 64, 3)
    assert not capsys.readouterr().err
    flash_attention.is_right.cache_clear()
    monkeypatch.setattr(flash_attention, "flash_forward", WRONG_KERNELS[message])
    for _ in range(2):
        assert not flash_attention.is_right(device, torch.float32, 64, 1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "packed rows without FlashAttention" in err
    assert message in err
    flash_attention.is_right.cache_clear()


def test_an_old_gpu_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    flash_attention.is_right.cache_clear()
    assert not flash_attention.is_right(torch.device("cpu"), torch.float16, 64, 1)
    flash_attention.is_right.cache_clear()


def test_what_is_left_to_flex_attention(monkeypatch):
    monkeypatch.setattr(flash_attention, "is_right", lambda *args: True)
    rows = [{"prompt": [1] * 64, "responses": [[1] * 33, [2] * 70], "ranks": [0, 1]}]
    varlen = batch_rows(rows).varlen
    short = batch_rows([{"prompt": [1] * 9, "responses": [[1] * 33], "ranks": [0]}] * 9).varlen

    def can_attend(varlen=varlen, device="cuda", dtype=torch.bfloat16, **options):
        config = GPTConfig(**{"n_embd": 128, "n_head": 2} | options)
        return flash_attention.can_attend(varlen, config, torch.device(device), dtype)

    assert can_attend()
    assert can_attend(dtype=torch.float16, n_embd=256)
    assert not can_attend(device="cpu")
    assert not can_attend(dtype=torch.float32)
    assert not can_attend(n_embd=272)
    assert not can_attend(n_embd=72)
    assert not can_attend(sliding_window=100, position="rotary")
    assert not can_attend(attention_softcap=50.0)
    assert not can_attend(None)
    assert not can_attend(short)


@pytest.mark.parametrize("name", ["documents", "sft", "ranking", "reward", "ppo"])
def test_losses_and_gradients_are_those_of_the_cpu(name, request):
    objective, make_batch = WORK[name]
    shape = SHAPE | {"position": "rotary", "n_kv_head": 2}
    batch, cfg = make_batch(), Config()
    model = GPT(GPTConfig(**shape, scalar_head="ppo" in name or name == "reward")).double()
    expected = gradients(model, objective, batch, cfg)
    request.getfixturevalue("gpu_with_flash")
    found = gradients(model, objective, batch, cfg)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_lengths_of_packed_rows():
    """Two rows with a prompt and responses, a text without a prompt, a prompt alone, padding."""
    rows = [
        {"prompt": [1, 2, 3], "responses": [[1, 2], None, [4, 5, 6]], "ranks": [0, 0, 0]},
        {"prompt": [], "responses": [[1] * 5], "ranks": [0]},
        {"prompt": [1, 2], "responses": [[7]], "ranks": [0]},
        {"prompt": [1] * 4, "responses": [[7, 8]], "ranks": [0]},
    ]
    varlen = batch_rows(rows, multiple=24).varlen
    # tokens     0 1 2 | 3 | 4 5 | 6 7 8 9 | 10 11 | 12 13 14 15 | 16 | 17 ... 23
    tokens = torch.arange(24)
    order = [0, 1, 2, 12, 13, 14, 15, 3, 4, 5, 16, *range(6, 12), *range(17, 24)]
    assert varlen.order.tolist() == order
    assert varlen.order[varlen.place].equal(tokens)
    assert varlen.segment_starts.tolist() == [0, 3, 7, 8, 10, 11, 15, 17, 24]
    assert (varlen.num_prompt_tokens, varlen.num_response_tokens) == (7, 4)
    assert varlen.prompt_starts.tolist() == [0, 3, 7]
    assert varlen.response_starts.tolist() == [0, 3, 4]
    assert varlen.segment_starts.dtype == varlen.prompt_starts.dtype == torch.int32
    longest = (varlen.longest_segment, varlen.longest_prompt, varlen.longest_responses)
    assert longest == (128, 128, 128)


def test_the_lengths_of_documents():
    tokens = np.array([0, 5, 6, 7, 0, 8, 9, 0, 0, 4] * 40)
    batch = stream_batch(tokens, 30, 4, 0, 0, 97, document_end=0)
    change = batch.sequence_id[1:] != batch.sequence_id[:-1]
    expected = [0, *(change.nonzero()[:, 0] + 1).tolist(), 120]
    assert batch.varlen.segment_starts.tolist() == expected
    assert not batch.varlen.num_response_tokens
    assert batch.varlen.order.tolist() == list(range(120))
    assert stream_batch(tokens, 30, 4, 0, 0, 97).varlen is None


def test_a_batch_moves_with_its_lengths():
    batch = random_batch()
    moved = batch.to("meta")
    assert moved.varlen.segment_starts.is_meta
    assert moved.varlen.longest_segment == batch.varlen.longest_segment
    assert moved.layout()["varlen"] is moved.varlen
    row = {"prompt": [1], "responses": [[2, 3]], "ranks": [0]}
    assert batch_rows([row], "padded").varlen is None


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pytorch_knows_these_kernels(kv_heads, monkeypatch):
    """Their arguments, and the shapes and dtypes of results, by PyTorch's own fake kernels. A fake
    tensor has no values, so nothing waits for them either. Two methods would ask for a driver."""
    monkeypatch.setattr(torch.Tensor, "contiguous", torch.Tensor.clone)
    varlen = random_batch().varlen
    n = len(varlen.order)
    with FakeTensorMode(allow_non_fake_inputs=True):
        varlen = varlen.map_tensors(lambda x: torch.empty_like(x, device="cuda"))
        heads = []
        for h in (4, kv_heads, kv_heads):
            heads.append(torch.empty(n, h, 64, dtype=torch.bfloat16, device="cuda"))
        y, lse = flash_attention.packed_forward(*heads, varlen, lambda *args: None)
        grads = flash_attention.packed_backward(torch.empty_like(y), *heads, y, lse, varlen)
    assert y.shape == heads[0].shape
    assert y.dtype == torch.bfloat16
    assert lse.shape == (4, n)
    assert lse.dtype == torch.float32
    for x, grad in zip(heads, grads, strict=True):
        assert grad.shape == x.shape
        assert grad.dtype == torch.bfloat16


def test_mix_is_compiled_once(monkeypatch):
    """For any number of tokens, at any place of a batch."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flash_attention.mix_, dynamic=None, backend=backend)
    monkeypatch.setattr(flash_attention, "compile_dynamic", lambda function, dynamic: compiled)
    torch._dynamo.reset()
    for n, start, r in ((40, 3, 17), (50, 9, 20), (64, 30, 9), (64, 1, 2)):
        y, row_y, weight = torch.randn(n, 3, 8), torch.randn(r, 3, 8), torch.rand(3, r).T
        expected = y.clone()
        flash_attention.mix_(expected.narrow(0, start, r), row_y, weight)
        flash_attention.compiled_mix(y.narrow(0, start, r), row_y, weight)
        assert y.equal(expected)
    assert len(graphs) == 1
