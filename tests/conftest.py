import contextlib
import glob
import importlib
import io
import json
import os
import random
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)

torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import train
from data import tokenizer
from data.folder import write_meta, write_stream
from data.rows import write_rows
from model import GPTConfig
from nanospin import checkpoint, config

SHARED = os.path.join(
    ROOT, "..", "shared", "data"
)  # real rows and GPT-2's vocabulary, where there are some
WORDS = "the loss of a model falls when it reads what people write and stops at the end".split()
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=64",
    "--device=cpu",
    "--eval_rows=8",
    "--eval_batches=2",
]


def make_data(folder):
    """A data folder with streams and ragged ranked rows of K = 3, in bytes."""
    os.makedirs(folder, exist_ok=True)
    enc, rng = tokenizer.load("bytes"), random.Random(0)

    def text(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for split, n in (("train", 40), ("val", 12)):
        write_stream(f"{folder}/{split}.bin", [text(10, 60) for _ in range(n)], enc)
        write_rows(
            f"{folder}/{split}.jsonl",
            [
                {"prompt": f"{i} {text(1, 3)}", "responses": [text(1, 4), text(1, 3), text(1, 5)]}
                for i in range(n)
            ],
        )
    write_meta(folder, "bytes", "made up")
    return folder


def make_runs(root, data):
    """{"pretrain": run, "sft": run}: a checkpoint of each stage."""
    runs = {stage: os.path.join(root, stage) for stage in ("pretrain", "sft")}
    shape = ["--position=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=False"]
    train.main(
        [
            "--stage=pretrain",
            f"--out_dir={runs['pretrain']}",
            f"--data={data}",
            "--max_steps=8",
            "--batch_size=8",
            "--lr=3e-3",
            *TINY,
            *shape,
        ]
    )
    train.main(
        [
            "--stage=sft",
            f"--out_dir={runs['sft']}",
            f"--data={data}",
            f"--init={runs['pretrain']}",
            "--template=Q: {prompt}\nA: ",
            "--max_steps=8",
            "--batch_size=8",
            "--lr=3e-3",
            "--max_response=16",
            "--device=cpu",
            "--eval_rows=8",
        ]
    )
    return runs


def source_files():
    """Every program file of the repository but experiments and tests."""
    files = glob.glob("*.py")
    for package in ("data", "nanospin", "tools", "studies", "bench"):
        files += glob.glob(f"{package}/**/*.py", recursive=True)
    return [file for file in sorted(files) if "/config/" not in file]


def load_config(argv):
    """The Config of config files and overrides, as train.py loads it."""
    return config.load(argv, GPTConfig)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return make_data(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def tiny_runs(tiny_data, tmp_path_factory):
    return make_runs(str(tmp_path_factory.mktemp("runs")), tiny_data)


def command(script, *args, input=""):
    """What a script does and says, as a shell would see it, in this process: starting one costs seconds. An error that is no exit is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(script).main
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.stdin", io.StringIO(input)),
    ):
        try:
            main(list(map(str, args)))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int | None) else 1
            err.write(f"{e.code}\n" if isinstance(e.code, str) else "")
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def read_metrics(run, kind):
    with open(f"{run}/metrics.jsonl", encoding="utf-8") as f:
        return [r for r in map(json.loads, f) if r["kind"] == kind]


def final_weights(run):
    from nanospin import checkpoint
    from safetensors.torch import load_file

    return load_file(os.path.join(checkpoint.latest(run), "model.safetensors"))
