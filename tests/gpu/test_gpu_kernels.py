"""The Triton kernels against plain PyTorch in float64.

python -m pytest tests/gpu                                       on a GPU
TRITON_INTERPRET=1 python -m pytest tests/gpu/test_gpu_kernels.py   on a CPU with Triton
"""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # conftest, test_*

from test_gpu_path import plain_decode_attention, plain_log_softmax_

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
gpu_kernels = pytest.importorskip("nanospin.gpu_kernels", reason="needs Triton")

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kv_heads, group", [(3, 1), (2, 3), (1, 20)])
@pytest.mark.parametrize("head_dim", [8, 48, 64, 128, 256])
def test_decode_attention(head_dim, kv_heads, group, softcap, dtype):
    """Rows of every length, also of one token, as views of one projection. The new key and value
    are in the cache afterwards, and nothing else has changed."""
    g = torch.Generator().manual_seed(0)
    first = torch.tensor([0, 1, 63, 64, 100, 149, 150], device=DEVICE)
    last = torch.tensor([150], device=DEVICE)
    B, columns = len(first), 256
    heads = kv_heads * (group + 2)
    x = torch.randn(B, heads, head_dim, generator=g).to(DEVICE, dtype)
    q, new_k, new_v = x.split([kv_heads * group, kv_heads, kv_heads], 1)
    k, v = torch.randn(2, B, kv_heads, columns, head_dim, generator=g).to(DEVICE, dtype)
    k[:, :, 150:] = v[:, :, 150:] = torch.nan  # not written yet
    exact_k, exact_v = k.double().nan_to_num(), v.double().nan_to_num()
    expected = plain_decode_attention(
        q.double(), new_k.double(), new_v.double(), exact_k, exact_v, first, last, softcap
    )
    found = gpu_kernels.decode_attention(q, new_k, new_v, k, v, first, last, softcap)
    assert found.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(found, expected) < bound
    for cache, exact in ((k, exact_k), (v, exact_v)):
        assert torch.equal(cache[:, :, :151].double(), exact[:, :, :151])
        assert cache[:, :, 151:].isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocab_size, V", [(33, 64), (50257, 50304), (1, 1), (16384, 16384)])
def test_log_softmax(vocab_size, V, softcap, dtype):
    """Log-probabilities and the gradient of the logits. Padding has no probability."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, V, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(vocab_size, (5,), generator=g).to(DEVICE)
    targets[0], targets[1] = 0, vocab_size - 1
    if V > vocab_size:
        targets[2] = V - 1  # padding: its probability is 0
    expected_grad = logits.double().clone()
    expected = plain_log_softmax_(expected_grad, targets, softcap, vocab_size, True)
    before = logits.clone()
    found = gpu_kernels.log_softmax_(logits, targets, softcap, vocab_size, False)
    assert torch.equal(logits, before)
    again = gpu_kernels.log_softmax_(logits, targets, softcap, vocab_size, True)
    # two kernels, in which the compiler may join products and sums differently
    last_bits = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, again, rtol=last_bits, atol=last_bits)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    bounds = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=min(1e-5, bounds[dtype]))
    torch.testing.assert_close(logits.double(), expected_grad, rtol=0, atol=bounds[dtype])
