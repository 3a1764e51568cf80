"""Policy gradients without a value function: advantages of groups of samples, and of a teacher."""

import glob
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TEMPLATE,
    TINY,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    letters,
    read_metrics,
    refused,
)
from test_distributed import ENV, torchrun_command
from test_gpu_path import gpu_path, gradients, no_host_reads
from test_ppo import BYTES, ppo_args, ppo_config, records_without_time, reward_args

import players
import ppo
import scorer
import train
from data import tokenizer
from data.batch import ppo_batch
from data.files import read_json
from data.folder import write_meta, write_stream
from data.rows import check_row, encode_rows, prompt_key, read_rows, write_rows
from loss import kl_k3
from model import GPT, GPTConfig
from nanospin import checkpoint, rounds

__all__ = ["gpu_path"]  # a fixture

GROUP_ESTIMATORS = ["grpo", "dr_grpo", "rloo"]


# ------------------------------------------------------------------------------- the arithmetic


def slow_advantages(rewards, estimator):
    """Of one prompt, sample by sample."""
    result = []
    for i, reward in enumerate(rewards):
        others = [other for j, other in enumerate(rewards) if j != i]
        mean = sum(rewards) / len(rewards)
        if estimator == "rloo":
            result.append(reward - sum(others) / len(others))
        elif estimator == "dr_grpo":
            result.append(reward - mean)
        else:
            squares = [(other - mean) ** 2 for other in rewards]
            std = math.sqrt(sum(squares) / (len(rewards) - 1))
            result.append((reward - mean) / (std + 1e-4))
    return result


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("K", range(2, 9))
def test_group_advantages_equal_a_slow_loop(estimator, K):
    rewards = np.random.default_rng(K).normal(size=(5, K))
    fast = ppo.group_advantages(rewards, estimator)
    for row, expected in zip(fast, rewards):
        np.testing.assert_allclose(row, slow_advantages(expected, estimator), rtol=1e-10)
    np.testing.assert_allclose(fast.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_a_group_of_equal_rewards_has_no_advantage(estimator):
    """Exactly 0, also where the mean of equal numbers is rounded."""
    for K in range(2, 9):
        assert (ppo.group_advantages(np.full((3, K), 0.1), estimator) == 0).all()


def samples_by_hand():
    """Two samples of each of two prompts. The last sample did not end."""
    return ppo.Trajectories(
        texts=["", "b", "c", "d"],
        ids=[[256], [1, 256], [2, 256], [3, 4, 5]],
        ended=[True, True, True, False],
        scores=np.array([1.0, 3.0, 2.0, 2.0]),
        logps=[
            np.float32([-1]),
            np.float32([-1, -2]),
            np.float32([-1, -1]),
            np.float32([-1, -1, -1]),
        ],
        refs=[
            np.float32([-1]),
            np.float32([-1.5, -2.5]),
            np.float32([-1, -1]),
            np.float32([-1, -3, -1]),
        ],
        teacher=[
            np.float32([-0.5]),
            np.float32([-3, -1]),
            np.float32([-1, -1]),
            np.float32([-1, -2, -3]),
        ],
        group_size=2,
    )


SCALING = {"kl_coef": 0.5, "mean": 7.0, "std": 3.0}


def group_config(*more):
    return ppo_config("--samples_per_prompt=2", "--missing_eos_penalty=0.25", *more)


@pytest.mark.parametrize(
    "estimator, first, second",
    [
        # R = 1, 3 - 0.5 x 1 of the first prompt and 2, 2 - 0.25 - 0.5 x 2 of the second
        ("dr_grpo", [-0.75, 0.75], [0.625, -0.625]),
        ("rloo", [-1.5, 1.5], [1.25, -1.25]),
        # deviations 1.5 / sqrt(2) and 1.25 / sqrt(2)
        ("grpo", [-(0.5**0.5), 0.5**0.5], [0.5**0.5, -(0.5**0.5)]),
    ],
)
def test_a_round_by_hand(estimator, first, second):
    arrays, metrics = ppo.advantages(
        group_config(f"--advantage={estimator}"), SCALING, samples_by_hand()
    )
    expected = [first[0]] + 2 * [first[1]] + 2 * [second[0]] + 3 * [second[1]]
    np.testing.assert_allclose(arrays["advantages"], expected, rtol=2e-4)
    assert set(arrays) == {"logps", "advantages"}
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert metrics == {"return": (1 + 2.5 + 2 + 0.75) / 4, "kl_coef": 0.5}


def test_a_round_by_hand_with_the_penalty_in_the_loss():
    cfg = group_config("--advantage=dr_grpo", "--kl_in=loss")
    samples = samples_by_hand()
    arrays, metrics = ppo.advantages(cfg, SCALING, samples)
    expected = [-1, 1, 1, 0.125, 0.125, -0.125, -0.125, -0.125]
    np.testing.assert_allclose(arrays["advantages"], expected, rtol=1e-6)
    np.testing.assert_array_equal(arrays["refs"], np.concatenate(samples.refs))
    assert metrics["return"] == (1 + 3 + 2 + 1.75) / 4


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_on_policy_distillation_by_hand(kl_in):
    """No reward and no penalty for a missing end."""
    cfg = ppo_config("--reward=", "--advantage=reverse_kl", "--teacher=t", f"--kl_in={kl_in}")
    samples = samples_by_hand()
    arrays, metrics = ppo.advantages(cfg, SCALING, samples)
    expected = np.array([0.5, -2, 1, 0, 0, 0, -1, -2])
    if kl_in == "reward":
        expected = expected - 0.5 * np.array([0, 0.5, 0.5, 0, 0, 0, 2, 0])
    np.testing.assert_allclose(arrays["advantages"], expected, rtol=1e-6)
    assert metrics["return"] == pytest.approx(expected.sum() / 4)
    scores = ppo.teacher_scores(samples.logps, samples.teacher)
    assert scores.tolist() == [0.5, -1.0, 0.0, -3.0]


def test_the_best_sample_of_a_prompt_is_first():
    """The tie of the second prompt stays in the order of sampling. The rows are ranked rows."""
    samples = ppo.best_first(samples_by_hand())
    assert samples.texts == ["b", "", "c", "d"]
    assert samples.scores.tolist() == [3, 1, 2, 2]
    assert samples.ids[0] == [1, 256]
    assert samples.refs[0].tolist() == [-1.5, -2.5]
    assert samples.values is None
    rows = ppo.scored_rows(
        [{"prompt": "p", "group": "g"}, {"prompt": "q"}], samples, BYTES, TEMPLATE
    )
    for row in rows:
        check_row(row, "here")
    assert rows[0]["scores"] == [3, 1]
    assert rows[0]["kl"] == [1, 0]
    assert rows[0]["group"] == "g"
    assert rows[1]["ended"] == [True, False]
    encoded, _ = encode_rows(rows, BYTES, TEMPLATE, 64)
    assert [row["ranks"] for row in encoded] == [[0, 1], [0, 0]]


def test_the_report_of_groups_by_hand():
    samples = samples_by_hand()
    rows = [{"prompt": "p", "responses": ["b"]}, {"prompt": "q", "responses": ["#### 4", "x"]}]
    report = ppo.sample_report(samples, rows)
    assert report["signal"] == 0.5
    assert report["score_best"] == 2.5
    assert report["score_worst"] == 1.5
    assert report["exact_match"] == 0.25
    assert report["reward"] == 2
    assert report["reward_std"] == pytest.approx(0.5**0.5)
    assert report["reward_se"] == 0  # both prompts have the mean 2
    assert report["kl"] == 0.75
    assert report["kl_se"] == pytest.approx(0.25 / 2**0.5)
    assert report["length"] == 2
    assert "exact_match" not in ppo.sample_report(samples, [rows[0], {"prompt": "q"}])


# ------------------------------------------------------------------------------- batch and loss


def grouped_rows(K=3, names=("logps", "advantages", "refs")):
    """Encoded rows of K responses with random numbers for each token."""
    rng = np.random.default_rng(0)
    texts = []
    for i in range(4):
        responses = ["ab" * (1 + (i + k) % 3) for k in range(K)]
        texts.append({"prompt": "say" + " it" * i, "responses": responses})
    rows, _ = encode_rows(texts, BYTES, TEMPLATE, 48)
    for row in rows:
        num_tokens = sum(len(y) for y in row["responses"])
        for name in names:
            row[name] = rng.normal(size=num_tokens)
        row["logps"] = -np.abs(row["logps"]) - 5  # near those of an untrained model
        row["refs"] = -np.abs(row["refs"]) - 5
    return rows


def tiny_model():
    shape = {"vocab_size": 257, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**shape, position="rotary")).double()
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.02)
    return model


