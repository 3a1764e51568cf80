"""The benchmarks compare like with like: the peer computes the same, and the floor counts what is needed."""

import numpy as np
import torch

from bench import bench
from bench import baselines
from nanospin.attention import is_visible
from conftest import command
from data.batch import batch_rows
from model import GPT, GPTConfig

SMALL = dict(vocab_size=128, block_size=64, n_layer=2, n_head=2, n_embd=32)


def test_the_plain_model_is_ours():
    plain, ours = bench.Plain(**SMALL), GPT(GPTConfig(**SMALL))
    names = {
        "attn.c_attn": "c_attn",
        "attn.c_proj": "c_proj",
        "mlp.c_fc": "c_fc",
        "mlp.c_proj": "out",
    }
    weights = plain.state_dict()
    for name in ours.state_dict():
        part = name.split(".", 2)[-1].rsplit(".", 1)[0]
        ours.state_dict()[name].copy_(
            weights[name.replace(part, names[part]) if part in names else name]
        )
    idx, targets = torch.randint(0, 128, (3, 20)), torch.randint(-1, 128, (3, 20))
    torch.testing.assert_close(
        ours(idx, targets), bench.plain_logps(plain, idx, targets), rtol=1e-5, atol=1e-5
    )


def test_the_floor_counts_what_is_seen():
    """Tokens, places and pairs, against the batch itself; FLOPs against the model's own count."""
    rng = np.random.default_rng(0)
    rows = [
        bench.random_row(rng, P, lengths, 128)
        for P, lengths in ((5, [3, 9]), (17, [1, 2]), (8, [6]))
    ]
    batch = batch_rows(rows)
    n, index, places = (
        int(batch["tokens"]),
        torch.arange(int(batch["tokens"])),
        batch["at"].unique(),
    )
    pairs = is_visible(batch["doc"], batch["branch"], index[:, None], index).sum(1)
    assert bench.work_of(rows) == (
        n,
        pairs.sum(),
        len(places),
        pairs[places].sum(),
        len(batch["targets"]),
    )
    model = GPT(GPTConfig(**SMALL))
    for asked in (100, 25):
        needed = bench.flops(model, baselines.Work(100, 100 * 64, asked, asked * 64, asked))
        assert needed == 100 * model.flops_per_token(64, asked / 100)


def test_an_unknown_benchmark_is_one_line():
    done = command("bench", "speed")
    assert done.returncode and "no such benchmark" in done.stderr and "Traceback" not in done.stderr
