"""tools/rebuild.py makes a round again from its manifest, or names what has changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

import train
from data.files import sha256, write_json
from data.rows import read_rows, write_rows
from nanospin import checkpoint
from nanospin.rounds import with_checksum
from tests.conftest import ROOT, make_data
from tests.test_train import spin_args
from tools import rebuild


@dataclass
class Inputs:
    """A run of two rounds, and the inputs that it was made from."""

    run: str
    data: str
    teacher: str

    def copy(self, folder):
        copies = {}
        for name, path in vars(self).items():
            copies[name] = shutil.copytree(path, f"{folder}/{os.path.basename(path)}")
        return Inputs(**copies)

    def moved(self):
        """The options that say where data and teacher are now."""
        return [f"--data={self.data}", f"--teacher={self.teacher}"]


@pytest.fixture(scope="module")
def original(tiny_runs, tmp_path_factory):
    """Two rounds with a teacher and replay, without the run's config.json."""
    folder = str(tmp_path_factory.mktemp("original"))
    run, teacher = f"{folder}/run", f"{folder}/teacher"
    data = make_data(f"{folder}/data")
    shutil.copytree(tiny_runs["pretrain"], teacher)
    train.main(
        spin_args(
            tiny_runs,
            data,
            run,
            "--players=data,teacher,self,self-1",
            f"--teacher={teacher}",
            "--rounds=2",
            "--replay_rounds=1",
            "--max_rows=24",
            "--max_steps=3",
            "--temperature=0.9",
            "--top_k=50",
            "--top_p=0.95",
        )
    )
    os.remove(f"{run}/config.json")
    return Inputs(run, data, teacher)


def refused(*args):
    """The error message of a command line: one line."""
    with pytest.raises(SystemExit) as e:
        rebuild.main(list(args))
    message = e.value.code
    assert isinstance(message, str) and "\n" not in message
    return message


def read_manifest(run):
    with open(f"{run}/round_1/collect.json", encoding="utf-8") as f:
        return json.load(f)


def edit_manifest(run, **changes):
    """Change the manifest of round 1, its checksum included."""
    manifest = read_manifest(run) | changes
    del manifest["sha256"]
    write_json(f"{run}/round_1/collect.json", with_checksum(manifest))


@pytest.mark.parametrize("round_id", [0, 1])
def test_a_rebuilt_round_is_identical(original, tmp_path, capsys, round_id):
    folder, out = f"{original.run}/round_{round_id}", f"{tmp_path}/again"
    rebuild.main([folder, f"--out={out}"])
    output = capsys.readouterr().out
    files = "self_train.jsonl, train.jsonl, train.ref.npz, self_val.jsonl, val.jsonl, val.ref.npz"
    assert f"identical, bit for bit: {files}" in output
    assert "warning" not in output
    for name in files.split(", "):
        assert sha256(f"{folder}/{name}") == sha256(f"{out}/round_{round_id}/{name}")
    assert len(read_rows(f"{out}/round_{round_id}/train.jsonl")) == 24
    assert "must be a new or an empty folder" in refused(folder, f"--out={out}")


