"""The reward model: its loss against pairs made one by one, its scores against one sequence at a time, the stage itself."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanospin import checkpoint
import eval
import train
from conftest import final_weights, read_metrics
from data.rows import encode_rows, write_rows
from data.batch import reward_batch
from data import tokenizer
from data.folder import write_meta
from eval import reward_metrics, reward_scores, forward_batch
from loss import plackett_luce, reward_loss
from model import GPT, GPTConfig
from test_train import Killed, assert_same_run, killing, refused

BYTES, CPU = tokenizer.load("bytes"), torch.device("cpu")


def ragged(B=20, K=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(B, K, generator=g) > 0.3
    present[:, 0] = True
    return (
        torch.randn(B, K, generator=g, dtype=torch.float64),
        present,
        torch.randint(0, K, (B, K), generator=g).sort(1).values,
    )


def test_all_pairs_of_a_prompt_equal_the_mean_over_explicit_pairs():
    scores, present, ranks = ragged()
    gaps = torch.randn(scores.shape, dtype=torch.float64).sort(1, descending=True).values
    scores.requires_grad_()
    loss, metrics = reward_loss(
        scores, present, ranks=ranks, gaps=gaps, score_margin=0.3, center_coef=0.05
    )
    rows, right = [], []
    for s, there, r, gap in zip(scores, present, ranks, gaps):
        terms = [
            (
                -F.logsigmoid(s[i] - s[j] - 0.3 * (gap[i] - gap[j])) + 0.05 * (s[i] + s[j]) ** 2,
                float(s[i] > s[j]),
            )
            for i, j in itertools.permutations(range(len(s)), 2)
            if there[i] and there[j] and r[i] < r[j]
        ]
        rows.append(sum(t for t, _ in terms) / max(1, len(terms)))
        right.append(sum(t for _, t in terms) / max(1, len(terms)))
    slow = sum(rows) / len(rows)
    # float64 throughout: some tens of roundings of numbers near 1
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    assert metrics["acc"].item() == pytest.approx(np.mean(right), rel=1e-6)
    for a, b in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(slow, scores)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (a[~present] == 0).all()


def test_two_responses_are_bradley_terry_under_either_kind():
    scores = 3 * torch.randn(30, 2, dtype=torch.float64)
    expected = -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
    for kind in ("pairs", "pl"):
        torch.testing.assert_close(
            reward_loss(scores, kind=kind)[0], expected, rtol=1e-13, atol=1e-13
        )
    gaps = torch.tensor([[3.0, 1.0]], dtype=torch.float64).expand(30, 2)
    with_margin = -F.logsigmoid(scores[:, 0] - scores[:, 1] - 0.5 * 2).mean()
    for kind in ("pairs", "pl"):
        torch.testing.assert_close(
            reward_loss(scores, kind=kind, gaps=gaps, score_margin=0.5)[0],
            with_margin,
            rtol=1e-13,
            atol=1e-13,
        )


def test_plackett_luce_and_the_constants():
    scores, present, ranks = ragged()
    torch.testing.assert_close(
        reward_loss(scores, present, "pl", ranks=ranks)[0],
        plackett_luce(scores, present, ranks=ranks).mean(),
    )
    for kind in ("pairs", "pl"):  # a ranking leaves the constant free; centring fixes it
        a, b = (reward_loss(scores + c, present, kind, ranks=ranks)[0] for c in (0.0, 7.0))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (
        reward_loss(scores + 7, present, ranks=ranks, center_coef=0.1)[0]
        > reward_loss(scores, present, ranks=ranks, center_coef=0.1)[0] + 1
    )
    zero = torch.zeros(4, 3)
    assert reward_loss(zero)[0].item() == pytest.approx(math.log(2)) and reward_loss(
        zero, kind="pl"
    )[0].item() == pytest.approx(math.log(6))
    with pytest.raises(ValueError, match="pairs or pl"):
        reward_loss(zero, kind="ipo")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_score_is_read_at_the_last_token(layout):
    """Against one sequence at a time: prompt + response, end-of-text read as well where there is one."""
    model = GPT(
        GPTConfig(
            vocab_size=257,
            block_size=64,
            n_layer=2,
            n_head=2,
            n_embd=32,
            position="rotary",
            scalar_head=True,
        )
    ).double()
    rows, _ = encode_rows(
        [
            {
                "prompt": f"the model {i}",
                "responses": ["falls" * (i % 4), None if i % 2 else "reads", "a" * 99],
            }
            for i in range(5)
        ],
        BYTES,
        "Q: {prompt}\nA: ",
        64,
    )
    scores, batch = forward_batch(model, reward_batch(rows, layout), CPU)
    fast = torch.zeros(15, dtype=torch.float64).index_put((batch["slot"],), scores).view(5, 3)
    for b, row in enumerate(rows):
        for k, y in enumerate(row["responses"]):
            slow = (
                0.0
                if y is None
                else (
                    model.hidden(torch.tensor([row["prompt"] + y]))[0, -1] @ model.scalar.weight[0]
                ).item()
            )
            assert abs(fast[b, k].item() - slow) < 1e-12  # float64: another order of sums
            assert y is None or batch["lengths"][b, k] == len(y)
    assert len(rows[0]["responses"][2]) + len(rows[0]["prompt"]) == 64 and rows[0]["responses"][
        0
    ] == [256]
    np.testing.assert_allclose(
        reward_scores(model, rows, 20, CPU, layout=layout), fast, rtol=1e-5, atol=1e-6
    )  # kept in float32


def test_logps_and_scalars_in_one_pass():
    model = GPT(
        GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=32, scalar_head=True)
    )
    idx = torch.randint(0, 257, (2, 8))
    read = torch.tensor([3, 15, 15])
    logps, scalars = model(idx, idx, read=read)
    assert torch.equal(logps, model(idx, idx)) and scalars[1] == scalars[2]
    torch.testing.assert_close(
        scalars, model(idx, read=read), rtol=1e-5, atol=1e-6
    )  # which makes two places alone


def test_reward_metrics_by_hand():
    rows = [
        {"responses": [[1], [1, 2], [3]], "ranks": [0, 1, 1]},
        {"responses": [[1], None, [3], [4]], "ranks": [0, 1, 2, 3]},
    ]
    scores = np.array([[2.0, 1.0, 3.0, 0.0], [1.0, 0.0, 1.0, 2.0]], dtype=np.float32)
    m = reward_metrics(
        scores, rows
    )  # right: 1 of 2 one apart; then a tie and a wrong one one apart, a wrong one two apart
    assert (
        m["acc"] == 1.5 / 5
        and m["acc@1"] == 1.5 / 4
        and m["pairs@1"] == 4
        and m["acc@2"] == 0.0
        and m["pairs@2"] == 1
    )
    nll = [np.log1p(np.exp([-1.0, 1.0])).mean(), np.log1p(np.exp([0.0, 1.0, 1.0])).mean()]
    assert m["pair_nll"] == pytest.approx(np.mean(nll)) and m["score"] == pytest.approx(10 / 6)
    assert m["length_acc"] == 2.0 / 5  # one of the five is shorter, four tie
    assert m["acc_se"] == pytest.approx(math.hypot(1 - 0.6, 0.5 - 0.9) / 5)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Rows whose better responses have more of the letter a: K = 4, some tied, with scores."""
    folder, rng = str(tmp_path_factory.mktemp("graded")), np.random.default_rng(0)
    for split, n in (("train", 96), ("val", 24)):
        rows = []
        for i in range(n):
            texts = [
                "".join(rng.choice(list("aaabcde"), size=rng.integers(4, 9))) for _ in range(4)
            ]
            texts.sort(key=lambda t: -t.count("a"))
            rows.append(
                {
                    "prompt": f"{split} {i}",
                    "responses": texts,
                    "scores": [t.count("a") for t in texts],
                }
            )
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, None, "made up")
    return folder


