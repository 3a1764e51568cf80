"""The whole way with no network, no GPU, no terminal, no home, an ASCII locale, and a path with
spaces and umlauts."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, make_data

# sitecustomize.py of every process that is started: connections leave this machine by error only
NO_NETWORK = """
import socket

LOCAL = ("127.0.0.1", "::1", "localhost", socket.gethostname())
connect_anywhere = socket.socket.connect

def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in LOCAL:
        raise OSError(f"no network in this test: {address}")
    return connect_anywhere(self, address)

socket.socket.connect = connect
"""

# several command lines, one after the other: starting a process for each would cost seconds
RUN_ALL = """
import importlib, json, socket, sys
sys.path.insert(0, "")
sys.stdout.reconfigure(errors="backslashreplace")  # as data.cli.run does
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as e:
    assert "no network in this test" in str(e)
for module, *args in json.loads(sys.argv[1]):
    sys.argv = [module, *args]
    importlib.import_module(module).main(args)
"""

STEPS = [
    "--max_steps=2",
    "--batch_size=4",
    "--eval_batches=1",
    "--eval_rows=4",
    "--data=data/a set",
]
SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64"]

PIPELINE = [
    [
        "data.jsonl.prepare",
        "naïve rows.jsonl",
        "--out=data/a set",
        "--tokenizer=bpe",
        "--vocab_size=300",
    ],
    ["train", "--stage=pretrain", "--out_dir=out/pre train", *SHAPE, *STEPS],
    ["train", "--stage=sft", "--init=out/pre train", "--out_dir=out/sft", *STEPS],
    [
        "train",
        "--stage=spin",
        "--init=out/sft",
        "--out_dir=out/spin",
        "--players=data,teacher,self",
        "--teacher=out/pre train",
        "--max_response=8",
        "--rounds=2",
        *STEPS,
    ],
    ["tools.rebuild", "out/spin/round_1", "--out=out/ägain"],
    ["sample", "out/spin", "--prompt", "naïve?", "--max_new_tokens=4"],
    [
        "eval",
        "sft=out/sft",
        "spin=out/spin",
        "--data=data/a set",
        "--rows=4",
        "--judge=out/pre train",
        "--out=out/ev al",
    ],
    ["tools.plot", "rounds", "out/rounds of spin.png", "out/spin"],
    ["tools.hf", "export", "out/spin", "--out=out/ex port"],
]


@dataclass
class Place:
    """A copy of the repository and the environment of its processes."""

    folder: Path
    env: dict[str, str]

    def run(self, *command):
        """A program's output. It must succeed and write nothing to standard error; its standard
        input is closed."""
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *command],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert not done.stderr, done.stderr
        return done.stdout


def repository_files():
    """What git tracks, and new files that it does not ignore; without the logs of studies."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout to copy")
    files = []
    for name in done.stdout.split("\0")[:-1]:
        if "/logs/" not in name and os.path.exists(os.path.join(ROOT, name)):
            files.append(name)
    return files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("any")
    folder = top / "a path with spaces" / "ünïcode"
    for name in repository_files():
        os.makedirs(folder / os.path.dirname(name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), folder / name)
    (top / "guard").mkdir()
    (top / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    with open(folder / "naïve rows.jsonl", "w", encoding="utf-8") as f:
        for i in range(60):
            f.write(json.dumps({"prompt": f"{i} naïve?", "response": f"{i} ü"}) + "\n")
            f.write(json.dumps({"text": f"{i}: " + "some text, más o menos. " * 9}) + "\n")
    make_data(str(folder / "data" / "some rows"))
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null/nowhere",
        "LANG": "C",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(top / "guard"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "ascii",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "TMPDIR": str(tmp_path_factory.mktemp("tmp")),
    }
    return Place(folder, env)


def test_the_whole_way(place):
    printed = place.run(sys.executable, "-c", RUN_ALL, json.dumps(PIPELINE))
    assert "out/spin: done" in printed
    assert "identical, bit for bit" in printed
    assert "spin beats sft" in printed
    out = place.folder / "out"
    assert (out / "rounds of spin.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "ex port" / "model.safetensors").exists()


def test_recipes_need_no_prepared_data(place):
    """make -n prints the commands that prepare the data first."""
    assert "-m data.addition.prepare" in place.run("make", "-n", "demo")
    assert "-m data.pydocs.prepare" in place.run("make", "-n", "demo-text")
    assert "taylor" in place.run("make", "-n", "figures-tn")


@pytest.mark.slow
def test_two_ranks(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--stage=pretrain", "--out_dir=out/two ranks", *SHAPE, *STEPS]
    printed = place.run(*torchrun, "train.py", *options, "--data=data/some rows")
    assert "cpu x 2" in printed
    assert "out/two ranks: done" in printed
