"""What a run reads again at every round is what it began with; moved inputs are accepted."""

import errno
import importlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import Killed, assert_same_run, killing, make_data, read_metrics, refused, spin_args
from safetensors.torch import load_file, save_file
from test_distributed import ENV, torchrun_command

import players
import ppo
import train
from data import tokenizer
from data.files import read_json, sha256, write_json
from data.folder import write_meta
from data.rows import read_rows, write_rows
from nanospin import checkpoint, inputs, same_run


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


# ------------------------------------------------------------------------------ hashes of files


def test_a_hash_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path, out = f"{tmp_path}/stream.bin", str(tmp_path)
    write_text(path, "abc")
    first = inputs.file_sha256(path, out)
    assert first == sha256(path)
    assert not os.path.exists(f"{out}/hashes.json")  # the file may still be changing
    monkeypatch.setattr(inputs, "SETTLED", -1.0)
    assert inputs.file_sha256(path, out) == first
    with monkeypatch.context() as m:
        m.setattr(inputs, "hash_chunks", None)  # it is not called
        assert inputs.file_sha256(path, out) == first

    stat = os.stat(path)
    write_text(path, "abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, time and inode
    assert inputs.file_sha256(path, out) == sha256(path) != first

    for content in ("", "{", "[1]", '{"' + path + '": 5}', "[" * 5000):
        write_text(f"{out}/hashes.json", content)
        assert inputs.file_sha256(path, out) == sha256(path)


def test_an_input_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SystemExit, match="gone: No such file"):
        inputs.file_sha256(f"{tmp_path}/gone", str(tmp_path))


# ------------------------------------------------------------------------------ between two rounds


def after_round_0(monkeypatch, change):
    """Call change() when round 0 has been trained."""
    fit = train.fit

    def fit_and_change(run, round_id, *rest):
        fit(run, round_id, *rest)
        if round_id == 0:
            change()

    monkeypatch.setattr(train, "fit", fit_and_change)


def change_first_row(path):
    rows = read_rows(path)
    write_rows(path, [rows[0] | {"responses": ["poison"]}, *rows[1:]])


def teacher_file(data, path):
    rows = []
    for split in ("train", "val"):
        for row in read_rows(f"{data}/{split}.jsonl"):
            rows.append({"prompt": row["prompt"], "responses": ["so it ends"]})
    write_rows(path, rows)


@pytest.mark.parametrize("changed", ["data", "teacher", "earlier samples", "replayed rows"])
def test_a_changed_input_ends_the_run_before_the_next_round(
    tiny_runs, tmp_path, monkeypatch, changed
):
    """In one line, and nothing of the round is written. Put back, the same command continues."""
    data, out, whole = make_data(f"{tmp_path}/data"), f"{tmp_path}/r", f"{tmp_path}/whole"
    teacher_file(data, f"{tmp_path}/teacher.jsonl")
    options = ["--rounds=2", "--max_steps=2", "--players=data,teacher,self,self-1"]
    options += [f"--teacher={tmp_path}/teacher.jsonl", "--replay_rounds=1"]
    path = {
        "data": f"{data}/train.jsonl",
        "teacher": f"{tmp_path}/teacher.jsonl",
        "earlier samples": f"{out}/round_0/self_train.jsonl",
        "replayed rows": f"{out}/round_0/train.jsonl",
    }[changed]
    args = spin_args(tiny_runs, data, out, *options)
    train.main(spin_args(tiny_runs, data, whole, *options))
    with monkeypatch.context() as m:
        after_round_0(m, lambda: change(path))

        def change(path):
            shutil.copy(path, f"{tmp_path}/original")
            change_first_row(path)

        message = refused(args)
    assert f"{path} was changed" in message
    assert "same command again" in message
    assert not os.path.exists(f"{out}/round_1")
    shutil.copy(f"{tmp_path}/original", path)
    train.main(args)
    assert_same_run(whole, out)


def test_changed_answers_of_a_teacher_checkpoint(tiny_runs, tiny_data, tmp_path, monkeypatch):
    out = f"{tmp_path}/r"
    options = ["--rounds=2", "--max_steps=1", "--players=data,teacher,self"]
    args = spin_args(tiny_runs, tiny_data, out, *options, f"--teacher={tiny_runs['pretrain']}")
    after_round_0(monkeypatch, lambda: change_first_row(f"{out}/teacher_val.jsonl"))
    assert "teacher_val.jsonl was changed" in refused(args)