def loss_and_gradient(model, rows, cfg, layout="packed"):
    """Of rows, as the sum over the units of their batch, and the number of units."""
    batch = ppo_batch(rows, layout)
    loss, metrics = train.ppo_objective(model, batch, cfg)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss, grads, metrics, train.count_tokens_or_responses(batch, cfg)


AVERAGES = ["token", "sequence", "constant"]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("K", [2, 8])
def test_packed_equals_padded_and_parts_add_up(average, K):
    """The loss of a batch is the sum of those of its rows, whatever their lengths."""
    cfg = group_config("--advantage=grpo", f"--loss_average={average}", "--max_response=9")
    model, rows = tiny_model(), grouped_rows(K)
    loss, grads, metrics, units = loss_and_gradient(model, rows, cfg)
    padded_loss, padded_grads, padded_metrics, padded_units = loss_and_gradient(
        model, rows, cfg, "padded"
    )
    parts = [loss_and_gradient(model, [row], cfg) for row in rows]
    assert units == padded_units == sum(part[3] for part in parts)
    expected = sum(len(y) for row in rows for y in row["responses"])
    assert units == (expected if average == "token" else 4 * K)
    # the logits go through float32
    torch.testing.assert_close(loss, padded_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, sum(part[0] for part in parts), rtol=1e-6, atol=1e-6)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad, padded_grads[i], rtol=1e-4, atol=1e-5)
        total = sum(part[1][i] for part in parts)
        torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        torch.testing.assert_close(value, padded_metrics[name], rtol=1e-6, atol=1e-6)
        total = sum(part[2][name] for part in parts)
        torch.testing.assert_close(value, total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_micro_batch_never_waits_for_the_gpu(average, layout, request):
    """And has the loss and the gradients of the CPU's code."""
    options = [f"--loss_average={average}", "--max_response=9", "--kl_in=loss"]
    cfg = group_config("--advantage=grpo", *options)
    model, rows = tiny_model().float(), grouped_rows()
    for row in rows:
        row |= {name: row[name].astype(np.float32) for name in ("logps", "advantages", "refs")}
    batch = ppo_batch(rows, layout)
    expected = gradients(model, train.ppo_objective, batch, cfg)
    request.getfixturevalue("gpu_path")
    with no_host_reads():
        found = gradients(model, train.ppo_objective, batch, cfg)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ the stage


def group_args(runs, data, out, *more):
    """Two rounds of 4 samples of each of 12 prompts, 4 steps each."""
    args = ["--max_rows=12", "--batch_size=6", "--advantage=grpo", "--samples_per_prompt=4"]
    return ppo_args(runs, data, out, *args, "--gen_batch_size=4", *more)


def distillation(runs):
    return ["--reward=", "--advantage=reverse_kl", f"--teacher={runs['pretrain']}"]


@pytest.fixture(scope="module")
def group_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("group") / "run")
    train.main(group_args(tiny_runs, tiny_data, out))
    return out


