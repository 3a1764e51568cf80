"""Stages spin and preference under a scorer (`ranked_by`): a function, a reward model, a judge.

Ranked rows are checked against a slow ranking, whose scores are computed one response at a time.
"""

import glob
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    TEMPLATE,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    letters,
    load_config,
    read_metrics,
    refused,
    spin_args,
)
from test_distributed import ENV, torchrun_command
from test_train import change_rows, preference_args, read_bytes, read_json, spoil_weights

import loss
import players
import rollout
import scorer as scoring
import train
from data import tokenizer
from data.batch import batch_indices, batch_rows
from data.folder import write_meta
from data.gsm8k.scorer import same_answer
from data.rows import check_row, encode_rows, prompt_key, read_rows, sampled_row, write_rows
from eval import pad_rows_to_K, ranking_metrics, row_logps
from model import GPT
from nanospin import checkpoint, distributed, elastic, rounds

BYTES = tokenizer.load("bytes")
LETTERS = "--ranked_by=conftest:letters"
FOUR = ["--players=data,self:3", "--max_rows=16", "--max_steps=2"]


def scored_args(runs, data, out, *more):
    """A spin run of one round: data and three samples of each of 16 prompts, two steps."""
    return spin_args(runs, data, out, LETTERS, *FOUR, *more)


def ranked_by(monkeypatch, function):
    monkeypatch.setattr(conftest, "scorer", function, raising=False)
    return "--ranked_by=conftest:scorer"


def constant(row, text):
    return 1.0


def ended_with_period(row, text):
    """A score of few values: many ties."""
    return float("e" in text)


# ------------------------------------------------------------------------ the slow ranking


def candidates_of(row, out, data, split, round_id=0, more=()):
    """[(player, text, ids)] of a prompt, from the files of samples and of the data.

    more: the like of other players.
    """
    found = list(more)
    for data_row in read_rows(f"{data}/{split}.jsonl"):
        if prompt_key(data_row) == prompt_key(row):
            text = data_row["responses"][0]
            found.append(("data", text, [*text.encode(), BYTES.eot_token]))
            break
    for sample in read_rows(f"{out}/round_{round_id}/self_{split}.jsonl"):
        if prompt_key(sample) == prompt_key(row):
            found.append(("self", sample["responses"][0], sample["ids"][0]))
    return found


def slow_ranks(scores):
    """The number of higher scores, for each."""
    ranks = []
    for score in scores:
        ranks.append(sum(other > score for other in scores))
    return ranks


def check_ranked_row(row, candidates, score, atol=0.0):
    """A ranked row is its candidates in the order of their scores.

    score(text, ids) -> float, computed for each candidate alone. atol: of the stored scores.
    """
    limit = 16  # max_response
    expected = []
    for player, text, ids in candidates:
        expected.append((score(text, ids), player, text, ids[:limit]))
    expected.sort(key=lambda item: -item[0])
    K = len(expected)
    assert len(row["responses"]) == len(row["players"]) == len(row["scores"]) == K
    wanted = [item[0] for item in expected]
    np.testing.assert_allclose(row["scores"], wanted, rtol=0, atol=atol)
    if atol == 0.0:
        assert row["ranks"] == slow_ranks(row["scores"]) == slow_ranks(wanted)
    assert sorted(row["players"]) == sorted(item[1] for item in expected)
    left = list(expected)
    for k in range(K):
        same = row["same_as"][k]
        ids = row["ids"][k if same is None else same][:limit]
        matches = [item for item in left if item[1] == row["players"][k] and item[3] == ids]
        assert matches
        assert any(abs(item[0] - row["scores"][k]) <= atol for item in matches)
        left.remove(matches[0])
        if same is not None:
            assert same < k
            assert row["ids"][k] is None and row["responses"][k] is None


def response_logp(model, enc, template, prompt, ids):
    """(log pi(ids | prompt), number of ids), from the logits of one sequence. Samples keep their
    ids: bytes that are not UTF-8 have no text."""
    context = enc.encode_ordinary(template.replace("{prompt}", prompt))
    response = ids[: model.config.block_size - len(context)]
    idx = torch.tensor([context + response])
    logps = model.eval()(idx).log_softmax(-1)[0]
    total = 0.0
    for n, token in enumerate(response):
        total += float(logps[len(context) + n - 1, token])
    return total, len(response)


def check_round(out, data, score, atol=0.0, K=4):
    """Every row of round 0. score(row, text, ids) -> float."""
    for split, n in (("train", 16), ("val", 8)):
        rows = read_rows(f"{out}/round_0/{split}.jsonl")
        assert len(rows) == n
        for row in rows:
            candidates = candidates_of(row, out, data, split)
            assert len(candidates) == K
            check_ranked_row(
                row, candidates, lambda text, ids, row=row: score(row, text, ids), atol
            )


# ----------------------------------------------------------------------------- the referees


@pytest.fixture(scope="module")
def scored_run(tiny_runs, tiny_data, tmp_path_factory):
    """Two rounds under a function."""
    out = str(tmp_path_factory.mktemp("scored") / "run")
    train.main(scored_args(tiny_runs, tiny_data, out, "--rounds=2"))
    return out


@pytest.fixture(scope="module")
def reward_run(tiny_runs, tiny_data, tmp_path_factory):
    """A reward model with a template of its own."""
    out = str(tmp_path_factory.mktemp("reward") / "run")
    args = spin_args(tiny_runs, tiny_data, out, "--stage=reward", "--max_steps=3", "--lr=1e-2")
    train.main([*args, "--template={prompt} -> "])
    return out


def test_a_function_ranks(scored_run, tiny_data):
    check_round(scored_run, tiny_data, lambda row, text, ids: letters(row, text))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_judge_ranks(tiny_runs, tiny_data, tmp_path, normalize):
    """By its mean log-probability of a token, end-of-text included, or by the sum."""
    out, judge_run = f"{tmp_path}/r", tiny_runs["pretrain"]
    options = [f"--ranked_by={judge_run}", f"--judge_length_normalize={normalize}"]
    train.main(scored_args(tiny_runs, tiny_data, out, *options))
    judge, enc, meta = GPT.from_checkpoint(judge_run)

    @torch.no_grad()
    def score(row, text, ids):
        total, n = response_logp(judge, enc, meta["config"]["template"], row["prompt"], ids)
        return total / n if normalize else total

    # float32 sums of at most 30 terms of about 5
    check_round(out, tiny_data, score, atol=1e-5 if normalize else 2e-4)


def test_a_reward_model_ranks(tiny_runs, tiny_data, reward_run, tmp_path):
    """By its scalar head at the last token of prompt and response alone."""
    out, colon = f"{tmp_path}/r", f"{tmp_path}/reward:10"  # no module:function
    shutil.copytree(reward_run, colon)
    train.main(scored_args(tiny_runs, tiny_data, out, f"--ranked_by={colon}"))
    model, enc, _ = GPT.from_checkpoint(reward_run)

    @torch.no_grad()
    def score(row, text, ids):
        context = enc.encode_ordinary(f"{row['prompt']} -> ")
        idx = torch.tensor([context + ids[:16]])
        return float(model.eval().values(idx, torch.tensor([idx.numel() - 1])))

    check_round(out, tiny_data, score, atol=1e-5)