def test_an_input_that_changes_while_a_round_samples(tiny_runs, tmp_path, monkeypatch):
    """The teacher's file is read after the sampling: the rows of the round are not written."""
    data, out = make_data(f"{tmp_path}/data"), f"{tmp_path}/r"
    path = f"{tmp_path}/teacher.jsonl"
    teacher_file(data, path)
    options = ["--max_steps=1", "--players=data,self,teacher", f"--teacher={path}"]
    sample = players.sample_policy

    def sample_and_change(*args):
        sample(*args)
        change_first_row(path)

    monkeypatch.setattr(players, "sample_policy", sample_and_change)
    assert f"{path} was changed" in refused(spin_args(tiny_runs, data, out, *options))
    assert not os.path.exists(f"{out}/round_0/train.jsonl")


def damage_end_of_round_0(run):
    """Damage its last checkpoint. Only samples of round 1 are left, no checkpoint."""
    for path in checkpoint.list_steps(f"{run}/round_1"):
        shutil.rmtree(path)
    path = checkpoint.latest(run, 0)
    with open(f"{path}/model.safetensors", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x55")


@pytest.mark.parametrize("stage", ["spin", "spin, killed", "ppo"])
def test_samples_of_another_policy_are_drawn_again(tiny_runs, tiny_data, tmp_path, capsys, stage):
    """The last checkpoint of round 0 is damaged, and the steps that are repeated differ in the last
    digits. Round 1 must not go on with samples of the policy that there was."""
    out, whole = f"{tmp_path}/r", f"{tmp_path}/whole"
    options = [f"--stage={stage.split(',')[0]}", "--rounds=2"]
    if stage == "ppo":
        options += ppo_options("--max_rows=16", "--save_interval=1", "--eval_interval=1")
    train.main([*spin_args(tiny_runs, tiny_data, out), *options])
    damage_end_of_round_0(out)
    if stage == "spin, killed":  # while it scored under the reference
        for name in ("train.ref.npz", "val.ref.npz", "collect.json"):
            os.remove(f"{out}/round_1/{name}")
    evaluation = "round_0/val_step_000002.jsonl"
    if stage == "ppo":
        change_first_row(f"{out}/{evaluation}")
    shutil.copytree(out, whole)
    shutil.rmtree(f"{whole}/round_1")
    if stage == "ppo":
        os.remove(f"{whole}/{evaluation}")

    options.append("--micro_batch_tokens=64")
    train.main([*spin_args(tiny_runs, tiny_data, whole), *options])
    capsys.readouterr()
    train.main([*spin_args(tiny_runs, tiny_data, out), *options])
    assert f"renamed to {out}/round_1.other_policy, and made again" in capsys.readouterr().out
    assert_same_run(whole, out)
    names = {"spin": ["self_train.jsonl", "train.jsonl"], "ppo": ["self_train.jsonl"]}
    for name in names.get(stage, []):
        assert sha256(f"{whole}/round_1/{name}") == sha256(f"{out}/round_1/{name}")
    if stage == "ppo":
        assert sha256(f"{whole}/{evaluation}") == sha256(f"{out}/{evaluation}")


def test_a_reward_model_that_changes_while_ppo_evaluates(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    """What was measured with it is not logged."""
    out, reward = f"{tmp_path}/r", f"{tmp_path}/reward"
    options = ["--stage=reward", f"--out_dir={reward}", "--max_steps=1"]
    train.main(spin_args(tiny_runs, tiny_data, reward, *options))
    weights = f"{checkpoint.resolve(reward)}/model.safetensors"

    def changing(cfg, path, *arguments):
        samples = sample_trajectories(cfg, path, *arguments)
        if "val_step" in path:
            with open(weights, "ab") as f:
                f.write(b"x")
        return samples

    sample_trajectories = ppo.sample_trajectories
    args = spin_args(tiny_runs, tiny_data, out, "--stage=ppo", f"--reward={reward}")
    args += ["--max_rows=8", "--rounds=1", "--max_steps=1"]
    monkeypatch.setattr(ppo, "sample_trajectories", changing)
    assert f"{weights} was changed" in refused(args)
    assert read_metrics(out, "eval") == []


def test_samples_of_the_same_policy_are_kept(tiny_runs, tiny_data, tmp_path):
    """The steps that are repeated are the same, so the samples of round 1 are its own."""
    out = f"{tmp_path}/r"
    args = spin_args(tiny_runs, tiny_data, out, "--rounds=2")
    train.main(args)
    before = os.stat(f"{out}/round_1/self_train.jsonl").st_ino
    damage_end_of_round_0(out)
    train.main(args)
    assert os.stat(f"{out}/round_1/self_train.jsonl").st_ino == before


@pytest.mark.parametrize("now", ["removed", "pruned", "replaced"])
@pytest.mark.parametrize("stage", ["spin", "preference"])
def test_init_and_teacher_may_go_once_they_are_not_read_again(
    tiny_runs, tiny_data, tmp_path, monkeypatch, capsys, stage, now
):
    """Killed while it samples round 1, or trains round 0. "pruned": the run of init has gone on."""
    init, out, whole = f"{tmp_path}/init", f"{tmp_path}/r", f"{tmp_path}/whole"
    shutil.copytree(tiny_runs["sft"], init)
    options = [f"--stage={stage}", "--save_interval=1"]
    if stage == "spin":
        options += ["--rounds=2", "--max_steps=2", f"--teacher={init}"]
        options += ["--players=data,teacher,self"]
    train.main([*spin_args({"sft": init}, tiny_data, whole), *options])
    args = [*spin_args({"sft": init}, tiny_data, out), *options]
    with monkeypatch.context() as m:
        module, name, at = players, "respond", 5
        if stage == "preference":
            module, name, at = train.distributed, "clip_grad_norm_", 2
        m.setattr(module, name, killing(getattr(module, name), at))
        with pytest.raises(Killed):
            train.main(args)
    assert checkpoint.latest(out).startswith(f"{out}/round_0")
    if now == "removed":
        shutil.rmtree(init)
    else:
        add_checkpoint(init)
        shutil.rmtree(f"{init}/round_0/step_000008")
        if now == "replaced":
            os.rename(f"{init}/round_0/step_000020", f"{init}/round_0/step_000008")
    for _ in range(2):  # the second start is of a finished run
        capsys.readouterr()
        train.main(args)
        assert "it is not read again" in capsys.readouterr().out
    assert_same_run(whole, out)


def ppo_options(*more):
    return ["--stage=ppo", "--reward=conftest:letters", "--max_rows=8", "--rounds=2", *more]


def add_checkpoint(run):
    """What the run of init does when it goes on: a newer checkpoint, with other weights."""
    old = checkpoint.latest(run)
    new = shutil.copytree(old, f"{os.path.dirname(old)}/step_000020")
    weights = load_file(f"{new}/model.safetensors")
    for tensor in weights.values():
        tensor *= 2
    save_file(weights, f"{new}/model.safetensors", metadata={"format": "pt"})
    meta = read_json(f"{new}/meta.json")
    meta |= {"step": 20, "weights_sha256": sha256(f"{new}/model.safetensors")}
    write_json(f"{new}/meta.json", meta)
    checkpoint.write_manifest(new)
    return old


def test_ppo_keeps_its_reference_when_the_run_of_init_goes_on(
    tiny_runs, tiny_data, tmp_path, monkeypatch
):
    """The checkpoint that the run began with is used, at later starts too; without it the run is
    refused."""
    init, out, whole = f"{tmp_path}/init", f"{tmp_path}/r", f"{tmp_path}/whole"
    shutil.copytree(tiny_runs["sft"], init)
    options = ppo_options("--max_steps=2")
    train.main(spin_args({"sft": init}, tiny_data, whole, *options))
    args = spin_args({"sft": init}, tiny_data, out, *options)
    with monkeypatch.context() as m:
        after_round_0(m, lambda: add_checkpoint(init))
        train.main(args)
    assert_same_run(whole, out)
    shutil.rmtree(f"{out}/round_1")
    train.main(args)
    assert_same_run(whole, out)
    shutil.rmtree(f"{out}/round_1")
    shutil.rmtree(f"{init}/round_0/step_000008")
    assert "begun with players_sha256" in refused(args)


# ------------------------------------------------------------------------------------- at a start


def pretrain_args(data, out, *more):
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32"]
    steps = ["--max_steps=4", "--save_interval=2", "--batch_size=4", "--eval_batches=1"]
    return ["--stage=pretrain", f"--data={data}", f"--out_dir={out}", *shape, *steps, *more]


def test_a_changed_stream_is_refused(tmp_path):
    """Of the same size and time, so that only its content tells."""
    data, out = make_data(f"{tmp_path}/data"), f"{tmp_path}/r"
    args = pretrain_args(data, out, "--device=cpu")
    train.main(args)
    shutil.rmtree(f"{out}/round_0/step_000004")
    path = f"{data}/train.bin"
    stat = os.stat(path)
    ids = np.fromfile(path, dtype=np.uint16)
    ids[:] = 65
    ids.tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert f"{path} was changed" in refused(args)
    assert "meta.json has" in refused(pretrain_args(data, f"{tmp_path}/new", "--device=cpu"))


def test_two_ranks_refuse_in_one_line(tmp_path):
    data = make_data(f"{tmp_path}/data")
    with open(f"{data}/val.bin", "r+b") as f:
        f.write(b"\x01\x00")
    args = pretrain_args(data, f"{tmp_path}/r", "--device=cpu")
    done = subprocess.run(torchrun_command(args), capture_output=True, text=True, env=ENV)
    assert done.returncode != 0
    assert done.stderr.count("val.bin was changed") == 1
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("val.bin")[0]


def test_moved_inputs_are_accepted(tiny_runs, tiny_data, tmp_path):
    """Data, init and teacher are elsewhere, with the same contents."""
    out = f"{tmp_path}/r"
    places = {}
    for name in ("one", "two"):
        folder = f"{tmp_path}/{name}"
        shutil.copytree(tiny_data, f"{folder}/data")
        shutil.copytree(tiny_runs["sft"], f"{folder}/sft")
        teacher_file(tiny_data, f"{folder}/teacher.jsonl")
        places[name] = folder

    def args(folder, *more):
        players = ["--players=data,teacher,self", f"--teacher={folder}/teacher.jsonl"]
        runs = {"sft": f"{folder}/sft"}
        return spin_args(runs, f"{folder}/data", out, "--max_steps=2", *players, *more)

    train.main(args(places["one"]))
    shutil.rmtree(places["one"])
    train.main(args(places["two"]))
    train.main(args(f"{tmp_path}/./two/"))

    # with other contents it is refused, in the same place and elsewhere
    change_first_row(f"{places['two']}/teacher.jsonl")
    assert "begun with players_sha256" in refused(args(places["two"]))
    shutil.move(places["two"], f"{tmp_path}/three")
    assert "begun with teacher" in refused(args(f"{tmp_path}/three"))


def test_a_moved_stream_is_accepted(tmp_path):
    """With a slash more, and if only the words for its source differ."""
    data, out = make_data(f"{tmp_path}/data"), f"{tmp_path}/r"
    args = pretrain_args(data, out, "--device=cpu")
    train.main(args)
    shutil.move(data, f"{tmp_path}/moved")
    moved = pretrain_args(f"{tmp_path}/moved/", out, "--device=cpu")
    train.main(moved)
    meta = read_json(f"{tmp_path}/moved/meta.json")
    write_json(f"{tmp_path}/moved/meta.json", meta | {"source": "described in other words"})
    train.main(moved)


def test_a_moved_reward_model_and_tokenizer_are_accepted(tiny_runs, tiny_data, tmp_path):
    out, reward = f"{tmp_path}/r", f"{tmp_path}/reward"
    options = ["--stage=reward", f"--out_dir={reward}", "--max_steps=1"]
    train.main(spin_args(tiny_runs, tiny_data, reward, *options))
    args = spin_args(tiny_runs, tiny_data, out, *ppo_options("--max_steps=1"))
    train.main([*args, f"--reward={reward}"])
    shutil.move(reward, f"{tmp_path}/moved")
    train.main([*args, f"--reward={tmp_path}/moved"])
    assert "begun with reward" in refused([*args, "--reward=conftest:letters"])

    data, out = make_data(f"{tmp_path}/data"), f"{tmp_path}/own"
    enc = tokenizer.load("bytes")
    for name in ("one", "two"):
        tokenizer.save(enc, f"{tmp_path}/{name}.tiktoken")
    args = pretrain_args(data, out, "--device=cpu")
    train.main([*args, f"--tokenizer={tmp_path}/one.tiktoken"])
    os.remove(f"{tmp_path}/one.tiktoken")
    train.main([*args, f"--tokenizer={tmp_path}/two.tiktoken"])


def test_a_config_file_with_anything_in_it_is_no_traceback(tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/r"
    args = spin_args(tiny_runs, tiny_data, out, "--max_steps=1")
    train.main(args)
    config = read_json(f"{out}/config.json")
    for value in (5, [], {"init": 3}, {"init": [1]}, None, {"x": {}}):
        for name in ("players_sha256", "checkpoints", "init", "data_sha256", "rounds"):
            changed = {"config": config["config"] | {name: value}, "starts": config["starts"]}
            write_json(f"{out}/config.json", changed)
            try:
                train.main(args)
            except SystemExit as e:
                assert "\n" not in str(e.code)


# -------------------------------------------------------------------------- a reward's source


def test_a_reward_function_with_another_source_is_said(
    tiny_runs, tiny_data, tmp_path, monkeypatch, capsys
):
    """Once per start, and it goes on: a fixed scorer must not end the run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    out = f"{tmp_path}/r"
    write_text(f"{tmp_path}/graded.py", "def f(row, text):\n    return len(text)\n")
    options = ["--stage=ppo", "--reward=graded:f", "--max_rows=8", "--max_steps=2"]
    args = spin_args(tiny_runs, tiny_data, out, *options, "--rounds=2")
    train.main(args)
    assert not read_metrics(out, "warning")
    first = read_json(f"{out}/round_1/collect.json")["reward_sha256"]
    assert first == sha256(f"{tmp_path}/graded.py")

    shutil.rmtree(f"{out}/round_1")
    write_text(f"{tmp_path}/graded.py", "def f(row, text):\n    return 2 * len(text)\n")
    importlib.invalidate_caches()
    del sys.modules["graded"]
    train.main(args)
    (warning,) = read_metrics(out, "warning")
    assert "the source of reward graded:f has changed" in warning["text"]
    assert read_json(f"{out}/round_1/collect.json")["reward_sha256"] != first
    config = read_json(f"{out}/config.json")["config"]
    assert config["reward_source_sha256"] == first


def test_rounds_may_change_and_the_schedule_is_said(tiny_runs, tiny_data, tmp_path, capsys):
    out = f"{tmp_path}/r"
    args = spin_args(tiny_runs, tiny_data, out, *ppo_options("--max_steps=1"))
    train.main(args)
    assert "rounds was" not in capsys.readouterr().out
    train.main([*args, "--rounds=3"])
    assert "rounds was 2, now it is 3: the learning-rate schedule" in capsys.readouterr().out
    train.main([*args, "--rounds=3"])
    assert "rounds was" not in capsys.readouterr().out


def test_lists_grow_with_the_rounds(tiny_runs, tiny_data, tmp_path, monkeypatch):
    """As if the run had had them from the start; the values of rounds that have begun stay. A round
    that was killed before its first checkpoint begins again, with the same values or others."""
    out, whole = f"{tmp_path}/r", f"{tmp_path}/whole"
    args = spin_args(tiny_runs, tiny_data, out, "--max_steps=1")
    more = ["--rounds=2", "--lr=[1e-3,5e-4]", "--beta=[0.5,0.2]"]
    train.main([*args, "--lr=[1e-3]"])
    for name, value in (("lr", "[5e-4,1e-3]"), ("beta", "[0.2,0.2]"), ("lr", "5e-4")):
        message = refused([*args, *more, f"--{name}={value}"])
        assert f"was begun with {name} = " in message
    for options in ([*more, "--lr=[1e-3,9e-4]"], more):
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", killing(train.fit, 0))
            with pytest.raises(Killed):
                train.main([*args, *options])
        assert os.path.exists(f"{out}/round_1/collect.json")
    train.main([*args, *more])
    train.main([*spin_args(tiny_runs, tiny_data, whole, "--max_steps=1"), *more])
    assert_same_run(whole, out)
    assert "was begun with lr = [0.001, 0.0005]" in refused([*args, *more, "--lr=[1e-3,1e-3]"])
    train.main([*args, *more, "--rounds=3", "--lr=[1e-3,5e-4,1e-4]", "--beta=[0.5,0.2,0.2]"])


def test_validation_rows_that_are_trained_on_are_said(tiny_runs, tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, f"{tmp_path}/data")
    rows = read_rows(f"{data}/train.jsonl")
    write_rows(f"{data}/val.jsonl", rows[:2] + read_rows(f"{data}/val.jsonl")[2:])
    write_meta(data, "bytes", "made up")
    for stage in ("sft", "reward", "spin", "ppo"):
        args = spin_args(tiny_runs, data, f"{tmp_path}/{stage}", "--max_steps=1", "--eval_rows=12")
        more = {"ppo": ppo_options(), "spin": ["--rounds=2"]}.get(stage, [f"--stage={stage}"])
        train.main([*args, *more])
        printed = capsys.readouterr().out
        assert printed.count("2 of 12 validation rows are among the training rows") == 1
    train.main(spin_args(tiny_runs, tiny_data, f"{tmp_path}/apart", "--max_steps=1"))
    assert "among the training rows" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["spin", "ppo"])
def test_prompts_without_room_leave_no_file(tiny_runs, tiny_data, tmp_path, stage):
    """An empty file of samples would stop the fixed command too."""
    options = ppo_options() if stage == "ppo" else []
    args = [*spin_args(tiny_runs, tiny_data, f"{tmp_path}/r"), *options]
    with pytest.raises(SystemExit, match="no prompt leaves room for a response"):
        train.main([*args, "--max_prompt=2"])
    assert not os.path.exists(f"{tmp_path}/r/round_0/self_train.jsonl")
    train.main(args)


def test_scores_of_the_reference_are_results(tiny_runs, tiny_data, tmp_path):
    """A run that was killed while the reference scored has settings to keep."""
    args = [*spin_args(tiny_runs, tiny_data, f"{tmp_path}/r"), "--stage=preference"]
    train.main(args)
    for name in ("metrics.jsonl", "round_0/collect.json", "round_0/val.ref.npz"):
        os.remove(f"{tmp_path}/r/{name}")
    for path in checkpoint.list_checkpoints(f"{tmp_path}/r"):
        shutil.rmtree(path)
    with pytest.raises(SystemExit, match="was begun with dtype"):
        train.main([*args, "--dtype=bfloat16"])


def killed_in_fit(monkeypatch, args):
    """A run that is killed in its first step, when all files of round 0 are there."""
    with monkeypatch.context() as m:
        m.setattr(train.distributed, "clip_grad_norm_", killing(None, 0))
        with pytest.raises(Killed):
            train.main(args)


@pytest.mark.parametrize("name", ["train.ref.npz", "val.ref.npz", "train.jsonl", "self_val.jsonl"])
def test_a_changed_file_of_the_current_round_is_refused(
    tiny_runs, tiny_data, tmp_path, monkeypatch, name
):
    """Log-probabilities of the reference that are other numbers say so nowhere but in the hash."""
    out = f"{tmp_path}/r"
    args = spin_args(tiny_runs, tiny_data, out, "--max_steps=2")
    killed_in_fit(monkeypatch, args)
    path = f"{out}/round_0/{name}"
    shutil.copy(path, f"{tmp_path}/original")
    if name.endswith(".npz"):
        with np.load(path) as f:
            arrays = dict(f)
        np.savez(path, **arrays | {"refs": arrays["refs"] + 0.5})
    else:
        change_first_row(path)
    assert f"{path} was changed" in refused(args)
    shutil.copy(f"{tmp_path}/original", path)
    train.main(args)


@pytest.mark.parametrize("content", [None, b"", b"\n"])
def test_samples_without_settings_are_not_gone_on_with(
    tiny_runs, tiny_data, tmp_path, monkeypatch, content
):
    """config.json is lost, and no checkpoint or manifest has the settings of the samples."""
    out = f"{tmp_path}/r"
    args = spin_args(tiny_runs, tiny_data, out, "--max_steps=1")
    with monkeypatch.context() as m:
        m.setattr(train.rollout, "reference_logprobs", killing(None, 0))
        with pytest.raises(Killed):
            train.main(args)
    os.rename(f"{out}/config.json", f"{tmp_path}/config.json")
    if content is not None:
        with open(f"{out}/config.json", "wb") as f:
            f.write(content)
    for more in ([], ["--temperature=0.5"]):
        message = refused([*args, *more])
        assert f"{out} has samples ({out}/round_0/" in message
        assert "put its config.json back" in message
    os.replace(f"{tmp_path}/config.json", f"{out}/config.json")
    train.main(args)


def test_a_manifest_has_the_settings_of_a_lost_config_json(
    tiny_runs, tiny_data, tmp_path, monkeypatch, capsys
):
    out, whole = f"{tmp_path}/r", f"{tmp_path}/whole"
    options = ["--max_steps=2", "--players=data,teacher,self", f"--teacher={tiny_runs['pretrain']}"]
    train.main(spin_args(tiny_runs, tiny_data, whole, *options))
    args = spin_args(tiny_runs, tiny_data, out, *options)
    killed_in_fit(monkeypatch, args)
    os.remove(f"{out}/config.json")
    assert "was begun with temperature = 1.0" in refused([*args, "--temperature=0.5"])
    assert "was begun with init" in refused([*args, f"--init={tiny_runs['pretrain']}"])
    capsys.readouterr()
    train.main(args)
    assert f"taken from {out}/round_0/collect.json" in capsys.readouterr().out
    assert_same_run(whole, out)


def test_an_out_dir_inside_a_run_is_refused(tiny_runs, tmp_path):
    """In a round or a checkpoint it would be removed with it, and be taken for the other run."""
    run = shutil.copytree(tiny_runs["sft"], f"{tmp_path}/out/sft")
    data = make_data(f"{tmp_path}/data")
    step = checkpoint.latest(run)
    os.symlink(step, f"{tmp_path}/link")
    copy = shutil.copytree(step, f"{tmp_path}/copy")  # as tools/hf.py imports one
    inside = [f"{run}/round_0", f"{run}/round_0/a/b", f"{run}/round_7", step, f"{step}/a/b/c"]
    inside += [f"{tmp_path}/link", f"{tmp_path}/link/a", copy, f"{copy}/a"]
    for out in inside:
        message = refused(pretrain_args(data, out, "--device=cpu"))
        assert f"out_dir {out} would be inside a run" in message
    assert not os.path.exists(f"{run}/round_7")
    assert sorted(os.listdir(f"{run}/round_0")) == ["step_000008"]
    for out in (f"{tmp_path}/out/round_1", f"{tmp_path}/out/demo/a", f"{run}/beside"):
        train.main(pretrain_args(data, out, "--device=cpu", "--max_steps=1"))


def test_a_dangling_link_is_no_content(tmp_path):
    os.symlink(tmp_path / "nothing", tmp_path / "metrics.jsonl")
    (tmp_path / ".metrics.jsonl.swp").write_text("an editor's")
    assert list(same_run.files_with_rows(str(tmp_path))) == []
    (tmp_path / "round_0").mkdir()
    (tmp_path / "round_0" / "train.jsonl.part").write_text("{}")
    found = list(same_run.files_with_rows(str(tmp_path)))
    assert found == [f"{tmp_path}/round_0/train.jsonl.part"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "round_0").mkdir()
    (tmp_path / "round_0" / "train.jsonl").write_text("{}")
    scandir = os.scandir

    def stale(path):
        if str(path).endswith("round_0"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale"):
        list(same_run.files_with_rows(str(tmp_path)))


def test_seeds_of_different_settings_are_not_averaged(tmp_path):
    runs = []
    for seed, settings in enumerate(({"lr": 1e-3}, {"lr": 1e-3, "new": 1}, {"lr": 2e-3})):
        runs.append(str(tmp_path / f"{seed}"))
        os.makedirs(runs[-1])
        inputs = {"seed": seed, "init": runs[-1], "log_interval": seed, "out_dir": runs[-1]}
        config = {"config": settings | inputs, "starts": []}
        write_json(f"{runs[-1]}/config.json", config)
    same_run.check_same_settings([*runs[:2], f"{tmp_path}/without"])
    with pytest.raises(SystemExit, match="/2 was trained with lr = 0.002, and .*/0 with 0.001"):
        same_run.check_same_settings(runs)