@pytest.fixture(scope="module")
def distilled_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("distilled") / "run")
    train.main(group_args(tiny_runs, tiny_data, out, *distillation(tiny_runs), "--kl_in=loss"))
    return out


def test_a_run_logs_its_metrics(group_run):
    steps, collects = read_metrics(group_run, "step"), read_metrics(group_run, "collect")
    assert len(steps) == 8
    assert {"policy_loss", "entropy", "clip_fraction", "approx_kl"} <= set(steps[0])
    assert "value_loss" not in steps[0]
    names = {"reward", "signal", "score_best", "score_worst", "exact_match", "return", "kl_coef"}
    assert names <= set(collects[0])
    assert not {"value", "explained_variance"} & set(collects[0])
    evals = read_metrics(group_run, "eval")
    assert len(evals) == 3
    assert set(ppo.METRICS) <= set(evals[0])  # of one sample of each held-out prompt


def test_the_policy_starts_as_the_one_that_sampled(group_run):
    starts, steps = read_metrics(group_run, "start"), read_metrics(group_run, "step")
    assert [record["round"] for record in starts] == [0, 1]
    assert all(record["off"] < 1e-5 for record in starts)
    assert not read_metrics(group_run, "warning")
    assert abs(steps[0]["approx_kl"]) < 1e-6
    assert steps[3]["approx_kl"] > 0


def test_there_is_no_value_function(group_run):
    assert "scalar_head.weight" not in final_weights(group_run)
    arrays = np.load(f"{group_run}/round_0/rollout.npz")
    assert set(arrays) == {"logps", "advantages"}


def test_the_files_of_a_round(group_run):
    """Samples: 4 lines of a prompt after each other. Rows: the same texts, best first."""
    samples = read_rows(f"{group_run}/round_1/self_train.jsonl")
    rows = read_rows(f"{group_run}/round_1/train.jsonl")
    assert len(samples) == 48
    assert len(rows) == 12
    for i, row in enumerate(rows):
        of_prompt = samples[4 * i : 4 * i + 4]
        assert {prompt_key(sample) for sample in of_prompt} == {prompt_key(row)}
        texts = [sample["responses"][0] for sample in of_prompt]
        order = sorted(range(4), key=lambda k: -letters(row, texts[k]))  # stable
        assert row["responses"] == [texts[k] for k in order]
        assert row["ids"] == [of_prompt[k]["ids"][0] for k in order]
        assert row["scores"] == [letters(row, text) for text in row["responses"]]
        assert row["ended"] == [of_prompt[k]["ended"] for k in order]
    assert len({tuple(row["responses"]) for row in rows}) == 12


