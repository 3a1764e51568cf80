"""Evaluation: log-probabilities, metrics and verdicts, against loops and numbers by hand."""

import json
import math
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import tokenizers_like
import torch
from conftest import TEMPLATE, command, read_metrics

import eval as eval_module
import train
from data import tokenizer
from data.files import read_json, write_json
from data.folder import write_meta
from data.rows import check_row, encode_rows, read_rows, sampled_row, write_rows
from data.template import written_ids
from eval import (
    Samples,
    check_judge,
    count_bytes,
    f1_score,
    function_scores,
    harness_metrics,
    is_best,
    judged_pairs,
    length_accuracy,
    main,
    ranking_metrics,
    retokenize,
    reward_metrics,
    rolling_windows,
    row_logps,
    sample_metrics,
    sampled_kl,
    win_rate,
    without_end,
)
from loss import preference_loss
from model import GPT, GPTConfig
from nanospin import checkpoint, eval_command
from studies.smollm2.scorer import argument_f1, token_f1

CPU = torch.device("cpu")
EOT = 256  # of bytes


def slow_logprob(model, prompt, response):
    """log pi(response | prompt) of one sequence, from all logits, in float64."""
    ids = torch.tensor([(prompt + response)[:-1]])
    logps = model(ids)[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))


# -------------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def test_response_logprobs_equal_one_sequence_at_a_time(tiny_runs):
    """In micro-batches of three tokens, with responses that are absent, empty or of other lengths.
    The same call gives the same bits."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    texts = []
    for i in range(7):
        responses = ["falls" * (i % 3), None if i % 2 else "reads", "a"]
        texts.append({"prompt": f"the model {i}", "responses": responses})
    rows, _ = encode_rows(texts, enc, TEMPLATE, 64)
    logps = row_logps(model, rows, 3, CPU)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            slow = 0.0
            if response is not None:
                slow = slow_logprob(model, row["prompt"], response)
            assert logps[b, k] == pytest.approx(slow, rel=1e-5)
    np.testing.assert_array_equal(logps, row_logps(model, rows, 3, CPU))


def test_ranking_metrics_by_hand():
    rows = [
        {"prompt": [9], "responses": [[1], [1, 2], [3]], "ranks": [0, 1, 2]},
        {"prompt": [9], "responses": [[1, 2, 3], [1], None], "ranks": [0, 1, 2]},
    ]
    logps = np.array([[-1.0, -2.0, -9.0], [-6.0, -3.0, 0.0]])
    refs = np.array([[-2.0, -2.0, -4.0], [-5.0, -5.0, 0.0]])
    # the implicit rewards are [.5, 0, -2.5] and [-.5, 1, -]
    m = ranking_metrics(logps, refs, rows, 0.5, ["data", "teacher", "self"])
    assert m["val_loss"] == 7 / 4
    assert m["acc"] == 3 / 4
    assert m["acc_se"] == pytest.approx(math.hypot(3 - 3 * m["acc"], 0 - m["acc"]) / 4)
    weights = 1 / (1 + np.exp([0.5, 3.0, 2.5]))  # of the first row's pairs
    assert m["grad_weight"] == pytest.approx((weights.mean() + 1 / (1 + math.exp(-1.5))) / 2)
    assert m["acc/data"] == 1 / 2
    assert m["acc/teacher"] == 1.0
    assert m["reward/data"] == 0.0
    assert m["reward/teacher"] == 0.5
    assert m["reward/self"] == -2.5
    assert m["logp/data"] == -3.5
    assert m["logp/self"] == -9.0
    assert m["kl_from_ref"] == 5.0
    first = math.log(1 + math.exp(-0.5) + math.exp(-3)) + math.log(1 + math.exp(-2.5))
    second = math.log(1 + math.exp(1.5))
    assert abs(m["rank_nll"] - (first + second) / 2) < 1e-12


def test_kl_from_ref_is_over_all_samples():
    """Samples that equal another response of their row are absent. They count as that one."""
    rows = [
        {
            "prompt": [9],
            "responses": [[1, 2], [3], None, None],
            "ranks": [0, 1, 4, 4],
            "players": ["data", "self", "self", "self"],
            "same_as": [None, None, 0, 0],
        },
        {
            "prompt": [9],
            "responses": [None, [4, 5, 6], None, None],
            "ranks": [4, 0, 4, 4],
            "players": ["data", "self", "self", "self"],
            "same_as": [None, None, 1, None],
        },
    ]
    refs = np.array([[-1.0, -3.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0]])
    logps = np.array([[-2.0, -7.0, 0.0, 0.0], [0.0, -4.0, 0.0, 0.0]])
    metrics = ranking_metrics(logps, refs, rows, 1.0, ["data", "self", "self", "self"])
    # nats: two samples of 1, one of 4, two of 2; tokens: two of 2, one of 1, two of 3
    assert metrics["kl_from_ref"] == (2 * 1 + 4 + 2 * 2) / (2 * 2 + 1 + 2 * 3)


def test_val_loss_counts_a_data_response_that_equals_a_better_one():
    """Under a scorer a sample may stand above the data's equal answer, which is absent then."""
    row = {"prompt": [9], "ranks": [0, 1], "same_as": [None, 0]}
    rows = [
        row | {"responses": [[1, 2], None], "players": ["self", "data"]},
        row | {"responses": [[3], [4, 5, 6]], "players": ["self", "data"], "same_as": [None] * 2},
    ]
    logps = np.array([[-1.0, 0.0], [-7.0, -8.0]])
    metrics = ranking_metrics(logps, np.zeros((2, 2)), rows, 1.0, ["data", "self"])
    assert metrics["val_loss"] == (1 + 8) / (2 + 3)


