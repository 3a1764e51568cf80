"""Saving, finding and removing checkpoints when disks, folders and numbers go wrong."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    TINY,
    Killed,
    final_weights,
    killing,
    read_metrics,
    refused,
    spin_args,
)
from safetensors.torch import load_file, save_file

import train
from data import files
from data.files import atomic_write, sha256, write_json
from model import GPT
from nanospin import checkpoint, elastic, lock, preflight, same_run


def pretrain_args(data, out, *more):
    """Four steps, a checkpoint after each."""
    steps = ["--max_steps=4", "--save_interval=1", "--eval_interval=2", "--batch_size=4"]
    return ["--stage=pretrain", f"--data={data}", f"--out_dir={out}", *steps, *TINY, *more]


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """A finished run; tests copy it."""
    out = str(tmp_path_factory.mktemp("finished") / "run")
    train.main(pretrain_args(tiny_data, out))
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, with the checkpoints of steps 3 and 4."""
    return shutil.copytree(finished, str(tmp_path / "run"))


def step_names(out, round_id=0):
    return sorted(os.listdir(f"{out}/round_{round_id}"))


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def read_json(path):
    return json.loads(read_text(path))


def seal(path):
    """Make the hashes of a changed checkpoint right again."""
    meta = read_json(f"{path}/meta.json")
    meta["weights_sha256"] = sha256(f"{path}/model.safetensors")
    write_json(f"{path}/meta.json", meta)
    checkpoint.write_manifest(path)


def change_meta(path, change):
    meta = read_json(f"{path}/meta.json")
    change(meta)
    write_json(f"{path}/meta.json", meta)
    seal(path)


# ----------------------------------------------------------------------------------- saving


ODD_NAMES = ["lr[1e-3]", "a*b?c", "x::y", "file:", "s3:/bucket", " a #1 %20 & {b} ~$'\"", "größe"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_of_out_dir(finished, tiny_data, tmp_path, name):
    """It is saved and resumed as under any other name."""
    out = f"{tmp_path}/{name}"
    os.makedirs(os.path.dirname(out), exist_ok=True)
    train.main(pretrain_args(tiny_data, out))
    shutil.rmtree(checkpoint.latest(out))
    train.main(pretrain_args(tiny_data, out))
    expected, weights = final_weights(finished), final_weights(out)
    for tensor_name in expected:
        assert torch.equal(expected[tensor_name], weights[tensor_name])


def spoil_last_byte(path):
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))


def spoil_weights(staging):
    spoil_last_byte(f"{staging}/model.safetensors")


def cut_weights(staging):
    os.truncate(f"{staging}/model.safetensors", 1000)


def lose_a_tensor(staging):
    tensors = load_file(f"{staging}/model.safetensors")
    tensors.popitem()
    save_file(tensors, f"{staging}/model.safetensors")


def only_a_header(staging):
    save_file({}, f"{staging}/model.safetensors")


def round_weights(staging):
    tensors = load_file(f"{staging}/model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, f"{staging}/model.safetensors")


def spoil_optimizer(staging):
    (name,) = os.listdir(f"{staging}/optimizer")
    spoil_last_byte(f"{staging}/optimizer/{name}")


def lose_optimizer(staging):
    (name,) = os.listdir(f"{staging}/optimizer")
    os.remove(f"{staging}/optimizer/{name}")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_weights,
        cut_weights,
        lose_a_tensor,
        only_a_header,
        round_weights,
        spoil_optimizer,
        lose_optimizer,
    ],
)
def test_a_checkpoint_that_is_not_what_was_saved_is_not_kept(
    tiny_data, tmp_path, monkeypatch, spoil
):
    """The older one stays, and the run does not end as done."""
    out = str(tmp_path / "run")
    add_other_files = checkpoint.add_other_files

    def spoiling(staging, meta, enc):
        add_other_files(staging, meta, enc)
        if meta["step"] > 2:
            spoil(staging)

    monkeypatch.setattr(checkpoint, "add_other_files", spoiling)
    assert "could not be saved" in refused(pretrain_args(tiny_data, out, "--keep_last=1"))
    assert step_names(out) == ["step_000002"]
    assert checkpoint.find_corruption(checkpoint.latest(out)) == ""
    assert "could not be saved" in read_metrics(out, "warning")[0]["text"]