@torch.no_grad()
def test_stored_arrays_follow_the_rows(group_run, tiny_runs):
    """Log-probabilities one sequence at a time, and the advantages from the scores of the row."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    arrays = np.load(f"{group_run}/round_0/rollout.npz")
    start = 0
    for row in read_rows(f"{group_run}/round_0/train.jsonl"):
        prompt = enc.encode_ordinary(TEMPLATE.format(prompt=row["prompt"]))
        totals = np.array(row["scores"]) - 1.0 * ~np.array(row["ended"]) - 0.1 * np.array(row["kl"])
        advantages = slow_advantages(totals.tolist(), "grpo")
        for ids, advantage in zip(row["ids"], advantages):
            logps = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
            expected = [logps[len(prompt) - 1 + t, token] for t, token in enumerate(ids)]
            part = slice(start, start + len(ids))
            np.testing.assert_allclose(arrays["logps"][part], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(arrays["advantages"][part], advantage, rtol=1e-4, atol=1e-5)
            start += len(ids)
    assert start == len(arrays["logps"])


def first_gradient(monkeypatch, args):
    """The gradient of the first step of a run, and its loss."""
    found = []
    clip = train.distributed.clip_grad_norm_

    def keep(params, limit):
        found.append([param.grad.detach().clone().double() for param in params])
        return clip(params, limit)

    with monkeypatch.context() as m:
        m.setattr(train.distributed, "clip_grad_norm_", keep)
        train.main(args)
    out = next(arg.removeprefix("--out_dir=") for arg in args if arg.startswith("--out_dir="))
    return found[0], read_metrics(out, "step")[0]


def slow_policy_gradient(runs, out, advantages_of, average, max_response, kl_to=None):
    """REINFORCE of a round's train.jsonl, one response at a time: - mean A log pi and its gradient.

    advantages_of(row) -> K numbers or arrays. kl_to: adds 0.3 x k3 to that model.
    """
    model, enc, _ = GPT.from_checkpoint(runs["sft"])
    model = model.double()
    rows = read_rows(f"{out}/round_0/train.jsonl")
    num_responses = sum(len(row["ids"]) for row in rows)
    num_tokens = 0
    for row in rows:
        num_tokens += sum(map(len, row["ids"]))
    total, value = 0.0, 0.0
    for row in rows:
        prompt = enc.encode_ordinary(TEMPLATE.format(prompt=row["prompt"]))
        for ids, advantage in zip(row["ids"], advantages_of(row)):
            idx, T = torch.tensor([prompt + ids]), len(ids)
            targets = torch.tensor(ids)[:, None]
            logps = model(idx)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            logps = logps.gather(1, targets)[:, 0]
            advantage = torch.as_tensor(advantage, dtype=torch.float64).expand(T)
            weight = {
                "token": 1 / num_tokens,
                "sequence": 1 / num_responses / T,
                "constant": 1 / num_responses / max_response,
            }[average]
            total = total - weight * (advantage * logps).sum()
            value -= weight * advantage.sum().item()
            if kl_to is not None:
                with torch.no_grad():
                    refs = kl_to(idx)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                k3 = kl_k3(logps, refs.gather(1, targets)[:, 0])
                total = total + weight * 0.3 * k3.sum()
                value += weight * 0.3 * k3.sum().item()
    return value, torch.autograd.grad(total, list(model.parameters()))


def assert_same_gradient(fast, slow):
    scale = max(grad.abs().max() for grad in slow)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale.item())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("estimator, K", [("grpo", 3), ("dr_grpo", 8), ("rloo", 2)])
def test_the_first_step_is_reinforce_with_the_baseline(
    tiny_runs, tiny_data, tmp_path, monkeypatch, average, estimator, K
):
    """Through the whole trainer in many micro-batches: one step on all samples."""
    out = f"{tmp_path}/r"
    options = [f"--advantage={estimator}", f"--samples_per_prompt={K}", "--max_steps=1"]
    options += ["--rounds=1", f"--loss_average={average}", "--batch_size=12", "--grad_clip=0"]
    options += ["--micro_batch_tokens=200", "--eval_interval=100", "--kl_coef=0"]
    fast, step = first_gradient(monkeypatch, group_args(tiny_runs, tiny_data, out, *options))

    def advantages_of(row):
        totals = np.array(row["scores"]) - 1.0 * ~np.array(row["ended"])
        return slow_advantages(totals.tolist(), estimator)

    value, slow = slow_policy_gradient(tiny_runs, out, advantages_of, average, 16)
    assert step["loss"] == pytest.approx(value, abs=2e-6)
    assert_same_gradient(fast, slow)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_first_step_of_distillation(tiny_runs, tiny_data, tmp_path, monkeypatch, average):
    """REINFORCE with the teacher's log-ratio at each token, and k3 in the loss. `init` has the same
    weights as the policy then, so the k3 and its gradient are 0."""
    out = f"{tmp_path}/r"
    options = [*distillation(tiny_runs), "--max_steps=1", "--rounds=1", "--batch_size=12"]
    options += ["--grad_clip=0", "--kl_in=loss", "--kl_coef=0.3", f"--loss_average={average}"]
    fast, step = first_gradient(monkeypatch, group_args(tiny_runs, tiny_data, out, *options))
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    student, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    teacher, _, _ = GPT.from_checkpoint(tiny_runs["pretrain"])

    @torch.no_grad()
    def advantages_of(row):
        prompt = enc.encode_ordinary(TEMPLATE.format(prompt=row["prompt"]))
        result = []
        for ids in row["ids"]:
            idx, targets = torch.tensor([prompt + ids]), torch.tensor(ids)[:, None]
            logps = []
            for model in (teacher, student):
                its = model(idx)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                logps.append(its.gather(1, targets)[:, 0])
            result.append(logps[0] - logps[1])
        return result

    value, slow = slow_policy_gradient(tiny_runs, out, advantages_of, average, 16, student.double())
    assert step["loss"] == pytest.approx(value, abs=2e-6)
    assert_same_gradient(fast, slow)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_size_of_micro_batches_does_not_change_a_round(
    tiny_runs, tiny_data, tmp_path, monkeypatch, average
):
    """Four steps with k3 in the loss, in one and in many micro-batches, packed and padded."""
    sizes = {
        "large": ["--micro_batch_tokens=100000"],
        "small": ["--micro_batch_tokens=150"],
        "padded": ["--layout=padded", "--micro_batch_tokens=1000"],
    }
    grads, steps = {}, {}
    for name, more in sizes.items():
        out = f"{tmp_path}/{name}"
        options = ["--rounds=1", "--kl_in=loss", f"--loss_average={average}", "--optimizer=rmsprop"]
        options += ["--entropy_coef=0.01", "--clip_range_high=0.3", "--eval_interval=100", *more]
        args = group_args(tiny_runs, tiny_data, out, *options)
        grads[name], _ = first_gradient(monkeypatch, args)
        steps[name] = read_metrics(out, "step")
    for name in ("small", "padded"):
        scale = max(grad.abs().max() for grad in grads["large"]).item()
        for a, b in zip(grads["large"], grads[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * scale)
        for a, b in zip(steps["large"], steps[name], strict=True):
            rel = 1e-4 if a["step"] else 1e-6  # rmsprop divides roundings by small gradients
            for key in ("loss", "norm", "policy_loss", "entropy", "clip_fraction", "kl"):
                assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-6), (a["step"], key)


def test_the_pretraining_loss_beside_groups(tiny_runs, tiny_data, tmp_path):
    """Responses and tokens of a stream are averaged each by themselves."""
    losses = {}
    for coef in (0.0, 0.5):
        out = f"{tmp_path}/{coef}"
        options = ["--rounds=1", "--max_steps=1", "--loss_average=sequence", "--eval_batches=1"]
        options += [f"--pretrain_coef={coef}", "--pretrain_batch_size=2"]
        train.main(group_args(tiny_runs, tiny_data, out, *options))
        losses[coef] = read_metrics(out, "step")[0]
        assert read_metrics(out, "start")[0]["off"] < 1e-5
    expected = losses[0.0]["loss"] + 0.5 * losses[0.5]["pretrain_loss"]
    assert losses[0.5]["loss"] == pytest.approx(expected, abs=1e-6)
    assert losses[0.5]["pretrain_loss"] > 1
    assert losses[0.5]["policy_loss"] == pytest.approx(losses[0.0]["policy_loss"], abs=1e-6)


def test_samples_that_are_all_equal_change_nothing(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Responses of one token repeat each other, and a constant reward gives no signal."""
    monkeypatch.setattr("conftest.constant", lambda row, text: 0.1, raising=False)
    out = f"{tmp_path}/r"
    options = ["--samples_per_prompt=8", "--max_response=1", "--reward=conftest:constant"]
    options += ["--missing_eos_penalty=0", "--kl_coef=0", "--rounds=1", "--loss_average=constant"]
    train.main(group_args(tiny_runs, tiny_data, out, *options))
    collect = read_metrics(out, "collect")[0]
    assert collect["signal"] == 0
    assert collect["score_best"] == collect["score_worst"] == pytest.approx(0.1)
    assert (np.load(f"{out}/round_0/rollout.npz")["advantages"] == 0).all()
    rows = read_rows(f"{out}/round_0/train.jsonl")
    assert any(len(set(row["responses"])) < 8 for row in rows)
    assert all(None not in row["responses"] for row in rows)
    assert all(record["norm"] == 0 for record in read_metrics(out, "step"))
    model = GPT.from_checkpoint(tiny_runs["sft"])[0]
    for name, weight in final_weights(out).items():
        assert torch.equal(weight, model.state_dict()[name])