def reward_args(runs, data, out, *more):
    return [
        "--stage=reward",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        "--template=Q: {prompt}\nA: ",
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


def test_it_learns_from_ln_2(reward_run):
    evals, start = read_metrics(reward_run, "eval"), read_metrics(reward_run, "start")[0]
    assert (
        abs(start["expected"] - math.log(2)) < 0.05 and start["off"] < 1e-6
    )  # rows of ties alone cost 0
    assert evals[0]["pair_nll"] == pytest.approx(math.log(2)) and evals[0]["acc"] == 0.5
    assert evals[-1]["acc"] - 3 * evals[-1]["acc_se"] > 0.6 and evals[-1]["pair_nll"] < 0.6
    assert {"acc@1", "acc@2", "pairs@1"} <= set(evals[-1])
    assert evals[-1]["acc@2"] > evals[-1]["acc@1"]


def test_it_resumes_bit_for_bit(tiny_runs, graded, reward_run, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 12))
        with pytest.raises(Killed):
            train.main(reward_args(tiny_runs, graded, f"{tmp_path}/killed"))
    train.main(reward_args(tiny_runs, graded, f"{tmp_path}/killed"))
    assert_same_run(reward_run, f"{tmp_path}/killed")


def test_layouts_agree(tiny_runs, graded, reward_run, tmp_path):
    train.main(
        reward_args(tiny_runs, graded, f"{tmp_path}/padded", "--layout=padded", "--max_steps=3")
    )
    train.main(
        reward_args(
            tiny_runs, graded, f"{tmp_path}/shared", "--max_steps=3", "--micro_batch_tokens=200"
        )
    )
    for a, b in zip(
        read_metrics(f"{tmp_path}/padded", "step"),
        read_metrics(f"{tmp_path}/shared", "step"),
        strict=True,
    ):
        assert (
            abs(a["loss"] - b["loss"]) < 1e-4
        )  # AdamW turns a rounding of a gradient near 0 into a step


