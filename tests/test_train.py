"""The trainer in this process: every stage, resuming bit for bit, and what it refuses."""

import dataclasses
import glob
import json
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import (
    TEMPLATE,
    TINY,
    Killed,
    assert_same_run,
    final_weights,
    killing,
    load_config,
    read_metrics,
    refused,
    spin_args,
)
from safetensors.torch import load_file, save_file

import players
import rollout
import train
from data import tokenizer
from data.files import sha256, write_json
from data.folder import write_meta
from data.rows import encode_rows, read_rows, sampled_row, write_rows
from data.template import TEMPLATE as DEFAULT_TEMPLATE
from data.template import written_ids
from model import GPT
from nanospin import checkpoint, elastic, rounds
from nanospin.config import Config
from nanospin.optim import lr_factor, make_optimizers

CPU = torch.device("cpu")


def small_args(stage, data, init, out, *more):
    """A run of one step that starts from the checkpoint `init`, if there is one."""
    args = [f"--stage={stage}", f"--data={data}", f"--out_dir={out}"]
    if init:
        args.append(f"--init={init}")
    return [*args, "--max_steps=1", "--batch_size=4", "--device=cpu", "--eval_rows=4", *more]


def numbers(run, kind, name):
    return [record[name] for record in read_metrics(run, kind)]


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


# ---------------------------------------------------------------------- optimizer and schedule


