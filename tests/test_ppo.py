"""PPO: its arithmetic against slow or exact forms on small vocabularies, then the stage."""

import dataclasses
import gc
import glob
import importlib
import math
import os
import shutil
import subprocess
import sys

import conftest
import numpy as np
import pytest
import tiktoken
import torch
from conftest import (
    TEMPLATE,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    letters,
    load_config,
    make_data,
    read_metrics,
    refused,
)
from test_distributed import ENV, assert_equal_up_to_rounding, torchrun, torchrun_command

import players
import ppo
import scorer as scoring
import train
from data import tokenizer
from data.batch import ppo_batch
from data.files import read_json, sha256, write_json
from data.folder import write_meta
from data.rows import encode_rows, read_rows, write_rows
from loss import kl_k3, ppo_loss
from model import GPT, GPTConfig
from nanospin import checkpoint, elastic, rounds

BYTES = tokenizer.load("bytes")


# ------------------------------------------------------------------------------- the arithmetic


def slow_gae(rewards, values, discount, gae_lambda):
    """Generalized advantage estimation of one trajectory, the sum of eq. 16 as it is written."""
    T = len(rewards)
    next_values = [*values[1:], 0.0]
    delta = [rewards[t] + discount * next_values[t] - values[t] for t in range(T)]
    result = []
    for t in range(T):
        weights = [(discount * gae_lambda) ** n for n in range(T - t)]
        result.append(np.dot(weights, delta[t:]))
    return result


def discounted_sums(rewards, discount):
    """Of each reward and those after it."""
    result = []
    for t in range(len(rewards)):
        weights = [discount**n for n in range(len(rewards) - t)]
        result.append(np.dot(weights, rewards[t:]))
    return result


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_slow_loop(discount, gae_lambda):
    rng = np.random.default_rng(0)
    lengths = np.array([1, 4, 7, 2])
    rewards, values = rng.normal(size=(2, 4, 7))
    fast = ppo.gae(rewards, values, lengths, discount, gae_lambda)
    for n, T in enumerate(lengths):
        slow = slow_gae(rewards[n, :T], values[n, :T], discount, gae_lambda)
        # float64, seven terms
        np.testing.assert_allclose(fast[n, :T], slow, rtol=1e-12, atol=1e-12)
        assert (fast[n, T:] == 0).all()
        if gae_lambda == 1.0:
            returns = fast[n, :T] + values[n, :T]
            expected = discounted_sums(rewards[n, :T], discount)
            np.testing.assert_allclose(returns, expected, rtol=1e-12)


def distributions():
    """Log-probabilities over nine tokens: p, one near it, one far from it."""
    g = torch.Generator().manual_seed(0)
    p = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    near = (p + 0.01 * torch.randn(9, generator=g, dtype=torch.float64)).log_softmax(0)
    far = (p + 2.0 * torch.randn(9, generator=g, dtype=torch.float64)).log_softmax(0)
    return p, near, far


def expectation(p, values):
    return (p.exp() * values).sum()


def test_kl_k3_in_expectation():
    """It has the exact KL as its mean, is never negative, and varies less than log p - log q where
    the two distributions are near."""
    p, near, far = distributions()
    for q in (near, far):
        k3 = kl_k3(p, q)
        # its parts cancel where p and q are near
        torch.testing.assert_close(expectation(p, k3), expectation(p, p - q), rtol=1e-9, atol=1e-15)
        assert (k3 >= 0).all()
    exact = expectation(p, p - near)
    variance = expectation(p, (kl_k3(p, near) - exact) ** 2)
    assert variance < expectation(p, (p - near - exact) ** 2)


def test_the_kl_estimate_of_samples():
    """Within five standard errors of the exact KL."""
    p, _, far = distributions()
    g = torch.Generator().manual_seed(0)
    samples = torch.multinomial(p.exp(), 200_000, replacement=True, generator=g)
    k3 = kl_k3(p, far)
    exact = expectation(p, p - far)
    standard_error = expectation(p, (k3 - exact) ** 2).sqrt() / 200_000**0.5
    assert abs(k3[samples].mean() - exact) < 5 * standard_error


@dataclasses.dataclass
class Tokens:
    """Random arguments of ppo_loss for 40 tokens, in float64."""

    logps: torch.Tensor
    values: torch.Tensor
    old_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def random_tokens():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, generator=g, dtype=torch.float64)
    return Tokens(
        logps=(-x[0].abs() - 0.1).requires_grad_(),
        values=x[1].clone().requires_grad_(),
        old_logps=-x[2].abs() - 0.1,
        old_values=x[3],
        advantages=x[4],
        returns=x[5],
    )


