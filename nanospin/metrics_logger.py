"""What a run reports: config.json, metrics.jsonl and lines on the console.

metrics.jsonl has one record per line, in the order of the run:

    {"kind": ..., "round": ..., "step": ..., the metrics ..., "seconds": since the record before}

kind is "step" (one optimizer step), "eval" (validation metrics), "collect" (about the samples of a
round), "start" (the loss at a round's first step, and what it should be) or "warning". The console
shows the few metrics listed below, metrics.jsonl has all.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections import deque

import numpy as np
import torch

from data.files import atomic_write, is_there, printable, require_regular, write_json, write_line
from nanospin import distributed

SHOWN_OF_RANKINGS = ["val_loss", "rank_nll", "acc", "margin", "kl_from_ref"]

# stage -> the metrics of an evaluation that the console shows
EVAL_METRICS = {
    "pretrain": ["val_loss"],
    "sft": ["val_loss", "pretrain_loss"],
    "reward": ["acc", "pair_nll"],
    "preference": SHOWN_OF_RANKINGS,
    "spin": SHOWN_OF_RANKINGS,
    "ppo": ["reward", "kl", "length", "ended", "pretrain_loss"],
}
# stage -> the metrics of a round's samples that the console shows; "length/": of every player
COLLECT_METRICS = {
    "preference": ["score_best", "score_worst", "signal"],
    "spin": ["score/", "score_best", "signal", "length/", "ended/self", "tie/"],
    "ppo": ["reward", "kl", "length", "ended"],
}
# of the check of a round's first loss
START_METRICS = ["loss", "expected"]

RECENT_STEPS = 50  # whose median time gives the estimate of the time that is left


# ------------------------------------------------------------------------------------ config.json


def write_config(cfg, start, device, dtype):
    """Write out_dir/config.json: the settings, and for each start of the run the (round, step) that
    it began at and what it ran on. start: preflight.Start."""
    path = os.path.join(cfg.out_dir, "config.json")
    now = {"at": start.at} | versions(device, dtype)
    starts = []
    if start.path:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with open(path, encoding="utf-8") as f:
                starts = list(json.load(f)["starts"])
    if starts:
        say_other_versions(cfg.out_dir, starts[-1], now)
    starts.append(now)
    write_json(path, {"config": start.settings, "starts": starts})


def say_other_versions(out_dir: str, before: dict, now: dict):
    """Say in one line which of torch, numpy and Python are not those of the last start."""
    changes = []
    for name in ("torch", "numpy", "python"):
        if isinstance(before, dict) and before.get(name) not in (None, now[name]):
            changes.append(f"{name} {before[name]} (now {now[name]})")
    if changes:
        text = f"{out_dir}: the last start was with {', '.join(changes)}; last digits may differ"
        print(printable(text), flush=True)


def versions(device, dtype) -> dict:
    """What the last digits of a result depend on besides the settings."""
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "tiktoken": importlib.metadata.version("tiktoken"),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "git": git_describe(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(dtype),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }


def git_describe() -> str:
    """The commit of this code, with "-dirty" if files were changed since."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------- metrics.jsonl


