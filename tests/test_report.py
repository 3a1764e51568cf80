"""The page of a run against the run's own files: foreign text, missing pieces. Where there is a
browser (NANOSPIN_BROWSER, or a Chromium on PATH), also how it looks there."""

import base64
import contextlib
import dataclasses
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import types

import pytest
from conftest import TINY, make_data

import train
from data import tokenizer
from data.batch import batch_rows, reward_batch
from data.files import read_json, write_json
from data.folder import write_meta, write_stream
from data.rows import encode_rows, read_rows, write_rows
from nanospin import checkpoint
from nanospin.config import Config
from nanospin.rounds import response_titles
from tools import demo
from tools.plot import HEADLINE_METRICS
from tools.report.__main__ import main, visible
from tools.report.charts import (
    Chart,
    different_in_training,
    equal_scores,
    format_number,
    run_charts,
    ticks,
)
from tools.report.runs import (
    Run,
    is_cut,
    kl_of,
    mask_parts,
    num_tokens,
    read_run,
    supervised_tokens,
    training_batch,
    training_cards,
    validation_cards,
)

EVIL = "<script>alert(1)</script> \x1b[31m & \u202eabc \"'"
SMALL = [
    "--batch_size=8",
    "--device=cpu",
    "--eval_rows=8",
    "--max_response=16",
    "--template=Q: {prompt}\nA: ",
]


@pytest.fixture(scope="module")
def runs(tiny_runs, tiny_data, tmp_path_factory):
    """A run of every stage. Spin's prompts are evil, and its tokenizer has the token "<script>",
    which the teacher's responses contain."""
    root = str(tmp_path_factory.mktemp("report"))
    folder, runs = make_data(f"{root}/data"), dict(tiny_runs)
    tokenizer.save(
        tokenizer.make_encoding("evil", {bytes([i]): i for i in range(256)} | {b"<script>": 256}),
        f"{folder}/evil.tiktoken",
    )
    enc = tokenizer.load(f"{folder}/evil.tiktoken")
    teacher = []
    for split in ("val", "train"):  # the first answer to a prompt of both counts
        write_stream(f"{folder}/{split}.bin", ["what people write " * 20] * 20, enc)
        rows = [
            row | {"prompt": f"{split} {i} {EVIL}", "responses": ["a b"]}
            for i, row in enumerate(read_rows(f"{folder}/{split}.jsonl"))
        ]
        write_rows(f"{folder}/{split}.jsonl", rows)
        for i, row in enumerate(rows):
            text, ids = (
                ("a b", [*b"a b", enc.eot_token])
                if split == "val" and i % 3 == 0
                else ("<script><script>", [256, 256, enc.eot_token])
            )
            teacher.append(
                {
                    "prompt": row["prompt"],
                    "responses": [text],
                    "ids": [ids],
                    "tokenizer": tokenizer.fingerprint(enc),
                }
            )
    write_meta(folder, "evil.tiktoken", EVIL)
    write_rows(f"{root}/teacher.jsonl", teacher)
    train.main(
        [
            "--stage=pretrain",
            f"--out_dir={root}/first",
            f"--data={folder}",
            "--max_steps=1",
            "--batch_size=8",
            *TINY,
            "--block_size=96",
        ]
    )
    train.main(
        [
            "--stage=spin",
            f"--out_dir={root}/spin",
            f"--data={folder}",
            f"--init={root}/first",
            "--players=data,teacher,self",
            f"--teacher={root}/teacher.jsonl",
            "--rounds=2",
            "--max_steps=3",
            "--eval_interval=1",
            "--max_rows=16",
            *SMALL,
        ]
    )
    common = [f"--data={tiny_data}", f"--init={tiny_runs['sft']}", *SMALL]
    train.main(["--stage=reward", f"--out_dir={root}/reward", "--max_steps=2", *common])
    train.main(["--stage=preference", f"--out_dir={root}/preference", "--max_steps=2", *common])
    train.main(
        [
            "--stage=ppo",
            f"--out_dir={root}/ppo",
            f"--reward={root}/reward",
            "--rounds=2",
            "--max_rows=16",
            "--eval_interval=1",
            *common,
        ]
    )
    return runs | {stage: f"{root}/{stage}" for stage in ("spin", "reward", "preference", "ppo")}


