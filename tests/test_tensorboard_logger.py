"""TensorBoard, against a stand-in for its writer, which keeps what it gets in a JSON file."""

import errno
import json
import os
import sys
import types

import pytest
from conftest import TINY, Killed, command, killing, spin_args

import train
from nanospin.metrics_logger import MetricsLogger
from nanospin.wandb_logger import wandb_names


class Writer:
    """Stands for torch.utils.tensorboard.SummaryWriter."""

    opened = 0

    def __init__(self, folder, purge_step=None):
        assert purge_step == 0
        os.makedirs(folder, exist_ok=True)
        Writer.opened += 1
        path = os.path.join(folder, f"events.out.tfevents.{Writer.opened}")
        self.file = open(path, "w", buffering=1)

    def add_scalar(self, name, value, step):
        self.file.write(json.dumps([name, value, step]) + "\n")

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


@pytest.fixture
def writer(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer


def read_events(out):
    """[[name, value, step]] of the event files of a run."""
    events = []
    for name in os.listdir(f"{out}/tensorboard"):
        if name.startswith("events"):
            with open(f"{out}/tensorboard/{name}", encoding="utf-8") as f:
                events += [json.loads(line) for line in f]
    return events


def expected_events(out):
    """From metrics.jsonl, whose steps begin again in every round: 5 steps each."""
    events = []
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            step = 5 * record["round"] + record["step"] + (record["kind"] == "step")
            for name, value in wandb_names(record, "spin").items():
                events.append([name, value, step])
            events.append(["round", record["round"], step])
    return events


def test_a_killed_run_has_every_record_once(writer, tiny_runs, tiny_data, tmp_path, monkeypatch):
    """Killed in the second round, past a checkpoint. What is not an event file stays."""
    out = f"{tmp_path}/spin"
    args = spin_args(tiny_runs, tiny_data, out, "--rounds=2", "--tensorboard=True")
    with monkeypatch.context() as m:
        m.setattr(MetricsLogger, "step", killing(MetricsLogger.step, 8))
        with pytest.raises(Killed):
            train.main(args)
    (tmp_path / "spin" / "tensorboard" / "mine").write_text("x")
    train.main(args)
    events = read_events(out)
    assert events == expected_events(out)
    assert max(step for _, _, step in events) == 10
    steps = [step for name, _, step in events if name == "train/loss"]
    assert steps == list(range(1, 11))
    assert {"eval/rewards/margins", "collect/tie/self"} <= {name for name, _, _ in events}
    assert os.path.exists(f"{out}/tensorboard/mine")


def test_it_can_be_switched_on_later(writer, tiny_runs, tiny_data, tmp_path):
    out = f"{tmp_path}/spin"
    train.main(spin_args(tiny_runs, tiny_data, out))
    assert not os.path.exists(f"{out}/tensorboard")
    train.main(spin_args(tiny_runs, tiny_data, out, "--tensorboard=True"))
    assert read_events(out) == expected_events(out) != []


def pretrain(data, out):
    args = ["--stage=pretrain", f"--data={data}", f"--out_dir={out}", "--batch_size=4"]
    return command("train", *args, "--max_steps=2", "--tensorboard=True", *TINY)


def test_a_missing_package_is_one_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    done = pretrain(tiny_data, f"{tmp_path}/run")
    assert done.returncode == 0 and "run: done" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "tensorboard" in line]
    assert "pip install tensorboard" in line


def test_an_error_at_the_end_is_said(writer, tiny_data, tmp_path, monkeypatch):
    """The package writes in a thread, which has noted an error by the second flush."""
    calls = []

    def flush(self):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "flush", flush)
    done = pretrain(tiny_data, f"{tmp_path}/run")
    assert done.returncode == 0 and "run: done" in done.stdout
    assert "tensorboard: [Errno 28] No space left on device; steps are missing" in done.stdout


def test_an_error_of_the_package_does_not_end_the_run(writer, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "add_scalar", lambda *args: 1 / 0)
    done = pretrain(tiny_data, f"{tmp_path}/run")
    assert done.returncode == 0 and "run: done" in done.stdout
    assert done.stdout.count("tensorboard: division by zero; training continues") == 1