def test_ties_count_half_in_evaluation():
    """As in training (loss.wins): pairs, a player against all worse responses, lengths, judges."""
    rows = []
    for _ in range(4):
        rows.append({"prompt": [9], "responses": [[1], [2], [3, 4]], "ranks": [0, 1, 2]})
    # of "data": above both, a tie with the best of them, a tie and one above it, all equal
    logps = np.array([[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    m = ranking_metrics(logps, np.zeros((4, 3)), rows, 1.0, ["data", "teacher", "self"])
    assert m["acc"] == (3 + 2.5 + 0.5 + 1.5) / 12
    assert m["acc/data"] == (1 + 0.5 + 0 + 0.5) / 4
    assert m["acc/teacher"] == (1 + 1 + 0 + 0.5) / 4
    training = [preference_loss(x[None], 0 * x[None], beta=1.0) for x in torch.from_numpy(logps)]
    assert m["acc"] == pytest.approx(np.mean([float(metrics["acc"]) for _, metrics in training]))

    m = reward_metrics(logps, rows)
    assert m["acc"] == (3 + 2.5 + 0.5 + 1.5) / 12
    assert m["length_acc"] == 1 / 6  # one of three pairs has equal lengths, two are wrong
    assert length_accuracy([2, 3], [2, 1]) == 0.75


def test_a_judge_with_equal_scores_has_no_favourite(tiny_runs):
    """Every response has the score 0, whatever it says."""
    judge, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    texts = [{"prompt": f"{i} the", "responses": ["a", "bb"]} for i in range(3)]
    pairs, _ = encode_rows(texts, enc, TEMPLATE, 64)
    with mock.patch("eval.row_logps", lambda *args: np.zeros((3, 2), np.float32)):
        assert win_rate(judge, pairs, CPU) == (0.5, 0.0)


def test_rows_in_which_nothing_is_ranked_do_not_count():
    """A row of ties costs 0 and has no pair; the ranking metrics are means over the others."""
    rows = [
        {"prompt": [9], "responses": [[1], [2]], "ranks": [0, 1]},
        {"prompt": [9], "responses": [[1], [2]], "ranks": [0, 0]},
    ]
    logps = np.array([[-1.0, -2.0], [-3.0, -1.0]])
    m = ranking_metrics(logps, np.zeros((2, 2)), rows, 1.0, ["1", "2"])
    assert m["rank_nll"] == pytest.approx(math.log1p(math.exp(-1)))
    assert m["acc"] == 1.0
    ties = ranking_metrics(logps[1:], np.zeros((1, 2)), rows[1:], 1.0, ["1", "2"])
    assert "acc" not in ties and "rank_nll" not in ties


@torch.no_grad()
def test_validation_loss_is_a_mean_over_what_is_predicted(tiny_runs, tmp_path):
    """The first token of a whole text is not predicted and does not count: plain torch in float64,
    the same in training and in eval.py, for rows of texts and of prompts."""
    texts = [{"text": text} for text in ("ab", "abc", "hello there", "xyz")]
    prompts = [{"prompt": f"{i} the", "responses": ["model" * i]} for i in range(1, 4)]
    for name, rows in (("texts", texts), ("prompts", prompts), ("both", texts + prompts)):
        folder, out = str(tmp_path / name), str(tmp_path / f"run_{name}")
        os.makedirs(folder)
        for split in ("train", "val"):
            write_rows(f"{folder}/{split}.jsonl", rows)
        write_meta(folder, "bytes", "made up")
        with torch.enable_grad():
            train.main(
                [
                    "--stage=sft",
                    f"--out_dir={out}",
                    f"--data={folder}",
                    f"--init={tiny_runs['sft']}",
                    f"--template={TEMPLATE}",
                    "--device=cpu",
                    "--max_steps=1",
                    f"--batch_size={len(rows)}",
                    "--lr=1e-12",
                ]
            )
        model, _, _ = GPT.from_checkpoint(tiny_runs["sft"])
        nll, num_targets = 0.0, 0
        for row in rows:
            if "text" in row:
                ids = [*row["text"].encode(), EOT]
                prompt, response = ids[:1], ids[1:]
            else:
                prompt = list(TEMPLATE.format(prompt=row["prompt"]).encode())
                response = [*row["responses"][0].encode(), EOT]
            nll -= slow_logprob(model, prompt, response)
            num_targets += len(response)
        expected = pytest.approx(nll / num_targets, rel=1e-5)
        assert read_metrics(out, "eval")[0]["val_loss"] == expected
        assert read_metrics(out, "step")[0]["loss"] == expected
        done = evaluate(f"a={tiny_runs['sft']}", f"--data={folder}")
        assert done.returncode == 0, done.stderr
        assert f"val_loss {nll / num_targets:.4f}" in done.stdout


# --------------------------------------------------------------------------- metrics of samples


def test_f1_score():
    assert f1_score("Return the name", "return a name") == pytest.approx(2 / 3)
    assert f1_score("", "x") == 0.0
    assert f1_score("", " ") == 1.0  # as SQuAD's script


def test_f1_as_a_scorer():
    """studies/smollm2 ranks samples by it."""
    row = {"prompt": "List files.", "responses": ["ls -l folder"]}
    assert token_f1(row, "ls folder") == pytest.approx(4 / 5)
    assert argument_f1(row, "ls folder") == pytest.approx(2 / 3)
    assert argument_f1(row, "ls") == argument_f1(row, "dir -l folder") == argument_f1(row, "") == 0
    assert argument_f1({"responses": ["ls"]}, "ls") == 1
    assert argument_f1({"responses": ["ls"]}, "ls -l") == 0


def test_sample_metrics():
    samples, references = ["#### 7", "#### 8"], ["1 + 6\n#### 7", "#### 9"]
    m = sample_metrics(samples, [[1, EOT], [1, 2, 3]], references, [True, False])
    assert m["exact_match"] == 0.5
    headings = ["#### 2. Pears are green", "#### 2. Something else"]  # no numbers of GSM8K
    assert sample_metrics(headings[:1], [[1]], headings[1:], EOT)["exact_match"] == 0.0
    assert m["ended"] == 0.5
    assert m["length"] == 2.5


def test_pass_at_k_counts_prompts_with_one_right_sample():
    samples = ["1", "2", "3", "3", "3", "3"]  # three samples each of two prompts
    ids = [[1, EOT]] * 6
    m = sample_metrics(samples, ids, ["2", "2", "2", "5", "5", "5"], [True] * 6, count=3)
    assert m["exact_match"] == pytest.approx(1 / 6)
    assert m["pass_at_3"] == 0.5


def test_scores_of_samples():
    """Their mean, and the mean of the best of each prompt's three samples."""
    samples, ids = ["1", "2", "4", "0", "1", "1"], [[1, EOT]] * 6
    scores = function_scores("tests.test_eval:as_score", [{"prompt": "a"}] * 6, samples)
    assert scores == [1, 2, 4, 0, 1, 1]
    m = sample_metrics(samples, ids, ["2"] * 6, [True] * 6, count=3, scores=scores)
    assert m["score"] == 1.5
    assert m["score_best_of_3"] == 2.5
    for text, problem in (("nan", "gave nan, not a finite number"), ("x", "raised ValueError")):
        with pytest.raises(SystemExit, match=f"{problem}.* the response '{text}'"):
            function_scores("tests.test_eval:as_score", [{"prompt": "a"}], [text])


def as_score(row, text):
    del row["prompt"]  # its own copy
    return float(text)


def test_length_accuracy_is_that_of_the_better_direction():
    assert length_accuracy([5, 5, 5], [3, 3, 9]) == pytest.approx(2 / 3)
    assert length_accuracy([1, 1], [2, 2]) == 1.0
    assert length_accuracy([2], [2]) == 0.5


# -------------------------------------------------------- what lm-evaluation-harness would report


@pytest.mark.parametrize(
    "ids, windows",
    [
        # the harness's own example: a text of ten ids, read by four
        (
            list(range(10)),
            [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])],
        ),
        ([7], [([99], [7])]),
        ([1] * 8, [([99], [1, 1, 1, 1]), ([1], [1, 1, 1, 1])]),
    ],
)
def test_rolling_windows_predict_every_id_once(ids, windows):
    found = [(row["prompt"], row["responses"][0]) for row in rolling_windows(ids, 99, 4)]
    assert found == windows


BLOCK_SIZE = 64


def slow_rolling_nats(model, text):
    """-log-probability of a whole text, id by id: each with the context of its window."""
    ids = list(text.encode())
    num_windows = math.ceil(len(ids) / BLOCK_SIZE)
    nats = 0.0
    for t, token in enumerate(ids):
        window = t // BLOCK_SIZE
        if window == 0:
            context = [EOT, *ids[:t]]
        elif window < num_windows - 1:
            context = ids[window * BLOCK_SIZE - 1 : t]
        else:  # the last window reaches back as far as it can
            context = ids[len(ids) - BLOCK_SIZE - 1 : t]
        nats -= slow_logprob(model, context, [token])
    return nats


def rows_of_every_kind():
    """Rows with choices, one of them absent, tied, empty, too long or alone; and whole texts."""
    rng = np.random.default_rng(0)
    words = "the loss of a model fällt ☃ x".split()
    rows = []
    for i in range(24):
        responses = []
        for _ in range(3):
            responses.append(" ".join(rng.choice(words, rng.integers(1, 6))))
        rows.append({"prompt": f"{i} the", "responses": responses})
    rows[0]["responses"][1] = None
    # a poor response and a good one share the first rank
    rows[1] |= {"responses": ["\x01\x02", "the", "\x03"], "scores": [1.0, 1.0, 0.0]}
    rows[2]["responses"] = ["the end"]
    rows[3]["responses"][2] = ""
    rows[4]["responses"][0] = "the loss of a model " * 5
    long = "the loss of a model falls when it reads what people write and stops at the end ☃ " * 2
    for text in (long, "what", "ä"):
        rows.append(check_row({"text": text}, ""))
    return rows


@torch.no_grad()
def test_harness_metrics_one_sequence_at_a_time(tiny_runs):
    """Without end-of-text, per UTF-8 byte, cut at the limits, long texts in windows."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rows = rows_of_every_kind()
    nats, num_bytes, right, right_by_bytes, num_choices = 0.0, 0, 0, 0, 0
    for row in rows:
        if not row["prompt"]:
            nats += slow_rolling_nats(model, row["responses"][0])
            num_bytes += len(row["responses"][0].encode())
            continue
        if "" in row["responses"]:
            continue
        prompt = list(TEMPLATE.format(prompt=row["prompt"]).encode())
        logps, sizes = [], []
        for text in row["responses"]:
            if text is None:
                logps.append(-1e9)
                sizes.append(1)
                continue
            ids = list(text.encode())[: BLOCK_SIZE - len(prompt)]
            logps.append(slow_logprob(model, prompt, ids))
            sizes.append(len(ids))
        nats -= logps[0]
        num_bytes += sizes[0]
        if len(logps) > 1:
            best = (0, 1) if "scores" in row else (0,)
            num_choices += 1
            right += np.argmax(logps) in best
            right_by_bytes += np.argmax(np.divide(logps, sizes)) in best

    encoded, _ = encode_rows(rows, enc, TEMPLATE, BLOCK_SIZE)
    m = harness_metrics(model, enc, TEMPLATE, rows, encoded, CPU)
    assert m["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert num_choices == 22
    assert m["choice_acc"] == right / num_choices
    assert m["choice_acc_bytes"] == right_by_bytes / num_choices
    assert 0 < right < right_by_bytes < num_choices


def test_the_best_choice_need_not_have_rank_0():
    assert is_best([1, 2, 2], 0, [True, True, True])
    assert not is_best([1, 2, 2], 1, [True, True, True])
    assert is_best([0, 1, 1], 2, [False, True, True])  # the best is absent: a tie of the others


def test_choices_between_which_nothing_is_ranked_do_not_count(tiny_runs):
    """Equal scores, and equal responses. Of the last row's equal ones only the first counts."""
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rows = [
        {"prompt": "1 the", "responses": ["aa", "bbbb"], "scores": [1, 1]},
        {"prompt": "2 the", "responses": ["xx", "xx"]},
        {"prompt": "3 the", "responses": ["the end", "the end", "\x01\x02"]},
    ]
    encoded, _ = encode_rows(rows, enc, TEMPLATE, BLOCK_SIZE)
    metrics = harness_metrics(model, enc, TEMPLATE, rows[:2], encoded[:2], CPU)
    assert set(metrics) == {"bits_per_byte"}

    logps = np.array([[-3.0, -2.0, -4.0]] * 3)  # equal ones differ by rounding
    with mock.patch("eval.row_logps", lambda *args: logps):
        metrics = harness_metrics(model, enc, TEMPLATE, rows, encoded, CPU)
    assert metrics["choice_acc"] == 1


# ------------------------------------------------------------------------------------- win rates


@pytest.mark.parametrize(
    "first, second, share",
    [("the end", "\x01\x02\x7f\x03", 1.0), ("the end", "the end", 0.5)],
    ids=["text against noise", "text against itself"],
)
def test_win_rate(tiny_runs, first, second, share):
    """Under a model of the data."""
    judge, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    texts = [{"prompt": f"{i} the", "responses": [first, second]} for i in range(6)]
    pairs, _ = encode_rows(texts, enc, TEMPLATE, 64)
    assert win_rate(judge, pairs, CPU) == (share, 0.0)


def test_a_response_of_no_token_is_its_end_for_a_judge(tmp_path):
    """White space that did not end, and a judge whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.save(f"{tmp_path}/tokenizer.json")
    write_json(f"{tmp_path}/tokenizer_config.json", {"eos_token": "</s>"})
    judge_enc, enc = tokenizer.load(f"{tmp_path}/tokenizer.json"), tokenizer.load("bytes")

    def ids_for_judge(text, ids):
        return retokenize(judge_enc, "{prompt}", enc, "{prompt}", text, ids)

    assert ids_for_judge("  ", [32, 32]) == [1]
    assert ids_for_judge("the ", [*b"the "]) == [2]
    assert ids_for_judge("the", [*b"the", EOT]) == [2, 1]


def test_a_judge_reads_samples_as_it_reads_the_data():
    """A judge whose template begins responses with " hm ", and a sample without it."""
    enc, lead = tokenizer.load("bytes"), "{prompt}{answer} hm {response}"
    of_data = retokenize(enc, lead, None, "", "the", None)
    assert retokenize(enc, lead, enc, "{prompt}", "the", [*b"the", EOT]) == of_data
    assert of_data == [*b" hm the", EOT]
    assert retokenize(enc, lead, enc, lead, "the", [7, EOT]) == [7, EOT]


def test_a_judge_without_thoughts_reads_what_follows_them(tiny_runs):
    """Of the data and of a policy with another template; samples of its own form stay."""
    judge, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    template = "Q{prompt}A{last}<think>\n\n</think>\n\n{response|thoughts}."
    config = {"template": template, "max_prompt": 0, "max_response": 0}
    text = "<think>x</think>y"
    ids = [*text.encode(), EOT]
    rows = [{"prompt": "p", "responses": [text]}]
    data = Samples({0: (text, None)})
    policy = Samples({0: (text, ids)}, enc, "{prompt}")
    (pair,), counts = judged_pairs(judge, enc, config, rows, data, policy)
    assert pair["responses"] == [[*b"y", EOT]] * 2
    assert counts["without thoughts"] == 2
    own = Samples({0: (text, ids)}, enc, template)
    (pair,), counts = judged_pairs(judge, enc, config, rows, own, policy)
    assert pair["responses"] == [ids, [*b"y", EOT]]
    assert counts["without thoughts"] == 1
    rows = [sampled_row({"prompt": "p"}, text, ids, enc, template)]  # the data has these samples
    (pair,), counts = judged_pairs(judge, enc, config, rows, data, policy)
    assert pair["responses"] == [[*b"y", EOT]] * 2
    assert counts["without thoughts"] == 2


# ---------------------------------------------------------------------------------- command line


def evaluate(*args):
    return command("eval", *args, "--device=cpu")


def test_checkpoints_and_a_judge(tiny_runs, tiny_data, tmp_path):
    done = evaluate(
        f"sft={tiny_runs['sft']}",
        f"cold={tiny_runs['sft']}@0",
        f"--judge={tiny_runs['pretrain']}",
        f"--data={tiny_data}",
        "--rows=8",
        f"--out={tmp_path}/e",
    )
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/e/eval.json", encoding="utf-8") as f:
        table = json.load(f)
    assert set(table) == {"sft", "cold", "data"}
    assert table["cold"]["temperature"] == 0
    assert table["sft"]["weights_sha256"] == checkpoint.weights_sha256(tiny_runs["sft"])
    assert table["cold"]["against"] == "sft"
    assert 0 <= table["cold"]["win_rate"] <= 1
    val_loss = read_metrics(tiny_runs["sft"], "eval")[-1]["val_loss"]
    assert table["sft"]["val_loss"] == pytest.approx(val_loss, rel=1e-5)
    assert table["cold"]["val_loss"] == table["sft"]["val_loss"]
    assert len(read_rows(f"{tmp_path}/e/cold.jsonl")) == 8


def test_bfloat16(tiny_runs, tiny_data, tmp_path):
    """--dtype is that of the matrix products: as a model in that dtype gives, and near float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = f"--out={tmp_path}/{dtype}.json"
        done = evaluate(f"a={tiny_runs['sft']}", f"--data={tiny_data}", f"--dtype={dtype}", out)
        assert done.returncode == 0, done.stderr
        table = read_json(f"{tmp_path}/{dtype}.json")["a"]
        assert table["settings"]["dtype"] == dtype
        losses[dtype] = table["val_loss"]
    # products are rounded to 8 bits: a relative error of 2^-8 in a logit, averaged over tokens
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 2**-8 * losses["float32"]
    done = evaluate(f"a={tiny_runs['sft']}", "--dtype=float16")
    assert done.returncode == 1 and "must be float32 or bfloat16" in done.stderr


def test_what_a_judge_cuts_is_counted(tiny_runs, tiny_data, tmp_path):
    """Prompts as well as responses, in the line and in the table."""
    judge = f"{tmp_path}/judge"
    args = [f"--data={tiny_data}", f"--init={tiny_runs['pretrain']}", f"--out_dir={judge}"]
    args += ["--template=Q: {prompt}\nA: ", "--device=cpu", "--max_steps=1"]
    train.main(["--stage=sft", *args, "--batch_size=8", "--eval_rows=8", "--max_prompt=20"])
    out = f"--out={tmp_path}/e.json"
    args = [f"sft={tiny_runs['sft']}", f"--judge={judge}", f"--data={tiny_data}", "--rows=8"]
    done = evaluate(*args, out)
    assert done.returncode == 0, done.stderr
    table = read_json(f"{tmp_path}/e.json")["data"]
    rows = read_rows(f"{tiny_data}/val.jsonl")[:8]
    marks = len("Q: \nA: ")
    cut = sum(marks + len(row["prompt"].encode()) > 20 for row in rows)
    assert table["judge_prompts_cut"] == cut > 0
    assert f"{cut} prompts are cut to the judge's limits" in done.stdout


def test_a_reference(tiny_runs, tiny_data):
    """The data's responses are ranked by implicit rewards."""
    reference = f"--reference={tiny_runs['pretrain']}"
    done = evaluate(f"a={tiny_runs['sft']}", reference, f"--data={tiny_data}", "--rows=8")
    assert done.returncode == 0, done.stderr
    assert "rank_nll" in done.stdout
    assert "acc/2" in done.stdout


def test_no_kl_to_a_reference_that_is_too_short(capsys):
    """A shorter context would be another model, and learned positions end there."""
    reference = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8))
    rows = [{"prompt": [1, 2, 3], "responses": [[4] * n], "ranks": [0]} for n in (2, 5)]
    assert sampled_kl("a", reference, reference, rows, CPU) == {"kl": 0}
    rows[1]["responses"][0].append(4)
    assert sampled_kl("a", reference, reference, rows, CPU) == {}
    assert "a: no kl, because 1 of 2 samples are longer" in capsys.readouterr().out


