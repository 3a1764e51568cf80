"""What scores a round: equal responses, functions that fail, are slow or are fixed, and prompts
that a model cannot score. In stages spin, preference and ppo."""

import functools
import glob
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    letters,
    load_config,
    logged_numbers,
    make_data,
    read_metrics,
    refused,
    spin_args,
)
from test_ppo import ppo_args, reward_args
from test_train import change_rows, read_bytes, read_json

import players
import ppo
import rollout
import scorer
import train
from data import tokenizer
from data.folder import write_meta
from data.rows import prompt_key, read_rows, write_rows
from model import GPT
from nanospin import elastic, inputs, rounds, same_run
from nanospin.config import Config
from nanospin.user_function import call_once

BYTES = tokenizer.load("bytes")
STAGES = ["spin", "preference", "ppo"]


@pytest.fixture(scope="module")
def reward_run(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reward") / "run")
    train.main(reward_args(tiny_runs, tiny_data, out, 3))
    return out


def stage_args(stage, runs, data, out, name, *more):
    """A run of two steps a round on 16 prompts, scored by `name`."""
    if stage == "ppo":
        options = ["--advantage=grpo", "--samples_per_prompt=3", "--batch_size=16", "--epochs=2"]
        return ppo_args(runs, data, out, f"--reward={name}", "--max_rows=16", *options, *more)
    options = [f"--stage={stage}", f"--ranked_by={name}", "--max_rows=16", "--max_steps=2"]
    if stage == "spin":
        options.append("--players=data,self:3")
    return spin_args(runs, data, out, *options, *more)


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """write_module(name, source): a module that is imported again when it is needed next."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = set()

    def write(name, source):
        written.add(name)
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()
        for module in list(sys.modules):
            if module.split(".")[0] in {name.split("/")[0] for name in written}:
                del sys.modules[module]
        return path

    return write


# --------------------------------------------------------------------------------- equal responses


def test_a_function_scores_equal_texts_of_a_row_once(monkeypatch):
    calls = []

    def count(row, text):
        calls.append((row["prompt"], text))
        return float(len(calls))

    monkeypatch.setattr(conftest, "scorer", count, raising=False)
    cfg = load_config(["--stage=spin", "--init=x", "--ranked_by=conftest:scorer"])
    texts = [["a", "b", "a"], ["a", None, "a"]]
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    scores = scorer.score_responses(cfg, None, rows, texts, [], "cpu")
    np.testing.assert_array_equal(scores, [[1, 2, 1], [3, np.nan, 3]])
    assert calls == [("p", "a"), ("p", "b"), ("q", "a")]


def groups_with_equals(n=40, K=8):
    """Texts of n prompts and their ids: in each row four equal ones among K. The third text is the
    fourth without its end: equal as text, and not for a model."""
    rng = np.random.default_rng(0)
    rows, texts, ids = [], [], []
    for i in range(n):
        rows.append({"prompt": f"{i} " + "x" * int(rng.integers(1, 20))})
        drawn = []
        for _ in range(K - 3):
            drawn.append("".join(rng.choice(list("abcde "), int(rng.integers(3, 15)))))
        drawn[2] = drawn[3]
        order = rng.permutation([0, 0, 0, *range(K - 3)]).tolist()
        texts.append([drawn[k] for k in order])
        ids.append([[*drawn[k].encode(), *[BYTES.eot_token] * (k != 2)] for k in order])
    return rows, texts, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["reward model", "judge", "other tokenizer"])
def test_a_model_gives_equal_responses_equal_scores(
    tiny_runs, reward_run, monkeypatch, kind, dtype
):
    """Whatever their places in a batch. The others have the scores that they have alone."""
    run = tiny_runs["pretrain"] if kind == "judge" else reward_run
    cfg = load_config(["--stage=spin", "--init=x", f"--ranked_by={run}"])
    judge = GPT.from_checkpoint(run, "cpu", dtype)
    rows, texts, ids = groups_with_equals()
    enc = BYTES
    if kind == "other tokenizer":  # of the samples: they are encoded again
        retokenize = scorer.retokenize

        def again(judge_enc, judge_template, enc, template, text, ids):
            return retokenize(judge_enc, judge_template, None, "", text, ids)

        monkeypatch.setattr(scorer, "retokenize", again)

    def score(rows, texts, ids):
        encoded = scorer.encode_for_judge(cfg, *judge, rows, texts, ids, enc)
        return scorer.score_responses(cfg, judge[0], rows, texts, encoded, "cpu")

    scores = score(rows, texts, ids)
    num_equal = 0
    for row_scores, row_texts, row_ids in zip(scores, texts, ids):
        keys = row_texts if kind == "other tokenizer" else row_ids
        for k, key in enumerate(keys):
            first = keys.index(key)
            assert row_scores[k] == row_scores[first]
            num_equal += first < k
    assert num_equal >= 3 * len(rows)
    alone = []
    for i in range(4):
        for k in range(8):
            alone.append(score([rows[i]], [[texts[i][k]]], [[ids[i][k]]])[0, 0])
    # scores of about 1: float32 sums in another order; eight bits of bfloat16
    atol = 1e-5 if dtype == torch.float32 else 0.1
    np.testing.assert_allclose(scores[:4].ravel(), alone, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "advantage, dtype",
    [("grpo", "float32"), ("grpo", "bfloat16"), ("rloo", "float32"), ("dr_grpo", "float32")],
)
def test_a_group_of_equal_samples_has_no_advantage(
    tiny_runs, tiny_data, reward_run, tmp_path, advantage, dtype
):
    """Greedy samples, under a reward model and a penalty on the KL, in a second round, whose policy
    is not the reference."""
    out = f"{tmp_path}/r"
    options = [f"--advantage={advantage}", "--samples_per_prompt=6"]
    options += [f"--dtype={dtype}", "--kl_coef=1", "--lr=1e-2", "--eval_interval=100"]
    args = stage_args("ppo", tiny_runs, tiny_data, out, reward_run, "--rounds=1")
    train.main([*args, "--max_steps=3"])  # drawn samples: the policy moves away
    args = stage_args("ppo", tiny_runs, tiny_data, f"{tmp_path}/g", reward_run, *options)
    cfg = replace(load_config(args), temperature=0.0)
    rows = read_rows(f"{tiny_data}/train.jsonl")[:16]
    os.makedirs(f"{tmp_path}/g/round_0")
    model, enc, _ = GPT.from_checkpoint(out, "cpu", getattr(torch, dtype))
    path = f"{tmp_path}/g/round_0/self_train.jsonl"
    more = (rows, model, enc, torch.device("cpu"), 6)
    samples = ppo.sample_trajectories(cfg, path, "name", *more)
    samples = ppo.best_first(samples)
    kl = [np.sum(a - b) for a, b in zip(samples.logps, samples.refs)]
    assert np.abs(kl).max() > 1e-3
    arrays, _ = ppo.advantages(cfg, {"kl_coef": 1.0, "mean": 0.0, "std": 1.0}, samples)
    assert (arrays["advantages"] == 0).all()
    report = ppo.sample_report(samples)
    assert report["signal"] == 0
    assert report["score_best"] == report["score_worst"]


def test_first_of_equals():
    ids = [[1], [2], [1], [1], [3], [3]]
    assert ppo.first_of_equals(ids, 3).tolist() == [0, 1, 0, 3, 4, 4]
    assert ppo.first_of_equals(ids, 1).tolist() == list(range(6))


# ------------------------------------------------------------------------ functions that are fixed

BROKEN = """def f(row, text):
    if row["prompt"] == {prompt!r}:
        1 / 0
    return -len(text)
"""
FIXED = "def f(row, text):\n    return len(text)  # fixed\n"


def assert_same_but_for_warnings(a, b):
    """The fixed one warns that its function has changed."""
    numbers = []
    for out in (a, b):
        numbers.append([r for r in logged_numbers(out) if r["kind"] != "warning"])
    assert numbers[0] == numbers[1]
    one, two = final_weights(a), final_weights(b)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_function_that_fails_on_held_out_rows(
    tiny_runs, tiny_data, tmp_path, write_module, capsys, stage
):
    """Fixed, the same command trains on its own scores, as if it had never been another."""
    args = {}
    for out in ("r", "whole"):
        args[out] = stage_args(stage, tiny_runs, tiny_data, f"{tmp_path}/{out}", "flipped:f")
    prompt = rollout.load_rows(load_config(args["r"]))["val"][3]["prompt"]
    write_module("flipped", BROKEN.format(prompt=prompt))
    message = refused(args["r"])
    assert "flipped:f raised ZeroDivisionError: division by zero" in message
    assert message.endswith("; fix it and run the same command again")
    folder = f"{tmp_path}/r/round_0"
    # ppo scores held-out rows when it evaluates
    assert os.path.exists(f"{folder}/train.jsonl") == (stage == "ppo")
    samples = [read_bytes(path) for path in glob.glob(f"{folder}/self_train.jsonl")]
    path = write_module("flipped", FIXED)
    capsys.readouterr()
    train.main(args["r"])
    printed = capsys.readouterr().out
    assert printed.count("nothing of it is trained on: its samples are scored again") == (
        stage == "ppo"
    )
    train.main(args["whole"])
    assert_same_but_for_warnings(f"{tmp_path}/whole", f"{tmp_path}/r")
    assert samples == [read_bytes(path) for path in glob.glob(f"{folder}/self_train.jsonl")]
    assert all(row["scores"][0] >= 0 for row in read_rows(f"{folder}/train.jsonl"))
    for name in ("train.jsonl", "rollout.npz" if stage == "ppo" else "val.jsonl"):
        assert read_bytes(f"{folder}/{name}") == read_bytes(f"{tmp_path}/whole/round_0/{name}")
    manifest = read_json(f"{folder}/collect.json")
    found = manifest["reward_sha256"] if stage == "ppo" else manifest["made_of"]["ranked_by"]
    assert found == rounds.sha256(str(path)) == read_json(f"{folder}/scorer.json")["sha256"]
    assert len(read_metrics(f"{tmp_path}/r", "collect")) == len(
        read_metrics(f"{tmp_path}/whole", "collect")
    )


@pytest.mark.parametrize(
    "module, function, at", [(rollout, "row_logps", 1), (train, "lr_factor", 1)]
)
def test_a_function_that_is_fixed_after_a_kill(
    tiny_runs, tiny_data, tmp_path, write_module, monkeypatch, module, function, at
):
    """Before a checkpoint of the round its rows are ranked again, and their reference too."""
    args = {}
    for out in ("r", "whole"):
        more = (f"{tmp_path}/{out}", "killed_rows:f", "--max_steps=4")
        args[out] = stage_args("spin", tiny_runs, tiny_data, *more)
    write_module("killed_rows", "def f(row, text):\n    return -len(text)\n")
    with monkeypatch.context() as m:
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(args["r"])
    assert os.path.exists(f"{tmp_path}/r/round_0/val.jsonl")
    write_module("killed_rows", FIXED)
    train.main(args["r"])
    train.main(args["whole"])
    assert_same_but_for_warnings(f"{tmp_path}/whole", f"{tmp_path}/r")


@pytest.mark.parametrize("stage", ["spin", "ppo"])
def test_rows_that_are_trained_on_stay(
    tiny_runs, tiny_data, tmp_path, write_module, monkeypatch, stage
):
    """Once there is a checkpoint of the round: the next round has the other function."""
    out = f"{tmp_path}/r"
    options = ["--rounds=2", "--max_steps=4", "--save_interval=2", "--batch_size=8"]
    args = stage_args(stage, tiny_runs, tiny_data, out, "trained_rows:f", *options)
    write_module("trained_rows", "def f(row, text):\n    return -len(text)\n")
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 3))
        with pytest.raises(Killed):
            train.main(args)
    expected = read_bytes(f"{out}/round_0/train.jsonl")
    write_module("trained_rows", FIXED)
    train.main(args)
    assert read_bytes(f"{out}/round_0/train.jsonl") == expected
    assert any("has changed since" in record["text"] for record in read_metrics(out, "warning"))
    for row in read_rows(f"{out}/round_1/train.jsonl"):
        assert all(score >= 0 for score in row["scores"])


def test_a_function_from_another_module(
    tiny_runs, tiny_data, tmp_path, write_module, monkeypatch, capsys
):
    """Its own file counts. What a helper module does is not noticed, and how many scores are kept
    is said."""
    monkeypatch.setattr(rounds, "PART_SIZE", 4)
    out = f"{tmp_path}/r"
    args = stage_args("spin", tiny_runs, tiny_data, out, "scorers_of_two:f")
    prompt = read_fifth_prompt(args)
    broken = BROKEN.format(prompt=prompt) + "from scorer_of_three import g\n"
    write_module("scorer_of_three", "g = 1\n")
    write_module("scorer_of_two", broken)
    package = write_module("scorers_of_two", "from scorer_of_two import f\n")
    first = inputs.source_sha256("scorers_of_two:f")
    assert first != rounds.sha256(str(package))
    refused(args)
    assert len(glob.glob(f"{out}/round_0/train.jsonl.scores.part*")) == 1
    write_module("scorer_of_three", "g = 2\n")
    assert inputs.source_sha256("scorers_of_two:f") == first
    capsys.readouterr()
    refused(args)
    assert "train.jsonl.scores: 4 of 16 rows are scored already" in capsys.readouterr().out

    write_module("scorer_of_two", FIXED)
    assert inputs.source_sha256("scorers_of_two:f") != first
    train.main(args)
    assert "scored already" not in capsys.readouterr().out
    (warning,) = read_metrics(out, "warning")
    assert "the source of ranked_by scorers_of_two:f has changed" in warning["text"]
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert all(score >= 0 for score in row["scores"])


def read_fifth_prompt(args):
    """The fifth prompt that the first round of stage spin draws."""
    cfg = load_config(args)
    return players.prompts_of_round(cfg, rollout.load_rows(cfg)["train"], 0)[5]["prompt"]


class Called:
    def __call__(self, row, text):
        return 0.0


def test_the_file_of_a_function():
    @functools.wraps(letters)
    def wrapped(row, text):
        return letters(row, text)

    ours, theirs = os.path.abspath(__file__), os.path.abspath(conftest.__file__)
    assert inputs.file_of_function(letters) == theirs
    assert inputs.file_of_function(wrapped) == theirs
    assert inputs.file_of_function(functools.partial(letters, None)) == theirs
    assert inputs.file_of_function(functools.lru_cache(letters)) == theirs
    assert inputs.file_of_function(Called()) == inputs.file_of_function(Called) == ours
    assert inputs.file_of_function(Called().__call__) == ours
    assert inputs.file_of_function(max) is None
    assert inputs.source_sha256("data.gsm8k.scorer:exact_match") == rounds.sha256(
        f"{ROOT}/data/gsm8k/scorer.py"
    )


# ------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_model_cuts_to_its_limits_is_said(tiny_runs, tiny_data, tmp_path, capsys, stage):
    """A reward model of short responses, and a policy whose responses are longer."""
    short = f"{tmp_path}/short"
    train.main([*reward_args(tiny_runs, tiny_data, short, 1), "--max_response=3"])
    capsys.readouterr()
    train.main(stage_args(stage, tiny_runs, tiny_data, f"{tmp_path}/r", short, "--rounds=1"))
    said = re.findall(
        rf"{short}\S* cuts to its limits (\d+) of (\d+) prompts and (\d+) of (\d+) responses",
        capsys.readouterr().out,
    )
    prompts_cut, prompts, responses_cut, responses = map(int, said[0])
    assert (prompts_cut, prompts) == (0, 16)
    rows = read_rows(f"{tmp_path}/r/round_0/train.jsonl")
    ids = [y for row in rows for y in row["ids"] if y is not None]
    assert responses == len(ids)
    assert responses_cut == sum(len(y) > 3 for y in ids) > 0


# ----------------------------------------------------------------------------- slow functions


@pytest.mark.parametrize("K, size", [(1, 256), (3, 85), (8, 32), (256, 1), (9999, 1)])
def test_a_part_has_at_most_256_calls_of_a_function(monkeypatch, tmp_path, K, size):
    """A signal is heard after that; the parts of a model have 1,024 rows."""
    sizes = []

    def keep_size(path, rows, of, score, size=0):
        sizes.append(size)
        return {"scores": np.zeros((len(rows), K))}

    monkeypatch.setattr(scorer, "score_in_parts", keep_size)
    monkeypatch.setattr(GPT, "from_checkpoint", lambda *args: (None, None, None))
    monkeypatch.setattr(scorer, "encode_for_judge", lambda *args: [])
    monkeypatch.setattr(inputs, "scorer_sha256", lambda name: "")
    rows, texts = [{"prompt": "p"}], [["a"] * K]
    for name in ("conftest:letters", "a/run"):
        cfg = load_config(["--stage=spin", "--init=x", f"--ranked_by={name}"])
        scorer.score_rows(cfg, f"{tmp_path}/x", rows, texts, texts, BYTES, torch.device("cpu"))
    assert sizes == [size, 1024]


def test_a_part_without_one_of_its_arrays_is_scored_again(tmp_path, monkeypatch):
    """One bit of a zip file's directory can hide its last array: the length of the comment of the
    entry before it."""
    rows = [{"prompt": [n], "responses": [[1]], "ranks": [0]} for n in range(4)]
    scored = []

    def score(numbers):
        scored.extend(numbers)
        return {"logps": np.array(numbers, float), "values": np.array(numbers, float)}

    path = f"{tmp_path}/round_0/x.npz"
    whole = rounds.score_in_parts(path, rows, "scorer", score, 2)
    assert rounds.score_in_parts(path, rows, "scorer", score, 2).keys() == whole.keys()
    assert scored == [0, 1, 2, 3]
    part = sorted(glob.glob(f"{path}.part*"))[0]
    with open(part, "rb") as f:
        content = bytearray(f.read())
    last_entry = content.rindex(b"PK\x01\x02")
    content[content.rindex(b"PK\x01\x02", 0, last_entry) + 32] ^= 64
    with open(part, "wb") as f:
        f.write(content)
    again = rounds.score_in_parts(path, rows, "scorer", score, 2)
    assert scored == [0, 1, 2, 3, 0, 1]
    assert {name: values.tolist() for name, values in again.items()} == {
        name: values.tolist() for name, values in whole.items()
    }


@pytest.mark.parametrize("stage", ["spin", "ppo"])
def test_a_signal_is_heard_while_a_function_scores(
    tiny_runs, tiny_data, tmp_path, monkeypatch, stage
):
    """After a part of few calls, which the next start has. The signal also stops a program that the
    function runs, of this call or of the one before: scores of this part do not count."""
    monkeypatch.setattr(scorer, "CALLS_OF_PART", 9)
    calls = []

    def signalled(row, text):
        calls.append(text)
        if len(calls) == 11:
            elastic.received_signals.append(15)
            return -1.0
        return -1.0 if len(calls) == 10 else letters(row, text)

    monkeypatch.setattr(conftest, "scorer", signalled, raising=False)
    args = {}
    for out in ("r", "whole"):
        more = (f"{tmp_path}/{out}", "conftest:scorer")
        args[out] = stage_args(stage, tiny_runs, tiny_data, *more)
    with monkeypatch.context() as m:
        m.setattr(elastic, "received_signals", [])
        with pytest.raises(SystemExit) as e:
            train.main(args["r"])
    assert e.value.code == 128 + 15
    assert len(calls) == 11
    kept = ".reward.part*" if stage == "ppo" else ".scores.part*"
    assert len(glob.glob(f"{tmp_path}/r/round_0/*{kept}")) == 1
    calls = list(range(100))
    train.main(args["r"])
    train.main(args["whole"])
    assert_same_run(f"{tmp_path}/whole", f"{tmp_path}/r")


@pytest.mark.parametrize("catches", [False, True])
def test_a_signal_ends_a_call_that_waits(tiny_runs, tiny_data, tmp_path, monkeypatch, catches):
    """For ever: for a process that the same signal has ended, say. The function may catch all."""

    def waits(row, text):
        os.chdir("/")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            threading.Event().wait(60)
        except BaseException:
            if not catches:
                raise
        return 0.0

    monkeypatch.setattr(conftest, "scorer", waits, raising=False)
    monkeypatch.setattr(elastic, "received_signals", [])
    args = stage_args("spin", tiny_runs, tiny_data, f"{tmp_path}/r", "conftest:scorer")
    folder, start = os.getcwd(), time.monotonic()
    before = signal.signal(signal.SIGTERM, elastic.handle_signal)
    try:
        with pytest.raises(SystemExit) as e:
            train.main(args)
        assert e.value.code == 128 + signal.SIGTERM
        assert time.monotonic() - start < 30
        assert catches or os.getcwd() == folder
        assert not glob.glob(f"{tmp_path}/r/round_0/*.scores.part*")
    finally:
        os.chdir(folder)
        signal.signal(signal.SIGTERM, before)


def test_a_process_that_a_function_forks_is_ended_by_a_signal(monkeypatch):
    """The run itself only notes it."""
    monkeypatch.setattr(elastic, "received_signals", [])
    before = signal.signal(signal.SIGTERM, elastic.handle_signal)
    try:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(20)
        assert process.exitcode == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert elastic.received_signals == [signal.SIGTERM]
    finally:
        process.kill()
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------ prompts left out


@pytest.mark.parametrize("stage", ["spin", "ppo"])
def test_of_rows_with_one_prompt_the_first_is_used(tiny_runs, tmp_path, capsys, stage):
    """And the number of the others is said."""
    data, out = make_data(f"{tmp_path}/data"), f"{tmp_path}/r"
    change_rows(data, lambda rows: rows + [row | {"responses": ["second"]} for row in rows[:5]])
    more = ["--max_rows=0", "--eval_rows=100", "--rounds=2"]
    train.main(stage_args(stage, tiny_runs, data, out, "conftest:letters", *more))
    printed = capsys.readouterr().out
    line = "data train: 5 rows with the prompt of an earlier row are left out"
    assert printed.count(line) == 1
    assert printed.count("data val: 5 rows with the prompt of an earlier") == 1
    rows = read_rows(f"{out}/round_0/train.jsonl")
    assert len(rows) == 40
    if stage == "spin":
        assert not any("second" in row["responses"] for row in rows)
        prompts = [row["prompt"] for row in read_rows(f"{out}/round_0/val.jsonl")]
        num_rows = len(read_rows(f"{data}/val.jsonl"))
        assert len(prompts) == len(set(prompts)) == num_rows - 5
        cfg = load_config(stage_args(stage, tiny_runs, data, out, "conftest:letters", *more))
        answers = rollout.encode_validation_answers(cfg, tokenizer.load("bytes"), 64)
        assert len(answers) == num_rows  # of the validation loss, as in other runs


def test_a_round_of_older_code_has_held_out_prompts_twice(tiny_runs, tmp_path):
    """Each is read with the first row of its prompt, and the run goes on."""
    rows = [{"prompt": prompt, "responses": ["yes"]} for prompt in ("a", "b")]
    path = f"{tmp_path}/val.jsonl"
    write_rows(path, [rows[0], rows[1], rows[0]])
    cfg = load_config(stage_args("spin", tiny_runs, "data", f"{tmp_path}/r", "conftest:letters"))
    ranked, found = rollout.read_ranked(cfg, path, rows, tokenizer.load("bytes"))
    assert len(ranked) == 3 and found == [rows[0], rows[1], rows[0]]
    write_rows(path, [rows[0], rows[1] | {"prompt": "c"}])
    with pytest.raises(SystemExit, match="has other prompts than the rows of data"):
        rollout.read_ranked(cfg, path, rows, tokenizer.load("bytes"))


def make_long_prompts(folder):
    """Data with one prompt of 80 bytes among the first rows of each split."""
    data = make_data(folder)
    change_rows(data, lambda rows: [rows[0] | {"prompt": "long " * 16}, *rows[1:]])
    return data


@pytest.mark.parametrize("stage", STAGES)
def test_prompts_that_a_model_cannot_score_are_left_out(
    tiny_runs, reward_run, tmp_path, capsys, stage
):
    """They are counted before anything is sampled. The policy cuts them, and has room."""
    data, out = make_long_prompts(f"{tmp_path}/data"), f"{tmp_path}/r"
    judge = f"{tmp_path}/judge"
    shutil.copytree(reward_run, judge)
    more = ["--max_rows=0", "--max_prompt=24", "--eval_rows=100", "--max_steps=2"]
    args = stage_args(stage, tiny_runs, data, out, judge, *more)
    train.main(args)
    printed = capsys.readouterr().out
    setting = "reward" if stage == "ppo" else "ranked_by"
    for split, n in (("train", 40), ("val", 12)):
        line = (
            f"data {split}: 1 of {n} prompts leave no room for a response in the block_size 64 of "
            f"{setting} {judge}"
        )
        assert printed.count(line) == 1
    keys = [prompt_key(row) for row in read_rows(f"{out}/round_0/train.jsonl")]
    assert len(keys) == 39 and not any("long" in key[0] for key in keys)
    if stage == "preference":  # the judge is not needed any more, and may be gone
        shutil.rmtree(judge)
    train.main(args)


def test_a_model_that_can_score_no_prompt_is_one_line(tiny_runs, reward_run, tmp_path):
    data = make_data(f"{tmp_path}/data")
    change_rows(data, lambda rows: [row | {"prompt": row["prompt"] + 70 * "y"} for row in rows])
    args = stage_args("spin", tiny_runs, data, f"{tmp_path}/r", reward_run, "--max_prompt=24")
    message = refused(args)
    assert "40 of 40 prompts leave no room for a response in the block_size 64" in message
    assert not glob.glob(f"{tmp_path}/r/round_0/self*")


def test_a_held_out_row_that_a_model_cannot_read_is_said_before_sampling(
    tiny_runs, tiny_data, tmp_path
):
    """A system message, of which the policy's template knows and the model's does not."""
    data, out = f"{tmp_path}/data", f"{tmp_path}/r"
    shutil.copytree(tiny_data, data)
    rows = read_rows(f"{data}/val.jsonl")
    write_rows(f"{data}/val.jsonl", [*rows[1:], rows[0] | {"system": "Be brief."}])
    write_meta(data, "bytes", "made up")
    own = "--template=S{system}{turn}Q{prompt}A{response}."
    args = [own, "--eval_rows=100", f"--ranked_by={tiny_runs['sft']}", "--players=self:2"]
    message = refused(spin_args(tiny_runs, data, out, *args))
    assert re.match(r"ranked_by .*: there is a system message, 'Be brief.'", message)
    args = [own, "--eval_rows=100", f"--teacher={tiny_runs['sft']}"]
    message = refused(spin_args(tiny_runs, data, out, *args, "--players=data,teacher,self"))
    assert re.match(r"teacher .*: there is a system message, 'Be brief.'", message)
    assert list(same_run.files_with_rows(out)) == []


@pytest.mark.parametrize("is_own", [False, True])
def test_a_model_whose_template_is_without_thoughts_scores_what_follows_them(
    tiny_runs, capsys, is_own
):
    """A sample of the same form keeps its ids."""
    judge, enc, meta = GPT.from_checkpoint(tiny_runs["sft"])
    template = "Q{prompt}A{last}<think>\n\n</think>\n\n{response|thoughts}."
    meta["config"] |= {"template": template, "max_prompt": 0, "max_response": 0}
    cfg = Config(template=template if is_own else "Q{prompt}A", ranked_by="judge", stage="spin")
    texts = ["<think>x</think>\nso", "plain"]
    ids = [[*text.encode(), enc.eot_token] for text in texts]
    rows = [{"prompt": "p"}]
    (row,) = scorer.encode_for_judge(cfg, judge, enc, meta, rows, [texts], [ids], enc)
    printed = capsys.readouterr().out
    if is_own:
        assert row["responses"] == ids
        assert printed == ""
    else:
        assert row["responses"] == [[*b"so", enc.eot_token], ids[1]]
        assert "thoughts: those of 1 of 2 responses are not scored" in printed


# ------------------------------------------------------------------------- functions that misbehave

PRINTED_BADLY = """
import os, sys

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

class MuteValue:
    def __repr__(self):
        sys.exit(0)

class Leaves(float):
    def __float__(self):
        sys.exit(0)

def error(row, text):
    raise Mute

def value(row, text):
    return MuteValue()

def leaves(row, text):
    return Leaves(1)

def lines(row, text):
    raise ValueError("one\\ntwo")

def large(row, text):
    return 1e30

def folder(row, text):
    os.chdir("/")
    return 1.0

def folder_and_error(row, text):
    os.chdir("/")
    1 / 0
"""


@pytest.mark.parametrize(
    "function, expected",
    [
        ("error", "raised Mute: a Mute that cannot be printed"),
        ("value", "gave a MuteValue that cannot be printed, not a finite number"),
        ("leaves", "raised SystemExit: 0"),
        ("lines", "raised ValueError: one two"),
        ("large", "gave 1e+30, not a finite number below 1e30"),
        ("folder", "changed the current folder"),
        ("folder_and_error", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_misbehaves_is_one_line(
    tiny_runs, tiny_data, tmp_path, write_module, monkeypatch, function, expected
):
    """Also where out_dir is relative. Fixed, the same command goes on."""
    monkeypatch.chdir(tmp_path)
    write_module("misbehaving", PRINTED_BADLY)
    args = stage_args("spin", tiny_runs, tiny_data, "r", f"misbehaving:{function}")
    message = refused(args)
    assert message.startswith(f"ranked_by misbehaving:{function} {expected}")
    assert os.getcwd() == str(tmp_path)
    assert not os.path.exists("r/lock")


def test_a_function_does_not_change_how_training_computes():
    """It may load a model at its first call. A resumed run may not call it again."""

    def settings():
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        return threads, precision, torch.get_default_dtype(), torch.is_grad_enabled()

    def changes(row, text):
        torch.set_num_threads(before[0] + 1)
        torch.set_float32_matmul_precision("medium" if before[1] != "medium" else "highest")
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        if text == "raises":
            raise ValueError("so")
        return 1.0

    before = settings()
    assert call_once(changes, {}, "a") == (1.0, "", "")
    assert settings() == before
    assert call_once(changes, {}, "raises")[1] == "raised ValueError: so"
    assert settings() == before


@pytest.mark.parametrize(
    "source, expected",
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os\nos.chdir('/')\ndef f(row, text): return 1.0", "changes the current folder"),
        (
            "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
            "a E that cannot be printed",
        ),
    ],
)
def test_a_module_that_misbehaves_is_one_line(
    tiny_runs, tiny_data, tmp_path, write_module, monkeypatch, source, expected
):
    monkeypatch.chdir(tmp_path)
    write_module("misbehaving_module", source)
    args = stage_args("spin", tiny_runs, tiny_data, "r", "misbehaving_module:f")
    message = refused(args)
    assert message.startswith("scorer misbehaving_module:f: ") and expected in message
    assert os.getcwd() == str(tmp_path)
