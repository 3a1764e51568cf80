"""A round is made again from its manifest alone, bit for bit, or what is in the way is named."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from nanospin import checkpoint
from tools import rebuild
import train
from conftest import make_data
from data.rows import read_rows, write_rows
from data.files import sha256, write_json
from test_train import spin_args


@pytest.fixture(scope="module")
def played(tiny_runs, tmp_path_factory):
    """(run, data, teacher) of two rounds with a teacher and history, whose config.json is gone."""
    folder = str(tmp_path_factory.mktemp("played"))
    run, data, teacher = f"{folder}/run", make_data(f"{folder}/data"), f"{folder}/teacher"
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
    return run, data, teacher


def refused(*args):
    with pytest.raises(SystemExit) as e:
        rebuild.main(list(args))
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    return e.value.code


def edited(run, **changes):
    """The run's second manifest with other contents, sealed again."""
    with open(f"{run}/round_1/collect.json", encoding="utf-8") as f:
        manifest = json.load(f)
    write_json(
        f"{run}/round_1/collect.json",
        rebuild.sealed(
            {name: changes.get(name, value) for name, value in manifest.items() if name != "sha256"}
        ),
    )


@pytest.mark.parametrize("round", [0, 1])
def test_a_round_is_made_again_bit_for_bit(played, tmp_path, capsys, round_id):
    run, _, _ = played
    rebuild.main([f"{run}/round_{round_id}", f"--out={tmp_path}/again"])
    said = capsys.readouterr().out
    assert (
        "bit for bit the same: self_train.jsonl, train.jsonl, train.ref.npz, self_val.jsonl, val.jsonl, val.ref.npz"
        in said
        and "warning" not in said
    )
    for name in ("train.jsonl", "val.jsonl", "self_train.jsonl", "train.ref.npz"):
        assert sha256(f"{run}/round_{round_id}/{name}") == sha256(
            f"{tmp_path}/again/round_{round_id}/{name}"
        )
    assert len(read_rows(f"{tmp_path}/again/round_{round_id}/train.jsonl")) == 24
    assert "no empty folder" in refused(f"{run}/round_{round_id}", f"--out={tmp_path}/again")


def test_what_moved_is_found_where_it_is_said_to_be(played, tmp_path, capsys):
    run, data, teacher = (
        shutil.move(
            shutil.copytree(path, f"{tmp_path}/copy/{os.path.basename(path)}"),
            f"{tmp_path}/{os.path.basename(path)}",
        )
        for path in played
    )
    base = shutil.move(checkpoint.latest(run, 0), f"{tmp_path}/base")
    edited(
        run,
        config=json.load(open(f"{run}/round_1/collect.json"))["config"]
        | {"data": "nowhere", "teacher": "nowhere"},
    )
    assert "--data and --teacher say where" in refused(
        f"{run}/round_1", f"--out={tmp_path}/again", f"--init={base}"
    )
    rebuild.main(
        [
            f"{run}/round_1",
            f"--out={tmp_path}/again",
            f"--init={base}",
            f"--data={data}",
            f"--teacher={teacher}",
        ]
    )
    assert "bit for bit the same" in capsys.readouterr().out


def test_what_is_not_as_it_was_is_named(played, tiny_runs, tmp_path, capsys):
    run, data, teacher = (
        shutil.copytree(path, f"{tmp_path}/{os.path.basename(path)}") for path in played
    )
    again, where = f"--out={tmp_path}/again", [f"--data={data}", f"--teacher={teacher}"]

    rows = read_rows(f"{data}/train.jsonl")
    write_rows(f"{data}/train.jsonl", [rows[0] | {"prompt": rows[0]["prompt"] + "?"}, *rows[1:]])
    assert (
        "data/train.jsonl is not the train.jsonl that the round was made of: its sha256 is"
        in refused(f"{run}/round_1", again, *where)
    )
    write_rows(f"{data}/train.jsonl", rows)
    assert f"{tiny_runs['pretrain']} is not the reference" in refused(
        f"{run}/round_1", again, *where, f"--init={tiny_runs['pretrain']}"
    )
    assert f"{tiny_runs['sft']} is not the teacher" in refused(
        f"{run}/round_1", again, where[0], f"--teacher={tiny_runs['sft']}"
    )
    earlier = f"{run}/round_0/self_train.jsonl"
    write_rows(earlier, read_rows(earlier)[::-1])
    assert f"{earlier} is not the round_0/self_train.jsonl" in refused(
        f"{run}/round_1", again, *where
    )
    shutil.copy(f"{played[0]}/round_0/self_train.jsonl", earlier)

    manifest = f"{run}/round_1/collect.json"
    with open(manifest, encoding="utf-8") as f:
        text = f.read()
    with open(manifest, "w", encoding="utf-8") as f:
        f.write(text.replace('"temperature": 0.9', '"temperature": 0.8'))
    assert "collect.json was edited" in refused(f"{run}/round_1", again, *where)
    assert "No such file" in refused(f"{run}/round_2", again)
    write_json(manifest, {"policy": "ppo's", "files": {}})
    assert "takes the folder of a round of preference or spin" in refused(f"{run}/round_1", again)
    write_json(manifest, json.loads(text) | {"round": "1"})
    assert "round must be int" in refused(f"{run}/round_1", again)

    # one who edits it and seals it again is told by the samples, from the line where they part
    said = json.loads(text)
    write_json(manifest, said)
    edited(
        run,
        config=said["config"] | {"temperature": 0.8},
        made_by=said["made_by"] | {"torch": "1.0", "threads": 64},
    )
    line = refused(f"{run}/round_1", again, *where)
    assert re.search(
        r"round_1/self_train.jsonl is the first file that differs: line \d+, '.+' for '", line
    )
    assert (
        "warning: it was made by torch '1.0', here '" in (out := capsys.readouterr().out)
        and "threads 64, here 1: last digits" in out
    )
    os.remove(f"{run}/round_1/self_train.jsonl")
    shutil.rmtree(f"{tmp_path}/again")
    assert "is not there as it was, to say where" in refused(f"{run}/round_1", again, *where)


def test_where_log_probabilities_part(tmp_path):
    for name, refs in (
        ("a", [[-1.0, -2.0], [-3.0, 0.0]]),
        ("b", [[-1.0, -2.0], [-3.5, 1.0]]),
        ("c", [[-1.0, -2.0]]),
    ):
        np.savez(f"{tmp_path}/{name}.npz", refs=np.array(refs, dtype=np.float32), of=name)
    assert (
        rebuild.first_difference(f"{tmp_path}/a.npz", f"{tmp_path}/b.npz")
        == ": row 1, response 0: -3.5 for -3.0, and 1 more"
    )
    assert (
        rebuild.first_difference(f"{tmp_path}/a.npz", f"{tmp_path}/c.npz")
        == ": it is of other rows"
    )