def test_the_same_out_again(tmp_path):
    """After an interruption before eval.json was written, the files are known as those of eval.py.
    A file of the user is not replaced, nor metrics that would not be measured again."""
    out, rows_path = str(tmp_path), "x/val.jsonl"

    def check(**checkpoints):
        entries = {}
        for name, path in checkpoints.items():
            entries[name] = eval_command.Entry(path, 1.0, {}, None, {})
        eval_command.check_folder(out, rows_path, entries, {"judge": "rm", "rows": 8})

    eval_command.name_players(out, ["data", "a"])
    (tmp_path / "a.jsonl").write_text("")
    check(a="c")
    row = {"checkpoint": "c", "temperature": 1.0, "data": rows_path}
    write_json(f"{out}/eval.json", {"b": row, "data": {"win_rate": 0.5}})
    eval_command.name_players(out, ["data", "b"])
    check(a="c", b="c")
    for checkpoints in ({"a": "c"}, {"a": "c", "b": "another"}):
        with pytest.raises(SystemExit, match="has metrics of b, c on x/val.jsonl"):
            check(**checkpoints)
    for changed in ({"temperature": 0.0}, {"data": "y/val.jsonl"}):
        write_json(f"{out}/eval.json", {"b": row | changed})
        with pytest.raises(SystemExit, match="which this command does not measure"):
            check(b="c")
    write_json(f"{out}/eval.json", {"b": row | {"settings": {"judge": None, "rows": 8}}})
    with pytest.raises(SystemExit, match="has metrics of b under other settings"):
        check(b="c")
    judged = {"b": row, "a": row | {"against": "b"}, "data": {"against": "b"}}
    for some in (judged, {"b": row, "data": {"against": "b"}}):
        write_json(f"{out}/eval.json", some)
        check(b="c", a="c")
        with pytest.raises(SystemExit, match="has win rates against b"):
            check(a="c", b="c")
    write_json(f"{out}/eval.json", {"b": row | {"settings": {"judge": "rm", "rows": 8}}})
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(SystemExit, match="mine.jsonl is there"):
        check(b="c", mine="c")