def test_margins_and_plackett_luce_by_config(tiny_runs, graded, tmp_path, tiny_data):
    train.main(
        reward_args(
            tiny_runs, graded, f"{tmp_path}/pl", "--loss_type=pl", "--center_coef=0.01", "--max_steps=2"
        )
    )
    train.main(
        reward_args(tiny_runs, graded, f"{tmp_path}/margin", "--score_margin=0.5", "--max_steps=2")
    )
    assert not read_metrics(f"{tmp_path}/pl", "warning") and not read_metrics(
        f"{tmp_path}/margin", "warning"
    )
    pl, margin = (read_metrics(f"{tmp_path}/{name}", "step")[0]["nll"] for name in ("pl", "margin"))
    assert (
        pl > 2.0 and margin > 0.75
    )  # about ln 4! less the ties; -log sigmoid(0 - m) is above ln 2
    assert "score_margin needs scores" in refused(
        reward_args(tiny_runs, tiny_data, f"{tmp_path}/none", "--score_margin=0.5")
    )
    assert "kind pl or pairs" in refused(
        reward_args(tiny_runs, graded, f"{tmp_path}/none", "--loss_type=ipo")
    )
    assert "stage reward's alone" in refused(["--stage=sft", "--center_coef=0.1"])


def command(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["eval.py", *args, "--device=cpu", "--rows=24"])
    eval.main()


def test_it_is_a_judge(reward_run, tiny_runs, graded, tmp_path, monkeypatch):
    """eval.py reports its accuracy, and takes its score for a verdict: graded data beat what an untrained policy says."""
    command(monkeypatch, f"rm={reward_run}", f"--data={graded}", f"--out={tmp_path}/e")
    assert json.load(open(f"{tmp_path}/e/eval.json"))["rm"]["acc"] == pytest.approx(
        read_metrics(reward_run, "eval")[-1]["acc"]
    )
    command(
        monkeypatch,
        f"sft={tiny_runs['sft']}",
        f"--judge={reward_run}",
        f"--data={graded}",
        f"--out={tmp_path}/j",
    )
    assert json.load(open(f"{tmp_path}/j/eval.json"))["data"]["win_rate"] > 0.6
    with pytest.raises(SystemExit, match="has no samples to judge"):
        command(monkeypatch, f"rm={reward_run}", f"--judge={reward_run}", f"--data={graded}")


def test_a_later_stage_leaves_the_head(reward_run, tiny_data, tmp_path):
    assert "scalar.weight" in final_weights(reward_run)
    train.main(
        [
            "--stage=sft",
            f"--out_dir={tmp_path}/sft",
            f"--data={tiny_data}",
            f"--init={reward_run}",
            "--max_steps=1",
            "--batch_size=8",
            "--max_response=16",
            "--device=cpu",
            "--eval_rows=4",
        ]
    )
    assert "scalar.weight" not in final_weights(f"{tmp_path}/sft")
    model, _, _ = GPT.from_checkpoint(reward_run)
    assert model.config.scalar and not GPT.from_checkpoint(f"{tmp_path}/sft")[0].config.scalar