def test_adamw_is_fused_and_muon_takes_the_matrices_of_the_blocks(tiny_runs):
    model, _, _ = GPT.from_checkpoint(tiny_runs["sft"])
    cfg = load_config(["--max_steps=1", "--optimizer=muon", "--weight_decay=0.1"])
    adamw, muon = make_optimizers(model, cfg, 1e-3, CPU)
    assert adamw.defaults["fused"]
    decayed, not_decayed = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and not_decayed["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in not_decayed["params"])
    expected = []
    for name, p in model.named_parameters():
        if name.startswith("h.") and p.dim() == 2:
            expected.append(p)
    assert len(muon.param_groups[0]["params"]) == len(expected)
    total = 0
    for group in adamw.param_groups + muon.param_groups:
        total += sum(p.numel() for p in group["params"])
    assert total == model.num_params()


def test_adamw_is_fused_on_a_gpu(tiny_runs):
    model, _, _ = GPT.from_checkpoint(tiny_runs["sft"])
    cfg = load_config(["--max_steps=1"])
    (adamw,) = make_optimizers(model, cfg, 1e-3, torch.device("cuda"))
    assert adamw.defaults["fused"]


@pytest.mark.parametrize("schedule, end", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules_warm_up_to_1_and_end_at_min_lr_ratio(schedule, end):
    options = ["--max_steps=1", "--warmup_ratio=0.1", "--min_lr_ratio=0.1"]
    cfg = load_config([*options, f"--schedule={schedule}"])
    factors = [lr_factor(cfg, step, 100) for step in range(101)]
    assert factors[0] < factors[5] < factors[10] == 1.0
    assert max(factors) == 1.0
    assert abs(factors[100] - end) < 1e-12


# ----------------------------------------------------------------------------------- the stages


def test_training_learns(tiny_runs):
    for run in tiny_runs.values():
        losses = numbers(run, "eval", "val_loss")
        assert losses[-1] < losses[0] - 0.1
    steps = read_metrics(tiny_runs["pretrain"], "step")
    assert [record["step"] for record in steps] == list(range(8))
    assert abs(steps[0]["loss"] - math.log(257)) < 0.1


@pytest.fixture(scope="module")
def spin_run(tiny_runs, tiny_data, tmp_path_factory):
    """Two rounds of data > teacher > self > the previous self."""
    out = str(tmp_path_factory.mktemp("spin") / "run")
    train.main(
        spin_args(
            tiny_runs,
            tiny_data,
            out,
            "--players=data,teacher,self,self-1",
            f"--teacher={tiny_runs['pretrain']}",
            "--rounds=2",
            "--replay_rounds=1",
            "--nll_coef=0.1",
        )
    )
    return out


def test_a_run_cannot_have_fewer_rounds_than_it_has_begun(tiny_runs, tiny_data, tmp_path):
    """Its newest checkpoint, of half a round, would be taken for the end of the run."""
    out = tmp_path / "run"
    args = spin_args(tiny_runs, tiny_data, str(out), "--max_steps=2", "--save_interval=1")
    train.main([*args, "--rounds=2"])
    shutil.rmtree(out / "round_1" / "step_000002")  # it was killed here
    before = (out / "config.json").read_bytes()
    with pytest.raises(SystemExit, match="has begun 2 rounds, more than rounds = 1"):
        train.main([*args, "--rounds=1"])
    assert (out / "config.json").read_bytes() == before
    train.main([*args, "--rounds=2"])
    assert checkpoint.latest(out).endswith("round_1/step_000002")


def test_a_round_starts_at_ln_k_factorial(spin_run):
    """The first round has no earlier self: K = 3. The second has four players."""
    assert max(numbers(spin_run, "start", "off")) < 1e-4
    evals = read_metrics(spin_run, "eval")
    first = [record for record in evals if record["round"] == 0][0]
    second = [record for record in evals if record["round"] == 1][0]
    assert abs(first["rank_nll"] - math.log(6)) < 1e-5
    assert abs(second["rank_nll"] - math.log(24)) < 1e-5
    assert "reward/self-1" in second


def test_the_players_responses(spin_run, tiny_data):
    """In order, the previous self in the next round, and one limit of length for all of them."""
    first, second = (read_rows(f"{spin_run}/round_{r}/train.jsonl") for r in (0, 1))
    data_rows = {row["prompt"]: row for row in read_rows(f"{tiny_data}/train.jsonl")}
    for row, next_row in zip(first, second, strict=True):
        assert row["responses"][0] == data_rows[row["prompt"]]["responses"][0]
        assert row["responses"][2] == next_row["responses"][3]
        assert row["responses"][3] is None
        cut_lengths = [ids and min(16, len(ids)) for ids in row["ids"]]
        assert cut_lengths == row.get("lengths", [ids and len(ids) for ids in row["ids"]])


def test_replay_rounds_adds_the_rows_of_earlier_rounds(spin_run):
    steps = [record for record in read_metrics(spin_run, "step") if record["round"] == 1]
    assert len(steps) == math.ceil(2 * 40 / 8)


def test_the_manifest_names_the_reference_and_reports_the_players(spin_run):
    manifest = read_json(f"{spin_run}/round_1/collect.json")
    reference = checkpoint.read_meta(checkpoint.latest(spin_run, 0))
    assert manifest["made_of"]["reference"] == reference["weights_sha256"]
    report = manifest["report"]["val"]
    names = ("tie/self", "length/data", "ended/self", "exact_match/self", "length_acc/self")
    assert set(names) <= set(report)


def test_the_policy_learns_to_tell_the_players_apart(spin_run):
    losses = [r["nll"] for r in read_metrics(spin_run, "step") if r["round"] == 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss_type", ["pl", "pairs", "ipo", "simpo", "orpo"])
def test_preference_stage_learns(tiny_runs, tiny_data, tmp_path, loss_type):
    out = str(tmp_path / "dpo")
    beta = 1.0 if loss_type in ("simpo", "orpo") else 0.1
    nll_coef = 1.0 if loss_type == "orpo" else 0.0
    train.main(
        [
            "--stage=preference",
            f"--out_dir={out}",
            f"--data={tiny_data}",
            f"--init={tiny_runs['sft']}",
            f"--template={TEMPLATE}",
            "--max_response=16",
            "--device=cpu",
            "--batch_size=8",
            "--epochs=12",
            "--lr=5e-4",
            f"--beta={beta}",
            "--eval_rows=8",
            f"--loss_type={loss_type}",
            f"--nll_coef={nll_coef}",
        ]
    )
    (start,) = read_metrics(out, "start")
    assert start["off"] < 1e-4
    losses = numbers(out, "step", "loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    assert sum(numbers(out, "step", "acc")[-5:]) / 5 > 0.55
    assert "acc/1" in read_metrics(out, "eval")[-1]


@pytest.mark.parametrize("options", [["--layout=padded"], ["--micro_batch_tokens=64"]])
def test_layouts_and_micro_batches_train_alike(tiny_runs, tiny_data, tmp_path, options):
    """The same losses as packed rows in one micro-batch, to rounding; AdamW turns the rounding of
    a gradient near 0 into a step."""
    packed, other = str(tmp_path / "packed"), str(tmp_path / "other")
    train.main(spin_args(tiny_runs, tiny_data, packed, "--max_steps=4"))
    train.main(spin_args(tiny_runs, tiny_data, other, "--max_steps=4", *options))
    for kind, name in (("step", "loss"), ("eval", "val_loss")):
        expected = numbers(packed, kind, name)
        assert numbers(other, kind, name) == pytest.approx(expected, rel=0, abs=1e-4)


def test_document_mask_changes_training_and_evaluation(tiny_data, tmp_path):
    losses = {}
    for masked in (True, False):
        out = str(tmp_path / str(masked))
        args = small_args("pretrain", tiny_data, None, out, "--max_steps=3", "--lr=1e-3", *TINY)
        train.main([*args, f"--document_mask={masked}"])
        losses[masked] = numbers(out, "eval", "val_loss")
    assert all(math.isfinite(loss) for loss in losses[True])
    assert losses[True][0] != losses[False][0]


def test_bfloat16(tiny_runs, tiny_data, tmp_path):
    """Matrix products in bfloat16, weights in float32. Policy and reference still agree at a
    round's start."""
    out = str(tmp_path / "r")
    train.main(spin_args(tiny_runs, tiny_data, out, "--dtype=bfloat16", "--max_steps=3"))
    assert read_metrics(out, "start")[0]["off"] < 0.02
    assert all(w.dtype == torch.float32 for w in final_weights(out).values())
    assert not read_metrics(out, "warning")


def shrunk(file, tiny_runs, tiny_data, out):
    """The arguments that make three CPU steps of a config file."""
    cfg = load_config([file])
    args = [
        file,
        f"--data={tiny_data}",
        f"--out_dir={out}",
        "--max_steps=3",
        "--batch_size=8",
        "--micro_batch_tokens=256",
        "--device=cpu",
        "--dtype=float32",
        "--eval_rows=8",
        "--eval_batches=1",
        "--compile=False",
    ]
    if "n_layer" in cfg.model:
        args += TINY
    if "n_kv_head" in cfg.model:
        args.append("--n_kv_head=1")
    if cfg.stage != "pretrain":
        init = tiny_runs["pretrain" if cfg.stage == "sft" else "sft"]
        args += [f"--init={init}", "--max_prompt=40", "--max_response=16"]
    if cfg.lora_rank:
        args.append("--lora_rank=4")
    if cfg.stage in ("spin", "ppo"):
        args += ["--max_rows=8", "--gen_batch_size=8"]
    if cfg.stage == "ppo":
        args += ["--rounds=2", "--reward=conftest:letters"]
    if cfg.ranked_by:
        args.append("--ranked_by=conftest:letters")
    if cfg.teacher not in ("", "rows"):
        args.append(f"--teacher={tiny_runs['pretrain']}")
    if cfg.pretrain_coef:
        args.append(f"--pretrain_data={tiny_data}")
    return args


def config_files():
    """Every experiment, except for the T_n study's, which have a model and a trainer of their own
    (test_taylor.py)."""
    files = glob.glob("config/**/*.py", recursive=True) + glob.glob("studies/*/config/*.py")
    return sorted(file for file in files if not file.startswith("studies/taylor/"))


@pytest.mark.parametrize("file", config_files())
def test_every_config_shrunk_runs(file, tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/run"
    args = shrunk(file, tiny_runs, tiny_data, out)
    train.main(args)
    losses = numbers(out, "step", "loss")
    assert len(losses) == 3 * load_config(args).rounds
    assert all(math.isfinite(loss) for loss in losses)


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        pytest.param("muon", marks=pytest.mark.slow),
        pytest.param("rmsprop", marks=pytest.mark.slow),
    ],
)
def test_pretraining_resumes_bit_for_bit(tiny_data, tmp_path, monkeypatch, optimizer):
    """Six steps equal three plus three resumed, with dropout, accumulation and a schedule. The run
    is killed two steps after its checkpoint, while it writes a line of metrics.jsonl."""
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"

    def args(out):
        return [
            "--stage=pretrain",
            f"--out_dir={out}",
            f"--data={tiny_data}",
            "--max_steps=6",
            "--save_interval=3",
            "--eval_interval=2",
            "--batch_size=8",
            "--micro_batch_tokens=256",
            f"--optimizer={optimizer}",
            "--lr=1e-3",
            "--warmup_ratio=0.3",
            "--dropout=0.1",
            "--weight_decay=0.1",
            *TINY,
        ]

    train.main(args(whole))
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 5))
        with pytest.raises(Killed):
            train.main(args(killed))
    assert checkpoint.latest(killed).endswith("step_000003")
    assert len(read_metrics(killed, "step")) == 5
    with open(f"{killed}/metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"kind": "st')
    train.main(args(killed))
    assert_same_run(whole, killed)


def test_a_finished_run_is_left_as_it_is(tiny_data, tmp_path):
    args = small_args("pretrain", tiny_data, None, tmp_path / "r", *TINY)
    train.main(args)
    before = read_bytes(tmp_path / "r/metrics.jsonl")
    train.main(args)
    assert read_bytes(tmp_path / "r/metrics.jsonl") == before


def kill_args(runs, data, out):
    """A run of two rounds with all three kinds of players."""
    teacher = f"--teacher={runs['pretrain']}"
    players = "--players=data,teacher,self"
    return spin_args(runs, data, out, players, teacher, "--rounds=2", "--nll_coef=0.1")


@pytest.fixture(scope="module")
def undisturbed(tiny_runs, tiny_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("undisturbed") / "run")
    train.main(kill_args(tiny_runs, tiny_data, out))
    return out


@pytest.mark.parametrize(
    "module, function, at",
    [
        pytest.param(players, "respond", 4, id="sampling"),
        pytest.param(rollout, "row_logps", 0, id="scoring", marks=pytest.mark.slow),
        pytest.param(train, "lr_factor", 8, id="training", marks=pytest.mark.slow),
        pytest.param(checkpoint, "write_json", 2, id="saving", marks=pytest.mark.slow),
    ],
)
def test_spin_resumes_bit_for_bit(
    tiny_runs, tiny_data, undisturbed, tmp_path, monkeypatch, module, function, at
):
    """Killed in the middle of sampling, scoring, a round's fit, or a save, in either round."""
    monkeypatch.setattr(rounds, "PART_SIZE", 16)
    killed = f"{tmp_path}/killed"
    with monkeypatch.context() as m:
        m.setattr(module, function, killing(getattr(module, function), at))
        with pytest.raises(Killed):
            train.main(kill_args(tiny_runs, tiny_data, killed))
    train.main(kill_args(tiny_runs, tiny_data, killed))
    assert_same_run(undisturbed, killed)
    for r in (0, 1):
        for file in ("train.jsonl", "val.jsonl", "train.ref.npz"):
            expected = read_bytes(f"{undisturbed}/round_{r}/{file}")
            assert read_bytes(f"{killed}/round_{r}/{file}") == expected
    assert not glob.glob(f"{killed}/**/*.part*", recursive=True)
    assert not glob.glob(f"{killed}/round_*/writing_*")


# ----------------------------------------------------------------------- rows and their players


def change_rows(folder, change):
    """Apply change(rows) to both splits of a data folder and write its meta.json again."""
    for split in ("train", "val"):
        path = f"{folder}/{split}.jsonl"
        write_rows(path, change(read_rows(path)))
    write_meta(str(folder), "bytes", "made up")


def test_equal_responses_are_absent(tiny_runs, tiny_data, tmp_path, capsys, monkeypatch):
    """A sample that equals the data's response or the teacher's is left out of the ranking. Exact
    match counts only the first as right.

    Greedy samples of a model this small run to the limit. There a text that is cut equals its own
    prefix.
    """
    monkeypatch.chdir(tmp_path)
    os.mkdir("rows")  # is no checkpoint of a teacher
    folder, out = str(tmp_path / "echo"), str(tmp_path / "run")
    shutil.copytree(tiny_data, folder)
    model, enc, _ = GPT.from_checkpoint(tiny_runs["sft"])

    def answer_as_the_model_would(rows):
        texts, _ = players.respond(model, enc, TEMPLATE, rows, max_response=16, temperature=0)
        for i, (row, text) in enumerate(zip(rows, texts)):
            best, second = [(text, "x"), ("x", text), ("x", "z")][i % 3]
            row["responses"] = [best, second, "unused"]
        return rows

    change_rows(folder, answer_as_the_model_would)
    args = spin_args(
        tiny_runs,
        folder,
        out,
        "--temperature=0",
        "--players=data,teacher,self",
        "--teacher=rows",
        "--max_steps=1",
    )
    train.main(args)

    rows = read_rows(f"{out}/round_0/val.jsonl")
    data_rows = read_rows(f"{folder}/val.jsonl")
    for row, data_row in zip(rows, rollout.load_rows(load_config(args))["val"]):
        same_as = [0, 1, None][data_rows.index(data_row) % 3]  # the data's, the teacher's, neither
        assert row["same_as"] == [None, None, same_as]
        assert (row["ids"][2] is None) == (same_as is not None)
    num_equal = sum(row["same_as"][2] is not None for row in rows)
    assert f"{num_equal} responses equal to a better one" in capsys.readouterr().out
    report = read_metrics(out, "collect")[0]
    right = sum(row["same_as"][2] == 0 for row in rows) / len(rows)
    assert report["exact_match/self"] == right
    assert 0 < right < report["tie/self"] < 1


@pytest.mark.parametrize("stage", ["preference", "reward"])
def test_data_responses_that_are_equal_are_not_ranked(
    tiny_runs, tiny_data, tmp_path, capsys, stage
):
    """Also when they are equal only after they are cut. Nothing is left to train on in a row of
    two of them."""
    folder = str(tmp_path / "equal")
    shutil.copytree(tiny_data, folder)
    args = [
        f"--stage={stage}",
        f"--data={folder}",
        f"--init={tiny_runs['sft']}",
        f"--template={TEMPLATE}",
        "--max_response=12",
        "--device=cpu",
        "--batch_size=8",
        "--max_steps=1",
    ]

    def make_pairs_equal(rows):
        for row in rows[::2]:
            row["responses"] = ["the same start, then x", "the same start, and y"]
        return rows

    change_rows(folder, make_pairs_equal)
    train.main([*args, f"--out_dir={tmp_path}/some"])
    expected = "20 responses equal to a better one, 20 with nothing ranked"
    assert expected in capsys.readouterr().out

    change_rows(folder, lambda rows: rows[::2])
    with pytest.raises(SystemExit, match="none of its 20 rows can be used .* 20 with nothing"):
        train.main([*args, f"--out_dir={tmp_path}/all"])


def test_dropout_of_init_is_off_beside_a_reference(tiny_runs, tiny_data, tmp_path, capsys):
    """Unless the config sets it; either is said. A run that resumes keeps what it has."""
    init, out = str(tmp_path / "sft"), str(tmp_path / "run")
    options = ["--device=cpu", f"--data={tiny_data}", f"--template={TEMPLATE}", "--batch_size=8"]
    start = [f"--init={tiny_runs['sft']}", "--max_steps=1"]
    train.main(["--stage=sft", f"--out_dir={init}", "--dropout=0.2", *options, *start])
    more = ["--stage=sft", f"--out_dir={tmp_path}/more", f"--init={init}", "--max_steps=1"]
    train.main([*options, *more])
    assert dropout_of(f"{tmp_path}/more") == 0.2  # there is no reference in sft
    capsys.readouterr()

    ranked = ["--stage=preference", *options, f"--init={init}", "--max_steps=2"]
    train.main([*ranked, f"--out_dir={out}", "--save_interval=1"])
    assert dropout_of(out) == 0.0
    assert (
        f"dropout 0.2 of {checkpoint.latest(init)} is off in stage preference"
        in capsys.readouterr().out
    )
    assert not read_metrics(out, "warning")

    train.main([*ranked, f"--out_dir={tmp_path}/set", "--dropout=0.2", "--save_interval=1"])
    assert dropout_of(f"{tmp_path}/set") == 0.2
    assert "dropout 0.2 is on" in capsys.readouterr().out
    (warning,) = read_metrics(f"{tmp_path}/set", "warning")
    assert "dropout is 0.2" in warning["text"]

    # a run from before this rule: its checkpoint has the dropout, its config does not set it
    checkpoint_path = checkpoint.latest(f"{tmp_path}/set")
    cfg = load_config([*ranked, f"--out_dir={tmp_path}/set"])
    model_config, _, _, path = train.resolve_model(cfg, GPT, checkpoint_path)
    assert (path, model_config.dropout) == (checkpoint_path, 0.2)
    assert "dropout 0.2 is on" in capsys.readouterr().out


def dropout_of(run):
    return checkpoint.read_meta(checkpoint.latest(run))["model"]["dropout"]


def test_a_prompt_without_room_is_dropped_and_reported(tiny_runs, tiny_data, tmp_path, capsys):
    folder, out = str(tmp_path / "long"), str(tmp_path / "r")
    shutil.copytree(tiny_data, folder)

    def lengthen_one_prompt(rows):
        rows[1]["prompt"] = "long " * 50
        return rows

    change_rows(folder, lengthen_one_prompt)
    players = ["--players=data,teacher,self", f"--teacher={tiny_runs['pretrain']}"]
    train.main(spin_args(tiny_runs, folder, out, *players, "--max_steps=1"))
    assert len(read_rows(f"{out}/round_0/train.jsonl")) == 39
    printed = capsys.readouterr().out
    assert "data train: 40 rows, 0 prompts cut" in printed
    assert "1 dropped" in printed


def test_a_teacher_from_a_ranked_file(tiny_runs, tiny_data, tmp_path):
    """Text is encoded and ends with end-of-text. Ids that this tokenizer made are kept as they are,
    with end-of-text or without."""
    fingerprint = tokenizer.fingerprint(tokenizer.load("bytes"))
    expected = {}
    teacher = []
    for split in ("train", "val"):
        for row in read_rows(f"{tiny_data}/{split}.jsonl"):
            answer = {"prompt": row["prompt"], "responses": ["so it ends"]}
            expected[row["prompt"]] = [*b"so it ends", 256]
            if len(teacher) % 2 == 0:
                answer |= {"ids": [[*b"so it ends"]], "tokenizer": fingerprint}
                expected[row["prompt"]] = [*b"so it ends"]
            teacher.append(answer)
    write_rows(f"{tmp_path}/teacher.jsonl", teacher)
    options = ["--players=data,teacher,self", f"--teacher={tmp_path}/teacher.jsonl"]
    train.main(spin_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options, "--max_steps=1"))
    rows = read_rows(f"{tmp_path}/r/round_0/train.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert row["ids"][1] == expected[row["prompt"]]


def test_samples_whose_text_was_edited_are_refused(tiny_data, tmp_path):
    """The ids of a sample would be used, and the edit would change nothing."""
    enc, path = tokenizer.load("bytes"), f"{tmp_path}/teacher.jsonl"
    rows = read_rows(f"{tiny_data}/train.jsonl")[:1]
    answer = {"prompt": rows[0]["prompt"], "responses": ["eleven"]}
    answer |= {"ids": [[*b"twelve", 256]], "tokenizer": tokenizer.fingerprint(enc)}
    write_rows(path, [answer])
    with pytest.raises(SystemExit, match="the ids are not those of its text"):
        players.match_responses(path, rows, enc, "{prompt}")
    write_rows(path, [answer | {"responses": ["twelve"]}])
    assert players.match_responses(path, rows, enc, "{prompt}") == [("twelve", [*b"twelve", 256])]


def test_a_teacher_without_room_for_a_prompt(tiny_runs, tiny_data, tmp_path):
    """It is said before anything is sampled, so max_prompt may be set and the run goes on."""
    teacher, out = f"{tmp_path}/teacher", f"{tmp_path}/r"
    small = [arg for arg in TINY if not arg.startswith("--block_size")]
    args = ["--stage=pretrain", f"--data={tiny_data}", f"--out_dir={teacher}", "--block_size=43"]
    train.main([*args, *small, "--max_steps=1", "--batch_size=4", "--device=cpu"])
    options = ["--players=data,teacher,self", f"--teacher={teacher}", "--max_steps=1"]
    args = spin_args(tiny_runs, tiny_data, out, *options)
    message = refused(args)
    assert "prompts leave no room for a response in the block_size 43 of teacher" in message
    assert message.endswith("set max_prompt")
    assert not glob.glob(f"{out}/teacher_*")
    train.main([*args, "--max_prompt=41"])
    assert os.path.exists(f"{out}/round_0/step_000001")


WITHOUT_THOUGHTS = "Q{prompt}A{last}<think>\n\n</think>\n\n{response|thoughts}."


def test_thoughts_of_a_teacher_without_those_of_the_policy(tiny_data, tmp_path, capsys):
    """A template without thoughts leaves them out of what another model wrote, and says so."""
    enc, path = tokenizer.load("bytes"), f"{tmp_path}/teacher.jsonl"
    rows = [
        row | {"prompt": row["prompt"] + str(i)}
        for i, row in enumerate(read_rows(f"{tiny_data}/train.jsonl"))
    ]
    texts = ["<think>\nwhy\n</think>\n\nso", "plain", "a </think> b", "<think>\nwh"]
    sampled = []
    for row, text in zip(rows, texts):
        sampled.append(sampled_row(row, text, [*text.encode(), 256], enc, "Q{prompt}A"))
    write_rows(path, sampled)
    found = players.match_responses(path, rows[:4], enc, WITHOUT_THOUGHTS)
    for (text, ids), expected in zip(found, ("so", "plain", " b", ""), strict=True):
        assert text == expected
        assert ids == [*written_ids(enc, WITHOUT_THOUGHTS, expected), 256]
    assert "those of 3 of 4 responses are left out" in capsys.readouterr().out
    found = players.match_responses(path, rows[:4], enc, "Q{prompt}A")
    assert [text for text, _ in found] == texts
    assert "thoughts" not in capsys.readouterr().out


@pytest.mark.parametrize("of, own", [("{prompt}", " hm "), (" hm ", "{prompt}")])
def test_a_teacher_of_another_template(tiny_data, tmp_path, of, own):
    """Its answers are encoded as those of the data are, under the policy's template."""
    of, own = [("{prompt}{answer} hm {response}" if "hm" in t else t) for t in (of, own)]
    enc, path = tokenizer.load("bytes"), f"{tmp_path}/teacher.jsonl"
    row = read_rows(f"{tiny_data}/train.jsonl")[0]
    ids = written_ids(enc, of, "twelve")
    write_rows(path, [sampled_row(row, "twelve", [*ids, 256], enc, of)])
    expected = [*written_ids(enc, own, "twelve"), 256]
    assert expected != [*ids, 256]
    assert players.match_responses(path, [row], enc, own) == [("twelve", expected)]


def test_responses_that_are_cut_are_counted_and_stay_whole(tiny_runs, tiny_data, tmp_path, capsys):
    """Those of a teacher too. Another run may use the rows of a round with other limits, or under
    another template: samples that did not end get no end there."""
    data, out = f"{tmp_path}/data", f"{tmp_path}/r"
    shutil.copytree(tiny_data, data)
    answers = ["ok", "a long answer of the teacher"]
    change_rows(data, lambda rows: [row | {"responses": answers} for row in rows])
    options = ["--players=data,teacher,self", "--teacher=rows", "--max_response=8", "--rounds=1"]
    args = spin_args(tiny_runs, data, out, *options, "--max_steps=1")
    for _ in range(2):  # when the rows are made, and when they are read
        train.main(args)
        rows = read_rows(f"{out}/round_0/train.jsonl")
        said = f"round 0 train: {len(rows)} rows, 0 prompts cut, {len(rows)} responses cut"
        assert said in capsys.readouterr().out
        shutil.rmtree(f"{out}/round_0/step_000001")
    (report,) = read_metrics(out, "collect")
    assert (report["length/data"], report["length/teacher"]) == (3, 8)
    assert (report["ended/data"], report["ended/teacher"]) == (1, 0)

    enc = tokenizer.load("bytes")
    num_unended = 0
    for template, before in ((TEMPLATE, b""), ("{prompt}\n{answer}so: {response}.", b"so: ")):
        encoded, counts = encode_rows(rows, enc, template, 64, 0, 0)
        assert counts["responses cut"] == 0
        for row, encoded_row in zip(rows, encoded):
            text = row["responses"][1].encode()
            assert encoded_row["responses"][1] == [*before, *text, enc.eot_token]
            sample = row["ids"][2]
            if sample and sample[-1] != enc.eot_token:
                num_unended += 1
                assert encoded_row["responses"][2][-1] != enc.eot_token
    assert num_unended > 10


def teacher_rows(data, answer):
    """A teacher's file: answer(row) to every prompt of a data folder."""
    rows = []
    for split in ("train", "val"):
        for row in read_rows(f"{data}/{split}.jsonl"):
            rows.append({"prompt": row["prompt"], "responses": [answer(row)]})
    return rows


def test_an_evaluation_without_the_metric_of_keep_best(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Where no held-out row is ranked there is no acc. Such a step is not rated, and training goes
    on."""
    out = f"{tmp_path}/r"
    stage = dataclasses.replace(train.STAGES["spin"], evaluate=lambda *args: {"val_loss": 1.0})
    monkeypatch.setitem(train.STAGES, "spin", stage)
    options = ["--keep_best=-acc", "--max_steps=2", "--eval_interval=1"]
    train.main(spin_args(tiny_runs, tiny_data, out, *options))
    texts = {record["text"] for record in read_metrics(out, "warning")}
    assert "this evaluation has no acc, so keep_best does not rate it" in texts
    assert checkpoint.latest(out).endswith("step_000002")


def test_equal_responses_count_in_a_round_report():
    """Lengths and ends are means over all samples. Those that equal a better response are absent
    from the ranking: short and right ones tie most, so a mean without them would be too long."""
    enc = tokenizer.load("bytes")
    end = enc.eot_token
    cfg = Config(stage="spin", players=["data", "self:3"], template=DEFAULT_TEMPLATE)
    row = {
        "responses": ["y", "y", "long", None],
        "ids": [[121, end], None, [108, 111, 110, 103], None],
        "same_as": [None, 0, None, 2],
    }
    data_row = {"responses": ["y"]}
    report = players.round_report(cfg, [row], [data_row], enc)
    assert report["tie/self"] == pytest.approx(2 / 3)
    assert report["length/self"] == pytest.approx((2 + 4 + 4) / 3)
    assert report["ended/self"] == pytest.approx(1 / 3)
    assert report["exact_match/self"] == pytest.approx(1 / 3)
    assert report["length_acc/self"] == 1
    # a sample that equals what the limits leave of the data's answer is no exact match
    long = {"responses": ["yes, it is", None], "ids": [[*b"yes, it is", end], None]}
    long |= {"same_as": [None, 0], "lengths": [3, None]}
    cut = dataclasses.replace(cfg, players=["data", "self"], max_response=3)
    report = players.round_report(cut, [long], [{"responses": ["yes, it is"]}], enc)
    assert (report["tie/self"], report["exact_match/self"], report["length/self"]) == (1, 0, 3)
    # what a teacher's answer is beyond the limits is not known
    cut = dataclasses.replace(cut, players=["data", "teacher"], teacher="rows")
    report = players.round_report(cut, [long], [{"responses": ["yes, it is"]}], enc)
    assert report["tie/teacher"] == 1 and "exact_match/teacher" not in report
    # nor where the response that it equals is a sample that did not end
    sample = {"responses": ["yes", None, None], "ids": [[*b"yes"], None, None]}
    sample |= {"same_as": [None, 0, 0], "players": ["self", "data", "teacher"]}
    cut = dataclasses.replace(cut, players=["data", "teacher", "self"])
    report = players.round_report(cut, [sample], [{"responses": ["yes, it is"]}], enc)
    assert report["exact_match/self"] == 0 and "exact_match/teacher" not in report
    # every sample equals the data's answer
    same = row | {"ids": [[121, end], None, None, None], "same_as": [None, 0, 0, 0]}
    report = players.round_report(cfg, [same], [data_row], enc)
    assert (report["tie/self"], report["length/self"], report["ended/self"]) == (1, 2, 1)
    assert "length_acc/self" not in report


def test_the_first_answer_of_a_teacher_counts(tiny_data, tmp_path):
    """The recipe appends to its file, so a prompt can be answered twice."""
    path, rows = f"{tmp_path}/teacher.jsonl", read_rows(f"{tiny_data}/train.jsonl")
    answers = [teacher_rows(tiny_data, lambda row, n=n: f"answer {n}") for n in (1, 2)]
    write_rows(path, answers[0] + answers[1])
    matched = players.match_responses(path, rows, tokenizer.load("bytes"), "{prompt}")
    assert {text for text, _ in matched} == {"answer 1"}


def test_empty_answers_of_a_teacher_are_absent_and_counted(tiny_runs, tiny_data, tmp_path, capsys):
    """Each row has its own answer, empty for every third prompt; "  " counts as empty."""
    empty = {0: "", 3: "  \n"}

    def answer(row):
        number = int(row["prompt"].split()[0])
        return empty.get(number % 6, f"answer {number}")

    path, out = f"{tmp_path}/teacher.jsonl", f"{tmp_path}/r"
    write_rows(path, teacher_rows(tiny_data, answer))
    players = ["--players=data,teacher,self", f"--teacher={path}"]
    train.main(spin_args(tiny_runs, tiny_data, out, *players, "--max_steps=1"))
    rows = read_rows(f"{out}/round_0/train.jsonl")
    num_empty = 0
    for row in rows:
        is_empty = answer(row) in empty.values()
        assert (row["responses"][1] is None) == (row["ids"][1] is None) == is_empty
        num_empty += is_empty
    printed = capsys.readouterr().out
    assert f"round 0 train: {num_empty} of 40 answers of the teacher are empty" in printed
    report = read_json(f"{out}/round_0/collect.json")["report"]["train"]
    assert report["empty/teacher"] == num_empty / 40


def spoil_weights(run, value):
    """Set a weight of a run's checkpoint, and seal the checkpoint again."""
    path = checkpoint.latest(run)
    weights = load_file(f"{path}/model.safetensors")
    weights["h.0.mlp.c_proj.weight"][0, 0] = value
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    meta = read_json(f"{path}/meta.json")
    meta["weights_sha256"] = sha256(f"{path}/model.safetensors")
    write_json(f"{path}/meta.json", meta)
    checkpoint.write_manifest(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_sampled(tiny_runs, tiny_data, tmp_path, value):
    """Of a teacher, or of the policy: no sample is written. With its weights fixed it goes on."""
    out, spoiled = f"{tmp_path}/r", f"{tmp_path}/spoiled"
    shutil.copytree(tiny_runs["sft"], spoiled)
    spoil_weights(spoiled, value)
    players = ["--players=data,teacher,self", "--max_steps=1"]
    args = spin_args(tiny_runs, tiny_data, out, *players, f"--teacher={spoiled}")
    message = refused(args)
    assert spoiled in message
    assert "h.0.mlp.c_proj.weight has numbers that are not finite" in message
    assert not glob.glob(f"{out}/**/*.jsonl*", recursive=True)
    spoil_weights(spoiled, 0.5)
    train.main(args)

    spoil_weights(spoiled, value)
    message = refused(spin_args({"sft": spoiled}, tiny_data, f"{tmp_path}/own", "--max_steps=1"))
    assert "not finite" in message
    assert not glob.glob(f"{tmp_path}/own/round_0/*.jsonl*")


def preference_args(runs, data, out, *more):
    return spin_args(runs, data, out, "--stage=preference", "--max_steps=2", *more)


def test_a_reference_that_is_not_finite_is_refused(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Before its log-probabilities are written, with the row and the checkpoint named."""
    row_logps = rollout.row_logps

    def broken(*args):
        logps = row_logps(*args)
        logps[7, 1] = math.nan
        return logps

    out = f"{tmp_path}/r"
    with monkeypatch.context() as m:
        m.setattr(rollout, "row_logps", broken)
        message = refused(preference_args(tiny_runs, tiny_data, out))
    assert f"log-probabilities under {tiny_runs['sft']}" in message
    assert "are not finite numbers for the prompt" in message
    assert os.listdir(f"{out}/round_0") == ["policy.json"]
    train.main(preference_args(tiny_runs, tiny_data, out))


def test_scoring_under_the_reference_goes_on_from_its_parts(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    """40 rows in parts of 16, killed in the third, and stopped by a signal after the second. Parts
    that a kill left behind are removed."""
    monkeypatch.setattr(rounds, "PART_SIZE", 16)
    whole, out = f"{tmp_path}/whole", f"{tmp_path}/r"
    train.main(preference_args(tiny_runs, tiny_data, whole))
    row_logps = rollout.row_logps
    with monkeypatch.context() as m:
        m.setattr(rollout, "row_logps", killing(row_logps, 1))
        with pytest.raises(Killed):
            train.main(preference_args(tiny_runs, tiny_data, out))
    assert len(glob.glob(f"{out}/round_0/train.ref.npz.part*")) == 1

    def signalled(*args):
        elastic.received_signals.append(15)
        return row_logps(*args)

    with monkeypatch.context() as m:
        m.setattr(elastic, "received_signals", [])
        m.setattr(rollout, "row_logps", signalled)
        with pytest.raises(SystemExit) as e:
            train.main(preference_args(tiny_runs, tiny_data, out))
    assert e.value.code == 128 + 15
    parts = glob.glob(f"{out}/round_0/train.ref.npz.part*")
    assert len(parts) == 2
    shutil.copy(parts[0], f"{tmp_path}/part")
    train.main(preference_args(tiny_runs, tiny_data, out))
    assert_same_run(whole, out)
    for split in ("train", "val"):
        expected = read_bytes(f"{whole}/round_0/{split}.ref.npz")
        assert read_bytes(f"{out}/round_0/{split}.ref.npz") == expected

    shutil.copy(f"{tmp_path}/part", parts[0])
    train.main(preference_args(tiny_runs, tiny_data, out))
    assert not glob.glob(f"{out}/round_0/*.part*")


def test_parts_of_other_rows_are_made_again(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """A part that is damaged or of another reference is not used."""
    monkeypatch.setattr(rounds, "PART_SIZE", 16)
    whole, out = f"{tmp_path}/whole", f"{tmp_path}/r"
    train.main(preference_args(tiny_runs, tiny_data, whole))
    os.makedirs(f"{out}/round_0")
    shutil.copy(f"{whole}/config.json", out)
    with open(f"{out}/round_0/train.ref.npz.part000000000-000000016", "wb") as f:
        f.write(b"PK")
    with open(f"{out}/round_0/train.ref.npz.part000000016-000000032", "wb") as f:
        np.savez(f, refs=np.zeros((16, 3), dtype=np.float32), of="other")
    train.main(preference_args(tiny_runs, tiny_data, out))
    assert_same_run(whole, out)


def test_rows_in_which_nothing_is_ranked(tiny_runs, tiny_data, tmp_path):
    """Responses that are equal after they are cut: said in one line, nothing to train on."""
    data = shutil.copytree(tiny_data, f"{tmp_path}/data")

    def make_equal(rows):
        for row in rows:
            row["responses"] = ["the same beginning, one end", "the same beginning, another"]
        return rows

    change_rows(data, make_equal)
    for stage in ("preference", "reward"):
        args = spin_args(tiny_runs, data, f"{tmp_path}/{stage}", f"--stage={stage}")
        message = refused(args)
        assert "none of its 40 rows can be used" in message
        assert "40 responses equal to a better one, 40 with nothing ranked" in message


def test_rows_of_a_round_name_their_tokenizer(spin_run):
    fingerprint = tokenizer.fingerprint(tokenizer.load("bytes"))
    paths = glob.glob(f"{spin_run}/round_*/*.jsonl") + glob.glob(f"{spin_run}/teacher_*.jsonl")
    assert len(paths) == 10
    for path in paths:
        assert {row.get("tokenizer") for row in read_rows(path)} == {fingerprint}


# ------------------------------------------------------------------- one run, one configuration


def reverse(rows):
    return rows[::-1]


def test_changed_data_is_noticed(tiny_runs, tiny_data, tmp_path):
    folder, out = str(tmp_path / "data"), str(tmp_path / "r")
    shutil.copytree(tiny_data, folder)
    args = small_args("preference", folder, tiny_runs["sft"], out, "--max_response=16")
    train.main(args)
    change_rows(folder, reverse)
    assert "begun with data_sha256" in refused(args)
    change_rows(folder, reverse)
    assert "begun with init" in refused([*args, f"--init={tiny_runs['pretrain']}"])
    train.main(args)

    # without config.json the checkpoint tells, and without checkpoints the files of the round
    change_rows(folder, reverse)
    os.remove(f"{out}/config.json")
    assert "begun with data_sha256" in refused(args)
    shutil.rmtree(checkpoint.latest(out))
    assert "other rows or another reference" in refused(args)


def test_data_that_did_not_end_has_no_end_token_in_self_play(tiny_runs, tiny_data, tmp_path):
    """The data's own responses and the second ones, as the teacher's."""
    folder, out = str(tmp_path / "cut"), str(tmp_path / "run")
    shutil.copytree(tiny_data, folder)

    def say_how_they_end(rows):
        for row in rows:
            row |= {"responses": ["the loss", "a model", "x"], "ended": [False, True, None]}
        return rows

    change_rows(folder, say_how_they_end)
    players = ["--players=data,teacher,self", "--teacher=rows", "--max_steps=1"]
    train.main(spin_args(tiny_runs, folder, out, *players))
    for row in read_rows(f"{out}/round_0/train.jsonl"):
        assert row["ids"][:2] == [[*b"the loss"], [*b"a model", 256]]


def test_a_run_keeps_its_settings(tiny_data, tmp_path):
    args = small_args("pretrain", tiny_data, None, tmp_path / "r", *TINY)
    train.main(args)
    assert "begun with lr = 0.0003, now it is 0.1" in refused([*args, "--lr=0.1"])
    train.main([*args, "--keep_last=2", "--keep_rounds=1"])  # they change no result

    # an entry of config.json and of checkpoints that older versions wrote
    settings = read_json(f"{tmp_path}/r/config.json")
    settings["config"]["prompts_differ"] = True
    write_json(f"{tmp_path}/r/config.json", settings)
    train.main(args)


def test_a_template_with_a_backslash_and_an_n_is_said(tiny_runs, tiny_data, tmp_path, capsys):
    for name, line_break in (("right", "\n"), ("wrong", "\\n")):
        options = [f"--out_dir={tmp_path}/{name}", f"--init={tiny_runs['pretrain']}"]
        options += [f"--data={tiny_data}", "--device=cpu", "--max_steps=1", "--batch_size=2"]
        train.main(["--stage=sft", *options, f"--template=Q: {{prompt}}{line_break}A: "])
        said = "the template has a backslash and an n" in capsys.readouterr().out
        assert said == (name == "wrong")


def test_the_template_is_the_checkpoints_unless_the_config_sets_it(tiny_runs, tiny_data, tmp_path):
    """A later stage takes the template of its init. The run keeps it, and refuses another."""
    out = str(tmp_path / "spin")
    args = []
    for arg in spin_args(tiny_runs, tiny_data, out, "--max_steps=1"):
        if not arg.startswith("--template"):
            args.append(arg)
    train.main(args)
    assert checkpoint.read_meta(checkpoint.latest(out))["config"]["template"] == TEMPLATE
    train.main(args)
    assert "was begun with template" in refused([*args, "--template=P: {prompt}"])
    pretrained = checkpoint.read_meta(checkpoint.resolve(tiny_runs["pretrain"]))
    assert pretrained["config"]["template"] == DEFAULT_TEMPLATE


@pytest.fixture
def other_tokenizer(tmp_path):
    path = str(tmp_path / "other.tiktoken")
    tokenizer.save(tokenizer.train(["some text to train on"] * 5, 300), path)
    return path


def test_contradictions_to_the_checkpoint_are_refused(
    tiny_runs, tiny_data, other_tokenizer, tmp_path
):
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], tmp_path / "r")
    assert "n_embd is 64" in refused([*args, "--n_embd=64"])
    assert "not the checkpoint's" in refused([*args, f"--tokenizer={other_tokenizer}"])


def test_missing_inputs_name_the_command_that_makes_them(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], tmp_path / "r")
    message = refused([*args, f"--data={tmp_path}/none"])
    assert "make it with: python -m data.jsonl.prepare" in message
    message = refused([*args, "--init=out/demo/sft"])
    assert "make it with: python train.py config/demo/sft.py" in message
    assert "no checkpoint found" in refused([*args, f"--init={tmp_path}/none"])


def test_a_teacher_without_a_response_is_refused(tiny_runs, tiny_data, tmp_path):
    options = ["--players=data,teacher,self", f"--teacher={tiny_data}/val.jsonl"]
    message = refused(spin_args(tiny_runs, tiny_data, f"{tmp_path}/r", *options))
    assert "no response to" in message


def test_impossible_sizes_are_refused(tiny_data, tmp_path, monkeypatch):
    args = small_args("pretrain", tiny_data, None, tmp_path / "r", *TINY)
    assert "block_size" in refused([*args, "--block_size=100000"])
    assert "multiple of n_head" in refused([*args, "--n_embd=33"])
    monkeypatch.setattr("nanospin.distributed.world_size", lambda: 2)
    assert "multiple of the number of ranks, 2" in refused([*args, "--batch_size=5"])


# ---------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "options, kept",
    [
        (["--keep_last=3"], [4, 5, 6]),
        (["--keep_last=1", "--keep_best=-val_loss"], [2, 6]),  # the highest: the loss falls
    ],
)
def test_the_last_checkpoints_and_the_best_are_kept(tiny_runs, tiny_data, tmp_path, options, kept):
    intervals = ["--max_steps=6", "--save_interval=1", "--eval_interval=2", "--lr=1e-3"]
    out = tmp_path / "r"
    train.main(small_args("sft", tiny_data, tiny_runs["pretrain"], out, *intervals, *options))
    steps = checkpoint.list_steps(f"{out}/round_0")
    assert [os.path.basename(path) for path in steps] == [f"step_{n:06d}" for n in kept]


def test_steps_of_a_share_of_an_epoch():
    for epochs, num_rows, batch_size, expected in ((0.1, 30, 1, 3), (1, 40, 8, 5), (1, 41, 8, 6)):
        cfg = load_config(["--stage=sft", f"--epochs={epochs}", f"--batch_size={batch_size}"])
        assert train.num_steps_of_round(cfg, range(num_rows)) == expected
    cfg = load_config(["--stage=sft", "--epochs=1e-20"])
    assert train.num_steps_of_round(cfg, range(5)) == 1


def test_an_unknown_metric_to_keep_the_best_by_is_refused(tiny_runs, tiny_data, tmp_path):
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], tmp_path / "r", "--keep_best=los")
    assert "there are val_loss" in refused(args)
    args = spin_args(tiny_runs, tiny_data, f"{tmp_path}/spin")
    assert "there are val_loss" in refused([*args, "--keep_best=acc/self"])  # it beats none
    assert not os.path.exists(f"{tmp_path}/spin")


def test_replayed_rows_that_are_gone_are_named(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    options = ["--max_steps=1", "--replay_rounds=1", "--rounds=2"]
    train.main(spin_args(tiny_runs, tiny_data, out, *options))
    shutil.rmtree(f"{out}/round_0")
    message = refused(spin_args(tiny_runs, tiny_data, out, *options))
    assert f"{out}/round_0/train.jsonl is missing, and replay_rounds" in message


def change_weights(folder):
    weights = bytearray(read_bytes(folder / "model.safetensors"))
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def change_meta(folder, change):
    """Write meta.json with change(meta) made to it, and the manifest that belongs to it."""
    meta, manifest = read_json(folder / "meta.json"), read_json(folder / "manifest.json")
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    manifest["meta.json"]["sha256"] = sha256(folder / "meta.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def widen_model(folder):
    change_meta(folder, lambda meta: meta["model"].update(n_embd=64))


def deepen_model(folder):
    change_meta(folder, lambda meta: meta["model"].update(n_layer=3))


def make_old_format(folder):
    """Before the field "format" there was none in meta.json."""
    change_meta(folder, lambda meta: meta.pop("format"))


def make_later_format(folder):
    change_meta(folder, lambda meta: meta.update(format=3))


@pytest.mark.parametrize(
    "change, message",
    [
        (change_weights, "model.safetensors is damaged"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda folder: os.remove(folder / "manifest.json"), "cannot be read"),
        (widen_model, "has shape"),
        (deepen_model, "other tensors"),
        (make_old_format, "written by another version of nanoSPIN"),
        (make_later_format, "cannot be read by this one"),
    ],
    ids=["weights", "meta", "manifest", "width", "depth", "old format", "later format"],
)
def test_checkpoints_that_cannot_be_used_are_refused(
    tiny_runs, tiny_data, tmp_path, change, message
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.latest(tiny_runs["sft"]), folder)
    change(folder)
    assert message in refused(small_args("sft", tiny_data, folder, tmp_path / "r"))


# ------------------------------------------------------------------------ losses that go wrong


def spoiled_stages(factor, at):
    """STAGES with an sft whose loss is multiplied by `factor` in call `at`, counted from 0."""
    calls = [0]

    def spoiled(model, batch, cfg):
        loss, metrics = train.token_objective(model, batch, cfg)
        calls[0] += 1
        return loss * (factor if calls[0] == at + 1 else 1.0), metrics

    sft = dataclasses.replace(train.STAGES["sft"], objective=spoiled)
    return train.STAGES | {"sft": sft}


def test_a_loss_that_is_not_finite_names_step_and_rows(tiny_runs, tiny_data, tmp_path):
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], tmp_path / "r", "--max_steps=5")
    message = refused(args, stages=spoiled_stages(math.nan, at=2))
    assert "step 2" in message
    assert "loss nan" in message
    assert "rows: [" in message


def test_a_step_that_is_not_finite_can_be_skipped(tiny_runs, tiny_data, tmp_path):
    out = str(tmp_path / "r")
    options = ["--max_steps=5", "--on_nonfinite=skip"]
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], out, *options)
    train.main(args, stages=spoiled_stages(math.nan, at=2))
    (warning,) = read_metrics(out, "warning")
    assert warning["step"] == 2 and warning["skipped"] == 1
    assert "this step is skipped: loss nan" in warning["text"]
    assert numbers(out, "step", "step") == [0, 1, 3, 4]
    assert all(torch.isfinite(w).all() for w in final_weights(out).values())


def test_a_loss_spike_is_reported(tiny_runs, tiny_data, tmp_path):
    """From the eleventh step on: before it there is no median to compare with."""
    out = str(tmp_path / "r")
    options = ["--max_steps=12", "--loss_spike_factor=3"]
    args = small_args("sft", tiny_data, tiny_runs["pretrain"], out, *options)
    train.main(args, stages=spoiled_stages(4.0, at=10))
    (warning,) = read_metrics(out, "warning")
    assert warning["step"] == 10
    assert "more than 3.0 times the recent median loss" in warning["text"]
    assert numbers(out, "step", "step") == list(range(12))


def test_a_round_that_does_not_start_at_ln_k_factorial_is_reported(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    out = str(tmp_path / "r")
    row_logps = rollout.row_logps

    def another_reference(*args, **kw):
        return row_logps(*args, **kw) + [[1.0, 0.0]]

    monkeypatch.setattr(rollout, "row_logps", another_reference)
    train.main(spin_args(tiny_runs, tiny_data, out, "--max_steps=1"))
    (warning,) = read_metrics(out, "warning")
    assert "policy and reference are not the same" in warning["text"]


def test_a_resume_repeats_no_warning_of_a_step(tiny_runs, tiny_data, tmp_path):
    out = str(tmp_path / "run")
    more = ["--max_steps=14", "--save_interval=1", "--keep_last=20", "--loss_spike_factor=0.1"]
    args = small_args("sft", tiny_data, tiny_runs["sft"], out, *more)
    train.main(args)
    before = [record["step"] for record in read_metrics(out, "warning")]
    assert 12 in before
    for step in (13, 14):
        shutil.rmtree(f"{out}/round_0/step_{step:06d}")
    train.main(args)
    assert [record["step"] for record in read_metrics(out, "warning")] == before


def test_a_clock_that_is_set_back_gives_no_negative_times(tiny_data, tmp_path, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: 2e9 - real())
    out = str(tmp_path / "run")
    train.main(
        ["--stage=pretrain", f"--out_dir={out}", f"--data={tiny_data}", "--max_steps=2", *TINY]
    )
    for record in read_metrics(out, "step"):
        assert record["ms"] > 0 and record["seconds"] > 0 and record["tokens_per_second"] > 0


def test_ranked_rows_that_were_cut_are_refused(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """After a kill while they are scored: nothing else knows how many they were."""
    out = str(tmp_path / "run")
    args = spin_args(tiny_runs, tiny_data, out, "--max_steps=1")
    with monkeypatch.context() as m:
        m.setattr(rollout, "row_logps", killing(rollout.row_logps, 0))
        with pytest.raises(Killed):
            train.main(args)
    rows = read_rows(f"{out}/round_0/train.jsonl")
    write_rows(f"{out}/round_0/train.jsonl", rows[:10])
    assert "train.jsonl has other prompts than the rows of" in refused(args)
    write_rows(f"{out}/round_0/train.jsonl", rows)
    train.main(args)