def test_bits_are_compared():
    a = torch.tensor([0.0, float("nan")])
    assert checkpoint.same_bits(a, a.clone())
    assert not checkpoint.same_bits(a, torch.tensor([-0.0, float("nan")]))
    assert not checkpoint.same_bits(a, a.double())
    assert not checkpoint.same_bits(a, a[:1])
    assert checkpoint.same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_weights_that_are_not_finite_are_not_saved(tiny_data, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    save = checkpoint.save

    def save_nan(run, round_id, step, model, optimizers, **options):
        if step == 3:
            with torch.no_grad():
                model.wte.weight[5, 3] = float("inf")
        return save(run, round_id, step, model, optimizers, **options)

    monkeypatch.setattr(checkpoint, "save", save_nan)
    message = refused(pretrain_args(tiny_data, out))
    assert "weights are not finite: wte.weight" in message and "step_000002" in message
    assert "same command" not in message
    assert step_names(out) == ["step_000001", "step_000002"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files")
def test_everything_is_on_the_disk_before_a_checkpoint_is_removed(tiny_data, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    events = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def log_fsync(fd):
        events.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), out)))
        fsync(fd)

    def log_rename(source, target):
        events.append(("rename", os.path.relpath(target, out)))
        rename(source, target)

    def log_rmtree(path, *args, **options):
        events.append(("remove", os.path.relpath(path, out)))
        rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    monkeypatch.setattr(shutil, "rmtree", log_rmtree)
    train.main(pretrain_args(tiny_data, out, "--max_steps=2", "--keep_last=1"))

    staging = "round_0/writing_000002"
    published = events.index(("rename", "round_0/step_000002"))
    before = events[:published]
    files = checkpoint.list_files(checkpoint.latest(out)) + ["manifest.json.tmp", "optimizer", "."]
    for name in files:
        assert ("fsync", os.path.normpath(f"{staging}/{name}")) in before, name
    assert ("fsync", "config.json.tmp") in before and ("fsync", "metrics.jsonl") in before
    assert before[-1] == ("fsync", staging)
    assert events[published + 1] == ("fsync", "round_0")
    assert events.index(("remove", "round_0/removing_000001")) > published + 1
    assert ("fsync", ".") in events[:published]  # of out_dir, which has a new round


# ------------------------------------------------------------------------------- removing


