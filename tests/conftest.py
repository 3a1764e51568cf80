"""What the tests share: tiny data, tiny runs, and helpers to run, kill and compare runs."""

import contextlib
import glob
import importlib
import io
import json
import os
import random
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import train
from data import tokenizer
from data.folder import write_meta, write_stream
from data.rows import write_rows
from model import GPTConfig
from nanospin import checkpoint, config

torch.set_num_threads(1)  # the models are tiny: threads would wait for each other

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)

# real rows and GPT-2's vocabulary; tests that need them are skipped without them
SHARED = os.path.join(ROOT, "..", "shared", "data")
WORDS = "the loss of a model falls when it reads what people write and stops at the end".split()
TEMPLATE = "Q: {prompt}\nA: "
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=64",
    "--device=cpu",
    "--eval_rows=8",
    "--eval_batches=2",
]


# ------------------------------------------------------------------------------- data and runs


def make_data(folder):
    """Write a data folder in bytes: token streams, and ragged ranked rows of K = 3."""
    os.makedirs(folder, exist_ok=True)
    enc, rng = tokenizer.load("bytes"), random.Random(0)

    def text(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for split, n in (("train", 40), ("val", 12)):
        write_stream(f"{folder}/{split}.bin", [text(10, 60) for _ in range(n)], enc)
        rows = []
        for i in range(n):
            prompt = f"{i} {text(1, 3)}"
            rows.append({"prompt": prompt, "responses": [text(1, 4), text(1, 3), text(1, 5)]})
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, "bytes", "made up")
    return folder


def make_runs(root, data):
    """Pretrain and fine-tune a tiny model -> {"pretrain": run folder, "sft": run folder}."""
    runs = {stage: os.path.join(root, stage) for stage in ("pretrain", "sft")}
    pretrain = [
        "--stage=pretrain",
        f"--out_dir={runs['pretrain']}",
        f"--data={data}",
        "--max_steps=8",
        "--batch_size=8",
        "--lr=3e-3",
        "--position=rotary",
        "--norm=rmsnorm",
        "--mlp=swiglu",
        "--bias=False",
        *TINY,
    ]
    sft = [
        "--stage=sft",
        f"--out_dir={runs['sft']}",
        f"--data={data}",
        f"--init={runs['pretrain']}",
        f"--template={TEMPLATE}",
        "--max_steps=8",
        "--batch_size=8",
        "--lr=3e-3",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
    ]
    train.main(pretrain)
    train.main(sft)
    return runs


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return make_data(str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def tiny_runs(tiny_data, tmp_path_factory):
    return make_runs(str(tmp_path_factory.mktemp("runs")), tiny_data)


def letters(row, text):
    """The reward of the PPO runs, as --reward=conftest:letters: the share of a's and e's."""
    return sum(c in "ae" for c in text) / max(1, len(text))


def spin_args(runs, data, out, *more):
    """Arguments of a self-play run that starts at runs["sft"]: 5 steps a round."""
    return [
        "--stage=spin",
        f"--out_dir={out}",
        f"--data={data}",
        f"--init={runs['sft']}",
        f"--template={TEMPLATE}",
        "--max_response=16",
        "--device=cpu",
        "--eval_rows=8",
        "--batch_size=8",
        "--epochs=1",
        "--lr=1e-3",
        "--beta=0.5",
        "--save_interval=2",
        "--eval_interval=2",
        *more,
    ]


# ------------------------------------------------------------------------- running and killing


def load_config(argv):
    """The Config of config files and overrides, as train.py loads it."""
    return config.load(argv, GPTConfig)


def command(script, *args, input=""):  # noqa: A002
    """Run a script's main() in this process (starting one costs seconds).

    Returns returncode, stdout and stderr as a shell would see them. An exception other than
    SystemExit is raised.
    """
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
            if isinstance(e.code, str):
                err.write(f"{e.code}\n")
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def refused(args, **options):
    """The one line with which train.py refuses to run."""
    with pytest.raises(SystemExit) as e:
        train.main(args, **options)
    message = str(e.value)
    assert e.value.code and "\n" not in message, message
    return message


class Killed(Exception):
    """Stands for the end of a process."""


def run_killed_at(event, function, *args) -> bool:
    """Call a function that is dead from its event-th file operation on: that one and all later ones
    raise. Returns whether it got there."""
    num_events = 0

    def mortal(operation):
        def run(*paths, **options):
            nonlocal num_events
            num_events += 1
            if num_events >= event:
                raise Killed
            return operation(*paths, **options)

        return run

    with contextlib.ExitStack() as patches:
        for name in ("replace", "remove", "unlink"):
            patches.enter_context(mock.patch.object(os, name, mortal(getattr(os, name))))
        try:
            function(*args)
        except Killed:
            return True
    return False


def killing(function, at):
    """`function`, but its call number `at`, counted from 0, and all later ones raise Killed."""
    calls = [0]

    def wrapped(*args, **kw):
        calls[0] += 1
        if calls[0] <= at:
            return function(*args, **kw)
        # A killed process leaves no thread that goes on saving: let it finish first.
        if not threading.current_thread().name.startswith("save"):
            checkpoint.save_thread.submit(int).result()
        raise Killed

    return wrapped


# ----------------------------------------------------------------------- reading and comparing


def read_metrics(run, kind):
    """The records of one kind in metrics.jsonl: step, eval, start, collect or warning."""
    with open(f"{run}/metrics.jsonl", encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    return [record for record in records if record["kind"] == kind]


def final_weights(run):
    return load_file(os.path.join(checkpoint.latest(run), "model.safetensors"))


def logged_numbers(run):
    """What metrics.jsonl says, without times."""
    names = ("kind", "round", "step", "loss", "norm", "val_loss", "rank_nll", "acc", "lr", "off")
    records = []
    with open(f"{run}/metrics.jsonl", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            records.append({name: record[name] for name in names if name in record})
    return records


def assert_same_run(a, b):
    """Bit for bit: the weights and every logged number."""
    assert logged_numbers(a) == logged_numbers(b)
    one, two = final_weights(a), final_weights(b)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def source_files():
    """Every program file of the repository but experiments and tests."""
    files = glob.glob("*.py")
    for package in ("data", "nanospin", "tools", "studies", "bench"):
        files += glob.glob(f"{package}/**/*.py", recursive=True)
    return [file for file in sorted(files) if "/config/" not in file]
