"""The fused LM head against logits and log_softmax."""

import pytest
import torch
from test_gpu_path import plain_log_softmax_

from nanospin import fused_head
from nanospin.fused_head import linear_logprobs


def plain_logprobs(hidden, weight, targets, softcap=0.0, vocab_size=None):
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits[..., :vocab_size].log_softmax(-1)
    logps = logps.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return logps * (targets >= 0)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(
    "chunk, kept", [(1, 7 * 37), (7, None), (7, 14 * 37 + 5), (7, 0), (1000, None)]
)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_linear_logprobs_equals_the_plain_one(dtype, tolerance, chunk, kept, softcap):
    """Odd sizes, a padded vocabulary, chunks smaller and larger than the input, and all, some or
    none of the probabilities kept. bfloat16 matmuls differ in the last of 8 bits, and gradients
    are rounded once more."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, 13, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(37, 13, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(-1, 33, (3, 11), generator=g)
    upstream = torch.rand(3, 11, generator=g).to(torch.promote_types(dtype, torch.float32))
    fast = linear_logprobs(
        hidden, weight, targets, softcap=softcap, vocab_size=33, chunk=chunk, kept=kept
    )
    slow = plain_logprobs(hidden, weight, targets, softcap, 33)
    assert fast.dtype == upstream.dtype
    assert (fast[targets < 0] == 0).all()
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    fast_grads = torch.autograd.grad((fast * upstream).sum(), (hidden, weight))
    slow_grads = torch.autograd.grad((slow * upstream).sum(), (hidden, weight))
    for a, b in zip(fast_grads, slow_grads):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture
def gpu_path(monkeypatch):
    """The head as a GPU computes it, with plain PyTorch for its kernel."""
    monkeypatch.setattr(fused_head, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused_head, "log_softmax_", plain_log_softmax_)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_head_of_a_gpu(gpu_path, dtype, softcap):
    """The values of the CPU's, whatever is kept. The gradients do not depend on it by a bit."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 300, 13, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(64, 13, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(-1, 33, (2, 300), generator=g)
    upstream = torch.rand(2, 300, generator=g).to(torch.promote_types(dtype, torch.float32))
    grads = []
    for kept in (0, 128 * 64, 1 << 20):
        found = linear_logprobs(hidden, weight, targets, softcap, 33, chunk=128, kept=kept)
        grads.append(torch.autograd.grad((found * upstream).sum(), (hidden, weight)))
    for some in grads[1:]:
        assert all(map(torch.equal, some, grads[0]))
    with torch.no_grad():
        assert torch.equal(linear_logprobs(hidden, weight, targets, softcap, 33), found)

    expected = plain_logprobs(hidden, weight, targets, softcap, 33)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    slow = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    for a, b in zip(grads[0], slow):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def test_a_chunk_of_a_gpu_is_a_multiple_of_128_tokens(gpu_path):
    for vocab_size in (257, 50304, 128256, 1 << 23):
        assert fused_head.tokens_of_chunk(torch.zeros(1), vocab_size) % 128 == 0


def test_autocast_decides_the_dtype_of_the_matmuls():
    hidden, weight, targets = torch.randn(9, 8), torch.randn(16, 8), torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logprobs(hidden, weight, targets)
    assert logps.dtype == torch.float32
    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(logps, expected)


def test_no_targets():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    logps = linear_logprobs(hidden, weight, torch.full((4,), -1))
    assert logps.tolist() == [0.0] * 4
    logps.sum().backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("bad", [16, -2])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match="targets must be"):
        linear_logprobs(torch.randn(2, 8), torch.randn(16, 8), torch.tensor([1, bad]))
