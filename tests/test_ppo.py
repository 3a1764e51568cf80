"""PPO: its arithmetic against slow or exact forms on small vocabularies, then the stage: learning, killed runs, two ranks."""

import dataclasses
import glob
import math
import os
import shutil

import numpy as np
import pytest
import torch

from nanospin import checkpoint
from nanospin import config
import ppo
import train
from conftest import load_config, final_weights, read_metrics
from data.rows import encode_rows, read_rows, write_rows
from data import tokenizer
from data.folder import write_meta
from eval import forward_batch
from loss import kl_estimates, ppo_loss
from model import GPT, GPTConfig
from test_parallel import assert_equal_up_to_rounding, torchrun
from test_train import Killed, assert_same_run, killing, refused

BYTES, CPU = tokenizer.load("bytes"), torch.device("cpu")


# ------------------------------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize("discount, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_slow_loop(discount, lam):
    """The sum of eq. 16 as it is written, one trajectory at a time."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 4, 7, 2])
    rewards, values = rng.normal(size=(2, 4, 7))
    fast = ppo.gae(rewards, values, lengths, discount, lam)
    for n, T in enumerate(lengths):
        V = [*values[n, :T], 0.0]
        delta = [rewards[n, t] + discount * V[t + 1] - V[t] for t in range(T)]
        slow = [sum((discount * lam) ** l * delta[t + l] for l in range(T - t)) for t in range(T)]
        np.testing.assert_allclose(
            fast[n, :T], slow, rtol=1e-12, atol=1e-12
        )  # float64, seven terms
        assert (fast[n, T:] == 0).all()
        if lam == 1.0:  # the returns are the discounted sums of what is still to come
            np.testing.assert_allclose(
                fast[n, :T] + V[:T],
                [sum(discount**l * rewards[n, t + l] for l in range(T - t)) for t in range(T)],
                rtol=1e-12,
            )


def test_kl_estimates_against_the_exact_kl():
    """In expectation over the whole vocabulary: k1 and k3 are exact, k2 only nearly, and k3 is never negative."""
    g = torch.Generator().manual_seed(0)
    p = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    near, far = (
        (p + s * torch.randn(9, generator=g, dtype=torch.float64)).log_softmax(0)
        for s in (0.01, 2.0)
    )
    for q in (near, far):
        exact = (p.exp() * (p - q)).sum()
        k1, k2, k3 = kl_estimates(p, q)
        torch.testing.assert_close((p.exp() * k1).sum(), exact, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            (p.exp() * k3).sum(), exact, rtol=1e-9, atol=1e-15
        )  # its parts cancel where p and q are near
        assert (k3 >= 0).all() and (k1 < 0).any()
        assert (p.exp() * (k3 - exact) ** 2).sum() < (p.exp() * (k1 - exact) ** 2).sum() or q is far
    k2_near, k2_far = (
        (p.exp() * kl_estimates(p, q)[1]).sum() / (p.exp() * (p - q)).sum() for q in (near, far)
    )
    assert abs(k2_near - 1) < 0.02 and abs(k2_far - 1) > 0.05
    draws = torch.multinomial(p.exp(), 200_000, replacement=True, generator=g)
    k3, exact = kl_estimates(p, far)[2], (p.exp() * (p - far)).sum()
    error = (p.exp() * (k3 - exact) ** 2).sum().sqrt() / 200_000**0.5
    assert abs(k3[draws].mean() - exact) < 5 * error


def inputs(m=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps, values, old_logps, old_values, advantages, returns = torch.randn(
        6, m, generator=g, dtype=torch.float64
    )
    return (
        (-logps.abs() - 0.1).requires_grad_(),
        values.requires_grad_(),
        -old_logps.abs() - 0.1,
        old_values,
        advantages,
        returns,
    )


def test_no_gradient_outside_the_clip():
    """A token has none where its ratio has left the clip on the side to which its advantage pushes; inside, r A's."""
    logps, values, old_logps, old_values, advantages, returns = inputs()
    loss, metrics = ppo_loss(
        logps, values, old_logps, old_values, advantages, returns, value_coef=0.0
    )
    (grad,) = torch.autograd.grad(loss, logps, retain_graph=True)
    ratio = (logps - old_logps).exp().detach()
    stopped = (advantages > 0) & (ratio > 1.2) | (advantages < 0) & (ratio < 0.8)
    assert 5 < stopped.sum() < 35 and (grad[stopped] == 0).all()
    torch.testing.assert_close(
        grad[~stopped], (-ratio * advantages / 40)[~stopped], rtol=1e-12, atol=0
    )
    assert metrics["clip_fraction"].item() == pytest.approx(
        ((ratio - 1).abs() > 0.2).double().mean().item()
    )
    loss, _ = ppo_loss(logps, values, old_logps, old_values, advantages, returns, value_coef=1.0)
    (grad,) = torch.autograd.grad(loss, values)
    # the value has none where the clipped one is worse, for there it stands still
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    still = ((values - old_values).abs() > 0.2) & (
        (clipped - returns).abs() > (values - returns).abs()
    )
    assert 3 < still.sum() < 37 and (grad[still] == 0).all()
    torch.testing.assert_close(
        grad[~still], ((values - returns) / 40)[~still].detach(), rtol=1e-12, atol=0
    )