def test_a_removal_that_fails_is_said_once_and_tried_again(tiny_data, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    rmtree = shutil.rmtree
    failures = []

    def failing(path, *args, **options):
        if "removing_000001" in path and len(failures) < 2:
            failures.append(path)
            raise OSError(39, "Directory not empty", path)
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", failing)
    train.main(pretrain_args(tiny_data, out, "--keep_last=1"))
    (warning,) = read_metrics(out, "warning")
    assert "an old checkpoint could not be removed" in warning["text"]
    assert len(failures) == 2 and step_names(out) == ["step_000004"]


def test_a_link_is_unlinked_and_its_target_stays(run, tiny_data, tmp_path):
    for name in ("step_000001", "writing_000009", "removing_000009"):
        shutil.copytree(f"{run}/round_0/step_000003", f"{tmp_path}/{name}")
        os.symlink(f"{tmp_path}/{name}", f"{run}/round_0/{name}")
    shutil.rmtree(f"{run}/round_0/step_000004")
    train.main(pretrain_args(tiny_data, run))
    assert step_names(run) == ["step_000003", "step_000004"]
    for name in ("step_000001", "writing_000009", "removing_000009"):
        assert os.path.exists(f"{tmp_path}/{name}/meta.json")
    assert not os.path.exists(f"{run}/metrics.jsonl.tmp") and not read_metrics(run, "warning")


def test_a_damaged_older_checkpoint_does_not_end_keep_best(run, tiny_data):
    shutil.rmtree(f"{run}/round_0/step_000004")
    shutil.copytree(f"{run}/round_0/step_000003", f"{run}/round_0/step_000002")
    with open(f"{run}/round_0/step_000002/meta.json", "w") as f:
        f.write("{")
    train.main(pretrain_args(tiny_data, run, "--keep_best=val_loss"))
    assert step_names(run) == ["step_000003", "step_000004"] and not read_metrics(run, "warning")
    steps = checkpoint.list_steps(f"{run}/round_0")
    assert checkpoint.best_checkpoint(steps, "val_loss") == f"{run}/round_0/step_000004"


def test_a_round_whose_last_checkpoint_was_removed_is_refused(run):
    """The best one that is left has to be named."""
    shutil.rmtree(f"{run}/round_0/step_000004")
    best = f"{run}/round_0/step_000003"
    assert checkpoint.resolve(f"{run}/round_0") == best  # the round may be going on
    os.makedirs(f"{run}/round_1")
    with pytest.raises(SystemExit, match="round_0: its last checkpoint, of step 4, was removed"):
        checkpoint.resolve(f"{run}/round_0/")
    assert checkpoint.resolve(best) == best


@pytest.mark.parametrize("keep_best, kept", [("val_loss", [1, 3]), ("-val_loss", [2, 3])])
def test_keep_rounds_keeps_the_best_of_all_rounds(run, keep_best, kept):
    checkpoints = {}
    for round_id, value in ((0, 2.0), (1, 1.0), (2, 3.0), (3, 2.5)):
        path = f"{run}/round_{round_id}/step_000004"
        if round_id:
            shutil.copytree(checkpoints[0], path)
        checkpoints[round_id] = path
        change_meta(path, lambda meta, v=value: meta["metrics"].update(val_loss=v))
    shutil.rmtree(f"{run}/round_0/step_000003")
    checkpoint.prune_rounds(run, 3, keep_best)
    assert checkpoint.list_checkpoints(run) == [checkpoints[n] for n in kept[::-1]]
    checkpoint.prune_rounds(run, 3)
    assert checkpoint.list_checkpoints(run) == [checkpoints[3]]


def test_the_best_is_not_one_whose_metric_is_nan(run):
    change_meta(f"{run}/round_0/step_000003", lambda meta: meta["metrics"].update(val_loss=None))
    for value, expected in ((float("nan"), None), (1.0, "step_000004")):
        change_meta(
            f"{run}/round_0/step_000004", lambda meta, v=value: meta["metrics"].update(val_loss=v)
        )
        best = checkpoint.best_checkpoint(checkpoint.list_steps(f"{run}/round_0"), "val_loss")
        assert best == (expected and f"{run}/round_0/{expected}")


# ----------------------------------------------------------------------------- keep_best


def test_an_unknown_keep_best_is_refused_before_anything_is_written(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/run"
    message = refused(spin_args(tiny_runs, tiny_data, out, "--keep_best=acc/nobody"))
    assert "keep_best 'acc/nobody' is not a metric" in message and "acc/data" in message
    assert not os.path.exists(out)


def later_args(stage, runs, data, out, *more):
    args = [f"--stage={stage}", f"--data={data}", f"--out_dir={out}", f"--init={runs['sft']}"]
    sizes = ["--max_steps=1", "--batch_size=4", "--eval_rows=4", "--max_response=8"]
    return [*args, *sizes, "--max_rows=8", "--device=cpu", *more]


@pytest.mark.parametrize(
    "stage, more",
    [
        ("pretrain", []),
        ("sft", ["--pretrain_coef=0.1", "--pretrain_batch_size=4"]),
        ("reward", []),
        ("preference", []),
        ("spin", []),
        ("ppo", ["--reward=conftest:letters"]),
    ],
)
def test_the_metrics_of_each_stage(tiny_runs, tiny_data, tmp_path, stage, more):
    """Each metric of an evaluation may be set as keep_best, and each listed one is measured."""
    out = f"{tmp_path}/run"
    if stage == "pretrain":
        args = pretrain_args(tiny_data, out)
    else:
        args = later_args(stage, tiny_runs, tiny_data, out, *more)
    train.main(args)
    record = read_metrics(out, "eval")[-1]
    measured = set(record) - {"kind", "round", "step", "seconds"}
    cfg = train.config_module.load(args, GPT.config_class)
    metrics = train.STAGES[stage].metrics
    for name in measured:
        preflight.check_keep_best(dataclasses.replace(cfg, keep_best=name), metrics)
        preflight.check_keep_best(dataclasses.replace(cfg, keep_best=f"-{name}"), metrics)
    for name in metrics:
        if stage == "preference" and name == "kl_from_ref":
            continue  # it needs the player "self"
        assert any(re.match(re.escape(name), other) for other in measured), name


# ------------------------------------------------------------------------------- resuming


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in ("999998", "1000000", "000002", "x", "1²"):
        os.makedirs(f"{tmp_path}/round_0/step_{step}")
    names = [os.path.basename(path) for path in checkpoint.list_steps(f"{tmp_path}/round_0")]
    assert names == ["step_000002", "step_999998", "step_1000000"]
    os.makedirs(f"{tmp_path}/round_10/step_000001")
    os.makedirs(f"{tmp_path}/round_9/step_000001")
    assert checkpoint.latest(tmp_path) == f"{tmp_path}/round_10/step_000001"


def test_a_file_that_is_not_in_the_manifest_is_ignored(run, tiny_data, capsys):
    open(f"{checkpoint.latest(run)}/.DS_Store", "w").close()
    train.main(pretrain_args(tiny_data, run))
    assert "ignored .DS_Store" in capsys.readouterr().out
    assert step_names(run) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("error", [(5, "Input/output error"), (13, "Permission denied")])
def test_unreadable_is_not_damaged(run, tiny_data, monkeypatch, error):
    """It is tried again. If it lasts, the run stops and nothing is changed."""
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    before = read_text(f"{run}/metrics.jsonl")
    failures = []

    def failing(path):
        if "step_" in path and len(failures) < limit:
            failures.append(path)
            raise OSError(*error, path)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    limit = 4
    message = refused(pretrain_args(tiny_data, run))
    assert "cannot be read now" in message
    assert message.endswith(f"the run then continues from {run}/round_0/step_000003")
    assert checkpoint.without_it(f"{run}/round_0/step_000003").startswith("there is none before it")
    assert len(failures) == 4 and step_names(run) == ["step_000003", "step_000004"]
    assert read_text(f"{run}/metrics.jsonl") == before
    limit = 7
    train.main(pretrain_args(tiny_data, run))
    assert step_names(run) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("name", ["", "round_0", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("functions", [("stat",), ("listdir", "scandir"), ("stat", "open")])
def test_what_cannot_be_read_now_is_not_missing(
    run, tiny_data, monkeypatch, capsys, name, functions
):
    """`os.path.isdir` and `os.path.exists` say no then, and the run would begin again at step 0."""
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    shutil.rmtree(f"{run}/round_0/step_000004")
    path = os.path.abspath(os.path.join(run, name))
    failures = []

    def failing(original):
        def function(argument=".", *args, **kwargs):
            is_path = isinstance(argument, str) and os.path.abspath(argument) == path
            if is_path and len(failures) < limit:
                failures.append(path)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            return original(argument, *args, **kwargs)

        return function

    for function in functions:
        monkeypatch.setattr(os, function, failing(getattr(os, function)))
    for more in (10**9, 2):
        limit = len(failures) + more
        if elastic.run(train.main, pretrain_args(tiny_data, run)):
            assert "Stale file handle" in capsys.readouterr().err
        limit = 0
        assert "step_000003" in step_names(run)
        assert [record["step"] for record in read_metrics(run, "step")][:3] == [0, 1, 2]
    train.main(pretrain_args(tiny_data, run))
    assert [record["step"] for record in read_metrics(run, "step")] == [0, 1, 2, 3]
    assert step_names(run) == ["step_000003", "step_000004"]
    assert "metrics.jsonl.1" not in os.listdir(run)


def test_a_round_on_a_disk_that_is_not_mounted(run, tiny_data, tmp_path):
    os.rename(f"{run}/round_0", f"{tmp_path}/elsewhere")
    os.symlink(f"{tmp_path}/mounted", f"{run}/round_0")
    before = read_text(f"{run}/metrics.jsonl")
    message = f"{run}/round_0 is a link to a folder that is not there"
    assert refused(pretrain_args(tiny_data, run)) == message
    assert read_text(f"{run}/metrics.jsonl") == before

    os.symlink(f"{tmp_path}/mounted", f"{tmp_path}/linked")
    message = f"{tmp_path}/linked is a link to a folder that is not there"
    assert refused(pretrain_args(tiny_data, f"{tmp_path}/linked")) == message


def test_a_stray_link_to_a_file_is_in_nobodys_way(run, tiny_data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    os.symlink(tmp_path / "file", f"{run}/round_00")
    train.main(pretrain_args(tiny_data, run))
    assert "resumes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["too long", "a link to itself"])
def test_a_name_that_no_folder_can_have_is_one_line_at_once(tiny_data, tmp_path, kind, capfd):
    out = f"{tmp_path}/{'x' * 300}"
    if kind == "a link to itself":
        out = f"{tmp_path}/loop"
        os.symlink(out, out)
    start = time.monotonic()
    assert elastic.run_main(train.main, pretrain_args(tiny_data, out)) == (1, False)
    assert time.monotonic() - start < 2  # it is not tried again
    error = {
        "too long": f"out_dir {out}: File name too long",
        "a link to itself": f"{out} is a link",
    }
    printed = capfd.readouterr().err
    assert re.fullmatch(rf"{error[kind]}.*\n", printed), printed


@pytest.mark.parametrize("of_rounds", [False, True])
def test_renamed_checkpoints_are_not_taken_for_none(run, tiny_data, of_rounds, capsys):
    """With fewer zeros, or more, in the number."""
    before = read_text(f"{run}/metrics.jsonl")
    if of_rounds:
        os.rename(f"{run}/round_0", f"{run}/round_00")
        folder = f"{run}/round_00"
    else:
        folder = f"{run}/round_0"
        for step in (3, 4):
            os.rename(f"{folder}/step_00000{step}", f"{folder}/step_{step}")
    os.symlink("nowhere", f"{run}/round_000")  # what somebody left is in nobody's way
    message = refused(pretrain_args(tiny_data, run))
    assert "has no checkpoint that can be used" in message
    assert "rename it as it was, to step_ and six digits, or remove" in message
    assert sorted(os.listdir(folder))[0].startswith("damaged_")
    assert read_text(f"{run}/metrics.jsonl") == before


def test_a_run_never_begins_anew_by_itself(run, tiny_data, capsys):
    """When the last checkpoint is damaged, too, it stops. Nothing is lost."""
    metrics = read_text(f"{run}/metrics.jsonl")
    for path in checkpoint.list_steps(f"{run}/round_0"):
        os.remove(f"{path}/model.safetensors")
    for _ in range(2):
        message = refused(pretrain_args(tiny_data, run))
        assert "no checkpoint that can be used" in message and "to begin again" in message
    assert step_names(run) == ["damaged_000003", "damaged_000004"]
    assert read_text(f"{run}/metrics.jsonl") == metrics
    shutil.rmtree(run)
    train.main(pretrain_args(tiny_data, run))


def test_metrics_outlive_their_checkpoints(run, tiny_data, capsys):
    """Who removes the checkpoints begins anew, but does not lose what was measured."""
    metrics = read_text(f"{run}/metrics.jsonl")
    shutil.rmtree(f"{run}/round_0")
    train.main(pretrain_args(tiny_data, run))
    assert "renamed to" in capsys.readouterr().out
    assert read_text(f"{run}/metrics.jsonl.1") == metrics
    assert len(read_metrics(run, "step")) == 4


def test_checkpoints_that_were_set_aside_are_kept(run, tiny_data):
    for n in range(2):
        os.remove(f"{run}/round_0/step_000004/model.safetensors")
        train.main(pretrain_args(tiny_data, run))
        assert len(step_names(run)) == 3 + n
    assert {"damaged_000004", "damaged_000004.2"} < set(step_names(run))


@pytest.mark.parametrize("what", ["metric", "weights"])
def test_a_checkpoint_that_is_not_finite_is_not_resumed(run, tiny_data, capsys, what):
    path = checkpoint.latest(run)
    if what == "metric":
        change_meta(path, lambda meta: meta["metrics"].update(val_loss=float("nan")))
    else:
        tensors = load_file(f"{path}/model.safetensors")
        tensors["ln_f.weight"][0] = float("nan")
        save_file(tensors, f"{path}/model.safetensors")
        seal(path)
    train.main(pretrain_args(tiny_data, run))
    output = capsys.readouterr().out
    expected = "val_loss is nan" if what == "metric" else "weights are not finite: ln_f.weight"
    assert expected in output
    assert step_names(run) == ["damaged_000004", "step_000003", "step_000004"]


def nan_stages(at):
    """STAGES whose pretrain's held-out loss is NaN from step `at` on."""

    def evaluate(run, round_id, step, train_data, val):
        return {"val_loss": float("nan") if step >= at else 1.0}

    pretrain = dataclasses.replace(train.STAGES["pretrain"], evaluate=evaluate)
    return train.STAGES | {"pretrain": pretrain}


@pytest.mark.parametrize("more", [[], ["--on_nonfinite=skip"]])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path, more):
    """Before that step is saved. The same command comes to the same end, and says so."""
    out = f"{tmp_path}/run"
    args = pretrain_args(tiny_data, out, *more)
    first = refused(args, stages=nan_stages(4))
    assert "step 4: val_loss is nan" in first and first.endswith("step_000003")
    assert step_names(out) == ["step_000002", "step_000003"]
    again = refused(args, stages=nan_stages(4))
    assert "the same command will stop here again" in again and "step_000003" in again
    train.main(args)
    assert step_names(out) == ["step_000003", "step_000004"]
    fresh = pretrain_args(tiny_data, f"{tmp_path}/fresh", *more)
    assert "no checkpoint: the same command" in refused(fresh, stages=nan_stages(0))


# ---------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"config": {}, "starts": []}'])
@pytest.mark.parametrize("has_settings", [True, False])
def test_a_lost_config_json_is_written_again(run, tiny_data, capsys, content, has_settings):
    path = f"{run}/config.json"
    before = read_json(path)["config"]
    if content is None:
        os.remove(path)
    else:
        with open(path, "w") as f:
            f.write(content)
    if not has_settings:  # an older checkpoint
        change_meta(checkpoint.latest(run), lambda meta: meta.pop("settings"))
    assert "begun with seed = 1337, now it is 9" in refused(
        pretrain_args(tiny_data, run, "--seed=9")
    )
    shutil.rmtree(f"{run}/round_0/step_000003")
    capsys.readouterr()
    train.main(pretrain_args(tiny_data, run))
    assert "its settings are taken from" in capsys.readouterr().out
    assert read_json(path)["config"] == before | {"out_dir": run}


@pytest.mark.parametrize("evaluated, saved, is_said", [(3, 4, True), (4, 2, False), (2, 4, True)])
def test_what_keep_best_misses_is_said(run, tiny_data, capsys, evaluated, saved, is_said):
    more = [f"--eval_interval={evaluated}", f"--save_interval={saved}", "--keep_best=val_loss"]
    train.main(pretrain_args(tiny_data, f"{run}_2", "--max_steps=1", *more))
    assert ("only one that is both can be kept" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_other_dropout_masks_are_said_at_a_resume(tiny_data, tmp_path, capsys, dropout):
    args = pretrain_args(tiny_data, f"{tmp_path}/r", f"--dropout={dropout}")
    train.main(args)
    train.main([*args, "--compile=False"])  # the default on a CPU
    assert "dropout masks" not in capsys.readouterr().out
    train.main([*args, "--compile=True"])
    said = "compile was False, now it is True: the dropout masks of the coming steps"
    assert (said in capsys.readouterr().out) == (dropout > 0)
    train.main([*args, "--micro_batch_tokens=64"])
    said = "micro_batch_tokens was 0, now it is 64: the dropout masks of the coming steps"
    assert (said in capsys.readouterr().out) == (dropout > 0)


def edit_config_json(run, **changes):
    values = read_json(f"{run}/config.json")
    for name, value in changes.items():
        values["config"][name] = value
        if value is None:
            del values["config"][name]
    write_json(f"{run}/config.json", values)


@pytest.mark.parametrize("lr", [0.05, None])
def test_an_edited_config_json_does_not_change_the_run(run, tiny_data, lr):
    """What the checkpoint says counts; of a setting that was taken out too."""
    edit_config_json(run, lr=lr)
    message = refused(pretrain_args(tiny_data, run, "--lr=0.05"))
    assert "begun with lr = 0.0003, now it is 0.05" in message
    train.main(pretrain_args(tiny_data, run))


def test_a_template_in_config_json_that_is_none_is_one_line(run, tiny_data):
    edit_config_json(run, template=5)
    message = refused(pretrain_args(tiny_data, run))
    assert "config.json: template must be str, got 5" in message


def test_a_line_of_metrics_that_is_not_utf8_has_its_number(run, tiny_data):
    with open(f"{run}/metrics.jsonl", "rb") as f:
        number = len(f.readlines()) + 1
    with open(f"{run}/metrics.jsonl", "ab") as f:
        f.write(b"\xff\n")
    message = refused(pretrain_args(tiny_data, run))
    assert f"metrics.jsonl:{number}: not a record of a run" in message


def test_other_versions_are_said_at_a_resume(run, tiny_data, capsys):
    path = f"{run}/config.json"
    values = read_json(path)
    values["starts"][-1] |= {"torch": "1.0", "python": "2.7"}
    write_json(path, values)
    train.main(pretrain_args(tiny_data, run))
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "last start" in text]
    assert "torch 1.0 (now " in line and "python 2.7" in line and "numpy" not in line
    train.main(pretrain_args(tiny_data, run))
    assert "the last start" not in capsys.readouterr().out


# ------------------------------------------------------------------------ untrusted files


def test_weights_of_another_dtype_are_refused(run):
    path = checkpoint.latest(run)
    tensors = load_file(f"{path}/model.safetensors")
    tensors["ln_f.weight"] = tensors["ln_f.weight"].to(torch.int32)
    save_file(tensors, f"{path}/model.safetensors")
    seal(path)
    with pytest.raises(SystemExit, match="ln_f.weight is I32, not floating point"):
        GPT.from_checkpoint(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layer": 10**9}, "at most"),
        ({"n_layer": 10**8}, "n_layer is 100000000"),
        ({"n_embd": 2**20}, "has shape"),
        ({"n_inner": 2**23}, "has shape"),
        ({"block_size": 2**28}, "has shape"),
        ({"vocab_size": 10**30}, "at most"),
    ],
)
def test_a_model_that_is_larger_than_its_file_is_not_built(run, fields, message):
    path = checkpoint.latest(run)
    change_meta(path, lambda meta: meta["model"].update(fields))
    start = time.time()
    with pytest.raises(SystemExit, match=message):
        GPT.from_checkpoint(path)
    assert time.time() - start < 5


def test_a_pipe_or_a_huge_file_instead_of_meta_json(run, monkeypatch):
    path = checkpoint.latest(run)
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 100)
    with pytest.raises(SystemExit, match="meta.json has [0-9]+ bytes"):
        checkpoint.read_meta(path)
    os.remove(f"{path}/meta.json")
    os.mkfifo(f"{path}/meta.json")
    with pytest.raises(SystemExit, match="not a regular file"):
        checkpoint.read_meta(path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "device"])
def test_output_replaces_only_regular_files(tmp_path, kind):
    path, target = str(tmp_path / "out"), str(tmp_path / "target")
    if "link" in kind:
        os.symlink(target, path)
        if kind == "link":
            open(target, "w").close()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        path = "/dev/null"
    with pytest.raises(SystemExit, match=path), atomic_write(path) as f:
        f.write("x")
    assert os.path.lexists(path) and not os.path.exists(f"{path}.tmp")


def test_a_leftover_is_replaced_and_a_failure_leaves_none(tmp_path):
    path, target = str(tmp_path / "out"), tmp_path / "target"
    target.write_text("mine")
    os.symlink(target, f"{path}.tmp")
    with atomic_write(path) as f:
        f.write("new")
    assert read_text(path) == "new" and target.read_text() == "mine"
    with pytest.raises(OSError) as error, atomic_write(path):
        raise OSError(27, "File too large")  # a full disk does not say which file
    assert error.value.filename == path
    with pytest.raises(KeyError), atomic_write(path) as f:
        f.write("half")
        raise KeyError
    assert read_text(path) == "new" and sorted(os.listdir(tmp_path)) == ["out", "target"]


# ------------------------------------------------------------------------------- the lock


def write_owner(out, pid, machine=None, **more):
    """Write the lock of another process."""
    owner = {
        "host": "elsewhere",
        "machine": machine or lock.machine(),
        "pid": pid,
        "process_start": lock.process_start(pid),
        "since": "yesterday",
        "token": "other",
    }
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/lock", "w") as f:
        json.dump(owner | more, f)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_of_an_out_dir_is_refused(tiny_data, tmp_path, sleeper):
    out = str(tmp_path / "run")
    write_owner(out, sleeper.pid)
    message = refused(pretrain_args(tiny_data, out))
    assert f"in use by process {sleeper.pid} on elsewhere (since yesterday)" in message
    assert set(os.listdir(out)) - {"hashes.json"} == {"lock"}  # no hash of a file that is new


def test_the_lock_of_a_dead_process_is_taken_over(tiny_data, tmp_path, sleeper, capsys):
    out = str(tmp_path / "run")
    write_owner(out, sleeper.pid, process_start="1")  # its number is another process's now
    train.main(pretrain_args(tiny_data, out))
    assert "took over the lock of process" in capsys.readouterr().out
    assert not os.path.exists(f"{out}/lock")
    write_owner(out, sleeper.pid)
    sleeper.kill()  # a zombie until it is waited for
    while lock.process_start(sleeper.pid):
        time.sleep(0.01)
    train.main(pretrain_args(tiny_data, out))
    assert not os.path.exists(f"{out}/lock")


@pytest.mark.parametrize("alive", [True, False])
def test_the_lock_of_another_machine_is_watched(tiny_data, tmp_path, monkeypatch, capsys, alive):
    out = str(tmp_path / "run")
    monkeypatch.setattr(lock, "WATCH_SECONDS", 2)
    write_owner(out, 1, machine="other")
    done = threading.Event()

    def touch():
        while not done.wait(0.1):
            os.utime(f"{out}/lock")

    toucher = threading.Thread(target=touch)
    if alive:
        toucher.start()
        try:
            assert "in use by process 1 on elsewhere" in refused(pretrain_args(tiny_data, out))
        finally:
            done.set()
            toucher.join()
    else:
        train.main(pretrain_args(tiny_data, out))
        assert "took over" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["my notes\n", "{}", '{"pid": 5}', "[1]", "{" * 5000, "\0a"])
