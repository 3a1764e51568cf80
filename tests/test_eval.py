from model import GPT
from data.rows import check_row
import json
import math

import numpy as np
import pytest
import torch

from conftest import command, read_metrics
from data.rows import encode_rows, read_rows
from data import tokenizer
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
