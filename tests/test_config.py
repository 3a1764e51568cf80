import os
import re
import subprocess
import sys

import pytest

from nanospin import config
from nanospin.config import load, per_round


def test_files_overrides_and_inheritance(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from config.demo.spin_k2 import *\nimport math\n_half = 0.5\nlr = [1e-4, _half * 1e-4]\nbeta = math.e\n"
    )
    cfg = load(
        [
            str(path),
            "--batch_size=16",
            "--players=data,self,self-1",
            "--compile=true",
            "--lr=[0.1, 1]",
        ]
    )
    assert (
        cfg.stage == "spin"
        and cfg.lr == [0.1, 1.0]
        and cfg.batch_size == 16
        and cfg.compile is True
    )
    assert cfg.players == ["data", "self", "self-1"] and abs(cfg.beta - 2.718) < 1e-3
    assert per_round(cfg.lr, 1) == 1.0 and per_round([3.0], 5) == 3.0 and per_round(2.0, 7) == 2.0
    assert load(["--lr=1", "--max_steps=1"]).lr == 1.0  # an int where a float is asked


@pytest.mark.parametrize(
    "args, message",
    [
        (["--bta=0.1"], "unknown setting 'bta', did you mean 'beta'"),
        (["--lr"], "--name=value"),
        (["--max_steps=1.5"], "max_steps must be int"),
        (["--lr=fast"], "lr must be float"),
        (["--lr=[1,'a']"], "lr must be float"),
        (["--compile=1"], "compile must be bool"),
        (["--batch_size=True"], "must be int"),
        (["--stage=dpo"], "stage must be one of"),
        (["--batch_size=0"], "at least 1"),
        (["--temperature=-1"], "not be negative"),
        (["--top_p=0"], "top_p"),
        (["--template=Q"], "must contain {prompt}"),
        ([], "needs max_steps"),
        (["--stage=spin"], "needs init"),
        (["--max_steps=1", "--rounds=2"], "has one round"),
        (["--stage=spin", "--init=x", "--rounds=3", "--lr=[1,2]"], "2 values for 3 rounds"),
        (["--stage=spin", "--init=x", "--players=data,teacher,self"], "teacher"),
        (["--stage=spin", "--init=x", "--teacher=y"], "teacher"),
        (["--stage=spin", "--init=x", "--players=self,data"], "begin with data"),
        (["--stage=spin", "--init=x", "--players=data,selfie"], "players are"),
        (["--stage=spin", "--init=x", "--players=data,self-1"], "must name self"),
        (["--label_smoothing=0.5", "--max_steps=1"], "label_smoothing"),
        (["--seed=-1"], "seed must not"),
        (["--taylor_order=21"], "at most 20"),
        (["--taylor_end=-1"], "taylor_end"),
        (["--max_steps=1", "--focal=1", "--taylor_order=1"], "taylor_order and focal"),
        (["--max_steps=1", "--label_smoothing=0.1", "--taylor_end=1"], "set one"),
        (["--stage=spin", "--init=x", "--focal=1"], "token losses"),
        (["--stage=preference", "--init=x", "--loss_type=ipo", "--taylor_end=1"], "no depth"),
        (["--max_steps=1", "--calibration=True"], "stage sft"),
        (["nothing.py"], "No such file"),
        (["--lr=0", "--max_steps=1"], "above 0"),
    ],
)
def test_mistakes_are_one_line(args, message):
    with pytest.raises(SystemExit) as e:
        load(args)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_mistakes_in_a_file(tmp_path):
    for text, message in (
        ("lr = (\n", "a.py:1: "),
        ("learning_rate = 1\n", "unknown setting 'learning_rate'"),
        ("lr = 1 / 0\n", "ZeroDivisionError"),
        ("n_layer = '2'\n", "n_layer must be int | None"),
    ):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(SystemExit) as e:
            load([str(tmp_path / "a.py")])
        assert message in str(e.value) and "\n" not in str(e.value)


def test_as_a_user_sees_it():
    done = subprocess.run([sys.executable, "train.py", "--bta=1"], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.strip() == "command line: unknown setting 'bta', did you mean 'beta'?"
    )


def test_every_file_in_config_loads_and_says_how_it_is_run():
    files = sorted(f for f in os.listdir("config") if f.endswith(".py") and f != "__init__.py")
    for name in (
        "pretrain_gpt2",
        "sft_ultrachat",
        "spin_k2",
        "spin_k3",
        "spin_k3_gsm8k",
        "tn_shp_first",
        "tn_shp_later",
        "tn_shp_clean",
    ):
        assert f"{name}.py" in files
    for file in files:
        load([f"config/{file}"])
        text = open(f"config/{file}", encoding="utf-8").read()
        header = text.split('"""')[1]
        assert f"train.py config/{file}" in header, file
        assert re.search(r"\bcores?\b|GPU", header) and re.search(
            r"minute|hour|second|\d s on", header
        ), file  # hardware and time
        assert re.search(r"\d %|loss|reward|starts at|cross-entropy|minimum|falls to", header), (
            file
        )  # what to expect


def test_maker_names_the_command():
    assert (
        config.maker("out/demo/sft") == "python train.py config/demo/sft.py"
        and config.maker("out/nowhere") == ""
    )