def test_a_file_that_is_no_lock_is_left_alone(tiny_data, tmp_path, content):
    (tmp_path / "lock").write_text(content)
    message = refused(pretrain_args(tiny_data, tmp_path))
    assert f"{tmp_path}/lock is not the lock of a run" in message
    assert (tmp_path / "lock").read_text() == content


@pytest.mark.parametrize("size", [0, 1, 10, 40, "zeros"])
def test_a_lock_that_was_cut_short_is_taken_over(tiny_data, tmp_path, monkeypatch, capsys, size):
    """A full disk leaves the beginning of it, a loss of power can leave zeros."""
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1)
    out = str(tmp_path / "run")
    write_owner(out, 1, machine="other")
    os.truncate(f"{out}/lock", 0 if size == "zeros" else size)
    if size == "zeros":
        os.truncate(f"{out}/lock", 100)
    train.main(pretrain_args(tiny_data, out))
    said = capsys.readouterr().out
    assert ("took over the lock of a run whose name was not written" in said) == bool(size)
    assert "None" not in said
    assert not os.path.exists(f"{out}/lock")


def test_an_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 1)
    lock.acquire(str(tmp_path))
    try:
        before = os.stat(f"{tmp_path}/lock").st_mtime_ns
        deadline = time.time() + 10
        while os.stat(f"{tmp_path}/lock").st_mtime_ns == before:
            assert time.time() < deadline
            time.sleep(0.1)
    finally:
        lock.release()


