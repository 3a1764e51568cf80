"""The frontier study: the true reward, the ranked data, the measurements and the report.

The sweep itself is `python -m studies.frontier.frontier`.
"""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from data.files import read_json, write_json
from data.pydocs.scorer import concrete
from data.rows import read_rows
from model import GPT
from sample import respond
from studies.frontier import frontier
from studies.frontier.frontier import Mean, Measurement, Results


@pytest.mark.parametrize(
    "text, score",
    [
        ("", 0.0),
        ("Do it.", 0.0),
        ("Return the name.", 1 / 3),
        ("Return the names of a name", 1 / 3),
        ("Return the list of the names", 2 / 3 - 1 / 6),
        ("Map a string to an int", 1.0),
        ("string list dict int", 2 / 3),
        ("string list dict int float set", 0.0),
        ("list, list, list", 1 / 3 - 2 / 3),
        ("string list dict int float set tuple array byte map key", -1.0),
    ],
)
def test_true_reward_by_hand(text, score):
    """One kind of thing is worth 1/3, three are best, six are a mere list; repeated words cost."""
    assert concrete(None, text) == pytest.approx(score)
    assert concrete(None, text.upper()) == pytest.approx(score)


def has_two_es(row, text):
    return float(text.count("e") > 1)


@pytest.fixture(scope="module")
def ranked(tiny_runs, tiny_data, tmp_path_factory):
    """Data ranked by has_two_es, and a reward model of them."""
    folder = tmp_path_factory.mktemp("frontier")
    data = str(folder / "ranked")
    judge = str(folder / "reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "concrete", has_two_es)
        frontier.rank(data, tiny_runs["sft"], tiny_data)
        train.main(
            [
                "--stage=reward",
                f"--init={tiny_runs['sft']}",
                f"--data={data}",
                f"--out_dir={judge}",
                "--loss_type=pairs",
                "--max_steps=2",
                "--batch_size=8",
                "--device=cpu",
            ]
        )
        yield data, judge


def test_rows_are_ranked_by_the_true_reward(ranked):
    data, _ = ranked
    rows = read_rows(f"{data}/train.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert len(row["responses"]) == 3
        assert row["scores"] == [has_two_es(row, text) for text in row["responses"]]
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["ids"]) == 3


def test_the_reference_is_at_no_distance_from_itself(ranked, tiny_runs):
    data, judge = ranked
    measured = frontier.measure(tiny_runs["sft"], tiny_runs["sft"], judge, data)
    assert measured.kl == 0
    assert set(measured.true_at) == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert all(len(scores) == 12 for scores in measured.true_at.values())
    path = tiny_runs["sft"] + ".json"
    kept = read_json(path)
    write_json(path, kept | {"measurement": kept["measurement"] | {"true": 7.0}})
    again = frontier.measure(tiny_runs["sft"], tiny_runs["sft"], judge, data)
    assert again.true == 7  # read from its file
    write_json(path, read_json(path) | {"inputs": kept["inputs"] | {"policy": "trained anew"}})
    assert frontier.measure(tiny_runs["sft"], tiny_runs["sft"], judge, data) == measured


def test_samples_of_another_reference_are_not_ranked_again(ranked, tiny_runs):
    data, _ = ranked
    frontier.rank(data, tiny_runs["sft"])  # left as it is
    with pytest.raises(SystemExit, match="samples of another model than .*pretrain is now"):
        frontier.rank(data, tiny_runs["pretrain"])


def test_kl_equals_one_sequence_at_a_time(ranked, tiny_runs):
    data, judge = ranked
    measured = frontier.measure(tiny_runs["pretrain"], tiny_runs["sft"], judge, data)
    assert measured.true == np.mean(measured.true_at["1.0"])

    policy, enc, meta = GPT.from_checkpoint(tiny_runs["pretrain"])
    reference = GPT.from_checkpoint(tiny_runs["sft"])[0]
    template = meta["config"]["template"]
    rows = read_rows(f"{data}/val.jsonl")
    _, samples = respond(
        policy,
        enc,
        template,
        rows,
        max_response=meta["config"]["max_response"],
        seed=frontier.EVAL_SEED,
    )
    log_ratios = []
    for row, sample in zip(rows, samples):
        prompt = enc.encode_ordinary(template.replace("{prompt}", row["prompt"]))
        idx = torch.tensor([prompt + sample])
        with torch.no_grad():
            p = policy(idx)[0].double().log_softmax(-1)
            q = reference(idx)[0].double().log_softmax(-1)
        positions = range(len(prompt) - 1, len(prompt) - 1 + len(sample))
        log_ratios.append(sum((p - q)[t, token].item() for t, token in zip(positions, sample)))
    assert measured.kl == pytest.approx(np.mean(log_ratios), rel=1e-4)
    standard_error = np.std(log_ratios) / math.sqrt(len(log_ratios))
    assert measured.kl_se == pytest.approx(standard_error, rel=1e-3)


def measurement(true, kl, learnt):
    return Measurement(
        true_at={str(t): [true + 0.1 * t, true, 0.5] for t in frontier.TEMPERATURES},
        true=true,
        kl=kl,
        kl_se=0.0,
        learnt=learnt,
        length=9.0,
        ended=1.0,
        kinds=2.0,
        beyond=0.25,
        minutes=0.5,
        example="x",
    )


def made_up(greedy_true=0.3, dpo=0.9):
    """(measured, base) of three methods with two seeds."""
    measured = {
        ("PPO, learnt reward", 1.0): [measurement(0.6, 1.0, 0.5), measurement(0.62, 1.1, 0.5)],
        ("PPO, learnt reward", 0.02): [
            measurement(greedy_true, 9.0, 2.5),
            measurement(greedy_true + 0.02, 9.0, 2.6),
        ],
        ("DPO", 0.1): [measurement(dpo, 1.0, 1.0), measurement(dpo + 0.02, 0.9, 1.0)],
        ("Preferred-FT", None): [measurement(0.55, 0.5, 0.2), measurement(0.55, 0.5, 0.2)],
    }
    return measured, measurement(0.5, 0.0, 0.0)


def text_of(*args):
    return "\n".join(frontier.findings(Results.of(*made_up(*args))))


@pytest.mark.parametrize(
    "args, expected",
    [
        # greedy_true, dpo
        (
            (),
            [
                "agrees with the DPO paper",
                "- KL ≤ 1: DPO 0.910 ± 0.010; Preferred-FT 0.550 ± 0.000. "
                "No setting of PPO, learnt reward is this close to the reference.",
                "- PPO, learnt reward: from 1.0 to 0.02 the learnt reward changes by +2.05, "
                "the true reward by -0.300: over-optimised.",
                "Win rate of DPO from temperature 0 to 1: ",
            ],
        ),
        (
            (0.95, 0.4),
            ["is not found here", "- PPO, learnt reward: none in this sweep"],
        ),
        (
            (0.95, 0.7),
            [
                "- KL ≤ 1: DPO\n",
                "- KL ≤ 2: DPO\n",
                "- KL ≤ 5: DPO\n",
                "- KL ≤ 10: PPO, learnt reward\n",
                "is not found here",
            ],
        ),
        # 0.91 ± 0.01 and 0.905 ± 0.01 cannot be told apart
        (
            (0.895,),
            ["- KL ≤ 10: DPO and PPO, learnt reward\n", "is not found here"],
        ),
        ((0.595,), ["not clear, within two standard errors"]),
    ],
)
def test_the_text_follows_the_numbers(args, expected):
    text = text_of(*args)
    for line in expected:
        assert line in text


def test_no_verdict_without_points_or_errors():
    measured, base = made_up()
    one_seed = {key: seeds[:1] for key, seeds in measured.items()}
    text = "\n".join(frontier.findings(Results.of(one_seed, base)))
    assert "is not tested here: there is one seed" in text
    assert "KL ≤ 1: DPO 0.900 ± 0.000; " in text
    assert "Over-optimisation" not in text and "two standard errors" not in text
    near = {
        key: [replace(one, kl=0.01 * one.kl) for one in seeds] for key, seeds in measured.items()
    }
    text = "\n".join(frontier.findings(Results.of(near, base)))
    assert "is not tested here: no KL budget can be compared" in text


def test_win_rates_count_ties_half():
    measured, base = made_up()
    rates = frontier.win_rates_against(base, measured["DPO", 0.1])
    assert rates[0].mean == pytest.approx((1 + 1 + 0.5) / 3)  # higher, higher, equal


def test_the_report(tmp_path):
    measured, base = made_up()
    args = argparse.Namespace(out=str(tmp_path), seeds=2, values=2, small=False)
    frontier.report(args, measured, base)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| DPO | beta 0.1 | 0.95 ± 0.05 | 0.910 ± 0.010 | 1.00 ± 0.00 | 9.0 | 100 % |" in text
    assert "| reference | - | 0.00 ± 0.00 |" in text
    assert "--seeds=2 --values=2`" in text

    saved = json.loads((tmp_path / "logs" / "frontier.json").read_text())
    assert saved["reference"] == 0.5
    assert saved["best"] == {"PPO, learnt reward": 1.0, "DPO": 0.1, "Preferred-FT": None}
    assert saved["points"]["DPO"][0][:2] == [0.1, pytest.approx([0.95, 0.05])]
    assert Results.load(tmp_path / "logs" / "frontier.json") == Results.of(measured, base)

    figure = tmp_path / "figures" / "frontier.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    figure.unlink()
    frontier.main(["--redraw", f"--out={tmp_path}"])
    assert figure.exists() and figure.with_suffix(".svg").exists()


def test_one_seed_has_no_error():
    assert Mean.of([0.5]) == Mean(0.5, 0.0)


def test_the_runs_of_a_sweep():
    runs = frontier.sweep_runs("out", ["rm_0", "rm_1"], 2, ["--init=sft"], small=False)
    assert len(runs) == 2 * 5 + 1
    first, second = runs["PPO, learnt reward", 0.15]
    assert first.args == [
        "studies/frontier/config/ppo.py",
        "--out_dir=out/PPO__learnt_reward_0.15_0",
        "--seed=0",
        "--init=sft",
        "--reward=rm_0",
        "--kl_coef=0.15",
    ]
    assert (second.out_dir, second.reward) == ("out/PPO__learnt_reward_0.15_1", "rm_1")