def test_metrics_by_hand():
    logps, values, old_logps, old_values, advantages, returns = inputs()
    loss, m = ppo_loss(
        logps, values, old_logps, old_values, advantages, returns, value_coef=0.3, entropy_coef=0.02
    )
    r, A = (logps - old_logps).exp(), advantages
    policy = -torch.stack([torch.min(x * a, x.clamp(0.8, 1.2) * a) for x, a in zip(r, A)]).mean()
    value = (
        torch.stack(
            [
                torch.max((v - g) ** 2, (o + (v - o).clamp(-0.2, 0.2) - g) ** 2)
                for v, o, g in zip(values, old_values, returns)
            ]
        ).mean()
        / 2
    )
    entropy = -(r * logps).mean()
    torch.testing.assert_close(loss, policy + 0.3 * value - 0.02 * entropy, rtol=1e-12, atol=1e-12)
    for name, slow in (
        ("policy_loss", policy),
        ("value_loss", value),
        ("entropy", entropy),
        ("approx_kl", (r - 1 - (logps - old_logps)).mean()),
    ):
        torch.testing.assert_close(m[name], slow.detach(), rtol=1e-12, atol=1e-12)


def test_the_entropy_bonus_is_the_entropys_gradient():
    """Over a whole vocabulary, each id as often as the old policy draws it, which is not the policy any more."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    logps, zero = logits.log_softmax(0), torch.zeros(7, dtype=torch.float64)
    # a mean over 7 tokens of equal weight: the old policy's probabilities come in through the old log-probabilities, r / 7 = p / (7 old) x old
    loss = (
        sum(
            7
            * old[i].exp()
            * ppo_loss(
                logps[i : i + 1],
                zero[:1],
                old[i : i + 1],
                zero[:1],
                zero[:1],
                zero[:1],
                entropy_coef=1.0,
            )[0]
            for i in range(7)
        )
        / 7
    )
    exact = (logps.exp() * logps).sum()  # minus the entropy
    for a, b in zip(
        torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(exact, logits)
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_first_step_is_the_policy_gradient():
    """While the policy is still the one that sampled, one epoch's loss without clip has the gradient of REINFORCE with these
    advantages: - mean A grad log pi, here through the whole model, one sequence at a time."""
    model = GPT(
        GPTConfig(
            vocab_size=257,
            block_size=48,
            n_layer=2,
            n_head=2,
            n_embd=32,
            position="rotary",
            scalar_head=True,
        )
    ).double()
    rng = np.random.default_rng(0)
    rows, _ = encode_rows(
        [{"prompt": f"say {i}", "responses": ["ab" * (i + 1)]} for i in range(4)],
        BYTES,
        "Q: {prompt}\nA: ",
        48,
    )
    for row in rows:
        row |= {
            name: rng.normal(size=len(row["responses"][0]))
            for name in ("logps", "values", "advantages", "returns")
        }
    batch = ppo.ppo_batch(rows)
    with torch.no_grad():
        batch["old_logps"], batch["old_values"] = forward_batch(model, batch, CPU)[0]
    cfg = load_config(
        [
            "--stage=ppo",
            "--init=x",
            "--reward=x:y",
            "--clip_range=0",
            "--value_clip_range=0",
            "--value_coef=0",
            "--max_steps=1",
        ]
    )
    loss, metrics = train.ppo_objective(forward_batch(model, batch, CPU)[0], batch, cfg, 0.1)
    params = [p for name, p in model.named_parameters() if not name.startswith("scalar")]
    fast = torch.autograd.grad(loss / len(batch["old_logps"]), params, allow_unused=True)
    slow = 0.0
    for row in rows:
        ids, start = row["prompt"] + row["responses"][0], len(row["prompt"])
        logps = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        slow = slow - sum(
            a * logps[start - 1 + t, y]
            for t, (a, y) in enumerate(zip(row["advantages"], row["responses"][0]))
        )
    for a, b in zip(fast, torch.autograd.grad(slow / len(batch["old_logps"]), params)):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-7
        )  # the slow one's logits go through float32
    assert metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0


def test_advantages_by_hand():
    """Two responses, the second without end-of-text: where the price of KL, the reward and the penalty stand, and what is whitened."""
    t = {
        "ids": [[1, 256], [1, 2, 3]],
        "ended": [True, False],
        "scores": np.array([3.0, 1.0]),
        "logps": [np.float32([-1, -2]), np.float32([-1, -1, -1])],
        "refs": [np.float32([-1.5, -2]), np.float32([-1, -3, -1])],
        "values": [np.float32([0.5, 0.25]), np.float32([0, 0, 1])],
    }
    cfg = load_config(
        [
            "--stage=ppo",
            "--init=x",
            "--reward=x:y",
            "--max_steps=1",
            "--gae_lambda=1",
            "--missing_eos_penalty=0.5",
            "--whiten_advantages=False",
        ]
    )
    arrays, figures = ppo.advantages(cfg, {"kl_coef": 0.1, "mean": 2.0, "std": 1.0}, t)
    rewards = [[-0.1 * 0.5, 0.0 + 1.0], [0.0, -0.1 * 2, 0.0 - 1.0 - 0.5]]
    returns = [0.95, 1.0, -1.7, -1.7, -1.5]
    np.testing.assert_allclose(arrays["returns"], returns, rtol=1e-6)
    np.testing.assert_allclose(
        arrays["advantages"], np.array(returns) - [0.5, 0.25, 0, 0, 1], rtol=1e-6
    )
    assert figures["return"] == pytest.approx(sum(map(sum, rewards)) / 2)
    assert figures["explained_variance"] == pytest.approx(
        1 - np.var(arrays["advantages"]) / np.var(returns), rel=1e-5
    )
    plain, _ = ppo.advantages(
        dataclasses.replace(cfg, whiten_rewards=False), {"kl_coef": 0.0, "mean": 2.0, "std": 1.0}, t
    )
    np.testing.assert_allclose(plain["returns"], [3, 3, 0.5, 0.5, 0.5], rtol=1e-6)
    whitened, _ = ppo.advantages(
        dataclasses.replace(cfg, whiten_advantages=True),
        {"kl_coef": 0.0, "mean": 2.0, "std": 1.0},
        t,
    )
    assert abs(whitened["advantages"].mean()) < 1e-6 and whitened[
        "advantages"
    ].std() == pytest.approx(1, abs=1e-6)
    assert (
        ppo.reward_scaling(cfg, 0, np.full(7, 0.1))["std"] == 1.0
    )  # a reward nobody has earned yet
    s = ppo.sample_report(t)
    assert (
        s["kl"] == (0.5 + 2.0) / 2
        and s["reward"] == 2.0
        and s["ended"] == 0.5
        and s["length"] == 2.5
        and s["entropy"] == pytest.approx(6 / 5)
    )
    assert s["kl_token"] == pytest.approx((math.exp(-0.5) - 0.5 + math.exp(-2) + 1) / 5)


# ----------------------------------------------------------------------------------------------------------- the stage


def letters(row, text):
    """Share of a's and e's: what the tests' policies are paid for."""
    return sum(c in "ae" for c in text) / max(1, len(text))


