"""No network, no GPU, no terminal, no home to write to, nothing but ASCII to print in, and a path with a space and an umlaut."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, make_data

GUARD = """
import socket

def connect(self, address, connect=socket.socket.connect):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
        raise OSError(f"there is no network, and {address} was asked for")
    return connect(self, address)
socket.socket.connect = connect
"""
ALL = """
import importlib, json, socket, sys
sys.path.insert(0, "")
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as e:
    assert "there is no network" in str(e)
for name, *args in json.loads(sys.argv[1]):
    main = importlib.import_module(name).main
    sys.argv = [name, *args]
    main(*[args] * main.__code__.co_argcount)
"""
STEPS = [
    "--max_steps=2",
    "--batch_size=4",
    "--eval_batches=1",
    "--eval_rows=4",
    "--data=data/a set",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder, environment) of a copy of what git has, with a data file and a data set."""
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout to copy")
    top = tmp_path_factory.mktemp("any")
    here = top / "a path with spaces" / "ünïcode"
    for name in tracked.stdout.split("\0")[:-1]:
        if not name.startswith("results/") and os.path.exists(os.path.join(ROOT, name)):
            os.makedirs(here / os.path.dirname(name), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), here / name)
    os.makedirs(top / "guard")
    (top / "guard" / "sitecustomize.py").write_text(GUARD)
    with open(here / "naïve rows.jsonl", "w", encoding="utf-8") as f:
        for i in range(60):
            f.write(
                json.dumps({"prompt": f"{i} naïve?", "response": f"{i} ü"})
                + "\n"
                + json.dumps({"text": f"{i}: " + "some text, más o menos. " * 9})
                + "\n"
            )
    make_data(str(here / "data" / "some rows"))
    return here, {
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


def run(place, *args):
    """A program's output; it must end well and have nothing to say on standard error. Its standard input is closed."""
    here, env = place
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *args],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert not done.returncode and not done.stderr, done.stdout[-2000:] + done.stderr
    return done.stdout


def test_the_whole_way(place):
    said = run(
        place,
        sys.executable,
        "-c",
        ALL,
        json.dumps(
            [
                (
                    "data.jsonl.prepare",
                    "naïve rows.jsonl",
                    "--out=data/a set",
                    "--tokenizer=bpe",
                    "--vocab_size=300",
                ),
                (
                    "train",
                    "--stage=pretrain",
                    "--out_dir=out/pre train",
                    "--n_layer=1",
                    "--n_head=2",
                    "--n_embd=16",
                    "--block_size=64",
                    *STEPS,
                ),
                ("train", "--stage=sft", "--init=out/pre train", "--out_dir=out/sft", *STEPS),
                (
                    "train",
                    "--stage=spin",
                    "--init=out/sft",
                    "--out_dir=out/spin",
                    "--players=data,teacher,self",
                    "--teacher=out/pre train",
                    "--max_response=8",
                    "--rounds=2",
                    *STEPS,
                ),
                ("rebuild", "out/spin/round_1", "--out=out/ägain"),
                ("sample", "out/spin", "--prompt", "naïve?", "--max_new_tokens=4"),
                (
                    "eval",
                    "sft=out/sft",
                    "spin=out/spin",
                    "--data=data/a set",
                    "--rows=4",
                    "--judge=out/pre train",
                    "--out=out/ev al",
                ),
                ("plot", "rounds", "out/rounds of spin.png", "out/spin"),
                ("hf", "export", "out/spin", "--out=out/ex port"),
            ]
        ),
    )
    assert "out/spin: done" in said and "bit for bit the same" in said and "spin beats sft" in said
    here = place[0]
    assert (here / "out" / "rounds of spin.png").read_bytes()[:4] == b"\x89PNG" and (
        here / "out" / "ex port" / "model.safetensors"
    ).exists()
    # the recipes hold, too, where nothing is prepared yet
    assert "-m data.pydocs.prepare" in run(
        place, "make", "-n", "demo"
    ) and "studies/taylor/config/clean.py" in run(place, "make", "-n", "figures-tn")


def test_two_ranks(place):
    said = run(
        place,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        "--stage=pretrain",
        "--out_dir=out/two ranks",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=64",
        *STEPS,
        "--data=data/some rows",
    )
    assert "cpu x 2" in said and "out/two ranks: done" in said