def test_no_policy_gradient_outside_the_clip():
    """A token has none if its ratio has left the clip range on the side to which its advantage
    pushes. Inside it is r A grad log pi."""
    t = random_tokens()
    loss, metrics = ppo_loss(**vars(t), value_coef=0.0)
    (grad,) = torch.autograd.grad(loss, t.logps)
    ratio = (t.logps - t.old_logps).exp().detach()
    stopped = ((t.advantages > 0) & (ratio > 1.2)) | ((t.advantages < 0) & (ratio < 0.8))
    assert 5 < stopped.sum() < 35
    assert (grad[stopped] == 0).all()
    expected = -ratio * t.advantages / 40
    torch.testing.assert_close(grad[~stopped], expected[~stopped], rtol=1e-12, atol=0)
    outside = ((ratio - 1).abs() > 0.2).double().mean().item()
    assert metrics["clip_fraction"].item() == pytest.approx(outside)


def test_no_value_gradient_where_the_clipped_value_is_worse():
    t = random_tokens()
    loss, _ = ppo_loss(**vars(t), value_coef=1.0)
    (grad,) = torch.autograd.grad(loss, t.values)
    change = t.values.detach() - t.old_values
    clipped = t.old_values + change.clamp(-0.2, 0.2)
    is_worse = (clipped - t.returns).abs() > (t.values.detach() - t.returns).abs()
    stopped = (change.abs() > 0.2) & is_worse
    assert 3 < stopped.sum() < 37
    assert (grad[stopped] == 0).all()
    expected = (t.values.detach() - t.returns) / 40
    torch.testing.assert_close(grad[~stopped], expected[~stopped], rtol=1e-12, atol=0)


def test_loss_and_metrics_token_by_token():
    t = random_tokens()
    loss, metrics = ppo_loss(**vars(t), value_coef=0.3, entropy_coef=0.02)
    policy = value = entropy = kl = 0.0
    for n in range(40):
        logp, old_logp, advantage = t.logps[n], t.old_logps[n], t.advantages[n]
        ratio = (logp - old_logp).exp()
        policy -= torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / 40
        clipped = t.old_values[n] + (t.values[n] - t.old_values[n]).clamp(-0.2, 0.2)
        errors = (t.values[n] - t.returns[n]) ** 2, (clipped - t.returns[n]) ** 2
        value += torch.max(*errors) / 2 / 40
        entropy -= ratio * logp / 40
        kl += (ratio - 1 - (logp - old_logp)) / 40
    expected = policy + 0.3 * value - 0.02 * entropy
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, slow in (
        ("policy_loss", policy),
        ("value_loss", value),
        ("entropy", entropy),
        ("approx_kl", kl),
    ):
        torch.testing.assert_close(metrics[name], slow.detach(), rtol=1e-12, atol=1e-12)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    """In expectation over a whole vocabulary, each token as often as the old policy draws it. The
    old policy is not the present one."""
    g = torch.Generator().manual_seed(0)
    old_logps = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    zero = torch.zeros(1, dtype=torch.float64)
    expected_loss = 0.0
    for token in range(7):
        now, old = logps[token : token + 1], old_logps[token : token + 1]
        loss, _ = ppo_loss(now, zero, old, zero, zero, zero, entropy_coef=1.0)
        expected_loss += old.exp() * loss
    minus_entropy = (logps.exp() * logps).sum()
    (grad,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(minus_entropy, logits)
    torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)


def ppo_config(*more):
    return load_config(["--stage=ppo", "--init=x", "--reward=x:y", "--max_steps=1", *more])


def test_the_first_step_is_the_policy_gradient():
    """While the policy is the one that sampled, the loss without clipping has the gradient of
    REINFORCE with these advantages, - mean A grad log pi. Here through a whole model, one sequence
    at a time."""
    shape = {"vocab_size": 257, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**shape, position="rotary", scalar_head=True)).double()
    rng = np.random.default_rng(0)
    texts = [{"prompt": f"say {i}", "responses": ["ab" * (i + 1)]} for i in range(4)]
    rows, _ = encode_rows(texts, BYTES, TEMPLATE, 48)
    for row in rows:
        for name in ("logps", "values", "advantages", "returns"):
            row[name] = rng.normal(size=len(row["responses"][0]))
    batch = ppo_batch(rows)
    with torch.no_grad():
        batch.old_logps, batch.old_values = model.logps_and_values(
            batch.idx, batch.targets, batch.value_positions, **batch.layout()
        )
    cfg = ppo_config("--clip_range=0", "--value_clip_range=0", "--value_coef=0")
    loss, metrics = train.ppo_objective(model, batch, cfg)
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0

    reinforce = 0.0
    for row in rows:
        ids, start = row["prompt"] + row["responses"][0], len(row["prompt"])
        logps = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        for t, (advantage, token) in enumerate(zip(row["advantages"], row["responses"][0])):
            reinforce -= advantage * logps[start - 1 + t, token]
    names, params = zip(*model.named_parameters())
    assert names[-1] == "scalar_head.weight"
    fast = torch.autograd.grad(loss, params[:-1])
    slow = torch.autograd.grad(reinforce, params[:-1])
    for a, b in zip(fast, slow):
        # the logits of the slow one go through float32; 40 tokens, as the loss is their sum
        torch.testing.assert_close(a, b, rtol=1e-4, atol=4e-6)