def ppo_args(runs, data, out, *more):
    return [
        "--stage=ppo",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        "--reward=test_ppo:letters",
        "--template=Q: {prompt}\nA: ",
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


def test_a_run_says_what_it_should(ppo_run, tiny_runs):
    starts, steps, collects, evals = (
        read_metrics(ppo_run, kind) for kind in ("start", "step", "collect", "eval")
    )
    assert (
        len(starts) == 2
        and all(s["off"] < 1e-5 for s in starts)
        and not read_metrics(ppo_run, "warning")
    )
    assert len(steps) == 12 and len(evals) == 3
    assert {"policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl"} <= set(steps[0])
    assert {
        "reward",
        "kl",
        "entropy",
        "explained_variance",
        "kl_coef",
        "length",
        "ended",
        "return",
    } <= set(collects[0])
    assert (
        abs(steps[0]["approx_kl"]) < 1e-6
        and steps[0]["clip_fraction"] == 0
        and steps[5]["approx_kl"] > 0
    )
    # the reference is the policy in the first round, and no longer in the second
    assert (
        collects[0]["kl"] == 0 == evals[0]["kl"] and collects[1]["kl"] > 0 and evals[-1]["kl"] > 0
    )
    assert collects[0]["value"] == 0 and collects[1]["value"] != 0  # the head starts at 0
    rows = read_rows(f"{ppo_run}/round_1/train.jsonl")
    assert (
        all(row["scores"] == [letters(None, row["responses"][0])] for row in rows)
        and len(rows) == 24
    )
    first = {row["prompt"] for row in read_rows(f"{ppo_run}/round_0/train.jsonl")}
    assert (
        len(first & {row["prompt"] for row in rows}) < 24
    )  # the next prompts of the permutation, then round again
    assert (
        "scalar.weight" in final_weights(ppo_run)
        and not GPT.from_checkpoint(ppo_run)[0].config.scalar
    )
    # the stored log-probabilities are those of the policy that sampled, one sequence at a time
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rows = read_rows(f"{ppo_run}/round_0/train.jsonl")
    stored = np.load(f"{ppo_run}/round_0/rollout.npz")["logps"]
    prompt, y = enc.encode_ordinary(f"Q: {rows[0]['prompt']}\nA: "), rows[0]["ids"][0]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + y]))[0].double().log_softmax(-1)
    np.testing.assert_allclose(
        stored[: len(y)], [logps[len(prompt) - 1 + t, i] for t, i in enumerate(y)], rtol=1e-5
    )