def test_in_order_the_samples_of_a_player_tie(tiny_runs, tiny_data, tmp_path):
    """Plackett-Luce is then the data against the rest: s_data - logsumexp of all scores."""
    out = f"{tmp_path}/r"
    train.main(spin_args(tiny_runs, tiny_data, out, "--ranked_by=order", *FOUR))
    rows = read_rows(f"{out}/round_0/train.jsonl")
    for row in rows:
        assert row["ranks"] == [0, 1, 1, 1]
        assert "scores" not in row and "players" not in row
        candidates = candidates_of(row, out, tiny_data, "train")
        for k, (_, text, ids) in enumerate(candidates):
            if row["same_as"][k] is None:
                assert (row["responses"][k], row["ids"][k]) == (text, ids)
    encoded, _ = encode_rows(rows, BYTES, TEMPLATE, 64, 0, 16)
    batch = batch_rows(encoded)
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, *batch.ranks.shape, generator=g, dtype=torch.float64)
    value, _ = loss.preference_loss(policy, reference, batch.response_mask, 0.5, ranks=batch.ranks)
    expected = []
    for s, mask in zip((0.5 * (policy - reference)).tolist(), batch.response_mask.tolist()):
        there = [x for x, is_there in zip(s, mask) if is_there]
        expected.append(math.log(sum(map(math.exp, there))) - s[0])
    # float64, four terms
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-12)
    # a round starts at the ln of the number of distinct responses, ln 4 and not ln 4!
    (start,) = read_metrics(out, "start")
    assert start["off"] < 1e-4
    num_distinct = batch.response_mask.sum(1).tolist()
    chosen = train.batch_indices(len(rows), 8, 1337, 0)
    expected = np.mean([math.log(num_distinct[i]) for i in chosen])
    assert start["loss"] == pytest.approx(expected, abs=1e-5)  # float32, eight terms of about 1


@pytest.mark.parametrize("K", [2, 5, 8])
def test_any_number_of_samples(tiny_runs, tiny_data, tmp_path, K):
    out = f"{tmp_path}/r"
    options = [f"--players=data,self:{K - 1}", "--max_steps=1"]
    train.main(scored_args(tiny_runs, tiny_data, out, *options))
    check_round(out, tiny_data, lambda row, text, ids: letters(row, text), K=K)
    assert read_metrics(out, "start")[0]["off"] < 1e-4


# ---------------------------------------------------------------------------- stage preference


def data_ranking_args(runs, data, out, *more):
    return preference_args(runs, data, out, "--max_rows=16", *more)


def test_the_responses_of_the_data_are_ranked_again(tiny_runs, tiny_data, tmp_path):
    """Rows of two and three responses, one of them twice. The data's own order is ignored."""
    data, shuffled = f"{tmp_path}/data", f"{tmp_path}/shuffled"
    shutil.copytree(tiny_data, data)

    def make_ragged(rows):
        for i, row in enumerate(rows):
            if i % 3 == 0:
                row["responses"] = row["responses"][:2]
            if i % 3 == 1:
                row["responses"].append(row["responses"][0])
        return rows

    change_rows(data, make_ragged)
    args = data_ranking_args(tiny_runs, data, f"{tmp_path}/r", LETTERS)
    train.main(args)
    by_prompt = {row["prompt"]: row for row in read_rows(f"{data}/train.jsonl")}
    for row in read_rows(f"{tmp_path}/r/round_0/train.jsonl"):
        texts = by_prompt[row["prompt"]]["responses"]
        assert row["scores"] == sorted([letters(row, text) for text in texts], reverse=True)
        assert row["ranks"] == slow_ranks(row["scores"])
        assert "players" not in row
        for k, text in enumerate(row["responses"]):
            if text is not None:
                assert letters(row, text) == row["scores"][k]
        assert {text for text in row["responses"] if text} == set(texts)
    assert read_metrics(f"{tmp_path}/r", "start")[0]["off"] < 1e-4
    (collected,) = read_metrics(f"{tmp_path}/r", "collect")
    assert {"score_best", "score_worst", "signal"} <= set(collected)

    shutil.copytree(data, shuffled)

    def turn(rows):
        return [row | {"responses": row["responses"][::-1]} for row in rows]

    change_rows(shuffled, turn)
    train.main(data_ranking_args(tiny_runs, shuffled, f"{tmp_path}/again", LETTERS))
    expected = read_bytes(f"{tmp_path}/r/round_0/train.jsonl")
    assert read_rows(f"{tmp_path}/again/round_0/train.jsonl") == json_lines(expected)


def json_lines(content):
    return [json.loads(line) for line in content.splitlines()]


def test_the_data_ranks_as_before(tiny_runs, tiny_data, tmp_path):
    train.main(data_ranking_args(tiny_runs, tiny_data, f"{tmp_path}/a"))
    train.main(data_ranking_args(tiny_runs, tiny_data, f"{tmp_path}/b", "--ranked_by=data"))
    assert_same_run(f"{tmp_path}/a", f"{tmp_path}/b")
    assert not os.path.exists(f"{tmp_path}/b/round_0/train.jsonl")


def test_an_empty_response_without_an_end_is_absent(tiny_runs, tiny_data, tmp_path):
    """It has no token."""
    data, out = f"{tmp_path}/data", f"{tmp_path}/r"
    shutil.copytree(tiny_data, data)

    def add_empty(rows):
        for row in rows:
            row |= {"responses": [*row["responses"], ""], "ended": [True, True, None, False]}
        return rows

    change_rows(data, add_empty)
    args = data_ranking_args(tiny_runs, data, out, LETTERS)
    train.main(args)
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert row["responses"][-1] is row["ids"][-1] is row["scores"][-1] is None
        assert row["same_as"][-1] is None and row["ranks"][-1] == 4
    train.main(args)


# ------------------------------------------------------------------------------ ties and absence


def test_ties_are_no_pairs(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """A score of two values: the loss is over the pairs of a high and a low one."""
    out = f"{tmp_path}/r"
    function = ranked_by(monkeypatch, ended_with_period)
    train.main(scored_args(tiny_runs, tiny_data, out, function, "--loss_type=pairs"))
    rows = read_rows(f"{out}/round_0/train.jsonl")
    assert any(len(set(row["ranks"])) == 2 for row in rows)
    for row in rows:
        num_high = sum(score == 1 for score in row["scores"])
        assert row["ranks"] == [0] * num_high + [num_high] * (4 - num_high)
    (start,) = read_metrics(out, "start")
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5)  # whatever is tied


