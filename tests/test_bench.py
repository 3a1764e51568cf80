"""The benchmarks compare like with like: the baseline computes the same loss, and the floor counts
the work that is needed."""

import math

import numpy as np
import pytest
import torch
from conftest import command

from bench import baselines, bench
from data.batch import batch_rows
from model import GPT, GPTConfig
from nanospin.attention import is_visible
from train import ppo_objective

SMALL = {"vocab_size": 128, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
RAGGED = [(9, [6, 2, 4, 3]), (5, [1, 6, 6, 2]), (9, [3, 3, 1, 5]), (7, [2, 4, 6, 1])]
ONLINE = {
    "GRPO": baselines.OnlineSize(RAGGED, 4, SMALL, "ragged"),
    "OnlineDPO": baselines.equal_size(8, 9, 6, 2, SMALL),
}


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


def test_the_ragged_workload_is_the_table():
    """It needs no other file. Its first rows, and how long everything is."""
    lengths = []
    for row in baselines.ragged_rows(64):
        lengths.append([len(row["prompt"]), *map(len, row["responses"])])
    assert lengths[:3] == [[364, 280, 57, 321], [100, 70, 55, 166], [151, 115, 82, 48]]
    assert max(row[0] + max(row[1:]) for row in lengths) < 1000
    assert [len(row["responses"]) for row in baselines.ragged_rows(8, K=2)] == [2] * 8
    assert [len(row["responses"]) for row in baselines.ragged_size().rows()] == [8] * 8
    assert len(baselines.sampling_requests()["128 ragged requests"]) == 128
    with pytest.raises(AssertionError, match="64 rows"):
        baselines.ragged_rows(65)


def rows_of(*lengths):
    rng = np.random.default_rng(0)
    return [baselines.random_row(rng, prompt, responses, 128) for prompt, responses in lengths]


def test_our_preference_step_equals_the_padded_one():
    """The same gradients, also when a step has several micro-batches."""
    rows = rows_of((5, [3, 9]), (17, [1, 2]), (8, [6, 4]))
    padded = batch_rows(rows, "padded")
    trainer = bench.OurTrainer(**SMALL)
    logps = trainer.model(padded.idx, padded.targets).sum(1).view(3, 2)
    ref = baselines.uniform_logps(padded.lengths, SMALL["vocab_size"])
    expected = bench.preference_loss(logps, ref)[0]
    assert abs(expected - math.log(2)) < 0.1  # the reference is close to the new model
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


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_round_moves_the_policy_and_not_the_reference(name):
    size = ONLINE[name]
    trainer = bench.OnlineTrainer(size)
    torch.testing.assert_close(trainer.reference.wte.weight, trainer.model.wte.weight)
    before = trainer.model.wte.weight.clone()
    rows, scores = trainer.sample()
    assert scores.shape == (len(size.lengths), size.K)
    assert [len(y) for row in rows for y in row["responses"]] == size.limits()
    assert scores[1, 0] == np.mean([i for i in rows[1]["responses"][0] if i])
    {"GRPO": trainer.grpo_round, "OnlineDPO": trainer.pl_round}[name]()
    assert not trainer.model.wte.weight.equal(before)
    assert trainer.reference.wte.weight.equal(before)


def test_an_online_round_needs_five_passes_over_its_rows():
    size = ONLINE["GRPO"]
    work = baselines.work_of_rows(size.rows())
    # each prompt once; the last token of a response is only a target
    assert work.tokens == 9 + 11 + 5 + 11 + 9 + 8 + 7 + 9
    need = bench.online_need(size)
    assert need.flops == bench.count_flops(GPT(GPTConfig(**SMALL)), work, passes=5)
    keys_and_values = 2 * 2 * 32 * 4  # bytes of a token in 2 layers of width 32
    prompts = 6 * 9 + 6 * 5 + 5 * 9 + 6 * 7  # read once a step for all samples of a prompt
    responses = sum(length**2 / 2 for length in size.limits())
    assert need.num_bytes == keys_and_values * (prompts + responses)


def online_rows(prompt_length):
    """Rows of ragged responses, with random advantages and reference. The second prompt has 8."""
    rows = bench.scored_rows(rows_of((prompt_length, [3, 9, 2, 4]), (8, [1, 2, 6, 5])))
    rng = np.random.default_rng(0)
    for row in rows:
        row["refs"] = rng.normal(-5, 0.1, len(row["refs"])).astype(np.float32)
    return rows


def test_trl_has_our_tokens():
    rows = online_rows(5)
    first, second = baselines.trl_grpo_batches(rows, batch=4)
    assert first["num_items_in_batch"] == second["num_items_in_batch"] == 32
    for row, batch in zip(rows, (first, second)):
        start = 0
        for k, response in enumerate(row["responses"]):
            prompt = batch["prompt_ids"][k][batch["prompt_mask"][k] == 1]
            completion = batch["completion_ids"][k][batch["completion_mask"][k] == 1]
            assert prompt.tolist() == row["prompt"]
            assert completion.tolist() == response
            refs = batch["ref_per_token_logps"][k, : len(response)]
            assert refs.numpy() == pytest.approx(row["refs"][start : start + len(response)])
            assert batch["advantages"][k] == pytest.approx(row["advantages"][start])
            start += len(response)


def test_our_grpo_step_equals_trls():
    """Loss and gradient of both sides with the same weights. The prompts have equal length: TRL
    gives a left-padded one shifted positions, as it passes none to GPT-2."""
    pytest.importorskip("trl", reason="TRL is in bench/requirements.txt")
    size = ONLINE["GRPO"]
    trainer = baselines.trl_online_trainer("GRPO", size, batch=4)
    trainer.model.train()
    ours = bench.OnlineTrainer(size)
    theirs = dict(trainer.model.named_parameters())
    for name, p in ours.model.named_parameters():
        p.data.copy_(like_ours(name, theirs["transformer." + name]))
    rows = online_rows(8)
    for row, logps in zip(rows, ours.token_scores(ours.model, rows)):
        row["logps"] = logps
    batch = bench.ppo_batch(rows)
    loss = ppo_objective(ours.model, batch, bench.GRPO)[0] / batch.num_targets
    expected = 0.0
    for micro_batch in baselines.trl_grpo_batches(rows, batch=4):
        expected = expected + trainer.compute_loss(trainer.model, micro_batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in ours.model.named_parameters()]
    grads = torch.autograd.grad(loss, list(ours.model.parameters()))
    their_grads = torch.autograd.grad(expected, [theirs["transformer." + name] for name in names])
    for name, grad, their_grad in zip(names, grads, their_grads):
        error = (grad - like_ours(name, their_grad)).norm()
        assert error < 3e-3 * grad.norm(), name  # TRL's backward pass of the head is less exact


def like_ours(name, weight):
    """GPT-2's matrices of a block are transposed in transformers."""
    is_matrix = weight.dim() == 2 and name.startswith("h.")
    return weight.T if is_matrix else weight


@pytest.mark.parametrize("name", ONLINE)
def test_trls_responses_have_our_lengths(name):
    pytest.importorskip("trl", reason="TRL is in bench/requirements.txt")
    size = ONLINE[name]
    trainer = baselines.trl_online_trainer(name, size)
    texts = [baselines.number_text(row["prompt"]) for row in size.rows()]
    if name == "GRPO":
        repeated = [text for text in texts for _ in range(size.K)]
        _, completions, *_ = trainer._generate(repeated)
        lengths = [len(completion) for completion in completions]
    else:
        _, _, _, mask, _ = trainer._generate(trainer.model, texts)
        lengths = mask.sum(1).tolist()
    assert lengths == size.limits()
    before = trainer.model.transformer.wte.weight.clone()
    assert trainer.ref_model.transformer.wte.weight.equal(before)
    baselines.trl_online_round(name, size)()


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