def test_the_reward_rises_at_a_bounded_kl(tiny_runs, tiny_data, tmp_path):
    """And a higher price of KL buys less of both."""
    ends = []
    for kl_coef in (0.02, 1.0):
        train.main(
            ppo_args(
                tiny_runs,
                tiny_data,
                f"{tmp_path}/{kl_coef}",
                "--max_rows=0",
                "--rounds=4",
                "--lr=3e-3",
                "--eval_interval=100",
                f"--kl_coef={kl_coef}",
                "--keep_rounds=1",
            )
        )
        ends.append(read_metrics(f"{tmp_path}/{kl_coef}", "collect"))
    cheap, dear = ends
    assert (
        cheap[-1]["reward"] > cheap[0]["reward"] + 3 * cheap[0]["reward_se"]
        and 0 < dear[-1]["kl"] < cheap[-1]["kl"]
    )
    # keep_rounds: the last round's checkpoints and those of one before it
    kept = {path.split("/")[-2] for path in glob.glob(f"{tmp_path}/1.0/round_*/step_*")}
    assert (
        kept == {"round_2", "round_3"}
        and len(glob.glob(f"{tmp_path}/1.0/round_*/rollout.npz")) == 4
    )


@pytest.mark.parametrize(
    "what, at",
    [
        ("sampling", 3),
        ("rewards", 0),
        ("advantages", 1),
        ("training", 3),
        ("training", 8),
        ("saving", 1),
    ],
)
def test_it_resumes_bit_for_bit(tiny_runs, tiny_data, ppo_run, tmp_path, monkeypatch, what, at):
    """Killed in the middle of a round: while it samples, scores, stores, fits or saves, of either round."""
    import rollout

    module, name = {
        "sampling": (rollout, "respond"),
        "rewards": (ppo, "rewards"),
        "advantages": (ppo, "advantages"),
        "training": (train, "lr_factor"),
        "saving": (checkpoint, "save"),
    }[what]
    with monkeypatch.context() as m:
        m.setattr(module, name, killing(getattr(module, name), at))
        with pytest.raises(Killed):
            train.main(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/killed"))
    train.main(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/killed"))
    assert_same_run(ppo_run, f"{tmp_path}/killed")
    for r in (0, 1):
        one, two = (
            np.load(f"{folder}/round_{r}/rollout.npz") for folder in (ppo_run, f"{tmp_path}/killed")
        )
        assert all(np.array_equal(one[key], two[key]) for key in one)
    kinds = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder, "collect")]
        for folder in (ppo_run, f"{tmp_path}/killed")
    ]
    assert kinds[0] == kinds[1]