SAMPLES = ppo.Trajectories(
    texts=["", ""],
    ids=[[1, 256], [1, 2, 3]],
    ended=[True, False],
    scores=np.array([3.0, 1.0]),
    logps=[np.float32([-1, -2]), np.float32([-1, -1, -1])],
    refs=[np.float32([-1.5, -2]), np.float32([-1, -3, -1])],
    values=[np.float32([0.5, 0.25]), np.float32([0, 0, 1])],
)


def test_advantages_by_hand():
    """Two responses, the second without end-of-text: the KL penalty on each token; reward and
    penalty at the last one."""
    options = ["--gae_lambda=1", "--missing_eos_penalty=0.5", "--whiten_advantages=False"]
    scaling = {"kl_coef": 0.1, "mean": 2.0, "std": 1.0}
    arrays, metrics = ppo.advantages(ppo_config(*options), scaling, SAMPLES)
    first = [-0.1 * 0.5, 0.0 + 1.0]
    second = [0.0, -0.1 * 2, 0.0 - 1.0 - 0.5]
    returns = np.array([0.95, 1.0, -1.7, -1.7, -1.5])
    np.testing.assert_allclose(arrays["returns"], returns, rtol=1e-6)
    expected = returns - [0.5, 0.25, 0, 0, 1]
    np.testing.assert_allclose(arrays["advantages"], expected, rtol=1e-6)
    assert metrics["return"] == pytest.approx((sum(first) + sum(second)) / 2)
    unexplained = np.var(arrays["advantages"]) / np.var(returns)
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained, rel=1e-5)


def test_whitening():
    scaling = {"kl_coef": 0.0, "mean": 2.0, "std": 1.0}
    options = ["--gae_lambda=1", "--missing_eos_penalty=0.5", "--whiten_rewards=False"]
    arrays, _ = ppo.advantages(ppo_config(*options), scaling, SAMPLES)
    np.testing.assert_allclose(arrays["returns"], [3, 3, 0.5, 0.5, 0.5], rtol=1e-6)
    assert abs(arrays["advantages"].mean()) < 1e-6
    assert arrays["advantages"].std() == pytest.approx(1, abs=1e-6)
    # scores that are all equal are not scaled
    assert ppo.reward_scaling(ppo_config(), 0, np.full(7, 0.1))["std"] == 1.0


def test_sample_report_by_hand():
    report = ppo.sample_report(SAMPLES)
    assert report["kl"] == (0.5 + 2.0) / 2
    assert report["reward"] == 2.0
    assert report["ended"] == 0.5
    assert report["length"] == 2.5
    assert report["entropy"] == pytest.approx(6 / 5)
    k3 = (math.exp(-0.5) - 0.5) + (math.exp(-2) + 1)
    assert report["kl_token"] == pytest.approx(k3 / 5)


# ------------------------------------------------------------------------------------ the stage


def ppo_args(runs, data, out, *more):
    """Two rounds of 24 samples, 6 steps each."""
    return [
        "--stage=ppo",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        "--reward=conftest:letters",
        f"--template={TEMPLATE}",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--batch_size=8",
        "--max_rows=24",
        "--rounds=2",
        "--epochs=2",
        "--lr=1e-3",
        "--schedule=constant",
        "--eval_interval=1",
        "--save_interval=2",
        "--kl_coef=0.1",
        *more,
    ]


@pytest.fixture(scope="module")
def ppo_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ppo") / "run")
    train.main(ppo_args(tiny_runs, tiny_data, out))
    return out


def test_a_run_logs_its_metrics(ppo_run):
    steps, collects = read_metrics(ppo_run, "step"), read_metrics(ppo_run, "collect")
    assert len(steps) == 12
    assert len(read_metrics(ppo_run, "eval")) == 3
    names = {"policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl"}
    assert names <= set(steps[0])
    names = {"reward", "kl", "entropy", "explained_variance"}
    names |= {"kl_coef", "length", "ended", "return"}
    assert names <= set(collects[0])


def test_the_policy_starts_as_the_one_that_sampled(ppo_run):
    starts, steps = read_metrics(ppo_run, "start"), read_metrics(ppo_run, "step")
    assert [record["round"] for record in starts] == [0, 1]
    assert all(record["off"] < 1e-5 for record in starts)
    warnings = read_metrics(ppo_run, "warning")
    assert all("during_step" in record for record in warnings)  # loss spikes
    assert abs(steps[0]["approx_kl"]) < 1e-6
    assert steps[0]["clip_fraction"] == 0
    assert steps[5]["approx_kl"] > 0


def test_the_reference_stays_the_first_policy(ppo_run):
    """And the scalar head starts at 0."""
    collects, evals = read_metrics(ppo_run, "collect"), read_metrics(ppo_run, "eval")
    assert collects[0]["kl"] == evals[0]["kl"] == 0
    assert collects[1]["kl_token"] > 0  # in few samples "kl" may be below 0
    assert evals[-1]["kl_token"] > 0
    assert collects[0]["value"] == 0
    assert collects[1]["value"] != 0


