"""The reward model: its loss against explicit pairs, its scores against one sequence at a time,
and the stage."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TEMPLATE,
    Killed,
    assert_same_run,
    command,
    final_weights,
    killing,
    read_metrics,
    refused,
)

import train
from data import tokenizer
from data.batch import reward_batch
from data.folder import write_meta
from data.rows import encode_rows, write_rows
from eval import reward_metrics, row_scores
from loss import plackett_luce, reward_loss
from model import GPT, GPTConfig
from nanospin import checkpoint

BYTES = tokenizer.load("bytes")


# ------------------------------------------------------------------------------------- the loss


def random_rankings(B=20, K=5, seed=0):
    """scores, response_mask and ranks (B, K): some responses absent, some ranks equal."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, K, generator=g) > 0.3
    mask[:, 0] = True
    scores = torch.randn(B, K, generator=g, dtype=torch.float64)
    ranks = torch.randint(0, K, (B, K), generator=g).sort(1).values
    return scores, mask, ranks


def ordered_pairs(mask, ranks):
    """(i, j) of a row: both are there and j is worse."""
    pairs = []
    for i in range(len(mask)):
        for j in range(len(mask)):
            if mask[i] and mask[j] and ranks[i] < ranks[j]:
                pairs.append((i, j))
    return pairs


def test_pairs_equal_the_mean_over_explicit_pairs():
    scores, mask, ranks = random_rankings()
    data_scores = torch.randn(scores.shape, dtype=torch.float64).sort(1, descending=True).values
    scores.requires_grad_()
    loss, metrics = reward_loss(
        scores, mask, ranks=ranks, data_scores=data_scores, score_margin=0.3, center_coef=0.05
    )
    slow, acc = 0.0, 0.0
    for s, row_mask, row_ranks, d in zip(scores, mask, ranks, data_scores):
        pairs = ordered_pairs(row_mask, row_ranks)
        for i, j in pairs:
            margin = 0.3 * (d[i] - d[j])
            term = -F.logsigmoid(s[i] - s[j] - margin) + 0.05 * (s[i] + s[j]) ** 2
            slow += term / len(pairs) / len(scores)
            acc += float(s[i] > s[j]) / len(pairs) / len(scores)
    # float64: some tens of roundings of numbers near 1
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    assert metrics["acc"].item() == pytest.approx(acc, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, scores)
    (slow_grad,) = torch.autograd.grad(slow, scores)
    torch.testing.assert_close(grad, slow_grad, rtol=1e-12, atol=1e-12)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("loss_type", ["pairs", "pl"])
def test_two_responses_are_bradley_terry(loss_type):
    scores = 3 * torch.randn(30, 2, dtype=torch.float64)
    diff = scores[:, 0] - scores[:, 1]
    loss, _ = reward_loss(scores, loss_type=loss_type)
    torch.testing.assert_close(loss, -F.logsigmoid(diff).mean(), rtol=1e-13, atol=1e-13)

    data_scores = torch.tensor([[3.0, 1.0]], dtype=torch.float64).expand(30, 2)
    loss, _ = reward_loss(scores, loss_type=loss_type, data_scores=data_scores, score_margin=0.5)
    expected = -F.logsigmoid(diff - 0.5 * 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="score_margin needs data_scores"):
        reward_loss(scores, loss_type=loss_type, score_margin=0.5)


def test_pl_is_plackett_luce():
    scores, mask, ranks = random_rankings()
    loss, _ = reward_loss(scores, mask, "pl", ranks=ranks)
    torch.testing.assert_close(loss, plackett_luce(scores, mask, ranks=ranks).mean())


@pytest.mark.parametrize("loss_type", ["pairs", "pl"])
def test_a_ranking_leaves_a_constant_free_and_center_coef_fixes_it(loss_type):
    scores, mask, ranks = random_rankings()

    def loss(scores, center_coef=0.0):
        return reward_loss(scores, mask, loss_type, ranks=ranks, center_coef=center_coef)[0]

    torch.testing.assert_close(loss(scores), loss(scores + 7), rtol=1e-12, atol=1e-12)
    assert loss(scores + 7, center_coef=0.1) > loss(scores, center_coef=0.1) + 1


def test_equal_scores_cost_ln_2_or_ln_k_factorial():
    zero = torch.zeros(4, 3)
    assert reward_loss(zero)[0].item() == pytest.approx(math.log(2))
    assert reward_loss(zero, loss_type="pl")[0].item() == pytest.approx(math.log(6))


def test_another_loss_type_is_refused():
    with pytest.raises(ValueError, match="pairs or pl"):
        reward_loss(torch.zeros(4, 3), loss_type="ipo")