def test_rounds_are_one_optimisation(tiny_runs, tiny_data, ppo_run, tmp_path, monkeypatch):
    """The optimizer's state goes on from round to round: forgotten, the second round goes elsewhere."""
    resume = checkpoint.resume
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "resume", lambda *args: None)
        train.main(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r"))
    a, b = (read_metrics(folder, "step") for folder in (ppo_run, f"{tmp_path}/r"))
    assert (
        a[5]["loss"] == b[5]["loss"]
        and a[8]["loss"] != b[8]["loss"]
        and resume is checkpoint.resume
    )
    train.main(
        ppo_args(tiny_runs, tiny_data, f"{tmp_path}/cosine", "--schedule=linear", "--min_lr_ratio=0")
    )
    rates = [r["lr"] for r in read_metrics(f"{tmp_path}/cosine", "step")]
    assert all(x > y for x, y in zip(rates, rates[1:])) and rates[6] == pytest.approx(
        rates[0] / 2
    )  # over all rounds


def reward_args(tiny_runs, tiny_data, out, steps):
    return [
        "--stage=reward",
        f"--out_dir={out}",
        f"--data={tiny_data}",
        f"--init={tiny_runs['sft']}",
        "--template={prompt} -> ",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--batch_size=8",
        f"--max_steps={steps}",
        "--lr=1e-2",
    ]


@pytest.fixture(scope="module")
def reward_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reward") / "run")
    train.main(reward_args(tiny_runs, tiny_data, out, 3))
    return out


def test_two_ranks_equal_one(tiny_runs, tiny_data, reward_run, tmp_path):
    """The reward model; then sampling, scoring and steps dealt to two ranks, the pretraining stream beside. The samples are the
    same ones, the sums of other order."""
    torchrun(reward_args(tiny_runs, tiny_data, f"{tmp_path}/reward", 3))
    assert_equal_up_to_rounding(
        reward_run, f"{tmp_path}/reward", 2e-5, pair=1 / 24
    )  # 8 rows of 3 pairs
    args = ppo_args(
        tiny_runs,
        tiny_data,
        f"{tmp_path}/two",
        "--rounds=1",
        f"--reward={reward_run}",
        "--pretrain_coef=0.5",
        "--pretrain_batch_size=2",
        "--eval_batches=1",
    )
    torchrun(args)
    train.main([a if not a.startswith("--out_dir") else f"--out_dir={tmp_path}/one" for a in args])
    assert (
        open(f"{tmp_path}/one/round_0/self_train.jsonl").read()
        == open(f"{tmp_path}/two/round_0/self_train.jsonl").read()
    )
    assert_equal_up_to_rounding(
        f"{tmp_path}/one", f"{tmp_path}/two", 5e-5
    )  # whitening divides roundings by the rewards' small deviation
    for kind in ("step", "eval"):
        for a, b in zip(
            read_metrics(f"{tmp_path}/one", kind),
            read_metrics(f"{tmp_path}/two", kind),
            strict=True,
        ):
            assert a["pretrain_loss"] == pytest.approx(b["pretrain_loss"], rel=1e-4)


def test_an_adaptive_price(tiny_runs, tiny_data, tmp_path):
    """kl_coef follows the last round's KL: at its target's far side by 1 +- 0.2 kl_adapt."""
    train.main(
        ppo_args(
            tiny_runs,
            tiny_data,
            f"{tmp_path}/r",
            "--rounds=3",
            "--kl_target=1e-6",
            "--kl_adapt=0.5",
            "--eval_interval=100",
        )
    )
    coefs = [r["kl_coef"] for r in read_metrics(f"{tmp_path}/r", "collect")]
    assert coefs == pytest.approx(
        [0.1, 0.1 * 0.9, 0.1 * 0.9 * 1.1]
    )  # the first round has no KL, the second more than asked


def test_a_reward_model_scores_under_its_own_template(tiny_runs, tiny_data, reward_run, tmp_path):
    """From its checkpoint: the score of a response is what the reward model says of it alone."""
    rm, out = f"{tmp_path}/rm", f"{tmp_path}/r"
    shutil.copytree(reward_run, rm)
    train.main(ppo_args(tiny_runs, tiny_data, out, f"--reward={rm}", "--rounds=1", "--max_steps=1"))
    model, enc, _ = GPT.from_checkpoint(rm)
    for row in read_rows(f"{out}/round_0/train.jsonl")[:3]:
        with torch.no_grad():
            ids = enc.encode_ordinary(f"{row['prompt']} -> ") + row["ids"][0]
            alone = model(torch.tensor([ids]), read=torch.tensor([len(ids) - 1])).item()
        assert row["scores"][0] == pytest.approx(alone, rel=1e-4, abs=1e-6)
    # it is part of what a run keeps
    shutil.rmtree(rm)
    train.main(reward_args(tiny_runs, tiny_data, rm, 1))
    assert "begun with players_sha256" in refused(
        ppo_args(tiny_runs, tiny_data, out, f"--reward={rm}", "--rounds=1", "--max_steps=1")
    )
    assert "is not a reward model" in refused(
        ppo_args(tiny_runs, tiny_data, f"{tmp_path}/q", f"--reward={tiny_runs['sft']}")
    )
    assert "is a reward model, no policy" in refused(
        ppo_args(tiny_runs, tiny_data, f"{tmp_path}/q", f"--init={rm}")
    )


def test_refusals(tiny_runs, tiny_data, ppo_run, tmp_path):
    args = ppo_args(tiny_runs, tiny_data, f"{tmp_path}/r")
    assert "has a reward" in refused([a for a in args if not a.startswith("--reward")])
    assert "temperature 1" in refused(args + ["--temperature=0.7"])
    assert "no module named" in refused(
        args + ["--reward=nowhere:f"]
    ).lower() and "test_ppo:nothing" in refused(args + ["--reward=test_ppo:nothing"])
    assert "clip must be below 1" in refused(args + ["--clip_range=1.5"])
    os.makedirs(f"{tmp_path}/texts")
    for split in ("train", "val"):
        write_rows(f"{tmp_path}/texts/{split}.jsonl", [{"text": "the loss falls"}] * 8)
    write_meta(f"{tmp_path}/texts", None, "made up")
    assert "have no prompt to play on" in refused(args + [f"--data={tmp_path}/texts"])
    assert "has no pretrain_coef" in refused(
        ["--stage=pretrain", "--max_steps=1", "--pretrain_coef=0.1"]
    )
    shutil.copytree(ppo_run, f"{tmp_path}/copy")
    stored = f"{tmp_path}/copy/round_1/rollout.npz"
    with open(stored, "r+b") as f:
        f.seek(200)
        f.write(b"\xff")
    assert "is damaged" in refused(ppo_args(tiny_runs, tiny_data, f"{tmp_path}/copy"))
    os.remove(f"{tmp_path}/copy/round_1/collect.json")
    assert "no longer the one that sampled" in refused(
        ppo_args(tiny_runs, tiny_data, f"{tmp_path}/copy")
    )
