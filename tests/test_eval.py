from model import GPT
from data.rows import check_row
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from nanospin import checkpoint
import data
from studies.taylor import analysis
from conftest import command, read_metrics
from data.rows import encode_rows, read_rows
from data import tokenizer
from studies.taylor.calibration import (
    calibration,
    distributions,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from eval import (
    extract_answer,
    f1_score,
    harness_metrics,
    length_accuracy,
    ranking_metrics,
    sample_metrics,
    response_logprobs,
    win_rate,
    rolling_windows,
)

BYTES = tokenizer.load("bytes")


def slow_logprob(model, prompt, response):
    """One sequence, full logits, float64."""
    ids = torch.tensor([(prompt + response)[:-1]])
    logps = model(ids)[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, y].item() for t, y in enumerate(response))


@torch.no_grad()
def test_score_equals_one_sequence_at_a_time(tiny_runs):
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rows, _ = encode_rows(
        [
            {
                "prompt": f"the model {i}",
                "responses": ["falls" * (i % 3), None if i % 2 else "reads", "a"],
            }
            for i in range(7)
        ],
        enc,
        "Q: {prompt}\nA: ",
        64,
    )
    fast = response_logprobs(model, rows, 3, torch.device("cpu"))
    slow = [
        [0.0 if y is None else slow_logprob(model, row["prompt"], y) for y in row["responses"]]
        for row in rows
    ]
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    np.testing.assert_array_equal(fast, response_logprobs(model, rows, 3, torch.device("cpu")))


def test_ranking_metrics_by_hand():
    rows = [
        {"responses": [[1], [1, 2], [3]], "ranks": [0, 1, 2]},
        {"responses": [[1, 2, 3], [1], None], "ranks": [0, 1, 2]},
    ]
    logps, refs = (
        np.array([[-1.0, -2.0, -9.0], [-6.0, -3.0, 0.0]]),
        np.array([[-2.0, -2.0, -4.0], [-5.0, -5.0, 0.0]]),
    )
    m = ranking_metrics(
        logps, refs, rows, 0.5, ["data", "teacher", "self"]
    )  # rewards [.5, 0, -2.5], [-.5, 1, -]
    assert m["val_loss"] == 7 / 4
    assert m["acc_se"] == pytest.approx(math.hypot(3 - 3 * m["acc"], 0 - m["acc"]) / 4)
    assert m["acc"] == 3 / 4 and m["acc/data"] == 1 / 2 and m["acc/teacher"] == 1.0
    assert m["reward/data"] == 0.0 and m["reward/teacher"] == 0.5 and m["reward/self"] == -2.5
    assert m["logp/data"] == -3.5 and m["logp/self"] == -9.0 and m["kl_from_ref"] == 5.0
    first = math.log(1 + math.exp(-0.5) + math.exp(-3)) + math.log(1 + math.exp(-2.5))
    assert abs(m["rank_nll"] - (first + math.log(1 + math.exp(1.5))) / 2) < 1e-12


def slow_distributions(model, rows, temperature):
    """Token by token, float64: (logp of the target, greatest probability, whether right, entropy)."""
    found = []
    for row in rows:
        ids = row["prompt"] + row["responses"][0]
        logps = (model(torch.tensor([ids]))[0].double() / temperature).log_softmax(-1)
        for t in range(max(1, len(row["prompt"])), len(ids)):
            p = logps[t - 1].exp()
            found.append(
                (
                    logps[t - 1, ids[t]].item(),
                    p.max().item(),
                    float(p.argmax() == ids[t]),
                    -(p * logps[t - 1]).sum().item(),
                )
            )
    return np.array(found).T