# ----------------------------------------------------------------------------------- the scores


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_score_is_read_at_the_last_token(layout):
    """Against one sequence at a time: prompt and response, with its end-of-text if it has one."""
    shape = {"vocab_size": 257, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**shape, position="rotary", scalar_head=True)).double()
    texts = []
    for i in range(5):
        responses = ["falls" * (i % 4), None if i % 2 else "reads", "a" * 99]
        texts.append({"prompt": f"the model {i}", "responses": responses})
    rows, _ = encode_rows(texts, BYTES, TEMPLATE, 64)
    assert rows[0]["responses"][0] == [256]
    assert len(rows[0]["prompt"]) + len(rows[0]["responses"][2]) == 64

    batch = reward_batch(rows, layout)
    values = model.values(batch.idx, batch.value_positions, **batch.layout())
    scores = (
        torch.zeros(15, dtype=torch.float64)
        .index_put((batch.value_response_index,), values)
        .view(5, 3)
    )
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            if response is None:
                assert scores[b, k] == 0
                continue
            hidden = model.hidden(torch.tensor([row["prompt"] + response]))
            slow = hidden[0, -1] @ model.scalar_head.weight[0]
            assert abs(scores[b, k] - slow) < 1e-12  # float64: another order of sums
            assert batch.lengths[b, k] == len(response)
    # few tokens at a time; kept in float32
    fast = row_scores(model, rows, 20, torch.device("cpu"), layout=layout)
    np.testing.assert_allclose(fast, scores, rtol=1e-5, atol=1e-6)


def test_reward_metrics_by_hand():
    """The first row has two pairs, one of them right. The second has a tie and a wrong pair one
    rank apart, and a wrong pair two ranks apart."""
    rows = [
        {"prompt": [9], "responses": [[1], [1, 2], [3]], "ranks": [0, 1, 1]},
        {"prompt": [9], "responses": [[1], None, [3], [4]], "ranks": [0, 1, 2, 3]},
    ]
    scores = np.array([[2.0, 1.0, 3.0, 0.0], [1.0, 0.0, 1.0, 2.0]], dtype=np.float32)
    m = reward_metrics(scores, rows)
    assert m["acc"] == 1.5 / 5
    assert m["acc@1"] == 1.5 / 4 and m["pairs@1"] == 4
    assert m["acc@2"] == 0.0 and m["pairs@2"] == 1
    assert m["acc_se"] == pytest.approx(math.hypot(1 - 0.6, 0.5 - 0.9) / 5)
    first = np.log1p(np.exp([-1.0, 1.0])).mean()
    second = np.log1p(np.exp([0.0, 1.0, 1.0])).mean()
    assert m["pair_nll"] == pytest.approx((first + second) / 2)
    assert m["score"] == pytest.approx(10 / 6)
    assert m["length_acc"] == 2.0 / 5  # of the five pairs one has a longer second, four tie


