"""The benchmarks compare like with like: the baseline computes the same loss, and the floor counts
the work that is needed."""

import numpy as np
import pytest
import torch
from conftest import command

from bench import baselines, bench
from data.batch import batch_rows
from model import GPT, GPTConfig
from nanospin.attention import is_visible

SMALL = {"vocab_size": 128, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}


def test_plain_model_equals_ours():
    plain = baselines.PlainGPT(**SMALL)
    ours = GPT(GPTConfig(**SMALL))
    names = {
        "attn.c_attn": "c_attn",
        "attn.c_proj": "c_proj",
        "mlp.c_fc": "c_fc",
        "mlp.c_proj": "out",
    }
    weights = plain.state_dict()
    for name, weight in ours.state_dict().items():
        module = name.split(".", 2)[-1].rsplit(".", 1)[0]
        if module in names:
            name = name.replace(module, names[module])
        weight.copy_(weights[name])
    idx = torch.randint(0, 128, (3, 20))
    targets = torch.randint(-1, 128, (3, 20))
    expected = baselines.plain_logprobs(plain, idx, targets)
    torch.testing.assert_close(ours(idx, targets), expected, rtol=1e-5, atol=1e-5)


def rows_of(*lengths):
    rng = np.random.default_rng(0)
    return [baselines.random_row(rng, prompt, responses, 128) for prompt, responses in lengths]


def test_our_preference_step_equals_the_padded_one():
    """The same gradients, also when a step has several micro-batches."""
    rows = rows_of((5, [3, 9]), (17, [1, 2]), (8, [6, 4]))
    padded = batch_rows(rows, "padded")
    trainer = bench.OurTrainer(**SMALL)
    logps = trainer.model(padded.idx, padded.targets).sum(1).view(3, 2)
    expected = bench.preference_loss(logps, torch.zeros_like(logps))[0]
    for batches in ([batch_rows(rows)], [batch_rows(rows[:1]), batch_rows(rows[1:])]):
        loss = sum(trainer.preference_loss(batch) for batch in batches) / len(rows)
        torch.testing.assert_close(loss, expected)


def test_work_is_what_the_batch_has():
    """Tokens, output positions and pairs of `work_of_rows`, counted on the batch itself."""
    rows = rows_of((5, [3, 9]), (17, [1, 2]), (8, [6]))
    batch = batch_rows(rows)
    n = int(batch.num_tokens)
    index = torch.arange(n)
    outputs = batch.logit_positions.unique()
    visible = is_visible(batch.sequence_id, batch.response_id, index[:, None], index)
    pairs = visible.sum(1)
    assert baselines.work_of_rows(rows) == baselines.Work(
        tokens=n,
        pairs=pairs.sum(),
        outputs=len(outputs),
        output_pairs=pairs[outputs].sum(),
        targets=len(batch.targets),
    )


@pytest.mark.parametrize("num_outputs", [100, 25])
def test_flops_are_the_models_own_count(num_outputs):
    model = GPT(GPTConfig(**SMALL))
    work = baselines.Work(
        tokens=100,
        pairs=100 * 64,
        outputs=num_outputs,
        output_pairs=num_outputs * 64,
        targets=num_outputs,
    )
    expected = 100 * model.flops_per_token(64, num_outputs / 100)
    assert bench.count_flops(model, work) == expected


def test_the_table_has_one_line_per_timing(capsys):
    timing = bench.Timing(
        ours=[1.0, 2.0, 4.0], baseline=[2.0, 6.0, 8.0], floor=[0.5, 1.0, 1.0], matmul_share=0.5
    )
    bench.print_speed("a step", "a baseline", timing, 3000)
    assert capsys.readouterr().out == (
        "| a step |    1,500 tok/s |      500 tok/s, a baseline | 2.00x (2.00-3.00) | 4.00x "
        "| 1000 ms | 50 % (25-50) |\n"
    )


def test_unknown_benchmark_is_a_one_line_error():
    done = command("bench.bench", "speed")
    assert done.returncode
    assert "no such benchmark" in done.stderr
    assert "Traceback" not in done.stderr