def test_the_rows_of_a_round(ppo_run):
    """Scored samples to max_rows prompts; the next round has the next prompts of a permutation."""
    first = read_rows(f"{ppo_run}/round_0/train.jsonl")
    second = read_rows(f"{ppo_run}/round_1/train.jsonl")
    assert len(second) == 24
    for row in second:
        assert row["scores"] == [letters(row, row["responses"][0])]
    both = {row["prompt"] for row in first} & {row["prompt"] for row in second}
    assert len(both) < 24


def test_a_checkpoint_keeps_the_scalar_head_for_resuming_only(ppo_run):
    assert "scalar_head.weight" in final_weights(ppo_run)
    model, _, _ = GPT.from_checkpoint(ppo_run)
    assert not model.config.scalar_head


@torch.no_grad()
def test_stored_logps_are_those_of_the_policy_that_sampled(ppo_run, tiny_runs):
    """Against one sequence at a time."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    row = read_rows(f"{ppo_run}/round_0/train.jsonl")[0]
    stored = np.load(f"{ppo_run}/round_0/rollout.npz")["logps"]
    prompt = enc.encode_ordinary(TEMPLATE.format(prompt=row["prompt"]))
    response = row["ids"][0]
    logps = model(torch.tensor([prompt + response]))[0].double().log_softmax(-1)
    expected = [logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    np.testing.assert_allclose(stored[: len(response)], expected, rtol=1e-5)


def test_the_reward_rises_and_a_penalty_on_kl_bounds_it(tiny_runs, tiny_data, tmp_path):
    collects = {}
    for kl_coef in (0.02, 1.0):
        out = f"{tmp_path}/{kl_coef}"
        options = ["--max_rows=0", "--rounds=4", "--lr=3e-3", "--eval_interval=100"]
        options += ["--keep_rounds=1", f"--kl_coef={kl_coef}"]
        train.main(ppo_args(tiny_runs, tiny_data, out, *options))
        collects[kl_coef] = read_metrics(out, "collect")
    first, last = collects[0.02][0], collects[0.02][-1]
    assert last["reward"] > first["reward"] + 3 * first["reward_se"]
    assert 0 < collects[1.0][-1]["kl"] < last["kl"]

    # keep_rounds: the checkpoints of the last round and of one before it, the samples of all
    kept = {path.split("/")[-2] for path in glob.glob(f"{tmp_path}/1.0/round_*/step_*")}
    assert kept == {"round_2", "round_3"}
    assert len(glob.glob(f"{tmp_path}/1.0/round_*/rollout.npz")) == 4


def records_without_time(run, kind):
    return [record | {"seconds": 0} for record in read_metrics(run, kind)]


@pytest.mark.parametrize(
    "module, function, at",
    [
        pytest.param(players, "respond", 3, id="sampling", marks=pytest.mark.slow),
        pytest.param(ppo, "score_rows", 0, id="scoring", marks=pytest.mark.slow),
        pytest.param(ppo, "advantages", 1, id="storing", marks=pytest.mark.slow),
        pytest.param(train, "lr_factor", 3, id="training", marks=pytest.mark.slow),
        pytest.param(train, "lr_factor", 8, id="training in round 1"),
        pytest.param(checkpoint, "save", 1, id="saving", marks=pytest.mark.slow),
    ],
)
def test_it_resumes_bit_for_bit(
    tiny_runs, tiny_data, ppo_run, tmp_path, monkeypatch, module, function, at
):
    """Killed in the middle of a round: while it samples, scores, stores, trains or saves."""
    killed = f"{tmp_path}/killed"
    args = ppo_args(tiny_runs, tiny_data, killed)
    with monkeypatch.context() as m:
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(args)
    train.main(args)
    assert_same_run(ppo_run, killed)
    for r in (0, 1):
        expected = np.load(f"{ppo_run}/round_{r}/rollout.npz")
        arrays = np.load(f"{killed}/round_{r}/rollout.npz")
        for name in expected:
            assert np.array_equal(arrays[name], expected[name]), name
    assert records_without_time(ppo_run, "collect") == records_without_time(killed, "collect")


def test_rounds_are_one_optimization(tiny_runs, tiny_data, ppo_run, tmp_path, monkeypatch):
    """The optimizer's state carries over from round to round. Without it the second round differs
    from its second step on."""
    out = f"{tmp_path}/r"
    monkeypatch.setattr(checkpoint, "load_optimizers", lambda *args: None)
    train.main(ppo_args(tiny_runs, tiny_data, out))
    expected, forgetful = read_metrics(ppo_run, "step"), read_metrics(out, "step")
    assert expected[5]["loss"] == forgetful[5]["loss"]
    assert expected[8]["loss"] != forgetful[8]["loss"]


def test_the_schedule_spans_all_rounds(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    train.main(ppo_args(tiny_runs, tiny_data, out, "--schedule=linear", "--min_lr_ratio=0"))
    rates = [record["lr"] for record in read_metrics(out, "step")]
    assert rates == sorted(set(rates), reverse=True)
    assert rates[6] == pytest.approx(rates[0] / 2)


def test_kl_coef_follows_the_kl_of_the_last_round(tiny_runs, tiny_data, tmp_path):
    """By at most 0.2 kl_adapt: the first round has no KL, the second more than its target."""
    out = f"{tmp_path}/r"
    options = ["--rounds=3", "--kl_target=1e-6", "--kl_adapt=0.5", "--eval_interval=100"]
    options.append("--lr=1e-2")  # far enough for a KL that its samples show
    train.main(ppo_args(tiny_runs, tiny_data, out, *options))
    coefs = [record["kl_coef"] for record in read_metrics(out, "collect")]
    assert coefs == pytest.approx([0.1, 0.1 * 0.9, 0.1 * 0.9 * 1.1])


# -------------------------------------------------------------------------- with a reward model


def reward_args(tiny_runs, data, out, num_steps):
    """A reward model with a template of its own."""
    return [
        "--stage=reward",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={tiny_runs['sft']}",
        "--template={prompt} -> ",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--batch_size=8",
        f"--max_steps={num_steps}",
        "--lr=1e-2",
    ]


@pytest.fixture(scope="module")
def reward_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reward") / "run")
    train.main(reward_args(tiny_runs, tiny_data, out, 3))
    return out


def test_a_reward_model_scores_with_its_own_template(tiny_runs, tiny_data, reward_run, tmp_path):
    """The reward of a sample is the reward model's score of that response alone."""
    options = [f"--reward={reward_run}", "--rounds=1", "--max_steps=1"]
    train.main(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    model, enc, _ = GPT.from_checkpoint(reward_run)
    for row in read_rows(f"{tmp_path}/r/round_0/train.jsonl")[:3]:
        ids = enc.encode_ordinary(f"{row['prompt']} -> ") + row["ids"][0]
        with torch.no_grad():
            alone = model.values(torch.tensor([ids]), torch.tensor([len(ids) - 1])).item()
        assert row["scores"][0] == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_a_run_keeps_its_reward_model(tiny_runs, tiny_data, reward_run, tmp_path):
    reward, out = f"{tmp_path}/reward", f"{tmp_path}/r"
    shutil.copytree(reward_run, reward)
    args = ppo_args(tiny_runs, tiny_data, out, f"--reward={reward}", "--rounds=1", "--max_steps=1")
    train.main(args)
    shutil.rmtree(reward)
    train.main(reward_args(tiny_runs, tiny_data, reward, 1))
    assert "begun with players_sha256" in refused(args)


def test_reward_model_and_policy_are_not_interchangeable(
    tiny_runs, tiny_data, reward_run, tmp_path
):
    args = ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r")
    assert "is not a reward model" in refused([*args, f"--reward={tiny_runs['sft']}"])
    message = refused([*args, f"--init={reward_run}"])
    assert "is a reward model, not a policy" in message


def copy_without_repeated_responses(data, folder):
    """A data folder without the rows in which a response occurs twice. Their scores are equal but
    for rounding, so whether such a pair counts as right depends on the order of sums."""
    os.makedirs(folder)
    for split in ("train", "val"):
        rows = read_rows(f"{data}/{split}.jsonl")
        distinct = [row for row in rows if len(set(row["responses"])) == 3]
        write_rows(f"{folder}/{split}.jsonl", distinct)
    write_meta(folder, "bytes", "made up")
    return folder


@pytest.mark.slow
def test_a_reward_model_of_two_ranks_equals_that_of_one(tiny_runs, tiny_data, tmp_path):
    data = copy_without_repeated_responses(tiny_data, f"{tmp_path}/data")
    one, two = f"{tmp_path}/one", f"{tmp_path}/two"
    train.main(reward_args(tiny_runs, data, one, 3))
    torchrun(reward_args(tiny_runs, data, two, 3))
    assert_equal_up_to_rounding(one, two, 2e-5)


@pytest.mark.slow
def test_two_ranks_equal_one(tiny_runs, tiny_data, reward_run, tmp_path):
    """Sampling, scoring and steps on two ranks, with a pretraining loss: the same samples, and
    sums in another order."""
    one, two = f"{tmp_path}/one", f"{tmp_path}/two"
    options = [f"--reward={reward_run}", "--rounds=1", "--eval_batches=1"]
    options += ["--pretrain_coef=0.5", "--pretrain_batch_size=2"]
    train.main(ppo_args(tiny_runs, tiny_data, one, *options))
    torchrun(ppo_args(tiny_runs, tiny_data, two, *options))
    samples = read_rows(f"{one}/round_0/self_train.jsonl")
    assert read_rows(f"{two}/round_0/self_train.jsonl") == samples
    # whitening divides roundings by the small deviation of the rewards
    assert_equal_up_to_rounding(one, two, 5e-5)
    for kind in ("step", "eval"):
        for a, b in zip(read_metrics(one, kind), read_metrics(two, kind), strict=True):
            assert a["pretrain_loss"] == pytest.approx(b["pretrain_loss"], rel=1e-4)


# ------------------------------------------------------------------------ rewards are checked


class Scorer:
    """A reward function that can be broken: gives `result`, or raises it, from call `at` on."""

    def __init__(self, result, at=5):
        self.result, self.at, self.calls = result, at, 0

    def __call__(self, row, text):
        self.calls += 1
        if self.calls <= self.at:
            return letters(row, text)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def scored_by(monkeypatch, scorer):
    monkeypatch.setattr(conftest, "scorer", scorer, raising=False)
    return "--reward=conftest:scorer"


@pytest.mark.parametrize("result", [None, math.nan, -math.inf, "1.5", [1.0, 2.0], 10**400])
def test_a_reward_that_is_no_number_is_refused(tiny_runs, tiny_data, tmp_path, monkeypatch, result):
    """It names function, prompt and value, and writes nothing; fixed, the same command goes on."""
    out = f"{tmp_path}/r"
    # the held-out rows are scored first
    args = ppo_args(tiny_runs, tiny_data, out, "--rounds=1", "--max_steps=1")
    args.append(scored_by(monkeypatch, Scorer(result)))
    message = refused(args)
    assert "reward conftest:scorer gave " in message
    assert repr(result)[:20] in message
    samples = read_rows(f"{out}/round_0/self_train.jsonl")
    assert f"the prompt {samples[5]['prompt']!r}" in message
    assert not os.path.exists(f"{out}/round_0/train.jsonl")
    assert not os.path.exists(f"{out}/round_0/collect.json")
    scored_by(monkeypatch, letters)
    train.main(args)
    whole = f"{tmp_path}/whole"
    train.main([*ppo_args(tiny_runs, tiny_data, whole), *args[-3:]])
    assert_same_run(whole, out)


def test_a_reward_function_cannot_change_the_rows(tiny_runs, tmp_path, monkeypatch):
    """The round trains on the prompts of the data, and is evaluated on them."""
    data = make_data(f"{tmp_path}/data")
    for split in ("train", "val"):
        rows = read_rows(f"{data}/{split}.jsonl")
        write_rows(f"{data}/{split}.jsonl", [row | {"history": [["hi", "ho"]]} for row in rows])
    write_meta(data, "bytes", "made up")

    def change(row, text):
        score = letters(row, text)
        row["prompt"] = row.pop("prompt").upper()
        row["history"].clear()
        return score

    reward = scored_by(monkeypatch, letters)
    train.main([*ppo_args(tiny_runs, data, f"{tmp_path}/whole"), reward])
    scored_by(monkeypatch, change)
    train.main([*ppo_args(tiny_runs, data, f"{tmp_path}/r"), reward])
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/r")


@pytest.mark.parametrize("error", [RuntimeError("server: Connection refused"), SystemExit(3)])
def test_an_error_of_a_reward_function_is_shown_as_it_is(
    tiny_runs, tiny_data, tmp_path, monkeypatch, capsys, error
):
    args = ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r", "--rounds=1")
    message = refused([*args, scored_by(monkeypatch, Scorer(error))])
    assert f"conftest:scorer raised {type(error).__name__}: {error}" in message
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "raise self.result" in shown


@pytest.mark.slow
def test_an_error_of_a_reward_function_on_two_ranks(tiny_runs, tiny_data, tmp_path):
    """The traceback of one rank and one line. A function that counts its calls sees each row on
    one rank only, and a random one makes no difference between the ranks."""
    with open(f"{tmp_path}/scorers.py", "w", encoding="utf-8") as f:
        f.write(
            "import os, random\n"
            "rng = random.SystemRandom()\n"
            "def broken(row, text):\n    raise RuntimeError('server: Connection refused')\n"
            "def noisy(row, text):\n"
            f"    open('{tmp_path}/calls', 'a').write(row['prompt'] + chr(10))\n"
            "    return rng.random()\n"
        )
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    args = ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r", "--rounds=1", "--max_steps=2")
    command = torchrun_command([*args, "--reward=scorers:broken"])
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert done.stderr.count("reward scorers:broken raised RuntimeError: server") == 1
    assert done.stderr.count("raise RuntimeError('server: Connection refused')") == 1
    assert "broke:" not in done.stderr

    args = ppo_args(tiny_runs, tiny_data, f"{tmp_path}/noisy", "--rounds=1", "--max_steps=2")
    command = torchrun_command([*args, "--reward=scorers:noisy", "--eval_interval=100"])
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/calls", encoding="utf-8") as f:
        calls = f.read().splitlines()
    num_evals = len(read_metrics(f"{tmp_path}/noisy", "eval"))
    assert len(calls) == 24 + 8 * num_evals
    assert read_metrics(f"{tmp_path}/noisy", "start")[0]["off"] < 1e-5


def test_a_reward_model_that_gives_nan_is_refused(
    tiny_runs, tiny_data, reward_run, tmp_path, monkeypatch
):
    def broken(*args):
        return np.full((24, 1), np.nan, dtype=np.float32)

    monkeypatch.setattr(scoring, "row_scores", broken)
    message = refused(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r", f"--reward={reward_run}"))
    assert f"reward {reward_run}" in message
    assert "gave nan" in message


@pytest.mark.parametrize("scorer", ["policy", "reference"])
def test_log_probabilities_that_are_not_finite_are_refused(
    tiny_runs, tiny_data, tmp_path, monkeypatch, scorer
):
    token_scores = ppo.token_scores
    calls = []

    def broken(*args):
        scores = token_scores(*args)
        calls.append(scorer)
        if len(calls) == {"policy": 1, "reference": 2}[scorer]:
            scores["logps"][3] = scores["logps"][3] * np.nan
        return scores

    monkeypatch.setattr(ppo, "token_scores", broken)
    out = f"{tmp_path}/r"
    message = refused(ppo_args(tiny_runs, tiny_data, out))
    assert f"log-probabilities under the {scorer}" in message
    prompt = read_rows(f"{out}/round_0/self_train.jsonl")[3]["prompt"]
    assert prompt in message
    assert not os.path.exists(f"{out}/round_0/collect.json")


# ------------------------------------------------------------------------------- parts, memory


@pytest.mark.parametrize(
    "function, at",
    [
        pytest.param("token_scores", 1, id="policy"),
        pytest.param("token_scores", 4, id="reference"),
        pytest.param("score_responses", 2, id="reward"),
        pytest.param("write_json", 0, id="manifest"),
    ],
)
def test_scoring_goes_on_from_its_parts(
    tiny_runs, tiny_data, ppo_run, tmp_path, monkeypatch, function, at
):
    """24 samples in parts of 8. What was scored before the kill is not scored again."""
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"
    monkeypatch.setattr(rounds, "PART_SIZE", 8)
    options = ["--rounds=1", "--eval_interval=100", "--micro_batch_tokens=256"]
    calls = []

    def counting(*args):
        calls.append(len(args[1]))
        return token_scores(*args)

    token_scores = ppo.token_scores
    monkeypatch.setattr(ppo, "token_scores", counting)
    train.main(ppo_args(tiny_runs, tiny_data, whole, *options))
    num_calls = len(calls)
    assert calls[:6] == [8] * 6
    calls.clear()
    with monkeypatch.context() as m:
        module = scoring if function == "score_responses" else ppo
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(ppo_args(tiny_runs, tiny_data, killed, *options))
    assert glob.glob(f"{killed}/round_0/*.part*")
    train.main(ppo_args(tiny_runs, tiny_data, killed, *options))
    assert len(calls) == num_calls
    assert_same_run(whole, killed)
    assert not glob.glob(f"{killed}/**/*.part*", recursive=True)
    for name in ("train.jsonl", "rollout.npz"):
        assert sha256(f"{killed}/round_0/{name}") == sha256(f"{whole}/round_0/{name}")


def test_parts_of_a_fixed_reward_function_are_made_again(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(rounds, "PART_SIZE", 8)
    out = f"{tmp_path}/r"
    options = ["--rounds=1", "--max_steps=1", "--reward=fixed:f"]
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source):
        with open(f"{tmp_path}/fixed.py", "w", encoding="utf-8") as f:
            f.write(f"calls = []\ndef f(row, text):\n    calls.append(1)\n    return {source}\n")
        sys.modules.pop("fixed", None)
        importlib.invalidate_caches()

    write("1.0 if len(calls) <= 12 else None")
    assert "gave None" in refused(ppo_args(tiny_runs, tiny_data, out, *options))
    write("float(len(text))  # another length of the source, whatever the clock says")
    train.main(ppo_args(tiny_runs, tiny_data, out, *options))
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert row["scores"] == [len(row["responses"][0])]


def test_a_signal_is_heard_between_parts(tiny_runs, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PART_SIZE", 8)
    out, whole = f"{tmp_path}/r", f"{tmp_path}/whole"
    options = ["--rounds=1", "--max_steps=2", "--eval_interval=100"]
    train.main(ppo_args(tiny_runs, tiny_data, whole, *options))
    score_responses = scoring.score_responses

    def signalled(*args):
        scores = score_responses(*args)
        elastic.received_signals.append(15)
        return scores

    with monkeypatch.context() as m:
        m.setattr(elastic, "received_signals", [])
        m.setattr(scoring, "score_responses", signalled)
        with pytest.raises(SystemExit) as e:
            train.main(ppo_args(tiny_runs, tiny_data, out, *options))
    assert e.value.code == 128 + 15
    assert len(glob.glob(f"{out}/round_0/self_train.jsonl.reward.part*")) == 1
    train.main(ppo_args(tiny_runs, tiny_data, out, *options))
    assert_same_run(whole, out)


def test_a_run_loads_each_tokenizer_once(tiny_runs, tiny_data, reward_run, tmp_path, monkeypatch):
    """PPO reads its reference and its reward model in every round and evaluation. The number of
    tokenizers in memory does not grow with them."""
    loaded = []
    load = tokenizer.load
    monkeypatch.setattr(tokenizer, "load", lambda name: loaded.append(name) or load(name))
    checkpoint.tokenizers.clear()
    options = ["--rounds=6", "--epochs=1", "--max_rows=8", f"--reward={reward_run}"]
    live = []
    rounds_end = train.checkpoint.prune_rounds

    def count(*args):
        gc.collect()
        live.append(sum(type(thing) is tiktoken.Encoding for thing in gc.get_objects()))
        return rounds_end(*args)

    monkeypatch.setattr(train.checkpoint, "prune_rounds", count)
    out = f"{tmp_path}/r"
    train.main([*ppo_args(tiny_runs, tiny_data, out), *options, "--keep_rounds=1"])
    assert len(live) == 6
    assert live[-1] == live[0]
    assert len(loaded) <= 2  # the init's, and what preflight looks at


def test_tokenizers_that_differ_are_not_confused(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs["sft"], f"{tmp_path}/run")
    path = checkpoint.latest(run)
    meta = checkpoint.read_meta(path) | {"tokenizer": "tokenizer.tiktoken"}
    merges = {bytes([i]): i for i in range(256)}
    for extra in (b"ab", b"cd"):
        enc = tokenizer.make_encoding("bpe", merges | {extra: 256})
        tokenizer.save(enc, f"{path}/tokenizer.tiktoken")
        read = checkpoint.read_tokenizer(
            path, meta | {"tokenizer_sha256": tokenizer.fingerprint(enc)}
        )
        assert read.decode([256]) == extra.decode()
    with pytest.raises(SystemExit, match="not the one that the checkpoint was trained with"):
        checkpoint.read_tokenizer(path, meta)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (["--reward="], "needs `reward`"),
        (["--temperature=0.7"], "temperature 1"),
        (["--reward=nowhere:f"], "No module named"),
        (["--reward=conftest:nothing"], "conftest:nothing"),
        (["--clip_range=1.5"], "clip_range must be below 1"),
    ],
)
def test_impossible_settings_are_refused(tiny_runs, tiny_data, tmp_path, options, message):
    assert message in refused([*ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r"), *options])


def test_only_sft_and_ppo_have_a_pretraining_loss():
    message = refused(["--stage=pretrain", "--max_steps=1", "--pretrain_coef=0.1"])
    assert "has no pretrain_coef" in message


def test_whole_texts_are_refused(tiny_runs, tmp_path):
    for split in ("train", "val"):
        write_rows(f"{tmp_path}/{split}.jsonl", [{"text": "the loss falls"}] * 8)
    write_meta(str(tmp_path), None, "made up")
    message = refused(ppo_args(tiny_runs, tmp_path, f"{tmp_path}/r"))
    assert "have no prompt to respond to" in message


def test_a_damaged_or_missing_rollout_is_refused(tiny_runs, tiny_data, ppo_run, tmp_path):
    copy = f"{tmp_path}/copy"
    shutil.copytree(ppo_run, copy)
    args = ppo_args(tiny_runs, tiny_data, copy)
    with open(f"{copy}/round_1/rollout.npz", "r+b") as f:
        f.seek(200)
        f.write(b"\xff")
    assert "rollout.npz is damaged" in refused(args)
    os.remove(f"{copy}/round_1/collect.json")
    assert "no longer the one that sampled" in refused(args)


def without_round_1(ppo_run, copy):
    """A run that was killed when it had trained the first round."""
    shutil.copytree(ppo_run, copy, ignore=shutil.ignore_patterns("round_1"))
    return copy


@pytest.mark.parametrize(
    "name, change",
    [
        ("now", {"kl_coef": 99.0}),
        ("now", {"mean": 0.5}),
        ("report", {"kl": 7.0}),
        ("files", {"train.jsonl": "0" * 64}),
    ],
)
def test_an_edited_manifest_is_refused(tiny_runs, tiny_data, ppo_run, tmp_path, name, change):
    """The next round would scale its rewards with what the edited one says."""
    copy = without_round_1(ppo_run, f"{tmp_path}/copy")
    path = f"{copy}/round_0/collect.json"
    manifest = read_json(path)
    write_json(path, manifest | {name: manifest[name] | change})
    assert "collect.json was edited" in refused(ppo_args(tiny_runs, tiny_data, copy))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"now": []}, "now must be dict, got []"),
        ({"now": {"kl_coef": 0.1, "mean": 0.5}}, "now.std must be float, got None"),
        ({"now": {"kl_coef": 0.1, "mean": 0.5, "std": "x"}}, "now.std must be float, got 'x'"),
        ({"files": []}, "files must be dict, got []"),
        ({"report": {}}, "report.kl must be float, got None"),
    ],
)
def test_a_damaged_manifest_is_refused(tiny_runs, tiny_data, ppo_run, tmp_path, changes, message):
    """Its checksum says that it was written so."""
    copy = without_round_1(ppo_run, f"{tmp_path}/copy")
    path = f"{copy}/round_0/collect.json"
    manifest = read_json(path) | changes
    del manifest["sha256"]
    write_json(path, rounds.with_checksum(manifest))
    assert message in refused(ppo_args(tiny_runs, tiny_data, copy))