def try_to_acquire(out, barrier, winners):
    barrier.wait()
    try:
        lock.acquire(out)
    except SystemExit:
        barrier.wait()
        return
    winners.put(os.getpid())
    barrier.wait()  # all have tried: now it may end


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_newcomers_gets_the_lock(tmp_path, stale):
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        if stale:
            write_owner(str(tmp_path), 2**22 + 1)
        barrier, winners = context.Barrier(8), context.Queue()
        args = (str(tmp_path), barrier, winners)
        processes = [context.Process(target=try_to_acquire, args=args) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        winners.get(timeout=5)
        assert winners.empty()


@pytest.mark.parametrize("what", ["removed", "renamed", "taken over"])
def test_a_run_whose_folder_is_lost_stops(tiny_data, tmp_path, monkeypatch, what):
    """With an error, and nothing is made again in its place."""
    out = str(tmp_path / "run")
    schedule_factor = train.schedule_factor

    def lose_folder(cfg, round_id, step, num_steps):
        if step == 2:
            checkpoint.save_thread.submit(int).result()
            if what == "removed":
                shutil.rmtree(out)
            elif what == "renamed":
                os.rename(out, out + "2")
            else:
                write_owner(out, os.getppid())
        return schedule_factor(cfg, round_id, step, num_steps)

    monkeypatch.setattr(train, "schedule_factor", lose_folder)
    message = refused(pretrain_args(tiny_data, out))
    if what == "taken over":
        assert "was taken over by process" in message
        assert read_json(f"{out}/lock")["token"] == "other"  # not ours to remove
    else:
        assert f"out_dir {out} was removed or renamed" in message
        assert not os.path.exists(out)


def test_a_save_leaves_the_folder_of_its_successor_alone(tiny_data, tmp_path, monkeypatch):
    """A run that was suspended in a save wakes up when another one has taken over."""
    out = str(tmp_path / "run")
    staging = f"{out}/round_0/writing_000003"
    verify = checkpoint.verify

    def take_over(folder, tensors):
        verify(folder, tensors)
        if folder == staging:
            write_owner(out, os.getppid())

    monkeypatch.setattr(checkpoint, "verify", take_over)
    assert "was taken over by process" in refused(pretrain_args(tiny_data, out))
    assert step_names(out) == ["step_000001", "step_000002", "writing_000003"]


def test_the_lock_is_released_at_every_end(tiny_data, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    refused(pretrain_args(tiny_data, out), stages=nan_stages(1))
    assert not os.path.exists(f"{out}/lock")
    with monkeypatch.context() as m:
        m.setattr(train, "lr_factor", killing(train.lr_factor, 1))
        with pytest.raises(Killed):
            train.main(pretrain_args(tiny_data, out))
    assert not os.path.exists(f"{out}/lock")


def test_a_lock_that_is_a_link_is_not_followed(tiny_data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    os.symlink(tmp_path / "target", out / "lock")
    assert "is a link" in refused(pretrain_args(tiny_data, out))
    assert not os.path.exists(tmp_path / "target")


def test_settings_of_older_checkpoints():
    meta = {"config": {"lr": 1.0, "model": {"n_layer": 2}}}
    assert same_run.saved_settings(meta) == {"lr": 1.0, "n_layer": 2}


def test_a_folder_of_transformers_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="import it: python -m tools.hf import"):
        checkpoint.resolve(str(tmp_path))