class MetricsLogger:
    """Writes records to out_dir/metrics.jsonl, prints them and passes them to `senders` (W&B,
    TensorBoard), functions of a record.

    start: the (round, step) of the checkpoint that the run resumes from. Records of later steps are
    removed: a killed run wrote them, and the steps will be taken again. The others are sent.
    began: when the program was started, so that the first record's seconds include loading.
    On ranks other than 0 every method does nothing.
    """

    def __init__(self, cfg, start: tuple[int, int], began: float, senders: list):
        self.cfg = cfg
        self.last_time = began
        self.senders = senders
        self.clock = RoundClock(began)
        self.file = None
        if distributed.rank() == 0:
            path = os.path.join(cfg.out_dir, "metrics.jsonl")
            require_regular(path)
            if start[1] < 0:
                keep_records(path, cfg.save_interval)
            kept = remove_later_records(path, start)
            self.file = open(path, "a", encoding="utf-8", buffering=1)
            for line in kept:
                self.send(json.loads(line))

    def step(self, round_id: int, step: int, metrics: dict, num_steps: int):
        """Log an optimizer step: loss, norm, lr, ms, tokens_per_second, mfu and the stage's own."""
        self.write("step", round_id, step, metrics, num_steps)

    def eval(self, round_id: int, step: int, metrics: dict):
        self.write("eval", round_id, step, metrics)

    def collect(self, round_id: int, metrics: dict):
        self.write("collect", round_id, 0, metrics)

    def initial_loss(self, round_id: int, metrics: dict):
        """Log the loss at a round's first step (`loss`) beside what it should be (`expected`)."""
        self.write("start", round_id, 0, metrics)

    def warning(self, round_id: int, step: int, text: str, **more):
        self.write("warning", round_id, step, more | {"text": text})

    def flush(self):
        """Wait until the records are on the disk. The thread that saves calls this."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def write(self, kind: str, round_id: int, step: int, metrics: dict, num_steps: int = 0):
        if self.file is None:
            return
        now = time.perf_counter()
        record = {"kind": kind, "round": round_id, "step": step} | metrics
        record["seconds"] = now - self.last_time
        self.last_time = now
        self.clock.add(record, now)
        write_line(self.file, json.dumps(record))
        if kind != "step":
            print(format_record(record, self.cfg.stage), flush=True)
        elif (step + 1) % self.cfg.log_interval == 0:
            steps_left = num_steps - step - 1
            rounds_left = self.cfg.rounds - round_id - 1
            left = self.clock.seconds_left(steps_left, num_steps, rounds_left)
            print(format_step(record, num_steps, *left), flush=True)
        self.send(record)

    def send(self, record: dict):
        for send in self.senders:
            send(record)


class RoundClock:
    """Estimates the time that is left, from the times of records.

    A step takes the median of the last RECENT_STEPS, and its share of what happens between steps in
    this round: evaluations and saves. A round takes the mean of those that this start has seen from
    beginning to end, sampling included, until then what its parts have taken.
    """

    def __init__(self, began: float):
        self.began = began  # of the program
        self.step_seconds = deque(maxlen=RECENT_STEPS)
        self.round_id = None
        self.first_record = began  # of the first round
        self.rounds_seen = 0
        self.round_start = began  # the first record of this round
        self.last_step = None  # when the last step of this round ended
        self.between_steps = 0.0
        self.num_between = 0

    def add(self, record: dict, now: float):
        """record: the next one of the run, at the time `now`."""
        if record["round"] != self.round_id:
            if self.round_id is None:
                self.first_record = now
            else:
                self.rounds_seen += 1
            self.round_id, self.round_start = record["round"], now
            self.last_step, self.between_steps, self.num_between = None, 0.0, 0
        if record["kind"] != "step":
            return
        seconds = record["ms"] / 1000
        self.step_seconds.append(seconds)
        if self.last_step is not None:
            self.between_steps += max(0.0, now - self.last_step - seconds)
            self.num_between += 1
        self.last_step = now

    def seconds_left(self, steps_left: int, num_steps: int, rounds_left: int) -> tuple:
        """(seconds until the last step of this round, until that of the last round)."""
        per_step = statistics.median(self.step_seconds)
        per_step += self.between_steps / max(1, self.num_between)
        of_round = per_step * steps_left
        if self.rounds_seen:
            per_round = (self.round_start - self.first_record) / self.rounds_seen
        else:
            per_round = self.first_record - self.began + per_step * num_steps
        return of_round, of_round + per_round * rounds_left


def keep_records(path: str, save_interval: int):
    """Before a run begins at step 0: if metrics.jsonl goes beyond a save, its checkpoints were lost
    or could not be saved. The file is renamed then, so that no metrics are lost with them."""
    if not is_there(path):
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                if record["round"] > 0 or record["step"] > save_interval:
                    break
        else:
            return
    n = 1
    while os.path.lexists(f"{path}.{n}"):
        n += 1
    os.rename(path, f"{path}.{n}")
    print(f"{path} is of a run without checkpoints: renamed to {path}.{n}", flush=True)


def remove_later_records(path: str, start: tuple[int, int]) -> list[str]:
    """Keep only the lines of metrics.jsonl up to the checkpoint `start`. Returns them."""
    if not is_there(path):
        return []
    kept = []
    number = 0
    try:
        with open(path, "rb") as f:  # a text file reads ahead: a bad line would have no number
            for content in f:
                number += 1
                line = content.decode()
                is_complete = line.endswith("\n")  # the last line is not, if a kill cut it short
                if is_complete and is_before(json.loads(line), start):
                    kept.append(line)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SystemExit(f"{path}:{number}: not a record of a run; fix or remove this line")
    with atomic_write(path) as f:
        f.writelines(kept)
    return kept


def is_before(record: dict, start: tuple[int, int]) -> bool:
    """Whether the checkpoint at start = (round, step) was saved after this record. A record of step
    s, and a warning during it, is of the step from s to s + 1."""
    end = record["step"]
    if record["kind"] == "step" or "during_step" in record:
        end += 1
    return (record["round"], end) <= start


# ------------------------------------------------------------------------------------ the console


def format_record(record: dict, stage: str) -> str:
    """The console's line for a record that is not a step's."""
    kind = record["kind"]
    head = f"round {record['round']} step {record['step']} | {kind}: "
    if kind == "warning":
        return head + record["text"]
    names = {
        "eval": EVAL_METRICS[stage],
        "collect": COLLECT_METRICS.get(stage, []),
        "start": START_METRICS,
    }[kind]
    shown = []
    for name in names:
        for key, value in record.items():
            if key == name or (name.endswith("/") and key.startswith(name)):
                shown.append(f"{key} {value:.4f}")
    return head + ", ".join(shown)


def format_step(record: dict, num_steps: int, of_round: float, of_run: float) -> str:
    """The console's line for a step. Steps are counted from 1 here. of_round, of_run: seconds left
    of this round, and of the run if there are rounds after it."""
    parts = [
        f"round {record['round']} step {record['step'] + 1}/{num_steps}",
        f"loss {record['loss']:.4f}",
    ]
    if "acc" in record:
        parts.append(f"acc {record['acc']:.2f}")
    parts += [
        f"lr {record['lr']:.1e}",
        f"norm {record['norm']:.2f}",
        f"{record['ms']:.0f} ms",
        f"{record['tokens_per_second'] / 1000:.1f}k tok/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    parts.append(f"eta {format_duration(of_round)}")
    if of_run > of_round:
        parts[-1] += f", run {format_duration(of_run)}"
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """3:12, or 1:03:12."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