@pytest.mark.parametrize("out", ["table", "table.json"])
def test_two_commands_at_a_time_with_one_out(tiny_runs, tiny_data, tmp_path, monkeypatch, out):
    """The one that ends first has its table. The other says so, and its metrics are printed."""
    out = f"{tmp_path}/{out}"
    options = [f"--data={tiny_data}", "--rows=8", f"--out={out}"]
    evaluate = eval_module.evaluate_checkpoint

    def evaluate_after_the_other(*args):
        monkeypatch.setattr(eval_module, "evaluate_checkpoint", evaluate)
        eval_module.main([f"b={tiny_runs['pretrain']}", *options])
        return evaluate(*args)

    monkeypatch.setattr(eval_module, "evaluate_checkpoint", evaluate_after_the_other)
    with pytest.raises(SystemExit, match="has metrics of b"):
        eval_module.main([f"a={tiny_runs['sft']}", *options])
    path = out if out.endswith(".json") else f"{out}/eval.json"
    assert "b" in read_json(path) and "a" not in read_json(path)


def test_a_judge_that_has_no_system_messages(tiny_runs):
    rows = [{"prompt": "a", "responses": ["b"], "system": "Be kind."}]
    with pytest.raises(SystemExit, match="system messages, and the template of --judge"):
        check_judge(tiny_runs["sft"], rows, "x/val.jsonl")
    check_judge(tiny_runs["sft"], [{"prompt": "a", "responses": ["b"]}], "x/val.jsonl")


def test_a_folder_whose_name_ends_as_a_temperature_does(tiny_runs, tmp_path):
    sft = checkpoint.resolve(tiny_runs["sft"])
    shutil.copytree(sft, f"{tmp_path}/a@2/round_0/step_000001")
    parsed = eval_command.parse_checkpoints(
        [f"{tmp_path}/a@2", f"cold={tmp_path}/a@2@0.5", f"b={sft}@0"]
    )
    path = f"{tmp_path}/a@2/round_0/step_000001"
    assert parsed == {"a@2": (path, 1.0), "cold": (path, 0.5), "b": (sft, 0.0)}