@torch.no_grad()
def test_calibration_token_by_token(tiny_runs):
    """Every figure against loops over single tokens; the temperature against a grid."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["pretrain"])
    texts = [{"text": "the model reads " * 2 + f"{i} and stops"} for i in range(6)] + [
        {"prompt": "Q", "responses": ["the loss falls", "no"]}
    ]
    rows, _ = encode_rows([check_row(row, "") for row in texts], enc, "<{prompt}>", 64)
    for i, row in enumerate(rows):
        row |= {"half": i % 2, "seen": 9 * (i % 3)}
    device = torch.device("cpu")
    for temperature in (1.0, 2.5):
        fast = distributions(model, rows, 50, device, temperature)
        for name, values in zip(
            ("logp", "top", "right", "entropy"), slow_distributions(model, rows, temperature)
        ):
            np.testing.assert_allclose(fast[name], values, rtol=1e-4, atol=1e-5)
    grid = [2 ** (i / 40) for i in range(-80, 120)]
    losses = [-slow_distributions(model, rows, t)[0].mean() for t in grid[::10]]
    fitted = fit_temperature(model, rows, 50, device)
    assert -slow_distributions(model, rows, fitted)[0].mean() <= min(losses) + 1e-6
    figures = calibration(model, rows, 50, device)
    logp, top, right, entropy = slow_distributions(model, rows, 1.0)
    half = np.concatenate(
        [[row["half"]] * (len(row["responses"][0]) - (not row["prompt"])) for row in rows]
    )
    seen = np.concatenate(
        [
            [
                t < row["seen"]
                for t in range(max(1, len(row["prompt"])), len(row["prompt"] + row["responses"][0]))
            ]
            for row in rows
        ]
    )
    fitted = [
        fit_temperature(model, [row for row in rows if row["half"] == h], 50, device)
        for h in (0, 1)
    ]
    at = [slow_distributions(model, rows, t) for t in fitted]
    expected = {
        "val_loss": -logp.mean(),
        "acc": right.mean(),
        "seen_loss": -logp[seen].mean(),
        "new_loss": -logp[~seen].mean(),
        "seen_share": seen.mean(),
        "new_tokens": (~seen).sum(),
        "entropy": entropy.mean(),
        "entropy_wrong": entropy[right == 0].mean(),
    }
    for h in (0, 1):
        expected |= {
            f"tokens/{h}": (half == h).sum(),
            f"loss/{h}": -logp[half == h].mean(),
            f"temperature/{h}": fitted[h],
            f"fitted_loss/{h}": -at[h][0][half == h].mean(),
            f"loss_t/{h}": -at[1 - h][0][half == h].mean(),
        }
        assert figures[f"fitted_loss/{h}"] < min(figures[f"loss/{h}"], figures[f"loss_t/{h}"])
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    crossed = [np.where(half == 0, at[1][k], at[0][k]) for k in (1, 2)]
    assert figures["ece_t"] == pytest.approx(
        expected_calibration_error(reliability(*crossed)), rel=1e-3
    )


def test_calibration_error_by_hand():
    curve = reliability(np.array([0.05, 0.06, 0.9, 1.0, 0.95]), np.array([0, 1, 1, 1, 0]))
    assert (
        [n for _, _, n in curve] == [2, 1, 2]
        and curve[0][:2] == [pytest.approx(0.055), 0.5]
        and curve[2][:2] == [pytest.approx(0.975), 0.5]
    )
    assert expected_calibration_error(curve) == pytest.approx((2 * 0.445 + 0.1 + 2 * 0.475) / 5)


def test_a_long_text_is_asked_for_once():
    """The windows of lm-evaluation-harness's own example, a text of ten ids read by four."""
    assert [
        (row["prompt"], row["responses"]) for row in rolling_windows(list(range(10)), 99, 4)
    ] == [
        ([99], [[0, 1, 2, 3]]),
        ([3], [[4, 5, 6, 7]]),
        ([5, 6, 7], [[8, 9]]),
    ]
    assert [(row["prompt"], row["responses"]) for row in rolling_windows([7], 99, 4)] == [
        ([99], [[7]])
    ] and [len(row["responses"][0]) for row in rolling_windows([1] * 8, 0, 4)] == [4, 4]


