"""What only a GPU can show. Skipped without one; bench/gpu.py also measures.

python -m pytest tests/gpu
"""

import contextlib
import functools
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # conftest, test_*

from test_flash_attention import random_batch
from test_gpu_path import LONG, SHAPE, WORK, gradients

from data.batch import batch_rows
from model import GPT, GPTConfig
from nanospin import attention, decoding, distributed, flash_attention
from nanospin.config import Config
from nanospin.flash_attention import FlashSequences
from sample import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = SHAPE | {"n_embd": 64}  # heads of 16, the narrowest of FlexAttention


@pytest.fixture(autouse=True)
def exact_float32():
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def no_waiting():
    """Raises where the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    with no_waiting():
        found = gradients(model, objective, on_gpu, cfg)
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


@pytest.mark.parametrize("kernel", ["FlexAttention", "FlashAttention"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 12, 64), (12, 4, 64), (4, 4, 128)])
def test_bfloat16_attention_is_close_to_float32(kernel, heads, kv_heads, width):
    """Packed rows, some without a prompt or with absent responses, with gradients."""
    batch = random_batch(0, 40).to("cuda")
    packed = attention.PackedSequences(batch.sequence_id, batch.response_id, batch.pos)
    flash, order = FlashSequences(batch.varlen).with_queries(None), batch.varlen.order
    n = len(batch.idx)
    inputs = [torch.randn(n, h, width, device="cuda") for h in (heads, kv_heads, kv_heads)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = [x.to(dtype).requires_grad_() for x in inputs]
        if kernel == "FlashAttention" and dtype == torch.bfloat16:
            assert flash_attention.is_right(q.device, dtype, width, heads // kv_heads)
            y = flash.attend(0, q[order], k[order], v[order])
        else:
            y = packed.attend(0, q, k, v)
        grads = torch.autograd.grad(y.float().square().sum(), (q, k, v))
        results.append((y.detach(), *grads))
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() < 2e-2 * exact.norm()


def test_flash_attention_never_waits_for_the_gpu():
    """In a bfloat16 step, whose gradients are those of FlexAttention to rounding."""
    objective = WORK["ranking"][0]
    rows = []
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, 97, 210).tolist()
        responses = [ids[90:160], ids[160:]]
        row = {"prompt": ids[:90], "responses": responses, "ranks": [0, 1]}
        rows.append(row | {"ref": [-320.0, -230.0]})
    batch = batch_rows(rows).to("cuda")
    shape = SHAPE | {"n_embd": 256, "block_size": 256}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    cfg = Config(stage="sft")
    model = distributed.prepare_model(model, torch.device("cuda"), torch.bfloat16, cfg)
    model.init_weights()
    gradients(model, objective, batch, cfg)
    with no_waiting():
        flash = gradients(model, objective, batch, cfg)
    flex = gradients(model, objective, replace(batch, varlen=None), cfg)
    flash, flex = only_gradients(flash), only_gradients(flex)
    assert (flash - flex).norm() < 5e-2 * flex.norm()


def only_gradients(found):
    return torch.cat([x.flatten().float() for x in found if x.dim()])