def test_a_reference_that_is_being_trained_is_the_same_for_all(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    reference, sft = f"{tmp_path}/reference", checkpoint.resolve(tiny_runs["sft"])
    shutil.copytree(checkpoint.resolve(tiny_runs["pretrain"]), f"{reference}/round_0/step_000001")

    def evaluate_checkpoint(*arguments):
        result = measure(*arguments)
        if not os.path.exists(f"{reference}/round_0/step_000002"):
            shutil.copytree(sft, f"{reference}/round_0/step_000002")
        return result

    measure = eval_module.evaluate_checkpoint
    monkeypatch.setattr(eval_module, "evaluate_checkpoint", evaluate_checkpoint)
    options = [f"--reference={reference}", f"--data={tiny_data}", "--rows=8", "--device=cpu"]
    eval_module.main([f"a={sft}@0", f"b={sft}@0", *options, f"--out={tmp_path}/e.json"])
    table = read_json(f"{tmp_path}/e.json")
    assert table["a"]["margin"] == table["b"]["margin"]
    assert table["a"]["settings"]["reference"] == f"{reference}/round_0/step_000001"


def test_a_judge_and_a_reference_that_are_removed_meanwhile(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    """A run that is being trained removes its older checkpoints."""
    sft, path = checkpoint.resolve(tiny_runs["sft"]), f"{tmp_path}/round_0/step_000001"
    shutil.copytree(sft, path)

    def evaluate_checkpoint(*arguments):
        shutil.rmtree(path, ignore_errors=True)
        return measure(*arguments)

    measure = eval_module.evaluate_checkpoint
    monkeypatch.setattr(eval_module, "evaluate_checkpoint", evaluate_checkpoint)
    options = [f"--reference={path}", f"--judge={path}", f"--data={tiny_data}", "--rows=8"]
    eval_module.main([f"a={sft}", f"b={sft}", *options, "--device=cpu", f"--out={tmp_path}/e.json"])
    table = read_json(f"{tmp_path}/e.json")
    assert table["b"]["judged"] > 0
    assert table["a"]["reward_chosen"] == table["b"]["reward_chosen"] == 0


def test_several_samples_and_their_kl(tiny_runs, tiny_data, tmp_path):
    """The first of several samples is the one that is written, and the KL to the model itself is 0,
    to another one what one sequence at a time gives."""
    sft, pretrain = tiny_runs["sft"], tiny_runs["pretrain"]
    options = [f"--data={tiny_data}", "--rows=8", "--samples=3", f"--out={tmp_path}/e"]
    scorer = "--scorer=builtins:no_such"
    done = evaluate(f"a={sft}", scorer, *options)
    assert done.returncode == 1
    assert "scorer builtins:no_such" in done.stderr.splitlines()[-1]
    done = evaluate(f"a={sft}", f"cold={sft}@0", f"--reference={sft}", *options)
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/e/eval.json", encoding="utf-8") as f:
        table = json.load(f)
    assert table["a"]["kl"] == 0
    assert "pass_at_3" in table["a"]
    assert not {"kl", "pass_at_3"} & set(table["cold"])
    assert len(read_rows(f"{tmp_path}/e/a.jsonl")) == 8

    done = evaluate(f"a={sft}", f"--reference={sft}", *options)
    assert done.returncode == 1 and "has metrics of cold" in done.stderr
    options[2:] = ["--samples=1", f"--out={tmp_path}/one"]
    done = evaluate(f"a={sft}", f"--reference={pretrain}", *options)
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/one/eval.json", encoding="utf-8") as f:
        kl = json.load(f)["a"]["kl"]
    policy, enc, meta = GPT.from_checkpoint(checkpoint.resolve(sft), "cpu")
    reference, _, _ = GPT.from_checkpoint(checkpoint.resolve(pretrain), "cpu")
    differences = []
    for row in read_rows(f"{tmp_path}/one/a.jsonl"):
        prompt = encode_rows([row], enc, meta["config"]["template"], policy.config.block_size)
        prompt = prompt[0][0]["prompt"]
        nats = [slow_logprob(model, prompt, row["ids"][0]) for model in (policy, reference)]
        differences.append(nats[0] - nats[1])
    assert kl == pytest.approx(np.mean(differences), rel=1e-4)


def sft_run(out, folder, *options):
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--device=cpu", "--max_steps=1"]
    train.main(["--stage=sft", f"--out_dir={out}", f"--data={folder}", *shape, *options])
    return out


def test_rows_that_a_run_was_trained_on_are_counted(tiny_runs, tiny_data, tmp_path, capsys):
    """What one run holds out may be among the training rows of another."""
    data = f"{tmp_path}/data"
    shutil.copytree(tiny_data, data)
    held_out = read_rows(f"{tiny_data}/val.jsonl")
    write_rows(f"{data}/train.jsonl", read_rows(f"{data}/train.jsonl") + held_out[:2])
    write_meta(data, "bytes", "made up")
    args = ["--stage=sft", f"--init={tiny_runs['sft']}", f"--data={data}", "--max_steps=1"]
    train.main([*args, f"--out_dir={tmp_path}/run", "--eval_rows=2"])
    checkpoints = [f"before={tiny_runs['sft']}", f"after={tmp_path}/run"]
    step = checkpoint.latest(f"{tmp_path}/run")
    imported = f"{tmp_path}/imported/round_0/step_000000"
    shutil.copytree(step, f"{imported}.copy")
    checkpoint.publish(f"{imported}.copy", imported, checkpoint.read_meta(step) | {"step": 0})
    checkpoints.append(f"imported={tmp_path}/imported")
    args = ["--stage=sft", f"--init={tmp_path}/run", f"--data={tiny_data}", "--max_steps=1"]
    train.main([*args, f"--out_dir={tmp_path}/more", "--eval_rows=2"])
    checkpoints.append(f"more={tmp_path}/more")
    merged = f"{tmp_path}/merged/round_0/step_000000"
    shutil.copytree(step, f"{merged}.copy")
    meta = checkpoint.read_meta(step) | {"step": 0, "base": step}
    checkpoint.publish(f"{merged}.copy", merged, meta)
    checkpoints.append(f"merged={tmp_path}/merged")
    capsys.readouterr()
    eval_module.main([*checkpoints, "--rows=100", f"--out={tmp_path}/table.json"])
    table = read_json(f"{tmp_path}/table.json")
    assert [table[name]["rows_trained_on"] for name in ("before", "after", "more")] == [0, 2, 2]
    assert table["merged"]["rows_trained_on"] == 2
    assert "rows_trained_on" not in table["imported"]
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    n = len(held_out)
    both = f"{tiny_data}/train.jsonl"
    start = f"warning: 2 of {n} rows are in the training files of"
    assert said == [
        f"{start} after, merged too (the same prompt in {data}/train.jsonl, {both})",
        f"{start} more too (the same prompt in {both}, {data}/train.jsonl)",
    ]


def test_rows_of_a_training_file_that_was_changed_are_not_counted(tmp_path, tiny_data, capsys):
    """Prepared again into the same folder, or moved; an init that is another run now. The rows that
    are known are still said."""
    data, other, first = f"{tmp_path}/data", f"{tmp_path}/other", f"{tmp_path}/first"
    for folder in (data, other):
        shutil.copytree(tiny_data, folder)
    rows = read_rows(f"{data}/val.jsonl")
    write_rows(f"{other}/train.jsonl", rows[:2])
    write_meta(other, "bytes", "made up")
    sft_run(first, data)
    args = ["--stage=sft", f"--init={first}", f"--data={other}", "--max_steps=1"]
    train.main([*args, f"--out_dir={tmp_path}/second"])

    def known():
        """rows_trained_on of first and second, and what is said of them."""
        table = f"{tmp_path}/table.json"
        args = [first, f"{tmp_path}/second", f"--data={tiny_data}", f"--out={table}"]
        capsys.readouterr()
        eval_module.main([*args, "--max_response=4"])
        said = [line for line in capsys.readouterr().out.splitlines() if "training" in line]
        return [metrics.get("rows_trained_on") for metrics in read_json(table).values()], said

    second = f"warning: 2 of {len(rows)} rows are in the training files of second too (the same"
    counts, said = known()
    assert counts == [0, 2] and len(said) == 1 and said[0].startswith(second)

    write_rows(f"{data}/train.jsonl", read_rows(f"{data}/train.jsonl")[1:])
    counts, said = known()
    changed = f"are not all known: {data}/train.jsonl was changed since"
    assert counts == [None, None]
    assert said[:2] == [f"the training rows of {name} {changed}" for name in ("first", "second")]
    assert said[2].startswith(second) and len(said) == 3

    shutil.rmtree(data)
    assert f"not all known: {data}/train.jsonl is not there" in known()[1][0]
    os.makedirs(f"{data}/train.jsonl")
    assert f"not all known: {data}/train.jsonl cannot be read: Is a directory" in known()[1][0]
    shutil.rmtree(data)
    shutil.rmtree(first)
    sft_run(first, other)
    counts, said = known()
    assert counts == [2, None]
    assert f"{first}/round_0/step_000001 cannot be read, or is another checkpoint now" in said[1]


def test_a_training_file_that_cannot_be_read_is_said(tmp_path, tiny_data, tiny_runs, capsys):
    """A run by an older version, which did not keep its hash: else the file would be another."""
    data = f"{tmp_path}/data"
    shutil.copytree(tiny_data, data)
    run = checkpoint.latest(tiny_runs["sft"])
    meta = checkpoint.read_meta(run)
    older = meta | {"settings": {}, "config": meta["config"] | {"data": data, "init": ""}}
    args = eval_command.make_parser("").parse_args([run])
    entry = eval_command.read_entry("older", run, 1.0, args)
    entry.meta = older
    eval_command.say_trained_on({"older": entry}, read_rows(f"{data}/val.jsonl"))
    assert entry.counts.pop("rows_trained_on") == 0 and not capsys.readouterr().out
    with open(f"{data}/train.jsonl", "a") as f:
        f.write("no row")
    eval_command.say_trained_on({"older": entry}, read_rows(f"{data}/val.jsonl"))
    said = capsys.readouterr().out
    assert said.startswith(f"the training rows of older are not all known: {data}/train.jsonl:")
    assert "rows_trained_on" not in entry.counts


def test_a_stage_that_reads_no_rows_was_trained_on_none(tiny_data, tiny_runs):
    """Pretraining reads train.bin; a folder can have both."""
    meta = checkpoint.read_meta(checkpoint.latest(tiny_runs["sft"]))
    config = meta["config"] | {"data": tiny_data, "init": ""}
    for stage, files in (("sft", [f"{tiny_data}/train.jsonl"]), ("pretrain", [])):
        trained = meta | {"config": config | {"stage": stage}, "settings": {}}
        assert eval_command.training_files(trained) == (files, [])
    assert eval_command.training_files(meta | {"step": 0}) == ([], [])
    merged = meta | {"step": 0, "base": tiny_runs["sft"], "adapter": "folder"}
    assert eval_command.training_files(merged)[1] == ["folder was merged into it"]


def test_the_data_of_an_import_and_of_a_merge(tmp_path, tiny_data, tiny_runs):
    """An import's setting is the default. A merge has that of the run that it was merged into."""
    run = checkpoint.latest(tiny_runs["sft"])
    meta = checkpoint.read_meta(run)
    assert meta["config"]["data"] == tiny_data
    imported = {"step": 0, "config": meta["config"] | {"data": f"{tmp_path}/default"}}
    merged = imported | {"base": run, "base_sha256": meta["weights_sha256"], "adapter": "folder"}
    onto_import = f"{tmp_path}/onto/round_0/step_000000"
    shutil.copytree(run, f"{onto_import}.copy")
    checkpoint.publish(f"{onto_import}.copy", onto_import, meta | {"step": 0})
    assert eval_command.data_of(meta) == eval_command.data_of(merged) == tiny_data
    assert eval_command.data_of(imported) == ""
    assert eval_command.data_of(merged | {"base": onto_import, "base_sha256": None}) == ""
    assert eval_command.data_of(merged | {"base_sha256": "of another"}) == ""
    args = eval_command.make_parser("").parse_args(["x"])
    with mock.patch.object(eval_command, "is_there", lambda path: path == "/val.jsonl"):
        assert eval_command.find_rows(args, [imported]) == "data/pydocs/val.jsonl"
    assert eval_command.find_rows(args, [imported, merged]) == f"{tiny_data}/val.jsonl"
    files, unknown = eval_command.training_files(merged)
    assert (files, unknown) == ([f"{tiny_data}/train.jsonl"], ["folder was merged into it"])
    files, unknown = eval_command.training_files(merged | {"base_sha256": "of another"})
    is_another = f"{run} cannot be read, or is another checkpoint now"
    assert files == [] and unknown[1] == is_another
    with mock.patch.object(checkpoint, "resolve", side_effect=PermissionError(13, "denied")):
        assert checkpoint.read_meta_of_init(merged) is None
        assert eval_command.training_files(merged)[1][1] == is_another


def test_every_checkpoint_is_measured_on_the_same_rows(tmp_path):
    """Those that fit all of them; how many are left out, and by which, is said, and what is cut."""
    rows = [{"prompt": "q" * n, "responses": ["answer", "no"]} for n in (1, 2, 3, 30, 31)]
    folder = str(tmp_path / "data")
    os.makedirs(folder)
    for split in ("train", "val"):
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, "bytes", "made up")
    options = ["--template=<{prompt}>", "--batch_size=2"]
    runs = {
        "long": sft_run(f"{tmp_path}/long", folder, "--block_size=64", *options),
        "short": sft_run(f"{tmp_path}/short", folder, "--block_size=24", *options),
        "cut": sft_run(f"{tmp_path}/cut", folder, "--block_size=64", "--max_response=5", *options),
    }
    specs = [f"{name}={run}" for name, run in runs.items()]
    done = evaluate(*specs, f"--data={folder}", f"--out={tmp_path}/e")
    assert done.returncode == 0, done.stderr
    assert "3 of 5 rows are measured: 2 have no room in short (block_size 24)" in done.stdout
    assert "cut: 0 prompts and 3 responses of 3 rows are cut to its limits" in done.stdout
    with open(f"{tmp_path}/e/eval.json", encoding="utf-8") as f:
        table = json.load(f)
    for name in runs:
        assert (table[name]["rows"], table[name]["left_out"]) == (3, 2)
        assert table[name]["responses_cut"] == (3 if name == "cut" else 0)
    alone = evaluate(f"long={runs['long']}", f"--data={folder}")  # without a shorter one beside it
    assert "rows are measured" not in alone.stdout

    for split in ("train", "val"):
        write_rows(f"{folder}/{split}.jsonl", rows[3:])
    write_meta(folder, "bytes", "made up")
    done = evaluate(*specs, f"--data={folder}")
    assert done.returncode == 1
    assert "block_size 24 leaves no room after any of 2 prompts" in done.stderr


def test_ids_never_reach_a_model_of_another_tokenizer(tiny_runs, tiny_data, tmp_path):
    enc = tokenizer.train(["the loss of a model falls " * 9], 300)
    tokenizer.save(enc, f"{tmp_path}/own.tiktoken")
    options = [f"--tokenizer={tmp_path}/own.tiktoken", "--block_size=64", "--batch_size=2"]
    other = sft_run(f"{tmp_path}/other", tiny_data, *options)
    done = evaluate(f"a={tiny_runs['sft']}", f"--reference={other}", f"--data={tiny_data}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a and --reference" in done.stderr and "different tokenizers" in done.stderr


def test_samples_of_eval_say_whether_they_ended(tiny_runs, tiny_data, tmp_path):
    options = [f"--data={tiny_data}", "--rows=8", f"--out={tmp_path}/e"]
    done = evaluate(f"a={tiny_runs['sft']}", *options)
    assert done.returncode == 0, done.stderr
    rows = read_rows(f"{tmp_path}/e/a.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["ended"] == (row["ids"][0][-1] == EOT)
    assert not all(row["ended"] for row in rows)


def test_rows_of_the_same_prompt_keep_their_own_answers(tiny_runs, tmp_path):
    """Two rows of one prompt, and a whole text, which nobody answers."""
    rows = [
        {"prompt": "same", "responses": ["first answer"]},
        {"prompt": "same", "responses": ["second one"], "ended": False},
    ]
    folder = f"{tmp_path}/data"
    os.makedirs(folder)
    for split in ("train", "val"):
        write_rows(f"{folder}/{split}.jsonl", [*rows, {"text": "the loss of a model"}])
    write_meta(folder, "bytes", "made up")
    done = evaluate(f"a={tiny_runs['sft']}", f"--data={folder}", f"--out={tmp_path}/e")
    assert done.returncode == 0, done.stderr
    assert sorted(read_rows(f"{tmp_path}/e/data.jsonl"), key=str) == sorted(rows, key=str)
    one, two = read_rows(f"{tmp_path}/e/a.jsonl")
    assert one["ids"] != two["ids"]


@pytest.mark.parametrize(
    "spec, message",
    [("a=RUN@hot", "no checkpoint"), ("sft", "no checkpoint"), ("a=nowhere", "no checkpoint")],
)
def test_bad_checkpoints_are_one_line(tiny_runs, tiny_data, spec, message):
    done = evaluate(spec.replace("RUN", tiny_runs["sft"]), f"--data={tiny_data}")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_out_is_neither_a_run_nor_a_data_folder(tiny_runs, tiny_data):
    """The samples of a player named metrics would replace a run's metrics.jsonl."""
    run = tiny_runs["sft"]
    for folder in (run, checkpoint.latest(run), tiny_data):
        before = sorted(os.listdir(folder))
        with pytest.raises(SystemExit, match="run's or a data folder"):
            main([f"metrics={run}", f"--data={tiny_data}", f"--out={folder}"])
        assert sorted(os.listdir(folder)) == before


def test_a_reward_model_is_no_reference(tiny_runs, tiny_data, tmp_path):
    args = ["--stage=reward", f"--init={tiny_runs['sft']}", f"--data={tiny_data}"]
    train.main([*args, f"--out_dir={tmp_path}/rm", "--max_steps=1", "--batch_size=4"])
    with pytest.raises(SystemExit, match="is a reward model, not a policy"):
        main([f"a={tiny_runs['sft']}", f"--data={tiny_data}", f"--reference={tmp_path}/rm"])


def test_out_replaces_only_what_an_earlier_eval_wrote(tiny_runs, tiny_data, tmp_path):
    options = [f"--data={tiny_data}", "--rows=4"]
    for name in ("a.jsonl", "data.jsonl", "eval.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        content = '{"prompt": "mine", "responses": ["x"]}\n'
        (folder / name).write_text(content)
        done = evaluate(f"a={tiny_runs['sft']}", *options, f"--out={folder}")
        assert done.returncode == 1
        assert f"{folder}/{name}" in done.stderr and "give another --out" in done.stderr
        assert done.stderr.count("\n") == 1
        assert os.listdir(folder) == [name] and (folder / name).read_text() == content
    out = tmp_path / "e"
    for _ in range(2):
        done = evaluate(f"a={tiny_runs['sft']}", *options, f"--out={out}")
        assert done.returncode == 0, done.stderr
        assert len(read_rows(f"{out}/a.jsonl")) == len(read_rows(f"{out}/data.jsonl")) == 4
    done = evaluate(f"a={tiny_runs['sft']}", *options, f"--out={out}", "--rows=6")
    assert done.returncode == 1 and "under other settings" in done.stderr
    assert len(read_rows(f"{out}/a.jsonl")) == 4
    (out / "b.jsonl").write_text(content)
    done = evaluate(f"b={tiny_runs['sft']}", *options, f"--out={out}")
    assert done.returncode == 1 and f"{out}/b.jsonl is there" in done.stderr


def test_a_checkpoint_without_limits_gets_some(tiny_data, tmp_path):
    """As an imported model has none: responses end after 256 tokens, and fewer rows are measured.
    What is set on the command line counts instead. The data is that of the run, and is named."""
    run = sft_run(f"{tmp_path}/run", tiny_data, "--block_size=700", "--batch_size=2")
    done = evaluate(run, "--rows=2", f"--out={tmp_path}/e")
    assert done.returncode == 0, done.stderr
    assert (
        "run has no limits of its own: prompts of at most 700 tokens, responses of 256, 2 rows"
        in done.stdout
    )
    assert f"{tiny_data}/val.jsonl: 2 of 12 rows" in done.stdout
    with open(f"{tmp_path}/e/eval.json", encoding="utf-8") as f:
        table = json.load(f)
    assert table["run"]["max_response"] == 256
    assert table["run"]["data"] == f"{tiny_data}/val.jsonl"
    assert max(len(row["ids"][0]) for row in read_rows(f"{tmp_path}/e/run.jsonl")) == 256

    done = evaluate(run, "--max_prompt=9")
    assert "max_prompt 9 leaves no room after any of 12 prompts" in done.stderr
    limits = ["--max_prompt=64", "--max_response=3"]
    done = evaluate(f"short={run}", f"--data={tiny_data}", *limits, f"--out={tmp_path}/s")
    assert done.returncode == 0, done.stderr
    assert "no limits" not in done.stdout and "12 of 12 rows" in done.stdout
    assert "short: 0 prompts and 36 responses of 12 rows are cut" in done.stdout
    assert {len(row["ids"][0]) for row in read_rows(f"{tmp_path}/s/short.jsonl")} <= {1, 2, 3}


def test_limits_of_a_run_stay(tiny_runs):
    done = evaluate(f"a={tiny_runs['sft']}", "--rows=1")
    assert done.returncode == 0 and "no limits" not in done.stdout, done.stderr


def test_out_can_be_a_file(tiny_runs, tiny_data, tmp_path):
    """One that is not there, or of an earlier eval.py."""
    options = [f"a={tiny_runs['sft']}", f"--data={tiny_data}/val.jsonl", "--rows=2"]
    path = f"{tmp_path}/new/table.json"
    for _ in range(2):
        done = evaluate(*options, f"--out={path}")
        assert done.returncode == 0, done.stderr
        assert os.listdir(f"{tmp_path}/new") == ["table.json"]
    with open(path, encoding="utf-8") as f:
        assert json.load(f)["a"]["rows"] == 2
    for content in ("[]", '{"mine": 1}'):
        with open(path, "w", encoding="utf-8") as f:
            f.write(content)
        done = evaluate(*options, f"--out={path}")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        with open(path, encoding="utf-8") as f:
            assert f.read() == content
    done = evaluate(*options, f"--out={tiny_runs['sft']}/config.json")
    assert done.returncode == 1 and "would be a file of a run" in done.stderr


@torch.no_grad()
def test_logps_of_given_rows(tiny_runs, tmp_path):
    """In the order of the file, those of a plain forward pass in float64 over the bytes. A response
    is cut as in training, and then has no end-of-text."""
    rows = [
        {"prompt": "0 the loss", "responses": ["of a model", "falls when it reads what", None]},
        {"text": "the loss of a model"},
        {"prompt": "x" * 90, "responses": ["no room"]},
        {"prompt": "1 the", "responses": ["", "loss"]},
    ]
    path = f"{tmp_path}/rows.jsonl"
    write_rows(path, rows)
    runs = [f"{name}={tiny_runs[name]}" for name in ("sft", "pretrain")]
    done = evaluate(*runs, "--logps", f"--data={path}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["checkpoint"], line["row"]) for line in lines] == [
        (name, i) for name in ("sft", "pretrain") for i in range(4)
    ]
    for name in ("sft", "pretrain"):
        model, _, meta = GPT.from_checkpoint(tiny_runs[name])
        model.double()
        config = meta["config"]
        for line in lines:
            if line["checkpoint"] != name:
                continue
            row = rows[line["row"]]
            if "text" in row:
                prompt, responses = [], [[*row["text"].encode(), EOT]]
            else:
                prompt = list(config["template"].format(prompt=row["prompt"], response="").encode())
                responses = []
                for text in row["responses"]:
                    responses.append(None if text is None else [*text.encode(), EOT])
            for k, response in enumerate(responses):
                if response is None or len(prompt) >= 64:
                    assert line["logps"][k] is None and line["tokens"][k] == 0
                    continue
                response = response[: config["max_response"] or 64]
                response = response[: 64 - len(prompt)]
                context = prompt or response[:1]  # a text's first token is not predicted
                predicted = response if prompt else response[1:]
                slow = slow_logprob(model, context, predicted)
                assert line["logps"][k] == pytest.approx(slow, rel=1e-5)
                assert line["tokens"][k] == len(predicted)

    out = f"{tmp_path}/logps.jsonl"
    done = evaluate(*runs, "--logps", f"--data={path}", f"--out={out}")
    assert done.returncode == 0 and f"{out}: 8 lines" in done.stdout
    with open(out, encoding="utf-8") as f:
        assert [json.loads(line) for line in f] == lines
    done = evaluate(*runs, "--logps", f"--data={path}", f"--out={tmp_path}/folder")
    assert done.returncode == 1 and "give a .jsonl file" in done.stderr
    done = evaluate(*runs, "--logps", f"--data={path}", f"--out={path}")
    assert done.returncode == 1 and "is what this command reads" in done.stderr


def test_logps_are_the_reference_log_probabilities_of_training(tiny_runs, tiny_data, tmp_path):
    """The ref of a preference run's validation rows, bit for bit but for the place in a batch."""
    out = f"{tmp_path}/dpo"
    args = ["--stage=preference", f"--out_dir={out}", f"--data={tiny_data}", "--device=cpu"]
    args += [f"--init={tiny_runs['sft']}", "--max_response=16", "--max_steps=1", "--batch_size=4"]
    train.main(args)
    done = evaluate(
        tiny_runs["sft"], "--logps", f"--data={tiny_data}", f"--judge={tiny_runs['sft']}"
    )
    assert done.returncode == 1
    assert done.stderr == "--logps only scores the data: it has no use for --judge\n"
    done = evaluate(tiny_runs["sft"], "--logps", f"--data={tiny_data}", "--rows=12")
    by_row = [json.loads(line)["logps"] for line in done.stdout.splitlines()]
    refs = np.load(f"{out}/round_0/val.ref.npz")["refs"]
    order = np.random.default_rng([0, 0]).permutation(12)  # of validation_rows
    np.testing.assert_allclose(np.array(by_row)[order], refs, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["byte level", "legacy", "first", "never"])
def test_bytes_of_a_response_cut_within_a_character(scheme, tmp_path):
    """Of every prefix of its tokens. A part of a character counts as its bytes, not as the three
    of U+FFFD, which stands for it in the decoded text. U+FFFD itself has three."""
    if scheme == "byte level":
        folder = tokenizers_like.chatml(str(tmp_path))
    else:
        folder = tokenizers_like.sentencepiece(str(tmp_path), scheme)
    enc = tokenizer.load(f"{folder}/tokenizer.json")
    texts = ["日本語 the テキスト", "🙂👩 the end🚀", "привет"]
    for text in [*texts, "a \ufffd b\ufffd", "\ufffd"]:
        ids = written_ids(enc, TEMPLATE, text)
        sizes = []
        for token in [enc.full.id_to_token(i) for i in ids]:
            if scheme == "byte level":
                sizes.append(len(tokenizer.token_bytes(token)))
            elif re.fullmatch("<0x..>", token):
                sizes.append(1)
            else:
                sizes.append(len(token.replace("▁", " ").encode()))
        extra = sum(sizes) - len(text.encode())  # a space before the text, which is no part of it
        assert extra in (0, 1)
        for n in range(1, len(ids) + 1):
            assert count_bytes(enc, TEMPLATE, ids[:n]) == sum(sizes[:n]) - extra


@pytest.mark.parametrize("limit", [BLOCK_SIZE, 30])
@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "U: {prompt} A: {response|trim}",
        "U: {prompt} A:{answer} <x>{response|trim} .{end}\n",
    ],
)
def test_bytes_are_those_of_the_scored_text(template, limit, tiny_runs):
    """Trimmed or not, with what the template writes around it or not, cut or not: here a token is a
    byte."""
    _, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])
    rows = [{"prompt": "1 the", "responses": ["the end\n", " a ", None, " the " * 9]}]
    encoded, _ = encode_rows(rows, enc, template, limit)
    responses, sizes = without_end(enc, template, rows[0], encoded[0])
    assert sizes == [len(ids or []) for ids in responses]
    assert (encoded[0]["responses"][3][-1] == enc.eot_token) == (limit == BLOCK_SIZE)