def test_two_commands_with_one_folder(original, tmp_path, monkeypatch):
    """The second is refused while the first writes, and the first ends as if alone."""
    folder, out = f"{original.run}/round_0", f"{tmp_path}/again"
    reference_checkpoint = rebuild.reference_checkpoint

    def beside_another(*args):
        command = [sys.executable, "-m", "tools.rebuild", folder, f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        assert f"{out} is in use by process {os.getpid()}" in done.stderr
        return reference_checkpoint(*args)

    monkeypatch.setattr(rebuild, "reference_checkpoint", beside_another)
    rebuild.main([folder, f"--out={out}"])


def test_a_round_whose_reference_was_removed(original, tmp_path):
    inputs = original.copy(tmp_path)
    init = shutil.move(checkpoint.latest(inputs.run, 0), f"{tmp_path}/init")
    for path in checkpoint.list_steps(f"{inputs.run}/round_0"):
        shutil.rmtree(path)
    args = [f"{inputs.run}/round_1", f"--out={tmp_path}/again", *inputs.moved()]
    assert "no checkpoint of round 0 any more" in refused(*args)
    rebuild.main([*args, f"--init={init}"])


@pytest.mark.parametrize("stage", ["spin", "preference"])
def test_a_round_that_needs_no_earlier_file(tiny_runs, tiny_data, tmp_path, capsys, stage):
    """Then nothing else makes the folder that it is written to."""
    run = f"{tmp_path}/run"
    train.main(spin_args(tiny_runs, tiny_data, run, f"--stage={stage}", "--max_steps=1"))
    rebuild.main([f"{run}/round_0", f"--out={tmp_path}/a/new/folder"])
    assert "identical, bit for bit" in capsys.readouterr().out


def test_a_round_ranked_by_a_function(tiny_runs, tiny_data, tmp_path, capsys, monkeypatch):
    """It is made again, the second round too, whose prompts are others. With another source the
    function is named."""
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "graded_again.py"
    source.write_text("def f(row, text):\n    return float(text.count('e'))\n")
    run = f"{tmp_path}/run"
    players = ["--players=data,self:3", "--ranked_by=graded_again:f", "--replay_rounds=1"]
    sizes = ["--rounds=2", "--max_rows=16", "--max_steps=1"]
    train.main(spin_args(tiny_runs, tiny_data, run, *players, *sizes))
    message = refused(f"{run}/round_0", f"--out={tmp_path}/again_0")
    assert message.endswith(
        "pass --ranked_by=graded_again:f"
    )  # data does not name what is imported
    function = "--ranked_by=graded_again:f"
    for round_id in (0, 1):
        rebuild.main([f"{run}/round_{round_id}", f"--out={tmp_path}/again_{round_id}", function])
        output = capsys.readouterr().out
        assert "identical, bit for bit: self_train.jsonl, train.jsonl, train.ref.npz" in output
    source.write_text("def f(row, text):\n    return -float(text.count('e'))\n")
    del sys.modules["graded_again"]  # as in another process
    message = refused(f"{run}/round_1", f"--out={tmp_path}/other", function)
    assert "graded_again:f is not the function that ranked the round" in message


@pytest.mark.parametrize("stage", ["spin", "preference"])
def test_a_round_ranked_by_a_judge_that_has_moved(tiny_runs, tiny_data, tmp_path, capsys, stage):
    run, judge, moved = f"{tmp_path}/run", f"{tmp_path}/judge", f"{tmp_path}/moved"
    shutil.copytree(tiny_runs["pretrain"], judge)
    options = [f"--stage={stage}", f"--ranked_by={judge}", "--max_rows=16", "--max_steps=1"]
    train.main(spin_args(tiny_runs, tiny_data, run, *options))
    shutil.move(judge, moved)
    args = [f"{run}/round_0", f"--out={tmp_path}/again"]
    message = refused(*args)
    assert f"{judge}" in message and "pass its path as --init, --base, --data" in message
    other = tiny_runs["sft"]
    message = refused(*args, f"--ranked_by={other}")
    assert f"{other} is not the ranked_by that the round was made from" in message
    rebuild.main([*args, f"--ranked_by={moved}"])
    assert "identical, bit for bit" in capsys.readouterr().out


def test_moved_inputs(original, tmp_path, capsys):
    inputs = original.copy(tmp_path)
    init = shutil.move(checkpoint.latest(inputs.run, 0), f"{tmp_path}/init")
    settings = read_manifest(inputs.run)["config"] | {"data": "nowhere", "teacher": "nowhere"}
    edit_manifest(inputs.run, config=settings)
    args = [f"{inputs.run}/round_1", f"--out={tmp_path}/again", f"--init={init}"]
    assert "--init, --base, --data, --teacher or --ranked_by" in refused(*args)
    rebuild.main([*args, *inputs.moved()])
    assert "identical, bit for bit" in capsys.readouterr().out


def test_changed_inputs_are_named(original, tiny_runs, tmp_path):
    inputs = original.copy(tmp_path)
    args = [f"{inputs.run}/round_1", f"--out={tmp_path}/again", *inputs.moved()]

    path = f"{inputs.data}/train.jsonl"
    rows = read_rows(path)
    changed = rows[0] | {"prompt": rows[0]["prompt"] + "?"}
    write_rows(path, [changed, *rows[1:]])
    message = refused(*args)
    assert f"{path} is not the train.jsonl that the round was made from: its sha256 is" in message
    write_rows(path, rows)

    other = tiny_runs["pretrain"]
    assert f"{other} is not the reference" in refused(*args, f"--init={other}")
    other = tiny_runs["sft"]
    assert f"{other} is not the teacher" in refused(*args, f"--teacher={other}")

    path = f"{inputs.run}/round_0/self_train.jsonl"
    write_rows(path, read_rows(path)[::-1])
    assert f"{path} is not the round_0/self_train.jsonl" in refused(*args)


def test_damaged_manifests_are_refused(original, tmp_path):
    inputs = original.copy(tmp_path)
    folder, out = f"{inputs.run}/round_1", f"--out={tmp_path}/again"
    path = f"{folder}/collect.json"
    manifest = read_manifest(inputs.run)

    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace('"temperature": 0.9', '"temperature": 0.8'))
    assert "collect.json was edited" in refused(folder, out)
    write_json(path, {"policy": "ppo's", "files": {}})
    assert "expected the folder of a round of stage preference or spin" in refused(folder, out)
    write_json(path, manifest | {"round": "1"})
    assert "round must be int" in refused(folder, out)
    assert "No such file" in refused(f"{inputs.run}/round_2", out)


def test_the_first_different_line_is_named(original, tmp_path, capsys):
    """With an edited temperature and a matching checksum the samples differ."""
    inputs = original.copy(tmp_path)
    args = [f"{inputs.run}/round_1", f"--out={tmp_path}/again", *inputs.moved()]
    manifest = read_manifest(inputs.run)
    edit_manifest(
        inputs.run,
        config=manifest["config"] | {"temperature": 0.8},
        made_by=manifest["made_by"] | {"torch": "1.0", "threads": 64},
    )
    pattern = r"round_1/self_train.jsonl is the first file that differs: line \d+, '.+', originally"
    assert re.search(pattern, refused(*args))
    output = capsys.readouterr().out
    assert "warning: the round was made with torch '1.0' (now '" in output
    assert "threads 64 (now 1); last digits" in output

    os.remove(f"{inputs.run}/round_1/self_train.jsonl")
    shutil.rmtree(f"{tmp_path}/again")
    assert "is missing or changed, so no line can be named" in refused(*args)


def test_the_first_different_log_probability_is_named(tmp_path):
    arrays = {
        "a": [[-1.0, -2.0], [-3.0, 0.0]],
        "b": [[-1.0, -2.0], [-3.5, 1.0]],
        "c": [[-1.0, -2.0]],
    }
    for name, refs in arrays.items():
        np.savez(f"{tmp_path}/{name}.npz", refs=np.array(refs, dtype=np.float32), of=name)

    def difference(old, new):
        return rebuild.first_difference(f"{tmp_path}/{old}.npz", f"{tmp_path}/{new}.npz")

    expected = ": row 1, response 0: -3.5, originally -3.0; 2 numbers differ"
    assert difference("a", "b") == expected
    assert difference("a", "c") == ": it has shape (1, 2), originally (2, 2)"
    assert "different rows" in difference("a", "a")
