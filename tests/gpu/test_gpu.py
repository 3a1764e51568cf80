"""What only a GPU can show. Skipped without one; bench/gpu.py also measures.

python -m pytest tests/gpu
"""

import functools
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # conftest, test_*

from test_gpu_path import LONG, SHAPE, WORK, gradients

from model import GPT, GPTConfig
from nanospin import attention, decoding, distributed
from nanospin.config import Config
from sample import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = SHAPE | {"n_embd": 64}  # heads of 16, the narrowest of FlexAttention


@pytest.fixture(autouse=True)
def exact_float32():
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("options", [{}, LONG | {"sliding_window": 7, "n_kv_head": 2}])
def test_losses_and_gradients_are_those_of_the_cpu(name, options):
    """Of every stage and layout, compiled. The second micro-batch waits for nothing."""
    objective, make_batch = WORK[name]
    shape = WIDE | options | {"scalar_head": "ppo" in name or name == "reward"}
    batch, cfg = make_batch(), Config(stage="sft")
    expected = gradients(GPT(GPTConfig(**shape)), objective, batch, cfg)
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    model = distributed.prepare_model(model, torch.device("cuda"), torch.float32, cfg)
    model.init_weights()
    on_gpu = batch.pin_memory().to("cuda")
    gradients(model, objective, on_gpu, cfg)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(model, objective, on_gpu, cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, LONG | {"n_kv_head": 2}, LONG | {"sliding_window": 7}])
def test_sampled_ids_are_the_same_with_and_without_cuda_graphs(options, monkeypatch):
    model = GPT(GPTConfig(**WIDE | {"block_size": 256} | options)).cuda()
    prompts = [[1 + i % 90] * n for i, n in enumerate((1, 9, 140, 3, 120, 64, 9, 2))]
    sample = functools.partial(generate, model, prompts, 100, batch_size=4)
    ids = [sample(generator=torch.Generator().manual_seed(0))]
    assert decoding.GRAPHS == {"cuda"}  # no capture failed
    monkeypatch.setattr(decoding, "GRAPHS", set())
    ids.append(sample(generator=torch.Generator().manual_seed(0)))
    assert ids[0] == ids[1]


def test_bfloat16_attention_is_close_to_float32():
    """Packed rows, with gradients."""
    batch = WORK["ranking"][1]().to("cuda")
    packed = attention.PackedSequences(batch.sequence_id, batch.response_id, batch.pos)
    results = []
    x = torch.randn(len(batch.idx), 12, 64, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        q = x.to(dtype).requires_grad_()
        y = packed.attend(0, q, q, q)
        results.append((y.detach(), torch.autograd.grad(y.float().square().sum(), q)[0]))
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 2e-2 * exact.norm()