# ------------------------------------------------------------------------------------ the stage


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Rows of K = 4 whose better responses have more of the letter a: some tied, with scores."""
    folder, rng = str(tmp_path_factory.mktemp("graded")), np.random.default_rng(0)
    for split, n in (("train", 96), ("val", 24)):
        rows = []
        for i in range(n):
            texts = []
            for _ in range(4):
                texts.append("".join(rng.choice(list("aaabcde"), size=rng.integers(4, 9))))
            texts.sort(key=lambda text: -text.count("a"))
            scores = [text.count("a") for text in texts]
            rows.append({"prompt": f"{split} {i}", "responses": texts, "scores": scores})
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, None, "made up")
    return folder


def reward_args(runs, data, out, *more):
    return [
        "--stage=reward",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        f"--template={TEMPLATE}",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=24",
        "--batch_size=16",
        "--loss_type=pairs",
        "--lr=3e-3",
        "--max_steps=30",
        "--eval_interval=10",
        "--save_interval=5",
        *more,
    ]


@pytest.fixture(scope="module")
def reward_run(tiny_runs, graded, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reward") / "run")
    train.main(reward_args(tiny_runs, graded, out))
    return out


def test_it_starts_at_ln_2_and_learns(reward_run):
    (start,) = read_metrics(reward_run, "start")
    assert abs(start["expected"] - math.log(2)) < 0.05  # a row of ties costs 0
    assert start["off"] < 1e-6
    evals = read_metrics(reward_run, "eval")
    first, last = evals[0], evals[-1]
    assert first["pair_nll"] == pytest.approx(math.log(2))
    assert first["acc"] == 0.5
    assert last["acc"] - 3 * last["acc_se"] > 0.6
    assert last["pair_nll"] < 0.6
    assert last["acc@2"] > last["acc@1"]
    assert last["pairs@1"] > 0


def test_it_resumes_bit_for_bit(tiny_runs, graded, reward_run, tmp_path, monkeypatch):
    killed = f"{tmp_path}/killed"
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 12))
        with pytest.raises(Killed):
            train.main(reward_args(tiny_runs, graded, killed))
    train.main(reward_args(tiny_runs, graded, killed))
    assert_same_run(reward_run, killed)


def test_layouts_train_alike(tiny_runs, graded, tmp_path):
    """AdamW turns the rounding of a gradient near 0 into a step."""
    losses = []
    for options in (["--layout=padded"], ["--micro_batch_tokens=200"]):
        out = f"{tmp_path}/{len(losses)}"
        train.main(reward_args(tiny_runs, graded, out, "--max_steps=3", *options))
        losses.append([record["loss"] for record in read_metrics(out, "step")])
    padded, packed = losses
    assert packed == pytest.approx(padded, rel=0, abs=1e-4)


@pytest.mark.parametrize(
    "options, least",
    [
        (["--loss_type=pl", "--center_coef=0.01"], 2.0),  # about ln 4!, less for the ties
        (["--score_margin=0.5"], 0.75),  # -log sigmoid(0 - margin) is above ln 2
    ],
)
def test_options_of_the_loss(tiny_runs, graded, tmp_path, options, least):
    out = f"{tmp_path}/r"
    train.main(reward_args(tiny_runs, graded, out, "--max_steps=2", *options))
    assert not read_metrics(out, "warning")
    assert read_metrics(out, "step")[0]["nll"] > least


def test_options_that_do_not_fit_are_refused(tiny_runs, graded, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    message = refused(reward_args(tiny_runs, tiny_data, out, "--score_margin=0.5"))
    assert "score_margin needs scores" in message
    message = refused(reward_args(tiny_runs, graded, out, "--loss_type=ipo"))
    assert "loss_type pairs or pl, not 'ipo'" in message
    assert "only stage reward has center_coef" in refused(["--stage=sft", "--center_coef=0.1"])


def test_a_later_stage_has_no_scalar_head(reward_run, tiny_data, tmp_path):
    assert "scalar_head.weight" in final_weights(reward_run)
    out = f"{tmp_path}/sft"
    train.main(
        [
            "--stage=sft",
            f"--out_dir={out}",
            f"--data={tiny_data}",
            f"--init={reward_run}",
            "--max_steps=1",
            "--batch_size=8",
            "--max_response=16",
            "--device=cpu",
            "--eval_rows=4",
        ]
    )
    assert "scalar_head.weight" not in final_weights(out)
    reward_model, _, _ = GPT.from_checkpoint(reward_run)
    policy, _, _ = GPT.from_checkpoint(out)
    assert reward_model.config.scalar_head
    assert not policy.config.scalar_head


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_the_head_of_init_is_not_kept(tiny_runs, reward_run, graded, tmp_path, monkeypatch, stage):
    """A new run's head starts at zero, whatever `init` was. A run that resumes keeps its own."""
    ppo = f"{tmp_path}/ppo"
    options = ["--stage=ppo", "--reward=conftest:letters", "--max_rows=16", "--loss_type=pl"]
    train.main(reward_args(tiny_runs, graded, ppo, *options, "--max_steps=3"))
    assert final_weights(ppo)["scalar_head.weight"].abs().max() > 0
    heads = []
    fit = train.fit

    def look(run, *rest):
        heads.append(run.model.scalar_head.weight.detach().clone())
        fit(run, *rest)

    monkeypatch.setattr(train, "fit", look)
    init = [f"--init={ppo}", "--max_steps=4"]
    init += options if stage == "ppo" else []
    out = f"{tmp_path}/again"
    args = reward_args(tiny_runs, graded, out, *init, "--save_interval=2")
    train.main(args)
    expected = final_weights(out)
    shutil.rmtree(checkpoint.latest(out))
    train.main(args)
    assert heads[0].abs().max() == 0 < heads[1].abs().max()
    for name, tensor in final_weights(out).items():
        assert torch.equal(tensor, expected[name])
    if stage == "reward":
        train.main(reward_args({"sft": reward_run}, graded, f"{tmp_path}/c", "--max_steps=1"))
        assert heads[-1].abs().max() == 0
        assert not read_metrics(f"{tmp_path}/c", "warning")


# ----------------------------------------------------------------------------------- as a judge


def evaluate(*args):
    return command("eval", *args, "--rows=24", "--device=cpu")


def read_table(folder):
    with open(f"{folder}/eval.json", encoding="utf-8") as f:
        return json.load(f)


def test_eval_reports_its_accuracy(reward_run, graded, tmp_path):
    done = evaluate(f"rm={reward_run}", f"--data={graded}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    expected = read_metrics(reward_run, "eval")[-1]["acc"]
    assert read_table(tmp_path)["rm"]["acc"] == pytest.approx(expected)


def test_eval_takes_it_as_a_judge(reward_run, tiny_runs, graded, tmp_path):
    """Graded data beats the samples of a policy that knows nothing of the grades."""
    args = [f"sft={tiny_runs['sft']}", f"--judge={reward_run}", f"--data={graded}"]
    done = evaluate(*args, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert read_table(tmp_path)["data"]["win_rate"] > 0.6


def test_eval_does_not_sample_from_it(reward_run, graded):
    done = evaluate(f"rm={reward_run}", f"--judge={reward_run}", f"--data={graded}")
    assert done.returncode == 1
    assert "a reward model has no samples to judge" in done.stderr