def test_ties_stand_in_an_order_of_their_ids(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Of no player, so that the order of ties says nothing about who wrote them."""
    out = f"{tmp_path}/r"

    def once(row, text):
        return 0.0 if row["prompt"].startswith("1") else letters(row, text)

    train.main(scored_args(tiny_runs, tiny_data, out, ranked_by(monkeypatch, once)))
    firsts = []
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        if row["prompt"].startswith("1"):
            assert row["ranks"] == [0] * 4
            firsts.append(row["players"][0])
    assert len(firsts) >= 3 and len(set(firsts)) == 2


def test_rows_of_equal_scores_are_left_out_and_counted(
    tiny_runs, tiny_data, tmp_path, monkeypatch, capsys
):
    def half(row, text):
        return 1.0 if int(row["prompt"].split()[0]) % 2 else letters(row, text)

    out = f"{tmp_path}/r"
    train.main(scored_args(tiny_runs, tiny_data, out, ranked_by(monkeypatch, half)))
    printed = capsys.readouterr().out
    rows = read_rows(f"{out}/round_0/train.jsonl")
    num_equal = sum(len(set(present_ranks(row))) < 2 for row in rows)
    assert 0 < num_equal < 16
    counted = [line for line in printed.splitlines() if line.startswith("round 0 train:")]
    assert f"{num_equal} with nothing ranked" in counted[0]
    manifest = read_json(f"{out}/round_0/collect.json")
    assert manifest["rows"]["train"] == 16 - num_equal
    assert manifest["report"]["train"]["signal"] == 1 - num_equal / 16
    assert manifest["rows"]["val"] == 8  # they have a validation loss


def present_ranks(row):
    return [rank for rank, ids in zip(row["ranks"], row["ids"]) if ids is not None]


def test_nothing_left_to_rank_is_one_clear_line(tiny_runs, tiny_data, tmp_path, monkeypatch):
    args = scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", ranked_by(monkeypatch, constant))
    message = refused(args)
    assert "ranked_by conftest:scorer gives all responses to a prompt the same score" in message
    assert "for each of 16 prompts" in message and "16 with nothing ranked" in message
    message = refused(
        data_ranking_args(tiny_runs, tiny_data, f"{tmp_path}/p", "--ranked_by=conftest:scorer")
    )
    assert "gives all responses to a prompt the same score" in message


def test_empty_answers_of_a_teacher_stay_absent(tiny_runs, tiny_data, tmp_path):
    """Last in the row, without a score. The function is not called with them."""
    answers = []
    for split in ("train", "val"):
        for row in read_rows(f"{tiny_data}/{split}.jsonl"):
            text = "" if int(row["prompt"].split()[0]) % 3 else "a bee sees"
            answers.append({"prompt": row["prompt"], "responses": [text]})
    path, out = f"{tmp_path}/teacher.jsonl", f"{tmp_path}/r"
    write_rows(path, answers)
    options = ["--players=data,teacher,self:2", f"--teacher={path}"]
    train.main(scored_args(tiny_runs, tiny_data, out, *options))
    num_absent = 0
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        if int(row["prompt"].split()[0]) % 3:
            num_absent += 1
            assert row["players"][-1] == "teacher" and row["ranks"][-1] == 4
            assert row["responses"][-1] is row["ids"][-1] is row["scores"][-1] is None
            assert row["same_as"][-1] is None
            candidates = candidates_of(row, out, tiny_data, "train")
            shorter = {}
            for name in ("responses", "players", "scores", "same_as", "ids", "ranks"):
                shorter[name] = row[name][:-1]
            check_ranked_row(shorter, candidates, lambda text, ids: letters(None, text))
    report = read_json(f"{out}/round_0/collect.json")["report"]["train"]
    assert report["empty/teacher"] == num_absent / 16


# -------------------------------------------------------------------------------- the players


@pytest.mark.parametrize("referee", ["function", "judge", "reward"])
def test_the_order_of_the_players_makes_no_difference(
    tiny_runs, tiny_data, reward_run, tmp_path, referee
):
    """Under a scorer: the same files, byte for byte, and the same weights."""
    names = {"function": "conftest:letters", "judge": tiny_runs["pretrain"], "reward": reward_run}
    for name, order in (("a", "data,self:3"), ("b", "self:3,data")):
        options = [f"--players={order}", f"--ranked_by={names[referee]}"]
        train.main(scored_args(tiny_runs, tiny_data, f"{tmp_path}/{name}", *options))
    for file in ("self_train", "train", "val"):
        expected = read_bytes(f"{tmp_path}/a/round_0/{file}.jsonl")
        assert read_bytes(f"{tmp_path}/b/round_0/{file}.jsonl") == expected
    assert_same_run(f"{tmp_path}/a", f"{tmp_path}/b")


def test_of_equal_responses_the_datas_is_kept(tiny_runs, tiny_data, tmp_path):
    """In whatever order the players are named: it is in the validation loss."""
    data = f"{tmp_path}/data"
    shutil.copytree(tiny_data, data)
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])

    def answer_as_the_model_would(rows):
        texts, _ = players.respond(model, enc, TEMPLATE, rows, max_response=16, temperature=0)
        for row, text in zip(rows[::2], texts[::2]):
            row["responses"] = [text]
        return rows

    change_rows(data, answer_as_the_model_would)
    for name, order in (("a", "data,self:2"), ("b", "self:2,data")):
        options = ["--temperature=0", f"--players={order}", "--max_steps=1"]
        train.main(scored_args(tiny_runs, data, f"{tmp_path}/{name}", *options))
        for row in read_rows(f"{tmp_path}/{name}/round_0/val.jsonl"):
            assert row["ids"][row["players"].index("data")] is not None
    expected = read_bytes(f"{tmp_path}/a/round_0/train.jsonl")
    assert read_bytes(f"{tmp_path}/b/round_0/train.jsonl") == expected


def test_top_players_stay_on_top(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Whatever their score, in their own order; the others are ranked by the score."""

    def own_samples_are_best(row, text):
        is_of_data = any(text in (y, "the teacher") for y in row["responses"])
        return -1.0 if is_of_data else letters(row, text)

    path, out = f"{tmp_path}/teacher.jsonl", f"{tmp_path}/r"
    answers = []
    for split in ("train", "val"):
        for row in read_rows(f"{tiny_data}/{split}.jsonl"):
            answers.append({"prompt": row["prompt"], "responses": ["the teacher"]})
    write_rows(path, answers)
    options = ["--players=data,teacher,self:2", "--top_players=teacher,data", f"--teacher={path}"]
    function = ranked_by(monkeypatch, own_samples_are_best)
    train.main(scored_args(tiny_runs, tiny_data, out, *options, function))
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert row["players"] == ["teacher", "data", "self", "self"]
        assert row["scores"][:2] == [-1.0, -1.0]
        assert row["ranks"][:2] == [0, 1]
        assert row["scores"][2] >= row["scores"][3]
        assert row["ranks"][2:] == ([2, 2] if row["scores"][2] == row["scores"][3] else [2, 3])


def test_a_round_draws_among_prompts_that_leave_room(tiny_runs, tiny_data, tmp_path, capsys):
    """max_rows of them in each round. What is dropped is said once, of all, and so is which
    validation rows are among all training rows."""
    data, out = f"{tmp_path}/data", f"{tmp_path}/r"
    shutil.copytree(tiny_data, data)
    rows = read_rows(f"{data}/train.jsonl")
    for row in rows[::2]:
        row["prompt"] += 80 * "y"  # block_size is 64
    write_rows(f"{data}/train.jsonl", rows)
    write_rows(f"{data}/val.jsonl", rows[1:8:2])
    write_meta(data, "bytes", "test")
    options = ["--max_prompt=0", "--max_rows=3", "--rounds=3", "--max_steps=1"]
    args = scored_args(tiny_runs, data, out, "--players=self:6", LETTERS, *options)
    train.main(args)
    printed = capsys.readouterr().out
    num_dropped = len(rows[::2])
    assert printed.count(f"{num_dropped} dropped") == 1
    assert "4 of 4 validation rows are among the training rows too" in printed
    drawn = []
    for round_id in range(3):
        drawn.append([row["prompt"] for row in read_rows(f"{out}/round_{round_id}/train.jsonl")])
        assert len(drawn[-1]) == 3 and not any("yyyy" in prompt for prompt in drawn[-1])
    assert len(set(sum(drawn, []))) == 9


# ------------------------------------------------------------------------------------- options


def encoded_round(args):
    """(train, val): the encoded rows of round 0 of a run."""
    collected = []
    collect = rollout.collect

    def keep(*a, **kw):
        collected.append(collect(*a, **kw))
        return collected[-1]

    stages = {}
    for name, stage in train.STAGES.items():
        stages[name] = train.replace(stage, collect=keep)
    train.main(args, stages=stages)
    return collected[0][:2]


def num_present(row):
    return sum(y is not None for y in row["responses"])


def test_best_and_worst(tiny_runs, tiny_data, tmp_path):
    """Two responses of a row are trained on. All are evaluated: the validation loss is of every
    row's response in the data."""
    args = scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", "--best_and_worst=True")
    trained, held_out = encoded_round(args)
    by_prompt = {}
    for row in read_rows(f"{tmp_path}/r/round_0/train.jsonl"):
        ids = BYTES.encode_ordinary(TEMPLATE.replace("{prompt}", row["prompt"]))
        by_prompt[tuple(ids)] = [y[:16] for y in row["ids"] if y is not None]
    assert len(trained) > 10
    for row in trained:
        there = by_prompt[tuple(row["prompt"])]
        kept = [y for y in row["responses"] if y is not None]
        assert kept == [there[0], there[-1]]
    assert sum(num_present(row) > 2 for row in held_out) > 4
    start = read_metrics(f"{tmp_path}/r", "step")[0]
    assert start["nll"] == pytest.approx(math.log(2), abs=1e-5)
    train.main(scored_args(tiny_runs, tiny_data, f"{tmp_path}/all"))
    one = read_metrics(f"{tmp_path}/r", "eval")[0]
    other = read_metrics(f"{tmp_path}/all", "eval")[0]
    assert one["val_loss"] == other["val_loss"]


def first_batch(trained):
    """The encoded rows of the first step, with a batch_size of 16 and the default seed."""
    return [trained[i] for i in train.batch_indices(len(trained), 16, 1337, 0)]


def ordered_pairs(row):
    """(i, j) of an encoded row: both are there, and i is better."""
    there = [k for k, y in enumerate(row["responses"]) if y is not None]
    return [(i, j) for i in there for j in there if row["ranks"][i] < row["ranks"][j]]


def test_rank_depth_1(tiny_runs, tiny_data, tmp_path):
    """The best against all worse ones: ln of their number and 1."""
    args = scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", "--rank_depth=1", "--batch_size=16")
    trained, _ = encoded_round(args)
    expected = []
    for row in first_batch(trained):
        best = min(i for i, _ in ordered_pairs(row))
        expected.append(math.log(1 + sum(i == best for i, _ in ordered_pairs(row))))
    # float32, 16 terms of about 1
    nll = read_metrics(f"{tmp_path}/r", "step")[0]["nll"]
    assert nll == pytest.approx(np.mean(expected), abs=1e-5)
    assert read_metrics(f"{tmp_path}/r", "start")[0]["off"] < 1e-4


def test_score_margin(tiny_runs, tiny_data, tmp_path):
    """At a round's start a pair costs ln(1 + exp(margin x the difference of its scores))."""
    options = ["--score_margin=2", "--loss_type=pairs", "--batch_size=16"]
    trained, _ = encoded_round(scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    losses = []
    for row in first_batch(trained):
        pairs = []
        for i, j in ordered_pairs(row):
            pairs.append(math.log1p(math.exp(2 * (row["scores"][i] - row["scores"][j]))))
        losses.append(np.mean(pairs))
    expected = np.mean(losses)
    assert expected > math.log(2) + 0.05
    # float32, 16 terms of about 1
    assert read_metrics(f"{tmp_path}/r", "step")[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert read_metrics(f"{tmp_path}/r", "start")[0]["off"] < 1e-4


def test_score_margin_beside_answers_of_the_data(tiny_runs, tiny_data, tmp_path):
    """The answers that only the validation loss reads have no score. They are in one batch with
    ranked rows, so no held-out row has."""
    options = ["--players=self:3", "--score_margin=1"]
    args = scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options)
    trained, held_out = encoded_round(args)
    assert len(held_out) == 16
    assert all("scores" in row for row in trained)
    assert not any("scores" in row for row in held_out)
    batch_rows(held_out)
    batch_rows(held_out[::-1])
    assert "val_loss" in read_metrics(f"{tmp_path}/r", "eval")[0]


def expected_start(loss_type, row, beta):
    """The loss of an encoded row whose implicit rewards are all 0, one pair at a time."""
    there = [k for k, y in enumerate(row["responses"]) if y is not None]
    pairs = ordered_pairs(row)
    if loss_type == "hinge":
        return 1.0
    if loss_type == "linear":
        return 0.0
    if loss_type == "sppo":
        total = 0.0
        for k in there:
            wins = sum(i == k for i, _ in pairs)
            losses = sum(j == k for _, j in pairs)
            ties = len(there) - 1 - wins - losses
            total += (((wins + ties / 2) / (len(there) - 1) - 0.5) / beta) ** 2
        return total
    if loss_type == "best_of_n":
        best = row["responses"][there[0]]
        return -row["ref"][there[0]] / len(best)
    return math.log(2)  # pairs with length_normalize


@pytest.mark.parametrize("loss_type", ["hinge", "linear", "sppo", "best_of_n", "pairs"])
def test_losses_start_at_their_expected_value(tiny_runs, tiny_data, tmp_path, loss_type):
    options = [f"--loss_type={loss_type}", "--batch_size=16", "--max_steps=3"]
    if loss_type == "pairs":
        options.append("--length_normalize=True")
    trained, _ = encoded_round(scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    (start,) = read_metrics(f"{tmp_path}/r", "start")
    assert start["off"] < 1e-4
    expected = np.mean([expected_start(loss_type, row, 0.5) for row in first_batch(trained)])
    # float32 log-probabilities of about 60 nats, 6e-8 each, over a length of 10
    assert start["loss"] == pytest.approx(expected, abs=1e-4)
    losses = [record["loss"] for record in read_metrics(f"{tmp_path}/r", "step")]
    assert losses[-1] < losses[0]


def test_length_normalize_with_pl(tiny_runs, tiny_data, tmp_path):
    options = ["--length_normalize=True", "--nll_coef=0.1", "--max_steps=3"]
    train.main(scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert read_metrics(f"{tmp_path}/r", "start")[0]["off"] < 1e-4


# ------------------------------------------------------------------------ prompts without answers


@pytest.fixture
def prompts_only(tiny_data, tmp_path):
    """A data folder whose rows are prompts; the validation rows have answers."""
    folder = f"{tmp_path}/prompts"
    shutil.copytree(tiny_data, folder)
    path = f"{folder}/train.jsonl"
    write_rows(path, [{"prompt": row["prompt"]} for row in read_rows(path)])
    write_meta(folder, "bytes", "made up")
    return folder


def test_prompts_without_answers(tiny_runs, tiny_data, prompts_only, tmp_path):
    """Samples of the policy alone are ranked. The validation loss is of the answers that there
    are: that of a run on rows with answers."""
    out = f"{tmp_path}/r"
    train.main(scored_args(tiny_runs, prompts_only, out, "--players=self:3", "--rounds=2"))
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert row["players"] == ["self"] * 3
    train.main(scored_args(tiny_runs, tiny_data, f"{tmp_path}/answers"))
    val_loss = read_metrics(out, "eval")[0]["val_loss"]
    expected = read_metrics(f"{tmp_path}/answers", "eval")[0]["val_loss"]
    assert val_loss == pytest.approx(expected, rel=1e-6)  # other rows beside them in a batch
    report = read_metrics(out, "collect")[0]
    assert "exact_match/self" in report and "length_acc/self" not in report

    path = f"{prompts_only}/val.jsonl"
    write_rows(path, [{"prompt": row["prompt"]} for row in read_rows(path)])
    write_meta(prompts_only, "bytes", "made up")
    train.main(scored_args(tiny_runs, prompts_only, f"{tmp_path}/none", "--players=self:3"))
    last = read_metrics(f"{tmp_path}/none", "eval")[-1]
    assert "val_loss" not in last and "acc" in last and "kl_from_ref" in last
    message = refused(scored_args(tiny_runs, prompts_only, f"{tmp_path}/data"))
    assert "it has no responses" in message


def test_other_prompts_in_each_round(scored_run, tiny_runs, tiny_data, tmp_path):
    """Under max_rows, and the same ones in a run of the same seed. The held-out ones stay."""
    again = f"{tmp_path}/again"
    train.main(scored_args(tiny_runs, tiny_data, again, "--rounds=2"))
    rounds_of = {}
    for run in (scored_run, again):
        rounds_of[run] = [read_bytes(f"{run}/round_{r}/train.jsonl") for r in (0, 1)]
    assert rounds_of[scored_run] == rounds_of[again]
    first, second = ({row["prompt"] for row in json_lines(content)} for content in rounds_of[again])
    assert len(first) == len(second) == 16 and not first & second  # 32 of 40
    held_out = [
        [row["prompt"] for row in read_rows(f"{again}/round_{r}/val.jsonl")] for r in (0, 1)
    ]
    assert held_out[0] == held_out[1]


def seen_prompts(rounds_of):
    """How often each row was taken after each round, checked: a round has no row twice, and no row
    was taken more than once more than another."""
    n = max(map(max, rounds_of)) + 1
    counts = np.zeros(n, int)
    for chosen in rounds_of:
        assert len(set(chosen)) == len(chosen)
        counts[list(chosen)] += 1
        assert counts.max() - counts.min() <= 1
    return counts


@pytest.mark.parametrize("n, size", [(1, 1), (5, 3), (7, 5), (8, 7), (10, 4), (12, 4), (40, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_a_round_has_no_prompt_twice(n, size, seed):
    """Over rounds each is there equally often, up to one. Until a round would have one twice they
    are those of `batch_indices`."""
    rounds_of = [rounds.round_indices(n, size, seed, r).tolist() for r in range(4 * n)]
    assert all(len(chosen) == size for chosen in rounds_of)
    assert seen_prompts(rounds_of).sum() == 4 * n * size
    before = [batch_indices(n, size, seed, r).tolist() for r in range(4 * n)]
    repeated = [len(set(chosen)) < size for chosen in before]
    same = repeated.index(True) if True in repeated else 4 * n
    assert rounds_of[:same] == before[:same]
    assert same == 4 * n or n % size


GROUPS = ["--stage=ppo", "--reward=conftest:letters", "--advantage=grpo", "--samples_per_prompt=3"]


@pytest.mark.parametrize("stage", ["spin", "ppo"])
def test_rounds_that_begin_the_data_again(tiny_runs, tiny_data, tmp_path, stage):
    """The third round has the last 8 of 40 prompts and 8 others. With seed 1 drawing 16 rows in a
    plain order would have one of them twice."""
    kind = GROUPS if stage == "ppo" else [LETTERS, "--players=self:3"]

    def args(out, num_rounds):
        more = ["--max_rows=16", "--max_steps=2", "--seed=1", f"--rounds={num_rounds}"]
        return spin_args(tiny_runs, tiny_data, f"{tmp_path}/{out}", *kind, *more)

    train.main(args("new", 3))
    numbers = {prompt_key(row): n for n, row in enumerate(read_rows(f"{tiny_data}/train.jsonl"))}
    rounds_of = []
    for r in range(3):
        rows = read_rows(f"{tmp_path}/new/round_{r}/train.jsonl")
        rounds_of.append([numbers[prompt_key(row)] for row in rows])
        assert len(read_rows(f"{tmp_path}/new/round_{r}/self_train.jsonl")) == 16 * 3
    assert seen_prompts(rounds_of).tolist().count(2) == 8
    assert len(set(batch_indices(40, 16, 1, 2))) == 15
    train.main(args("new", 4))  # more rounds go on


def test_replay_rounds_under_a_scorer(scored_run, tiny_runs, tiny_data, tmp_path):
    """The rows of the round before, with the scores that they got then."""
    out = f"{tmp_path}/r"
    more = ["--rounds=2", "--replay_rounds=1", "--max_steps=0", "--score_margin=1"]
    train.main(scored_args(tiny_runs, tiny_data, out, *more))
    expected = read_bytes(f"{scored_run}/round_0/train.jsonl")
    assert read_bytes(f"{out}/round_0/train.jsonl") == expected
    manifest = read_json(f"{out}/round_1/collect.json")
    both = read_rows(f"{out}/round_0/train.jsonl") + read_rows(f"{out}/round_1/train.jsonl")
    ranked = [row for row in both if len(set(present_ranks(row))) > 1]
    assert manifest["rows"]["train"] == len(ranked) > 16
    assert "round_0/train.jsonl" in manifest["made_of"]


# ------------------------------------------------------------------------- scorers that misbehave


class Scorer:
    """A function that gives `result`, or raises it, from call `at` on."""

    def __init__(self, result, at=40):
        self.result, self.at, self.calls = result, at, 0

    def __call__(self, row, text):
        self.calls += 1
        if self.calls <= self.at:
            return letters(row, text)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.mark.parametrize("result", [None, math.nan, "1", ValueError("no such word")])
def test_a_scorer_that_fails(tiny_runs, tiny_data, scored_run, tmp_path, monkeypatch, result):
    """One line with the function, the prompt and the value, and no ranked row. Fixed, the same
    command goes on from the samples and from the scores that it has."""
    monkeypatch.setattr(rounds, "PART_SIZE", 4)
    out = f"{tmp_path}/r"
    function = ranked_by(monkeypatch, Scorer(result))
    args = scored_args(tiny_runs, tiny_data, out, function, "--rounds=2")
    message = refused(args)
    shown = "raised ValueError: no such word" if isinstance(result, ValueError) else repr(result)
    assert message.startswith("ranked_by conftest:scorer ") and shown in message
    rows = read_rows(f"{scored_run}/round_0/train.jsonl")
    prompt = rows[40 // 4]["prompt"]  # four responses to each
    assert f"the prompt {prompt!r}" in message
    assert not os.path.exists(f"{out}/round_0/train.jsonl")
    assert len(glob.glob(f"{out}/round_0/train.jsonl.scores.part*")) == 2
    samples = f"{out}/round_0/self_train.jsonl"
    written = os.stat(samples).st_mtime_ns

    fixed = Scorer(None, at=10**9)
    ranked_by(monkeypatch, fixed)
    train.main(args)
    assert os.stat(samples).st_mtime_ns == written
    scored = 2 * (16 + 8) * 4
    assert fixed.calls == scored - 2 * 4 * 4  # less two parts of four rows
    assert_same_run(scored_run, out)
    assert not glob.glob(f"{out}/round_*/*.part*")


def test_a_slow_scorer_is_progress(monkeypatch):
    """A part of a thousand rows may take longer than `timeout`: each call counts as progress, so
    that the rank is not taken for one that hangs."""
    touches = []

    def slow(row, text):
        touches.append(distributed.heartbeat.touches)
        return 0.0

    ranked_by(monkeypatch, slow)
    cfg = SimpleNamespace(reward="", ranked_by="conftest:scorer")
    scoring.call_function(cfg, [({"prompt": "p"}, "text")] * 20)
    assert len(set(touches)) == 20


def test_a_scorer_that_changes_its_row(tiny_runs, tiny_data, scored_run, tmp_path, monkeypatch):
    def change(row, text):
        score = letters(row, text)
        row["prompt"] = row["prompt"].upper()
        row["responses"].clear()
        return score

    function = ranked_by(monkeypatch, change)
    train.main(scored_args(tiny_runs, tiny_data, f"{tmp_path}/r", function, "--rounds=2"))
    assert_same_run(scored_run, f"{tmp_path}/r")


def test_a_function_with_another_source_is_said(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Its scores are not mixed: parts of the old source are scored again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rounds, "PART_SIZE", 4)
    out, path = f"{tmp_path}/r", tmp_path / "graded_rows.py"
    path.write_text("def f(row, text):\n    return text.count('e') if text else 1 / 0\n")
    args = scored_args(tiny_runs, tiny_data, out, "--ranked_by=graded_rows:f", "--rounds=2")
    with monkeypatch.context() as m:
        m.setattr(scoring, "call_function", killing(scoring.call_function, 3))
        with pytest.raises(Killed):
            train.main(args)
    path.write_text("def f(row, text):\n    return -text.count('e')\n")
    importlib.invalidate_caches()
    del sys.modules["graded_rows"]
    train.main(args)
    (warning,) = read_metrics(out, "warning")
    assert "the source of ranked_by graded_rows:f has changed" in warning["text"]
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert all(score <= 0 for score in row["scores"])
    manifest = read_json(f"{out}/round_1/collect.json")
    assert manifest["made_of"]["ranked_by"] == rounds.sha256(str(path))


def test_a_source_that_changes_in_a_run(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """The run goes on with the function that it has. Started again, it has the new one, and does
    not mix their scores."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rounds, "PART_SIZE", 4)
    out, path = f"{tmp_path}/r", tmp_path / "edited_rows.py"
    path.write_text("def f(row, text):\n    return text.count('e')\n")
    first = rounds.sha256(str(path))
    args = scored_args(tiny_runs, tiny_data, out, "--ranked_by=edited_rows:f", "--rounds=2")
    fit = train.fit

    def fit_and_edit(*fit_args):
        fit(*fit_args)
        path.write_text("def f(row, text):\n    return -text.count('e')\n")

    with monkeypatch.context() as m:
        m.setattr(train, "fit", fit_and_edit)
        m.setattr(scoring, "call_function", killing(scoring.call_function, 7))
        with pytest.raises(Killed):
            train.main(args)
    assert len(glob.glob(f"{out}/round_1/train.jsonl.scores.part*")) == 1
    importlib.invalidate_caches()
    del sys.modules["edited_rows"]
    train.main(args)
    sources = [first, rounds.sha256(str(path))]
    for r, sign in enumerate((1, -1)):
        manifest = read_json(f"{out}/round_{r}/collect.json")
        assert manifest["made_of"]["ranked_by"] == sources[r]
        for row in read_rows(f"{out}/round_{r}/train.jsonl"):
            assert all(sign * score >= 0 for score in row["scores"])


@pytest.mark.parametrize("when", ["between rounds", "between starts"])
def test_other_weights_of_a_scorer_are_refused(
    tiny_runs, tiny_data, reward_run, tmp_path, monkeypatch, when
):
    """With the original put back, the same command goes on."""
    judge, out = f"{tmp_path}/judge", f"{tmp_path}/r"
    shutil.copytree(reward_run, judge)
    args = scored_args(tiny_runs, tiny_data, out, f"--ranked_by={judge}", "--rounds=2")
    fit = train.fit

    def fit_and_spoil(*fit_args):
        fit(*fit_args)
        if when == "between starts":
            raise Killed
        spoil_weights(judge, 0.5)

    with monkeypatch.context() as m:
        m.setattr(train, "fit", fit_and_spoil)
        if when == "between rounds":
            message = refused(args)
        else:
            with pytest.raises(Killed):
                train.main(args)
            spoil_weights(judge, 0.5)
            message = refused(args)
    if when == "between rounds":
        assert f"{judge}" in message and "model.safetensors was changed" in message
    else:
        assert "was begun with players_sha256" in message and "ranked_by" in message
    assert not os.path.exists(f"{out}/round_1/train.jsonl")
    shutil.rmtree(judge)
    shutil.copytree(reward_run, judge)
    train.main(args)


def test_a_scorer_that_is_not_there_is_refused_at_once(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    for name in ("nowhere:f", "conftest:nothing", f"{tmp_path}/no_run"):
        message = refused(scored_args(tiny_runs, tiny_data, out, f"--ranked_by={name}"))
        assert name in message
        assert not os.path.exists(f"{out}/round_0")


# ---------------------------------------------------------------------------------- resuming


def kill_args(runs, data, out):
    return scored_args(runs, data, out, "--rounds=2", "--max_steps=4", "--replay_rounds=1")


@pytest.fixture(scope="module")
def undisturbed(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("undisturbed") / "run")
    train.main(kill_args(tiny_runs, tiny_data, out))
    return out


KILLS = [
    pytest.param(players, "respond", 3, id="sampling"),
    pytest.param(scoring, "call_function", 2, id="scoring"),
    pytest.param(scoring, "call_function", 4, id="scoring the second round"),
    pytest.param(rollout, "mark_equal_responses", 0, id="writing"),
    pytest.param(rollout, "row_logps", 1, id="reference"),
    pytest.param(train, "lr_factor", 3, id="training"),
    pytest.param(train, "lr_factor", 7, id="training the second round"),
]


def assert_same_files(expected, out):
    assert_same_run(expected, out)
    for r in (0, 1):
        for name in ("self_train.jsonl", "train.jsonl", "val.jsonl", "train.ref.npz"):
            path = f"round_{r}/{name}"
            assert read_bytes(f"{out}/{path}") == read_bytes(f"{expected}/{path}")
    assert not glob.glob(f"{out}/**/*.part*", recursive=True)


def test_a_damaged_part_of_samples_is_found(tmp_path):
    """Any flipped bit, a missing row, and rows of other prompts."""
    path, rows, samples = f"{tmp_path}/part", [], []
    for n in range(3):
        rows.append({"prompt": f"p {n}", "responses": ["a"], "group": f"g {n}"})
        samples.append(
            sampled_row(rows[n], "abé", [97, 98, 195, 169] + [256] * (n > 0), BYTES, TEMPLATE)
        )
    write_rows(path, samples)
    assert players.is_sampled(path, rows, BYTES, TEMPLATE)
    content = read_bytes(path)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with open(path, "wb") as f:
            f.write(flipped)
        assert not players.is_sampled(path, rows, BYTES, TEMPLATE), (place, bytes(flipped))
    for damaged in (samples[:2], samples[::-1], []):
        write_rows(path, damaged)
        assert not players.is_sampled(path, rows, BYTES, TEMPLATE)


@pytest.mark.parametrize("module, function, at", KILLS)
def test_a_scored_run_resumes_bit_for_bit(
    tiny_runs, tiny_data, undisturbed, tmp_path, monkeypatch, module, function, at
):
    monkeypatch.setattr(rounds, "PART_SIZE", 8)
    out = f"{tmp_path}/killed"
    with monkeypatch.context() as m:
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(kill_args(tiny_runs, tiny_data, out))
    train.main(kill_args(tiny_runs, tiny_data, out))
    assert_same_files(undisturbed, out)


def test_a_signal_between_two_parts_of_scores(
    tiny_runs, tiny_data, undisturbed, tmp_path, monkeypatch
):
    """The run stops with what it has scored, and goes on from there."""
    monkeypatch.setattr(rounds, "PART_SIZE", 8)
    out = f"{tmp_path}/r"
    call_function = scoring.call_function

    def signalled(*args):
        scores = call_function(*args)
        elastic.received_signals.append(15)
        return scores

    with monkeypatch.context() as m:
        m.setattr(elastic, "received_signals", [])
        m.setattr(scoring, "call_function", signalled)
        with pytest.raises(SystemExit) as e:
            train.main(kill_args(tiny_runs, tiny_data, out))
    assert e.value.code == 128 + 15
    assert len(glob.glob(f"{out}/round_0/*.scores.part*")) == 1
    train.main(kill_args(tiny_runs, tiny_data, out))
    assert_same_files(undisturbed, out)


KILLING_PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest
import players, rollout, scorer, train
from nanospin import elastic, rounds
rounds.PART_SIZE = 8
module, function, at = sys.argv[1:4]
if module:
    module = sys.modules[module]
    setattr(module, function, conftest.killing(getattr(module, function), int(at)))
sys.exit(elastic.run(train.main, sys.argv[4:]))  # it ends ranks as train.py does
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, function, at",
    [
        ("players", "respond", "2"),
        ("scorer", "call_function", "1"),
        ("rollout", "row_logps", "1"),
        ("train", "lr_factor", "7"),
    ],
)
def test_two_ranks_resume_bit_for_bit(tiny_runs, tiny_data, tmp_path, module, function, at):
    tests = os.path.dirname(os.path.abspath(__file__))
    program = f"{tmp_path}/program.py"
    with open(program, "w", encoding="utf-8") as f:
        f.write(KILLING_PROGRAM.format(root=conftest.ROOT, tests=tests))
    env = ENV | {"PYTHONPATH": tests}

    def start(out, *kill):
        args = kill_args(tiny_runs, tiny_data, f"{tmp_path}/{out}")
        command = torchrun_command(args, program=(program, *kill))
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=conftest.ROOT)

    whole = start("whole", "", "", "")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = start("killed", module, function, at)
    assert killed.returncode != 0 and "Killed" in killed.stderr, killed.stderr[-3000:]
    again = start("killed", "", "", "")
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_files(f"{tmp_path}/whole", f"{tmp_path}/killed")


@pytest.mark.slow
def test_two_ranks_rank_as_one(tiny_runs, tiny_data, reward_run, tmp_path):
    """Under a function, whose calls the ranks divide, and under a reward model, but for the
    rounding of its scores."""
    env = ENV | {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
    for name in ("conftest:letters", reward_run):
        outs = [f"{tmp_path}/{n}_{os.path.basename(name)}" for n in (1, 2)]
        options = [f"--ranked_by={name}", "--max_steps=1"]
        train.main(scored_args(tiny_runs, tiny_data, outs[0], *options))
        command = torchrun_command(scored_args(tiny_runs, tiny_data, outs[1], *options))
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        for file in ("self_train", "train", "val"):
            one, two = (read_rows(f"{out}/round_0/{file}.jsonl") for out in outs)
            if name == reward_run and file != "self_train":
                # each rank has other batches: float32 sums of 32 terms of about 1, in another order
                for row, other in zip(one, two, strict=True):
                    assert row.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-5)
            assert one == two


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stage=sft", LETTERS], "stage sft has no ranked_by, only preference and spin"),
        (["--stage=reward", LETTERS], "stage reward has no ranked_by"),
        (["--ranked_by=data"], "stage spin is not ranked by data"),
        (["--stage=preference", "--ranked_by=order"], "stage preference is not ranked by order"),
        (["--best_and_worst=True"], "best_and_worst needs a scorer in ranked_by"),
        (["--ranked_by=order", "--best_and_worst=True"], "best_and_worst needs a scorer"),
        (["--top_players=data"], "top_players needs stage spin and a scorer in ranked_by"),
        (
            ["--stage=preference", LETTERS, "--top_players=data"],
            "top_players needs stage spin and a scorer in ranked_by",
        ),
        (["--score_margin=1"], "score_margin in stage spin needs a scorer in ranked_by"),
        (
            ["--stage=sft", "--score_margin=1"],
            "score_margin is for stages reward, preference and spin",
        ),
        (["--players=data,self:0"], "players are data, teacher, self, self:2"),
        (["--players=data,self:-1"], "players are data, teacher, self, self:2"),
        (["--players=data,self:10000"], "players are data, teacher, self, self:2"),
        (["--players=data,teacher:2"], "players are data, teacher, self, self:2"),
        (
            [LETTERS, "--players=data,self,self-1"],
            "player self-1 is for ranked_by order: under a scorer each round has other prompts",
        ),
        (["--players=data,self-1"], "players must include self"),
        ([LETTERS, "--players=self:2,self"], "players must differ"),
        ([LETTERS, "--players=self"], "players must be two or more"),
        ([LETTERS, "--players=self:1"], "players must be two or more"),
        (["--players=self:2"], "players must begin with data"),
        (["--players=self,data"], "players must begin with data"),
        ([LETTERS, "--players=teacher,self"], "set `teacher` exactly when players include teacher"),
        ([LETTERS, "--teacher=rows"], "set `teacher` exactly when players include teacher"),
        ([LETTERS, "--top_players=self"], "top_players are data and teacher, got 'self'"),
        ([LETTERS, "--top_players=teacher"], "top_players teacher is not among the players"),
        ([LETTERS, "--top_players=data,data"], "top_players must differ"),
        ([LETTERS, "--top_players=data", "--score_margin=1"], "set one of the two"),
        (["--stage=sft", "--length_normalize=True"], "preference and spin have length_normalize"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(SystemExit) as e:
        load_config(["--stage=spin", "--init=x", *options])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--players=data,self:4"],
        [LETTERS, "--players=self:2"],
        [LETTERS, "--players=self,data"],
        [LETTERS, "--players=self:9999"],
        [LETTERS, "--players=teacher,self", "--teacher=x", "--top_players=teacher"],
        [LETTERS, "--score_margin=1", "--best_and_worst=True"],
    ],
)
def test_settings_that_go_together(options):
    load_config(["--stage=spin", "--init=x", *options])


# ----------------------------------------------------------------------------- report and metrics


def test_the_report_of_a_round(scored_run, tiny_data):
    """Against a direct count over the validation rows. Scores count tied responses too."""
    answers = {row["prompt"]: row["responses"][0] for row in read_rows(f"{tiny_data}/val.jsonl")}
    for record in read_metrics(scored_run, "collect"):
        rows = read_rows(f"{scored_run}/round_{record['round']}/val.jsonl")
        scores, right, signal = {"data": [], "self": []}, [], []
        for row in rows:
            signal.append(len(set(present_ranks(row))) > 1)
            for k, player in enumerate(row["players"]):
                scores[player].append(row["scores"][k])
                if player == "self":
                    same = row["same_as"][k]
                    text = row["responses"][k if same is None else same]
                    right.append(same_answer(text, answers[row["prompt"]]))
        assert len(scores["self"]) == 24 and len(scores["data"]) == 8
        # float64 sums of 24 terms
        for player, values in scores.items():
            assert record[f"score/{player}"] == pytest.approx(np.mean(values), rel=1e-12)
        best = np.mean([row["scores"][0] for row in rows])
        worst = np.mean([row["scores"][-1] for row in rows])
        assert record["score_best"] == pytest.approx(best, rel=1e-12)
        assert record["score_worst"] == pytest.approx(worst, rel=1e-12)
        assert record["signal"] == np.mean(signal)
        assert record["exact_match/self"] == np.mean(right)
        assert {"tie/self", "length/self", "ended/self", "length_acc/self"} <= set(record)


def test_scores_of_tied_samples_count(tiny_runs, tiny_data, tmp_path):
    """Greedy samples of a prompt are equal: two of three are ties, and have a score."""
    out = f"{tmp_path}/r"
    train.main(scored_args(tiny_runs, tiny_data, out, "--temperature=0", "--max_steps=1"))
    (record,) = read_metrics(out, "collect")
    samples = read_rows(f"{out}/round_0/self_val.jsonl")
    scores = [letters(None, row["responses"][0]) for row in samples]
    assert len(scores) == 24
    assert record["score/self"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert record["tie/self"] >= 2 / 3


def test_kl_from_ref_is_that_of_the_samples(tiny_runs, tiny_data, tmp_path):
    """Of one byte each: most are equal. The file of samples has them all."""
    peaked, out = f"{tmp_path}/peaked", f"{tmp_path}/r"
    few = ["--stage=sft", "--max_response=1", "--max_steps=40", "--lr=1e-2"]
    train.main(spin_args(tiny_runs, tiny_data, peaked, *few))
    options = [f"--init={peaked}", "--players=data,self:8", "--max_response=1", "--lr=1e-2"]
    train.main(scored_args(tiny_runs, tiny_data, out, *options))
    logps = []
    for source in (peaked, out):
        model, enc, _ = GPT.from_checkpoint(source)
        rows, _ = encode_rows(
            read_rows(f"{out}/round_0/self_val.jsonl"), enc, TEMPLATE, model.config.block_size, 0, 1
        )
        logps.append(row_logps(model, rows, 4096, torch.device("cpu")).astype(np.float64))
    assert len(rows) == 8 * 8
    expected = (logps[0] - logps[1]).mean()
    record = read_metrics(out, "eval")[-1]
    assert read_metrics(out, "collect")[-1]["tie/self"] > 0.2
    # float32 log-probabilities of about 5
    assert record["kl_from_ref"] == pytest.approx(expected, abs=1e-5) and expected > 1e-3


def test_kl_from_ref_needs_samples_of_the_policy_itself(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    args = scored_args(tiny_runs, tiny_data, out, "--temperature=0.5")
    assert "'kl_from_ref' is not a metric" in refused([*args, "--keep_best=kl_from_ref"])
    train.main(args)
    record = read_metrics(out, "eval")[-1]
    assert "kl_from_ref" not in record and "reward/self" in record


def metrics_rows(seed):
    """Ragged ranked rows with players of their own, and log-probabilities of policy and
    reference."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(12):
        K = int(rng.integers(2, 6))
        there = rng.random(K) < 0.8
        there[0] = True
        responses = []
        for k in range(K):
            responses.append([1] * int(rng.integers(1, 6)) if there[k] else None)
        ranks = sorted(rng.integers(0, 3, K).tolist())
        players = rng.permutation(["data", *["self"] * (K - 1)]).tolist()
        rows.append({"prompt": [0], "responses": responses, "ranks": ranks, "players": players})
    rows.append({"prompt": [0], "responses": [[1, 1]], "ranks": [0], "players": ["data"]})
    rows = pad_rows_to_K(rows, 5)
    logps, refs = rng.normal(-10, 3, (2, len(rows), 5)).astype(np.float32)
    return rows, logps, refs


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_of_rows_with_players_of_their_own(seed):
    """`ranking_metrics` against a loop over rows, players and pairs."""
    rows, logps, refs = metrics_rows(seed)
    rewards = 0.5 * (logps - refs)
    metrics = ranking_metrics(logps, refs, rows, 0.5, ["data", *["self"] * 4])
    right, beats, reward, nats, tokens, kl, own_tokens = [], {}, {}, 0.0, 0, 0.0, 0
    for b, row in enumerate(rows):
        there = [k for k, y in enumerate(row["responses"]) if y is not None]
        for i in there:
            player = row["players"][i]
            worse = [j for j in there if row["ranks"][i] < row["ranks"][j]]
            right += [rewards[b, i] > rewards[b, j] for j in worse]
            if worse:
                beats_all = all(rewards[b, i] > rewards[b, j] for j in worse)
                beats.setdefault(player, []).append(beats_all)
            reward.setdefault(player, []).append(rewards[b, i])
            if player == "data":
                nats -= logps[b, i]
                tokens += len(row["responses"][i])
            else:
                kl += refs[b, i] - logps[b, i]
                own_tokens += len(row["responses"][i])
    # float32 sums of some tens of numbers of about 10
    assert metrics["acc"] == pytest.approx(np.mean(right), rel=1e-6)
    assert metrics["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["kl_from_ref"] == pytest.approx(kl / own_tokens, rel=1e-4, abs=1e-5)
    for player in ("data", "self"):
        assert metrics[f"acc/{player}"] == pytest.approx(np.mean(beats[player]), rel=1e-6)
        expected = np.mean(reward[player])
        assert metrics[f"reward/{player}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_ranked_rows_are_rows_of_the_format(scored_run):
    """They are checked as those of the data are, and train a reward model."""
    for path in glob.glob(f"{scored_run}/round_*/*.jsonl"):
        for row in read_rows(path):
            check_row(row, path)


def test_the_policy_learns_what_scores(tiny_runs, tiny_data, tmp_path):
    """Its held-out ranking gets better than chance, 1/2."""
    out = f"{tmp_path}/r"
    options = ["--max_rows=40", "--max_steps=30", "--players=self:4", "--lr=2e-3"]
    train.main(scored_args(tiny_runs, tiny_data, out, *options))
    losses = [record["nll"] for record in read_metrics(out, "step")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    assert not any(math.isnan(float(w.sum())) for w in final_weights(out).values())
    assert checkpoint.latest(out)
