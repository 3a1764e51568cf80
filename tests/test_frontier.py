"""The frontier's scorer, data, measures and report; the sweep itself is `make frontier`."""

import json
import math

import numpy as np
import pytest
import torch

from nanospin import checkpoint
from studies.frontier import frontier
import train
from data.rows import read_rows
from data.pydocs.scorer import concrete
from test_ppo import reward_args


@pytest.mark.parametrize(
    "text, score",
    [
        ("", 0.0),
        ("Do it.", 0.0),
        ("Return the name.", 1 / 3),
        ("Return the names of a name", 1 / 3 - 0 / 5),
        ("Return the list of the names", 2 / 3 - 1 / 6),
        ("Map a string to an int", 1.0),
        ("string list dict int", 2 / 3),
        ("string list dict int float set", 0.0),
        ("list, list, list", 1 / 3 - 2 / 3),
        ("string list dict int float set tuple array byte map key", -1.0),
    ],
)
def test_the_scorer_by_hand(text, score):
    """One kind of thing is a third, three are best, six are a list; a word said again costs its share."""
    assert concrete(None, text) == pytest.approx(score) and concrete(
        None, text.upper()
    ) == pytest.approx(score)


def test_rows_are_ranked_by_the_true_reward_and_a_policy_is_measured_on_them(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    ranked, judge = str(tmp_path / "ranked"), str(tmp_path / "reward")
    scored = lambda row, text: float(text.count("e") > 1)
    monkeypatch.setattr(frontier, "concrete", scored)
    frontier.rank(ranked, tiny_runs["sft"], tiny_data)
    rows = read_rows(f"{ranked}/train.jsonl")
    assert len(rows) == 40 and all(
        len(row["responses"]) == 3 and row["scores"] == [scored(None, y) for y in row["responses"]]
        for row in rows
    )
    train.main(reward_args(tiny_runs, ranked, judge, 2))
    same = frontier.measure(tiny_runs["sft"], tiny_runs["sft"], judge, ranked)
    assert (
        same["kl"] == 0
        and set(same["true_at"]) == {"0.0", "0.25", "0.5", "0.75", "1.0"}
        and len(same["true_at"]["0.0"]) == 12
    )
    other = frontier.measure(tiny_runs["pretrain"], tiny_runs["sft"], judge, ranked)
    assert other["true"] == np.mean(other["true_at"]["1.0"])
    # KL of its samples by one sequence at a time
    said, model, ref = (
        [],
        checkpoint.load_model(tiny_runs["pretrain"])[0],
        checkpoint.load_model(tiny_runs["sft"])[0],
    )
    enc, meta = checkpoint.load_model(tiny_runs["pretrain"])[1:]
    rows = read_rows(f"{ranked}/val.jsonl")
    _, ids = frontier.respond(
        model, enc, meta["config"]["template"], rows, 0, meta["config"]["max_response"], 7
    )
    for row, y in zip(rows, ids):
        x = enc.encode_ordinary(meta["config"]["template"].replace("{prompt}", row["prompt"]))
        with torch.no_grad():
            p, q = (m(torch.tensor([x + y]))[0].double().log_softmax(-1) for m in (model, ref))
        said.append(sum((p - q)[len(x) - 1 + t, i].item() for t, i in enumerate(y)))
    assert other["kl"] == pytest.approx(np.mean(said), rel=1e-4) and other[
        "kl_se"
    ] == pytest.approx(np.std(said) / math.sqrt(len(said)), rel=1e-3)


def figures(true, kl, learnt):
    return {
        "true": true,
        "kl": kl,
        "kl_se": 0.0,
        "learnt": learnt,
        "length": 9.0,
        "ended": 1.0,
        "kinds": 2.0,
        "beyond": 0.25,
        "minutes": 0.5,
        "example": "x",
        "true_at": {str(t): [true + 0.1 * t, true, 0.5] for t in frontier.TEMPERATURES},
    }


def made_up(greedy_true=0.3, dpo=0.9):
    measured = {
        ("PPO, learnt reward", 1.0): [figures(0.6, 1.0, 0.5), figures(0.62, 1.1, 0.5)],
        ("PPO, learnt reward", 0.02): [
            figures(greedy_true, 9.0, 2.5),
            figures(greedy_true + 0.02, 9.0, 2.6),
        ],
        ("DPO", 0.1): [figures(dpo, 1.0, 1.0), figures(dpo + 0.02, 0.9, 1.0)],
        ("Preferred-FT", None): [figures(0.55, 0.5, 0.2), figures(0.55, 0.5, 0.2)],
    }
    return measured, figures(0.5, 0.0, 0.0)


def test_the_verdict_follows_the_figures(tmp_path):
    def words(*args):
        measured, base = made_up(*args)
        found = frontier.points(measured)
        return "\n".join(
            frontier.verdict(found, base, {"DPO": frontier.win_rates(measured["DPO", 0.1], base)})
        )

    assert (
        "agrees with the paper" in words()
        and "- PPO, learnt reward: from 1.0 to 0.02 the learnt reward changes by +2.05, the true one by -0.300: over-optimised."
        in words()
    )
    assert "not found here" in words(
        0.95, 0.4
    ) and "- PPO, learnt reward: none in this sweep" in words(0.95)
    assert "within 1: DPO; within 2: DPO; within 5: DPO; within 10: PPO, learnt reward (" in words(
        0.95, 0.7
    )
    assert "within 10: DPO and PPO, learnt reward (" in words(0.895) and "not found here" in words(
        0.895
    )  # 0.91 +- 0.01 and 0.905 +- 0.01
    assert (
        "nats: DPO 0.910 +- 0.010, Preferred-FT 0.550 +- 0.000; no setting of PPO, learnt reward is so near"
        in words()
    )
    assert "not clear, within two standard errors" in words(0.595)


def test_the_report(tmp_path):
    import argparse

    measured, base = made_up()
    frontier.report(
        argparse.Namespace(out=str(tmp_path), seeds=2, values=2, small=False), measured, base
    )
    text = (tmp_path / "report.md").read_text()
    assert (
        "| DPO | beta 0.1 | 0.95 +- 0.05 | 0.910 +- 0.010 |" in text
        and (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    )
    rates = json.loads((tmp_path / "frontier.json").read_text())["win_rates"]["DPO"]
    assert rates[0][0] == pytest.approx((1 + 1 + 0.5) / 3)  # above, above, equal