def test_bytes_where_a_special_token_takes_white_space(tmp_path):
    """As Phi-3's do: the white space after the prompt is not scored, so it is not counted."""
    folder = tokenizers_like.byte_level(str(tmp_path), ["<|a|>"], "", "<|end|>", strips=True)
    enc = tokenizer.load(f"{folder}/tokenizer.json")
    template = "{prompt}<|a|>\n{response}<|end|>\n"
    rows = [{"prompt": "the", "responses": ["  hi there", "hi there", "\n\nq"]}]
    encoded, _ = encode_rows(rows, enc, template, BLOCK_SIZE)
    responses, sizes = without_end(enc, template, rows[0], encoded[0])
    assert sizes == [8, 8, 1]
    for ids, size in zip(responses, sizes):
        assert len(enc.decode(ids).encode()) == size


def test_a_choice_of_no_byte_is_there():
    """As a lone "▁" is, to which a response can be cut."""
    rows = [{"prompt": "p", "responses": ["a", "b"]}]
    encoded = [{"prompt": [1], "responses": [[2], [3]], "ranks": [0, 1]}]
    with (
        mock.patch("eval.row_logps", lambda *args: np.array([[-1.0, -2.0]])),
        mock.patch("eval.without_end", lambda *args: ([[2], [3]], [0, 1])),
        np.errstate(divide="ignore"),
    ):
        metrics = harness_metrics(None, None, TEMPLATE, rows, encoded, CPU)
    assert metrics["choice_acc"] == 1.0