class Checked(html.parser.HTMLParser):
    """Tags that close what was opened, their attributes, and the text between."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def page_of(*folders, tmp_path):
    main([*folders, f"--out={tmp_path}/page.html"])
    with open(f"{tmp_path}/page.html", encoding="utf-8") as f:
        page = f.read()
    return page, Checked(page)


@pytest.mark.parametrize(
    "stage, titles",
    [
        ("pretrain", ["Cross-entropy", "Learning rate"]),
        ("sft", ["Cross-entropy", "Gradient norm"]),
        ("reward", ["Ranking loss in training", "Loss of pairs", "Ranking accuracy"]),
        ("preference", ["Ranking loss", "Implicit reward"]),
        (
            "spin",
            [
                "Ranking loss",
                "Implicit reward",
                "Log-probability of the response",
                "KL from the reference",
            ],
        ),
        ("ppo", ["Reward", "KL to the reference", "Entropy", "Value loss"]),
    ],
)
def test_a_page_of_every_stage(runs, stage, titles, tmp_path):
    page, checked = page_of(runs[stage], tmp_path=tmp_path)
    for text in ("cannot be shown", "not finished", "class=notes"):
        assert text not in page
    drawn = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert set(titles) <= set(drawn)
    assert len(set(drawn)) == len(drawn) == checked.tags.count("svg")
    # self-contained: no script, nothing to fetch, and a policy that would stop it
    fetching = "script link img iframe object embed base form use image".split()
    assert not set(fetching) & set(checked.tags)
    names = {name for name, _ in checked.attributes}
    assert not {"src", "href", "srcset", "style", "action"} & names
    assert not any(name.startswith("on") for name in names)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    # its last validation metric is the log's
    last = read_run(runs[stage]).of_kind("eval")[-1]
    key = HEADLINE_METRICS.get(stage, ["val_loss"])[0]
    assert format_number(last[key]) in page


def test_the_loss_of_another_objective_is_no_cross_entropy(runs, tmp_path):
    """A training loss T_n has a chart of its own: the validation loss is cross-entropy."""
    folder = copied(runs["sft"], tmp_path)
    config_path = f"{folder}/config.json"
    meta = read_json(config_path)
    assert "Loss" not in {chart.title for chart in run_charts(read_run(folder))}
    meta["config"]["taylor_order"] = 2.0
    write_json(config_path, meta)
    charts = {chart.title: chart.series for chart in run_charts(read_run(folder))}
    assert set(charts["Loss"]) == {"training"}
    assert set(charts["Cross-entropy"]) == {"validation"}


def test_a_card_shows_the_tokens_that_were_trained(runs):
    run = read_run(runs["spin"])
    row = {"ids": [[65, run.enc.eot_token], [65, 66, 67], [65, 66, 67, run.enc.eot_token]]}
    assert [is_cut(run, row, k) for k in range(3)] == [False, True, False]
    row["lengths"] = [2, 3, 3]
    assert [num_tokens(row, k) for k in range(3)] == [2, 3, 3]
    assert is_cut(run, row, 2)


def test_several_runs_are_compared(runs, tmp_path):
    page, checked = page_of(runs["pretrain"], runs["sft"], runs["spin"], tmp_path=tmp_path)
    links = [value for name, value in checked.attributes if name == "href"]
    assert links == ["#run1", "#run2", "#run3"]
    assert all(("id", link[1:]) in checked.attributes for link in links)
    assert "Cross-entropy, validation" in page and page.count("<section") == 4
    assert all(f"{i} {name}" in page for i, name in ((1, "pretrain"), (2, "sft"), (3, "spin")))


def test_foreign_text_is_text(runs, tmp_path):
    page, checked = page_of(runs["spin"], tmp_path=tmp_path)
    assert "<script" not in page and not set("\x1b\u202e") & set(page)
    # the prompt, a token, and a setting (data_source)
    assert "<script>alert(1)</script> \\x1b[31m & \\u202eabc \"'" in checked.text
    assert re.search('title="id 256">&lt;script&gt;</span>', page)
    assert "<script>alert(1)" in checked.text.partition("Settings and provenance")[2]
    # the teacher's ties, each with the text that it equals
    assert page.count("<mark>same as data</mark>") >= 2


def test_every_value_of_the_template_is_escaped(tmp_path):
    """Whatever a log holds: keys, warnings, names of players and of the run's folder."""
    run = tmp_path / "<i>\x1b"
    run.mkdir()
    evil = "<blink onclick=x>\x1b\u202e\"'{{ 7777 * 7777 }}"
    (run / "config.json").write_text(
        json.dumps({"config": {"stage": evil, evil: evil}, "starts": [{evil: evil}]})
    )
    records = [
        {"kind": "eval", "round": 0, "step": 1, evil: 1.0, f"reward/{evil}": 2.0, "val_loss": 3.0},
        {"kind": "warning", "round": 0, "step": 1, "text": evil},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    page, checked = page_of(str(run), str(run), tmp_path=tmp_path)
    assert not {"blink", "onclick"} & {*checked.tags, *(name for name, _ in checked.attributes)}
    assert not set("\x1b\u202e") & set(page) and "60481729" not in page
    assert checked.text.count("<blink onclick=x>\\x1b\\u202e\"'{{ 7777 * 7777 }}") >= 10


def test_samples_are_the_rounds_own(runs, tmp_path):
    _, checked = page_of(runs["spin"], tmp_path=tmp_path)
    for t in (0, 1):
        row = read_rows(f"{runs['spin']}/round_{t}/val.jsonl")[0]
        assert f"self, round {t}" in checked.text
        shown = html.parser.HTMLParser()
        said = []
        shown.handle_data = said.append
        shown.feed(visible(row["responses"][2]))
        assert "".join(said) in checked.text
    _, checked = page_of(runs["ppo"], tmp_path=tmp_path)
    files = sorted(
        n
        for t in (0, 1)
        for n in os.listdir(f"{runs['ppo']}/round_{t}")
        if n.startswith("val_step")
    )
    assert len(files) == 3 and all(
        f"round {t}, step {s}" in checked.text for t, s in ((0, 0), (0, 2), (1, 2))
    )
    scores = sorted(row["scores"][0] for row in read_rows(f"{runs['ppo']}/round_1/train.jsonl"))
    for score in (scores[0], scores[-1]):
        assert f"score {format_number(score)}" in checked.text


@pytest.fixture(scope="module")
def ranked_runs(tiny_runs, tiny_data, tmp_path_factory):
    """Spin with several samples in order and under a function, and preference under a function."""
    root = str(tmp_path_factory.mktemp("ranked"))
    small = [f"--data={tiny_data}", f"--init={tiny_runs['sft']}", *SMALL, "--max_steps=2"]
    spin = ["--stage=spin", "--max_rows=16", *small]
    scored = "--ranked_by=conftest:letters"
    train.main([*spin, f"--out_dir={root}/order", "--players=data,self:2"])
    train.main([*spin, f"--out_dir={root}/scored", "--players=self:3,data", scored])
    train.main(["--stage=preference", *small, f"--out_dir={root}/preference", scored])
    grpo = ["--advantage=grpo", "--samples_per_prompt=3", "--reward=conftest:letters"]
    train.main(["--stage=ppo", *grpo, "--max_rows=16", *small, f"--out_dir={root}/grpo"])
    return {name: f"{root}/{name}" for name in ("order", "scored", "preference", "grpo")}


@pytest.mark.parametrize("name", ["order", "scored", "preference"])
def test_a_page_of_several_samples(ranked_runs, tmp_path, name):
    """Samples of a player are numbered. The level ln K! is not drawn: ties and scores differ from
    row to row."""
    page, checked = page_of(ranked_runs[name], tmp_path=tmp_path)
    assert "cannot be shown" not in page and "class=notes" not in page
    assert "equal scores: ln" not in page
    drawn = re.findall("<figcaption>(.*?)</figcaption>", page)
    scored = {"Score", "Rows in which something is ranked"}
    assert (scored <= set(drawn)) == (name != "order")
    if name != "preference":
        for title in ("self 1, round 0", "self 2, round 0"):
            assert title in checked.text
    assert ("self 3, round 0" in checked.text) == (name == "scored")


@pytest.mark.parametrize("options", ["--loss_type=pairs", "--loss_type=pl"])
def test_the_losses_of_a_reward_model(tiny_runs, tiny_data, tmp_path, options):
    """The loss of pairs of the validation is drawn beside the training loss only if that is the
    same quantity. The level for equal scores of Plackett-Luce depends on the row."""
    folder = str(tmp_path / "reward")
    common = [f"--data={tiny_data}", f"--init={tiny_runs['sft']}", *SMALL, "--max_steps=2"]
    train.main(["--stage=reward", options, f"--out_dir={folder}", *common])
    charts = {chart.title: chart for chart in run_charts(read_run(folder))}
    if options == "--loss_type=pairs":
        assert list(charts["Ranking loss"].series) == ["training", "loss of pairs"]
        assert charts["Ranking loss"].level[0] == pytest.approx(math.log(2))
    else:
        assert "Ranking loss" not in charts
        assert list(charts["Ranking loss in training"].series) == ["training"]
        assert charts["Ranking loss in training"].level is None
        assert list(charts["Loss of pairs"].series) == ["validation"]


RANKINGS = [  # loss_type, whether evaluations have the loss and the accuracy of training
    ("pl", True, True),
    ("ipo", False, True),
    ("pairs", False, True),
    ("simpo", False, False),
]


@pytest.mark.parametrize("option, is_same, has_same_acc", RANKINGS)
def test_the_losses_of_rankings(tiny_runs, tiny_data, tmp_path, option, is_same, has_same_acc):
    """Training and validation are in one chart only if they are the same quantity."""
    folder = str(tmp_path / "preference")
    common = [f"--data={tiny_data}", f"--init={tiny_runs['sft']}", *SMALL, "--max_steps=2"]
    train.main(["--stage=preference", f"--loss_type={option}", f"--out_dir={folder}", *common])
    charts = {chart.title: chart for chart in run_charts(read_run(folder))}
    expected = ["training", "validation"] if is_same else ["validation"]
    assert list(charts["Ranking loss"].series) == expected
    assert ("Ranking loss in training" in charts) == (not is_same)
    assert ("training" in charts["Ranking accuracy"].series) == has_same_acc
    assert ("Ranking accuracy in training" in charts) == (not has_same_acc)


def test_what_evaluations_compute_in_another_way():
    def different(stage, players=("data", "self"), **settings):
        run = types.SimpleNamespace(stage=stage, players=list(players))
        run.setting = lambda name: settings.get(name, getattr(Config(), name))
        return different_in_training(run)

    assert different("spin") == different("spin", loss_type="pairs") == {"kl"}
    assert different("spin", ["data", "teacher", "self"], loss_type="pairs") == {"kl", "nll"}
    assert different("spin", best_and_worst=True) == {"kl", "nll", "acc"}
    assert different("preference", length_normalize=True) == {"kl", "nll", "acc"}
    assert different("preference", rank_depth=1) == {"kl", "nll"}
    assert different("reward", loss_type="pairs") == {"kl"}
    assert different("reward", loss_type="pairs", score_margin=2.0) == {"kl", "nll"}


def test_each_sample_of_grpo_has_its_kl(ranked_runs, tmp_path):
    page, checked = page_of(ranked_runs["grpo"], tmp_path=tmp_path)
    assert "cannot be shown" not in page and "class=notes" not in page
    row = {"kl": [0.25, 1.5]}
    assert (kl_of(row, 1), kl_of({"kl": 0.5}, 0)) == (1.5, 0.5)
    rows = read_rows(f"{ranked_runs['grpo']}/round_0/train.jsonl")
    shown = [number for row in rows for number in row["kl"]]
    assert any(f"KL {format_number(number)} nats" in checked.text for number in shown)


def test_cards_show_the_response_of_their_player(ranked_runs):
    """In a row that a scorer ranked too, where the players stand in the order of their scores."""
    run = read_run(ranked_runs["scored"])
    rows = {row["prompt"]: row for row in read_rows(f"{ranked_runs['scored']}/round_0/val.jsonl")}
    cards = validation_cards(run, 8)
    assert len(cards) == 8
    for row, answers in cards:
        titles = [title for _, title, _, _ in answers]
        assert titles == ["data", "self 1, round 0", "self 2, round 0", "self 3, round 0"]
        places = [k for _, _, _, k in answers]
        assert sorted(places) == [0, 1, 2, 3] and places[1:] == sorted(places[1:])
        assert rows[row["prompt"]]["players"][places[0]] == "data"
    for row, answers in training_cards(run, 4):
        titles = [title.partition(" ")[0] for _, title, _, _ in answers]
        assert titles == row["players"]


@pytest.mark.parametrize("name", ["order", "scored"])
def test_the_mask_names_the_players_of_its_row(ranked_runs, name):
    run = read_run(ranked_runs[name])
    row, _ = training_batch(run)
    names = response_titles(row.get("players") or ["data", "self", "self"])
    shown = [part[0] for part in mask_parts(run)]
    there = [title for title, y in zip(names, row["responses"]) if y is not None]
    assert shown == ["prompt", *there]


def test_titles_of_responses():
    assert response_titles(["self", "data", "self"]) == ["self 1", "data", "self 2"]
    assert response_titles(["data", "self", "self-1"]) == ["data", "self", "self-1"]
    assert response_titles([]) == []


@pytest.mark.parametrize(
    "settings, level",
    [
        ({}, math.log(2)),
        ({"players": ["data", "teacher", "self"]}, math.log(6)),
        ({"players": ["data", "self:2"]}, None),
        ({"loss_type": "pairs"}, math.log(2)),
        ({"players": ["data", "self:2"], "loss_type": "pairs"}, None),
        ({"players": ["data", "self", "self-1"]}, None),
        ({"ranked_by": "module:f"}, None),
        ({"ranked_by": "module:f", "loss_type": "pairs"}, math.log(2)),
        ({"ranked_by": "module:f", "loss_type": "pairs", "score_margin": 1.0}, None),
        ({"ranked_by": "order"}, math.log(2)),
        ({"players": ["data", "teacher", "self"], "rank_depth": 1}, None),
        ({"loss_type": "hinge"}, None),
    ],
)
def test_the_level_of_equal_scores(settings, level):
    found = equal_scores(Run("folder", config={"stage": "spin"} | settings))
    assert found is None if level is None else found[0] == pytest.approx(level)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_supervised_are_the_responses_with_their_end(layout):
    enc, template = tokenizer.load("bytes"), "Q: {prompt} A: "
    rows, _ = encode_rows(
        [{"prompt": "ab", "responses": ["cde", None, "f"]}, {"prompt": "", "responses": ["xyz"]}],
        enc,
        template,
        64,
    )
    prompt, eot = list(b"Q: ab A: "), enc.eot_token
    wanted = [
        (-1, [(i, False) for i in prompt]),
        (0, [(i, True) for i in [*b"cde", eot]]),
        (2, [(i, True) for i in [*b"f", eot]]),
    ]
    batch = batch_rows([rows[0]], layout)
    assert supervised_tokens(batch) == wanted
    assert supervised_tokens(batch_rows([rows[1]], layout)) == [
        (-1, [(ord("x"), False)]),
        (0, [(i, True) for i in [*b"yz", eot]]),
    ]
    batch.targets[batch.targets == eot] = -1  # a mask that forgets the end would be seen
    assert supervised_tokens(batch)[1:] == [(k, tokens[:-1]) for k, tokens in wanted[1:]]
    # a reward model's score is read at the end of each response
    again = prompt if layout == "padded" else []
    assert supervised_tokens(reward_batch([rows[0]], layout)) == [
        (0, [(i, i == eot) for i in [*prompt, *b"cde", eot]]),
        (2, [(i, i == eot) for i in [*again, *b"f", eot]]),
    ]


def test_the_mask_is_of_a_row_that_is_trained(runs, tmp_path):
    """The row that is shown is one that the run trains on, token for token."""
    made = []

    def make_batch(rows, layout):
        made.extend(rows)
        return batch_rows(rows, layout)

    sft = dataclasses.replace(train.STAGES["sft"], make_batch=make_batch)
    with open(f"{runs['sft']}/config.json") as f:
        settings = json.load(f)["config"]
    again = [
        f"--{name}={settings[name]}"
        for name in (
            "stage",
            "data",
            "init",
            "template",
            "max_steps",
            "batch_size",
            "lr",
            "max_response",
            "device",
            "eval_rows",
        )
    ]
    train.main([*again, f"--out_dir={tmp_path}/again"], stages=train.STAGES | {"sft": sft})
    row, _ = training_batch(read_run(runs["sft"]))
    assert any(
        row["prompt"] == other["prompt"] and row["responses"] == other["responses"]
        for other in made
    )


def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy" / os.path.basename(run))


def test_a_run_by_epochs_that_was_killed_after_an_evaluation(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/run"
    options = ["--epochs=1", "--max_steps=0", "--eval_interval=1", "--save_interval=1"]
    options += ["--keep_last=9", f"--init={tiny_runs['pretrain']}", f"--data={tiny_data}"]
    train.main(["--stage=sft", f"--out_dir={out}", *SMALL, *options])
    assert "not finished" not in page_of(out, tmp_path=tmp_path)[0]
    *_, before, last = checkpoint.list_steps(f"{out}/round_0")
    shutil.rmtree(last)
    step = checkpoint.read_meta(before)["step"]
    lines = []
    with open(f"{out}/metrics.jsonl") as f:
        for line in f:
            record = json.loads(line)
            if record["step"] < step or (record["step"], record["kind"]) == (step, "eval"):
                lines.append(line)
    with open(f"{out}/metrics.jsonl", "w") as f:
        f.writelines(lines)
    page, _ = page_of(out, tmp_path=tmp_path)
    assert "The run is not finished" in page
    assert f"its last record is of round 0, step {step}" in page
    with pytest.raises(SystemExit, match=f"run is not finished: .* round 0, step {step}; run its"):
        demo.check_finished(out, demo.checkpoints_of(out))
    shutil.rmtree(f"{out}/round_0")
    with pytest.raises(SystemExit, match="run has no checkpoint: it has not been trained yet"):
        demo.check_finished(out, demo.checkpoints_of(out))


def test_missing_pieces_are_said(runs, tmp_path):
    def said(folder, *what):
        page, _ = page_of(str(folder), tmp_path=tmp_path)
        for text in what:
            assert text in page, text
        return page

    spin = copied(runs["spin"], tmp_path)
    log = (spin / "metrics.jsonl").read_text()
    line_end = log.index("\n", len(log) * 2 // 3)
    (spin / "metrics.jsonl").write_text(log[: line_end - 5])  # cut in the middle of a line
    said(spin, "lines cannot be read", "The run is not finished", "Implicit reward")
    (spin / "metrics.jsonl").write_text(
        "\n".join(line for line in log.split("\n") if '"round": 1' not in line)
    )
    said(spin, "its last record is of round 0, step 3")
    (spin / "metrics.jsonl").write_text(
        log.replace('"loss": 1', '"loss": Infinity, "was": 1')
        + '{"kind": "warning", "round": 1, "step": 2, "text": "<b>spike</b>"}\n[1]\n{"kind": 3}\n'
    )
    assert (
        "inf"
        not in re.sub("<style.*?/style>", "", said(spin, "2 of", "&lt;b&gt;spike&lt;/b&gt;"))
        .replace("Infinity", "")
        .split("Samples")[0]
    )
    rows = read_rows(spin / "round_1" / "val.jsonl")
    write_rows(str(spin / "round_1" / "val.jsonl"), rows[:4])
    said(spin, "round_1/val.jsonl has changed since the run used it", "self, round 0")
    (spin / "round_1" / "val.jsonl").write_text("{}\n")
    (spin / "round_1" / "collect.json").unlink()
    said(spin, "val.jsonl:1: a row needs prompt and responses")
    write_rows(str(spin / "round_1" / "val.jsonl"), [row | {"same_as": 5} for row in rows])
    said(spin, "This cannot be shown. A file of the run is not as expected")
    shutil.rmtree(spin / "round_1")
    shutil.rmtree(spin / "round_0" / "step_000003")
    said(spin, "There is no checkpoint yet", "self, round 0", "The loss mask cannot be shown")
    for name in ("train.jsonl", "val.jsonl"):
        (spin / "round_0" / name).unlink()
    (spin / "config.json").write_text(
        '{"config": {"stage": "spin", "players": 3, "rounds": "x"}, "starts": 4}'
    )
    (spin / "metrics.jsonl").unlink()
    said(
        spin,
        "No validation prompt has samples yet",
        "metrics.jsonl: No such file",
        "No step and no evaluation is logged yet",
    )
    ppo = copied(runs["ppo"], tmp_path)
    shutil.rmtree(ppo / "round_1")
    (ppo / "config.json").unlink()
    said(ppo, "config.json: No such file", "Reward")
    sft = copied(runs["sft"], tmp_path)
    weights = sft / "round_0" / "step_000008" / "meta.json"
    weights.write_text(weights.read_text().replace("8", "9"))
    said(sft, "meta.json is damaged", "The loss mask cannot be shown")


def test_mistakes_are_one_line(runs, tmp_path):
    def refused(*args):
        with pytest.raises(SystemExit) as e:
            main(list(args))
        assert "\n" not in str(e.value), e.value
        return str(e.value)

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for folder in (f"{tmp_path}/none", str(tmp_path), f"{tmp_path}/hf"):
        assert "not a run's out_dir" in refused(folder)
    assert "required: RUN" in refused()
    assert "--rows" in refused(runs["sft"], "--rows=0")
    assert "No such file or directory" in refused(runs["sft"], f"--out={tmp_path}/no/page.html")
    assert "\\x1bnone: not a run's out_dir" in refused("\x1bnone")


def test_a_curve_is_where_its_values_are():
    series = {"a": [[(0, 1.0), (10, 3.0)], [(10, 2.0), (20, 2.0)]]}
    chart = Chart("t", "u", series, (0, 20), [(10, "round 1")], (1.5, "level"))
    assert chart.x(0) < chart.x(10) < chart.x(20) and chart.y(1.0) > chart.y(2.0) > chart.y(3.0)
    assert chart.x(10) - chart.x(0) == pytest.approx(chart.x(20) - chart.x(10), abs=0.11)
    level = (3 * chart.y(1.0) + chart.y(3.0)) / 4  # 1.5 of 1 to 3
    assert chart.y(1.5) == pytest.approx(level, abs=0.11)
    assert chart.border_lines == [(chart.x(10), "round 1")]
    assert [text for _, text in ticks(0, 1, 4)] == ["0", "0.5", "1.0"]
    assert [text for _, text in ticks(-9e4, 9e4, 4)] == ["\u221250,000", "0", "50,000"]
    close = ticks(4.5e-4, 5.5e-4, 4)
    assert len({text for _, text in close}) == len(close) > 2
    Chart("constant", "", {"a": [[(0, 0.0)]]}, (0, 0))


# ------------------------------------------------------------------------------ in a real browser


def find_browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "headless_shell"):
        if shutil.which(name):
            return shutil.which(name)
    return None


BROWSER = os.environ.get("NANOSPIN_BROWSER") or find_browser()
LOOK = """(() => {
  const box = e => e.getBoundingClientRect();
  const all = q => [...document.querySelectorAll(q)];
  const bad = [];
  const outside = (t, s) => t.left < s.left - 1 || t.right > s.right + 1 ||
    t.top < s.top - 1 || t.bottom > s.bottom + 1;
  const overlap = (t, o) => t.left < o.right - 1 && o.left < t.right - 1 &&
    t.top < o.bottom - 2 && o.top < t.bottom - 2;
  for (const svg of all('svg')) {
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, box(t)]);
    texts.forEach(([name, t], i) => {
      if (outside(t, box(svg))) bad.push(`${svg.ariaLabel}: ${name} is cut`);
      for (const [other, o] of texts.slice(i + 1))
        if (overlap(t, o)) bad.push(`${svg.ariaLabel}: ${name} over ${other}`);
    });
  }
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const back = getComputedStyle(document.body).backgroundColor;
  const ink = e => getComputedStyle(e)[e.matches('.key') ? 'backgroundColor' : 'color'];
  const curve = s => box(s).width > 100 && box(s).height > 50 && s.querySelector('polyline');
  return {
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    curves: all('svg').filter(curve).length,
    columns: new Set(all('.curves figure').map(e => box(e).left)).size,
    bad,
    dark: light(back) < 0.1,
    contrast: Math.min(
      ...all('body, p, dt, dd, td, th, h4, li, .key').map(e => contrast(ink(e), back))),
    scripts: document.scripts.length,
    text: document.body.innerText,
  };
})()"""


@contextlib.contextmanager
def browser(folder):
    """A Chromium without a window, driven through a pipe: call(method, **params) -> result, and the
    list of its events."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-zygote",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', BROWSER, *flags],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    session, events, sent, buffer = {}, [], [0], [b""]

    def call(method, **params):
        sent[0] += 1
        os.write(
            ours_out,
            json.dumps({"id": sent[0], "method": method, "params": params} | session).encode()
            + b"\0",
        )
        while True:
            while b"\0" not in buffer[0]:
                more = os.read(ours_in, 1 << 20)
                assert more, "the browser is gone"
                buffer[0] += more
            message, _, buffer[0] = buffer[0].partition(b"\0")
            message = json.loads(message)
            if message.get("id") == sent[0]:
                return message["result"]
            events.append(message)

    try:
        target = call("Target.createTarget", url="about:blank")["targetId"]
        session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Log", "Runtime"):
            call(f"{domain}.enable")
        yield call, events
    finally:
        process.kill()
        process.wait()
        os.close(ours_in)
        os.close(ours_out)


@pytest.mark.skipif(not BROWSER, reason="no Chromium: set NANOSPIN_BROWSER or have one on PATH")
def test_in_a_browser(runs, tmp_path):
    pages = {
        name: page_of(*folders, tmp_path=tmp_path)[0]
        for name, folders in {
            "spin": [runs["spin"]],
            "ppo": [runs["ppo"]],
            "all": [runs[s] for s in ("pretrain", "sft", "reward", "preference")],
        }.items()
    }
    shots = os.environ.get("NANOSPIN_SCREENSHOTS", str(tmp_path))
    with browser(tmp_path / "profile") as (call, events):
        for name, page in pages.items():
            (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
            for width, scheme in ((1280, "light"), (390, "dark")):
                url = f"file://{tmp_path}/{name}.html"
                seen = look(call, events, url, width, scheme)
                # nothing sticks out: wide tables scroll in their box
                assert seen["width"] <= seen["window"] == width
                assert seen["curves"] == page.count("<svg") and seen["bad"] == []
                assert seen["columns"] == (3 if width > 600 else 1)
                assert seen["dark"] == (scheme == "dark") and seen["contrast"] >= 4.5
                assert seen["scripts"] == 0
                assert ("<script>alert(1)</script>" in seen["text"]) == (name == "spin")
                methods = {event["method"] for event in events}
                assert not methods & {
                    "Log.entryAdded",
                    "Runtime.consoleAPICalled",
                    "Runtime.exceptionThrown",
                    "Page.javascriptDialogOpening",
                }
                requests = []
                for event in events:
                    if event["method"] == "Network.requestWillBeSent":
                        requests.append(event["params"]["request"]["url"])
                assert requests == [url]
                shot = call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                picture = base64.b64decode(shot)
                assert picture[:4] == b"\x89PNG" and len(picture) > 20_000
                with open(os.path.join(shots, f"{name}_{width}.png"), "wb") as f:
                    f.write(picture)


def look(call, events, url, width, scheme):
    """What LOOK finds on a page in a window of a width and a color scheme."""
    call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=800,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    call("Emulation.setEmulatedMedia", features=[feature])
    events.clear()
    call("Page.navigate", url=url)
    state = "document.readyState + location.href"
    while call("Runtime.evaluate", expression=state)["result"]["value"] != f"complete{url}":
        pass
    return call("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