def test_the_reward_of_groups_rises(tiny_runs, tiny_data, tmp_path):
    options = ["--max_rows=24", "--rounds=4", "--lr=3e-3", "--kl_coef=0", "--eval_interval=100"]
    options += ["--advantage=rloo", "--missing_eos_penalty=0"]
    train.main(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    first, *_, last = read_metrics(f"{tmp_path}/r", "collect")
    assert last["reward"] > first["reward"] + 3 * first["reward_se"]


def test_the_penalty_in_the_loss_holds_the_policy_back(tiny_runs, tiny_data, tmp_path):
    kl = {}
    for advantage in ("dr_grpo", "gae"):
        for kl_coef in (0.0, 3.0):
            out = f"{tmp_path}/{advantage}-{kl_coef}"
            options = ["--lr=3e-3", f"--kl_coef={kl_coef}", "--kl_in=loss", "--eval_interval=100"]
            options += [f"--advantage={advantage}", "--whiten_advantages=False"]
            train.main(group_args(tiny_runs, tiny_data, out, *options))
            assert all(record["off"] < 1e-5 for record in read_metrics(out, "start"))
            assert "refs" in np.load(f"{out}/round_1/rollout.npz")
            kl[kl_coef] = read_metrics(out, "collect")[1]["kl_token"]
        steps = read_metrics(out, "step")
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert steps[-1]["kl"] > 0
        assert 0 < kl[3.0] < kl[0.0]


def test_kl_coef_of_groups_follows_the_kl_of_the_last_round(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    options = ["--rounds=3", "--kl_target=1e-6", "--kl_adapt=0.5", "--eval_interval=100"]
    train.main(group_args(tiny_runs, tiny_data, out, *options))
    coefs = [record["kl_coef"] for record in read_metrics(out, "collect")]
    assert coefs == pytest.approx([0.1, 0.1 * 0.9, 0.1 * 0.9 * 1.1])


def test_values_with_several_samples_of_a_prompt(tiny_runs, tiny_data, tmp_path):
    """gae with K = 4: each response is a trajectory; packed equals padded."""
    outs = [f"{tmp_path}/packed", f"{tmp_path}/padded"]
    for out in outs:
        layout = f"--layout={os.path.basename(out)}"
        train.main(group_args(tiny_runs, tiny_data, out, "--advantage=gae", "--rounds=1", layout))
    assert read_metrics(outs[0], "start")[0]["off"] < 1e-5
    assert "scalar_head.weight" in final_weights(outs[0])
    arrays = np.load(f"{outs[0]}/round_0/rollout.npz")
    assert set(arrays) == {"logps", "values", "advantages", "returns"}
    assert len(read_rows(f"{outs[0]}/round_0/train.jsonl")[0]["responses"]) == 4
    for a, b in zip(read_metrics(outs[0], "step"), read_metrics(outs[1], "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)


# ----------------------------------------------------------------------- on-policy distillation


def test_distillation_approaches_its_teacher(tiny_runs, tiny_data, tmp_path):
    """`reward` is minus the KL to the teacher, here the pretrained model, on samples."""
    options = [*distillation(tiny_runs), "--max_rows=24", "--rounds=5", "--lr=3e-3"]
    options += ["--kl_coef=0", "--eval_interval=5"]
    train.main(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    evals = read_metrics(f"{tmp_path}/r", "eval")
    assert evals[0]["reward"] < 0
    assert evals[-1]["reward"] > evals[0]["reward"] / 2
    assert evals[-1]["kl"] > 0


def test_a_teacher_that_is_the_policy_teaches_nothing(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    options = [*distillation(tiny_runs), f"--teacher={tiny_runs['sft']}", "--rounds=1"]
    options.append("--samples_per_prompt=1")
    train.main(group_args(tiny_runs, tiny_data, out, *options))
    assert abs(np.load(f"{out}/round_0/rollout.npz")["advantages"]).max() < 1e-6
    manifest = read_json(f"{out}/round_0/collect.json")
    assert manifest["teacher_sha256"] == checkpoint.weights_sha256(tiny_runs["sft"])
    assert "reward" not in manifest


def test_the_files_of_distillation(distilled_run, tiny_runs):
    rows = read_rows(f"{distilled_run}/round_1/train.jsonl")
    arrays = np.load(f"{distilled_run}/round_1/rollout.npz")
    assert set(arrays) == {"logps", "advantages", "refs"}
    lengths = []
    for row in rows:
        lengths += map(len, row["ids"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
    ends = np.cumsum(lengths)[:-1]
    sums = [part.sum() for part in np.split(arrays["advantages"], ends)]
    scores = np.concatenate([row["scores"] for row in rows])
    np.testing.assert_allclose(sums, scores, rtol=1e-4, atol=1e-4)
    kl = np.split(arrays["logps"] - arrays["refs"], ends)
    expected = np.concatenate([row["kl"] for row in rows])
    np.testing.assert_allclose([part.sum() for part in kl], expected, rtol=1e-4, atol=1e-5)
    assert all(record["off"] < 1e-5 for record in read_metrics(distilled_run, "start"))
    assert not glob.glob(f"{distilled_run}/**/*.part*", recursive=True)


# -------------------------------------------------------------------------- prompts without answers


def test_rows_may_be_prompts_only(tiny_runs, tiny_data, tmp_path):
    """The same run as on rows with answers, but for exact match."""
    data = f"{tmp_path}/data"
    shutil.copytree(tiny_data, data)
    for split in ("train", "val"):
        rows = read_rows(f"{data}/{split}.jsonl")
        write_rows(f"{data}/{split}.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_meta(data, "bytes", "made up")
    outs = {}
    for folder in (tiny_data, data):
        outs[folder] = out = f"{tmp_path}/run{len(outs)}"
        train.main(group_args(tiny_runs, folder, out, "--rounds=1"))
    assert_same_run(*outs.values())
    assert "exact_match" in read_metrics(outs[tiny_data], "eval")[0]
    for kind in ("collect", "eval"):
        assert "exact_match" not in read_metrics(outs[data], kind)[0]
    args = group_args(tiny_runs, data, f"{tmp_path}/best", "--keep_best=exact_match")
    assert "keep_best 'exact_match' is not a metric" in refused(args)


# ------------------------------------------------------------------------------------- resuming


# module, function, the call at which it is killed, and what is left in the round's folder
PHASES = [
    pytest.param(players, "respond", 3, "self_train.jsonl.part*", id="sampling"),
    pytest.param(ppo, "token_scores", 1, "self_train.jsonl.policy.part*", id="policy"),
    pytest.param(ppo, "token_scores", 4, "self_train.jsonl.reference.part*", id="reference"),
    pytest.param(scorer, "score_responses", 1, "self_train.jsonl.reward.part*", id="reward"),
    pytest.param(ppo, "write_rows", 0, "self_train.jsonl", id="rows"),
    pytest.param(ppo, "write_json", 0, "rollout.npz", id="manifest"),
    pytest.param(train, "lr_factor", 3, "step_*2", id="training"),
    pytest.param(train, "lr_factor", 5, "step_*4", id="training in round 1"),
]


def assert_same_rounds(whole, killed):
    assert_same_run(whole, killed)
    for path in sorted(glob.glob(f"{whole}/round_*/*.jsonl")):
        other = path.replace(whole, killed)
        with open(path, "rb") as a, open(other, "rb") as b:
            assert a.read() == b.read(), path
    for r in (0, 1):
        expected = np.load(f"{whole}/round_{r}/rollout.npz")
        arrays = np.load(f"{killed}/round_{r}/rollout.npz")
        assert set(arrays) == set(expected)
        for name in expected:
            assert np.array_equal(arrays[name], expected[name]), name
    assert records_without_time(whole, "collect") == records_without_time(killed, "collect")
    assert not glob.glob(f"{killed}/**/*.part*", recursive=True)


def kill_and_resume(monkeypatch, args, out, module, function, at, left):
    with monkeypatch.context() as m:
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(args)
    assert glob.glob(f"{out}/round_0/{left}")
    train.main(args)


@pytest.mark.parametrize("module, function, at, left", PHASES)
def test_groups_resume_bit_for_bit(
    tiny_runs, tiny_data, group_run, tmp_path, monkeypatch, module, function, at, left
):
    """Killed in the middle of a round, with parts of 5 samples or rows."""
    monkeypatch.setattr(rounds, "PART_SIZE", 5)
    killed = f"{tmp_path}/killed"
    args = group_args(tiny_runs, tiny_data, killed)
    kill_and_resume(monkeypatch, args, killed, module, function, at, left)
    assert_same_rounds(group_run, killed)


@pytest.mark.parametrize("at, scorer", [(1, "policy"), (4, "reference"), (7, "teacher")])
def test_distillation_resumes_bit_for_bit(
    tiny_runs, tiny_data, distilled_run, tmp_path, monkeypatch, at, scorer
):
    monkeypatch.setattr(rounds, "PART_SIZE", 5)
    killed, left = f"{tmp_path}/killed", f"self_train.jsonl.{scorer}.part*"
    args = group_args(tiny_runs, tiny_data, killed, *distillation(tiny_runs), "--kl_in=loss")
    kill_and_resume(monkeypatch, args, killed, ppo, "token_scores", at, left)
    assert_same_rounds(distilled_run, killed)


DYING = """
import importlib, os, sys
import train
from nanospin import elastic, rounds

rounds.PART_SIZE = 5
module, function, at = os.environ["DIE"].split(":")
if module:
    module = importlib.import_module(module)
    original, calls = getattr(module, function), []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) > int(at):
            os._exit(9)
        return original(*args, **options)

    setattr(module, function, dying)
sys.exit(elastic.run(train.main, sys.argv[1:]))
"""


def run_two_ranks(tmp_path, args, die="::"):
    program = f"{tmp_path}/dying.py"
    with open(program, "w", encoding="utf-8") as f:
        f.write(DYING)
    env = ENV | {"DIE": die, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = torchrun_command(args, program=(program,))
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["grpo", "reverse_kl"])
def test_two_ranks_equal_one_and_resume_bit_for_bit(tiny_runs, tiny_data, tmp_path, advantage):
    """One run dies again and again: in the middle of each phase, from its parts on."""
    more = ["--loss_average=sequence", "--kl_in=loss"]
    scored = ("scorer:score_responses:1", "reward")
    if advantage == "reverse_kl":
        more += distillation(tiny_runs)
        scored = ("ppo:token_scores:3", "teacher")
    deaths = [  # and whose parts are left then
        ("players:respond:2", ""),
        ("ppo:token_scores:1", "policy"),
        ("ppo:token_scores:3", "reference"),
        scored,
        ("ppo:write_json:0", None),
        ("train:lr_factor:3", None),
        ("train:lr_factor:2", None),
    ]
    one, two, dying = f"{tmp_path}/one", f"{tmp_path}/two", f"{tmp_path}/dying"
    train.main(group_args(tiny_runs, tiny_data, one, *more))
    done = run_two_ranks(tmp_path, group_args(tiny_runs, tiny_data, two, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    samples = read_rows(f"{one}/round_0/self_train.jsonl")
    assert read_rows(f"{two}/round_0/self_train.jsonl") == samples
    for a, b in zip(read_metrics(one, "step")[:4], read_metrics(two, "step")[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
    args = group_args(tiny_runs, tiny_data, dying, *more)
    for death, left in deaths:
        assert run_two_ranks(tmp_path, args, death).returncode != 0, death
        if left is not None:
            name = f"self_train.jsonl.{left}" if left else "self_train.jsonl"
            assert glob.glob(f"{dying}/round_0/{name}.part*"), death
    done = run_two_ranks(tmp_path, args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_rounds(two, dying)


# -------------------------------------------------------------------------------------- refusals


def pretrained(data, out, *more):
    """A model after one step."""
    args = ["--stage=pretrain", f"--data={data}", f"--out_dir={out}", "--max_steps=1"]
    train.main([*args, "--batch_size=2", *TINY, *more])
    return out


def test_a_teacher_with_another_tokenizer_is_refused(tiny_runs, tiny_data, tmp_path):
    """Before anything is sampled."""
    data = f"{tmp_path}/data"
    shutil.copytree(tiny_data, data)
    merges = {bytes([i]): i for i in range(256)} | {b"th": 256}
    enc = tokenizer.make_encoding("bpe", merges)
    tokenizer.save(enc, f"{data}/tokenizer.tiktoken")
    for split in ("train", "val"):
        write_stream(f"{data}/{split}.bin", ["the loss of the model"] * 40, enc)
    write_meta(data, "tokenizer.tiktoken", "made up")
    teacher, out = pretrained(data, f"{tmp_path}/teacher"), f"{tmp_path}/r"
    options = [*distillation(tiny_runs), f"--teacher={teacher}"]
    message = refused(group_args(tiny_runs, tiny_data, out, *options))
    assert f"teacher {teacher}" in message
    assert "another tokenizer than the policy" in message
    assert not glob.glob(f"{out}/round_0/*")


def test_a_teacher_with_a_shorter_context_is_refused(tiny_runs, tiny_data, tmp_path):
    teacher = pretrained(tiny_data, f"{tmp_path}/teacher", "--block_size=48")
    options = [*distillation(tiny_runs), f"--teacher={teacher}", "--rounds=1", "--max_steps=1"]
    message = refused(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert "has block_size 48, too short for 64 tokens" in message
    train.main(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options, "--max_prompt=32"))


def test_a_teacher_of_another_template_is_refused(tiny_runs, tiny_data, tmp_path):
    """It would score the tokens after a prompt in a format that it does not know."""
    options = [*distillation(tiny_runs), f"--teacher={tiny_runs['sft']}", "--template=A:{prompt}"]
    message = refused(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert "the policy 'A:{prompt}'; advantage reverse_kl scores the same tokens" in message


def test_a_reward_model_is_no_teacher(tiny_runs, tiny_data, tmp_path):
    reward = f"{tmp_path}/reward"
    train.main(reward_args(tiny_runs, tiny_data, reward, 1))
    options = [*distillation(tiny_runs), f"--teacher={reward}"]
    message = refused(group_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert f"teacher {reward}" in message
    assert "is a reward model, not a policy" in message


def test_the_estimator_of_a_run_stays(tiny_runs, tiny_data, group_run, tmp_path):
    copy = f"{tmp_path}/copy"
    shutil.copytree(group_run, copy)
    for setting, message in (
        ("--advantage=rloo", "was begun with advantage = 'grpo'"),
        ("--samples_per_prompt=2", "was begun with samples_per_prompt = 4"),
        ("--kl_in=loss", "was begun with kl_in = 'reward'"),
    ):
        assert message in refused(group_args(tiny_runs, tiny_data, copy, setting))
    with open(f"{copy}/round_1/rollout.npz", "r+b") as f:
        f.truncate(100)
    assert "rollout.npz is damaged" in refused(group_args(tiny_runs, tiny_data, copy))