@torch.no_grad()
def test_bits_and_choices_one_sequence_at_a_time(tiny_runs):
    """Against loops over single responses and single ids: without end-of-text, by UTF-8 bytes, cut where the limits cut, long texts in windows."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"{i} the",
            "responses": [
                " ".join(rng.choice("the loss of a model fällt ☃ x".split(), rng.integers(1, 6)))
                for _ in range(3)
            ],
        }
        for i in range(24)
    ]
    rows[0]["responses"][1] = None
    rows[1] |= {
        "responses": ["\x01\x02", "the", "\x03"],
        "scores": [1.0, 1.0, 0.0],
    }  # a tie of a poor and a good one
    rows[4]["responses"][0] = "the loss of a model " * 5  # is cut
    rows[2]["responses"] = ["the end"]
    rows[3]["responses"][2] = ""
    long = "the loss of a model falls when it reads what people write and stops at the end ☃ " * 2
    rows += [check_row({"text": text}, "") for text in (long, "what", "ä")]
    length, nats, size, right, right_bytes, n = 64, 0.0, 0, 0, 0, 0
    for row in rows:
        if not row["prompt"]:
            ids = list(row["responses"][0].encode())
            for t in range(len(ids)):
                first = (
                    max(0, t // length * length - 1)
                    if t // length < (len(ids) - 1) // length
                    else max(0, len(ids) - length - 1)
                )
                nats -= slow_logprob(model, ([256] if t < length else []) + ids[first:t], [ids[t]])
            size += len(ids)
        elif "" not in row["responses"]:
            prompt = list(f"Q: {row['prompt']}\nA: ".encode())
            said = [
                None if y is None else list(y.encode())[: length - len(prompt)]
                for y in row["responses"]
            ]
            logps = [-1e9 if y is None else slow_logprob(model, prompt, y) for y in said]
            nats, size = nats - logps[0], size + len(said[0])
            if len(said) > 1:
                best = (0, 1) if "scores" in row else (0,)
                n, right = n + 1, right + (np.argmax(logps) in best)
                right_bytes += (
                    np.argmax([logp / len(y or [1]) for logp, y in zip(logps, said)]) in best
                )
    m = harness_metrics(
        model, enc, rows, encode_rows(rows, enc, "Q: {prompt}\nA: ", length)[0], torch.device("cpu")
    )
    assert m["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert m["choice_acc"] == right / n and m["choice_acc_bytes"] == right_bytes / n and n == 22
    assert 0 < right < right_bytes < n


def test_answers_and_overlap():
    assert (
        extract_answer("so 3 + 4 = 7\n#### 1,234.") == "1234"
        and extract_answer("#### 1\n#### -2") == "-2"
        and extract_answer(" 405 ") == "405"
    )
    assert (
        f1_score("Return the name", "return a name") == pytest.approx(2 / 3)
        and f1_score("", "x") == 0.0
    )
    m = sample_metrics(
        ["#### 7", "#### 8"], [[1, 256], [1, 2, 3]], ["1 + 6\n#### 7", "#### 9"], 256
    )
    assert m["exact_match"] == 0.5 and m["ended"] == 0.5 and m["length"] == 2.5
    assert (
        length_accuracy([5, 5, 5], [3, 3, 9]) == pytest.approx(2 / 3)
        and length_accuracy([1, 1], [2, 2]) == 1.0
        and length_accuracy([2], [2]) == 0.5
    )


def test_win_rate(tiny_runs):
    """Data-like text beats noise under a model of the data; a response against itself is a half."""
    judge, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])

    def pairs(a, b):
        return encode_rows(
            [{"prompt": f"{i} the", "responses": [a, b]} for i in range(6)],
            enc,
            "Q: {prompt}\nA: ",
            64,
        )[0]

    assert win_rate(judge, pairs("the end", "\x01\x02\x7f\x03"), torch.device("cpu")) == (1.0, 0.0)
    assert win_rate(judge, pairs("the end", "the end"), torch.device("cpu"))[0] == 0.5


def run(*args):
    return command(args[0].removesuffix(".py"), *args[1:])


def test_command_line(tiny_runs, tiny_data, tmp_path):
    done = run(
        "eval.py",
        f"sft={tiny_runs['sft']}",
        f"cold={tiny_runs['sft']}@0",
        f"--judge={tiny_runs['pretrain']}",
        f"--data={tiny_data}",
        "--rows=8",
        f"--out={tmp_path}/e",
        "--device=cpu",
    )
    assert done.returncode == 0, done.stderr
    table = json.load(open(f"{tmp_path}/e/eval.json"))
    assert (
        set(table) == {"sft", "cold", "data"}
        and table["cold"]["against"] == "sft"
        and 0 <= table["cold"]["win_rate"] <= 1
    )
    assert (
        table["sft"]["val_loss"]
        == table["cold"]["val_loss"]
        == pytest.approx(read_metrics(tiny_runs["sft"], "eval")[-1]["val_loss"], rel=1e-5)
    )
    assert len(read_rows(f"{tmp_path}/e/cold.jsonl")) == 8
    done = run(
        "eval.py",
        f"a={tiny_runs['sft']}",
        f"--reference={tiny_runs['pretrain']}",
        f"--data={tiny_data}",
        "--rows=8",
        "--device=cpu",
    )
    assert done.returncode == 0 and "acc/2" in done.stdout and "rank_nll" in done.stdout, (
        done.stderr
    )
    for bad in (
        ["eval.py", f"a={tiny_runs['sft']}@hot", "--device=cpu", f"--data={tiny_data}"],
        ["eval.py", "sft"],
        ["eval.py", "a=nowhere", "--device=cpu", f"--data={tiny_data}"],
    ):
        assert run(*bad).returncode != 0


def tn_runs(folder):
    """Made-up runs of the T_n study. The halves, of 100 and 300 tokens, are best at steps 10 and 20: what stops at one is measured
    on the other, and at the last step T_1 is better than T_0 by 0.5 +- 0.04."""
    for setting, split, methods in (
        ("later", "row", ("T_0", "T_1", "T_2")),
        ("later", "group", ("T_0", "T_1")),
        ("map_long", "row", ("T_0", "T_1", "T_2")),
        ("clean", "group", ("T_0", "T_1", "T_10", "dropout")),
        ("spin", "group", ("T_0", "T_1")),
    ):
        for method in methods:
            for seed in (1, 2, 3):
                os.makedirs(f"{folder}/{setting}/{split}/{method}/{seed}")
                with open(f"{folder}/{setting}/{split}/{method}/{seed}/config.json", "w") as f:
                    json.dump({"config": {"data_source": "made up"}}, f)
                gain = (method == "T_1") * (0.5 + 0.04 * (seed - 2)) + (method == "T_2") * 0.52
                with open(f"{folder}/{setting}/{split}/{method}/{seed}/metrics.jsonl", "w") as f:
                    for step, loss, halves in (
                        (0, 5.0, (5.0, 5.0)),
                        (10, 3.0, (1.0, 4.0)),
                        (20, 3.5, (2.0, 3.0)),
                        (30, 4.0 - gain, (4.0 - gain, 4.0 - gain)),
                    ):
                        figures = {
                            "val_loss": loss,
                            "seen_loss": 1.0 + 0.1 * (method == "T_2"),
                            "new_loss": 5.0 - 0.7 * (method == "T_2"),
                            "entropy_wrong": 1.0,
                            "ece": 0.1,
                            "ece_t": 0.05,
                            "acc": 0.5,
                            "seen_share": 0.75,
                            "new_tokens": 40.0,
                            "reliability": [[0.1, 0.2, 15], [0.9, 0.8, 5]],
                        }
                        for h in (0, 1):
                            figures |= {
                                f"loss/{h}": halves[h],
                                f"fitted_loss/{h}": halves[1 - h],
                                f"loss_t/{h}": halves[h] + 0.1,
                                f"temperature/{h}": 1.5,
                                f"tokens/{h}": (100.0, 300.0)[h],
                            }
                        played = {
                            "val_loss": loss,
                            "acc": 0.5,
                            "rank_nll": 0.6,
                            "kl_from_ref": 0.0,
                            "reward/data": 0.1,
                            "reward/self": -0.1,
                        }
                        f.write(
                            json.dumps(
                                {"kind": "eval", "round": 0, "step": step}
                                | (played if setting == "spin" else figures)
                            )
                            + "\n"
                        )


def test_reliability_curves_are_pooled_by_their_tokens():
    ((x, y),) = analysis.pooled(
        [[[0.1, 0.2, 20], [0.9, 1.0, 9]], [[0.12, 0.5, 10], [0.95, 0.0, 20]]]
    )
    assert (x, y) == (pytest.approx(3.2 / 30), pytest.approx(9 / 30))


def test_the_taylor_study(tmp_path):
    """Each half is measured where the other stops; differences are paired by seed, with Student's interval; bold leaves out 0."""
    tn_runs(f"{tmp_path}/runs")
    done = run("taylor.py", f"{tmp_path}/runs", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    text = open(f"{tmp_path}/out/report.md").read()
    early = (
        300 * 4.0 + 100 * 2.0
    ) / 400  # half 0 stops at 10, where half 1 has 4; half 1 at 20, where half 0 has 2
    warm = (300 * 3.1 + 100 * 1.1) / 400  # by their own temperatures they stop at 20 and 10
    assert (
        f"| T_0 | 4.0000 ± 0 | {early:.4f} ± 0 | 4.1000 ± 0 | {warm:.4f} ± 0 |" in text
        and "| 15 ± 0 | 1.50 ± 0 |" in text
        and "Data: made up." in text
    )
    error = 4.30 * 0.04 / math.sqrt(3)
    assert (
        f"| T_1 | **-0.5000 ± {error:.4f}** | +0.0000 ± 0.0000 |" in text
        and "| dropout | +0.0000 ± 0.0000 |" in text
    )
    assert text.index("| T_1 | **") < text.index("| T_10 | +0.0000")
    assert (
        "| later | 30 | 3.000 ± 0 | 10 ± 0 | 4.000 ± 0 | 3.500 ± 0.04 | 3.480 ± 0 | 3 | 3 | 3 | 2 | 3 |"
        in text
        and "## map_long" not in text
    )
    assert (
        "| map_long | 2 | 25.00 | 1.00 | 1.10 | 5.00 | 4.30 | 12.50 | -0.520 |" in text
    )  # 0.1 dearer, 0.7 cheaper: equal at 0.1 / 0.8
    assert f"3.5000 (-0.5000 ± {error:.4f})" in text.split("## spin: round 0")[1]
    os.remove(f"{tmp_path}/out/report.md")  # and again from what was kept
    done = run("taylor.py", f"{tmp_path}/out/runs", f"{tmp_path}/out")
    assert done.returncode == 0 and open(f"{tmp_path}/out/report.md").read() == text, done.stderr
    for name in ("a_b_validation", "c_stopping", "d_seen", "e_calibration", "f_long"):
        assert open(f"{tmp_path}/out/{name}.png", "rb").read(4) == b"\x89PNG"
    for rest in ("later", "clean"):  # figures-tn-map alone
        shutil.rmtree(f"{tmp_path}/out/runs/{rest}")
    assert run("taylor.py", f"{tmp_path}/out/runs", f"{tmp_path}/less").returncode == 0 and set(
        os.listdir(f"{tmp_path}/less")
    ) == {"runs", "report.md", "f_long.png"}
    with open(f"{tmp_path}/runs/clean/group/dropout/2/metrics.jsonl") as f:
        whole = f.read().splitlines()
    with open(f"{tmp_path}/runs/clean/group/dropout/2/metrics.jsonl", "w") as f:
        f.write(whole[0] + "\n")
    for args, message in (
        ((f"{tmp_path}/runs", f"{tmp_path}/out"), "clean/group: a run is missing or unfinished"),
        ((f"{tmp_path}/nothing", f"{tmp_path}/x"), "no runs SETTING"),
        (("x",), "taylor.py out/tn"),
    ):
        done = run("taylor.py", *args)
        assert done.returncode == 1 and message in done.stderr, done.stderr
