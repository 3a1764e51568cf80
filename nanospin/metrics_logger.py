"""What a run says of itself: config.json, metrics.jsonl, a line a step.

metrics.jsonl holds a record a line: {"kind": step | eval | start | collect | warning, "round", "step", "seconds", ...}.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time

import numpy as np
import torch

from nanospin import distributed
from data.files import read_json, write_json


def write_config(cfg, settings, at, device, dtype):
    """out_dir/config.json: the settings, and what each start of the run ran on."""
    path, starts = os.path.join(cfg.out_dir, "config.json"), []
    if at[1] >= 0 and os.path.exists(path):
        starts = read_json(path, ("starts",))["starts"]
    os.makedirs(cfg.out_dir, exist_ok=True)
    write_json(
        path, {"config": settings, "starts": starts + [{"at": at} | versions(device, dtype)]}
    )


def versions(device, dtype):
    """What a number's last digits depend on, beside the settings."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "tiktoken": importlib.metadata.version("tiktoken"),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "git": git_describe(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(dtype),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }


def git_describe():
    """The commit, and "-dirty" if the files differ from it."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make_logger(cfg, at, began, send):
    """A function that appends a record to metrics.jsonl, prints it, and hands it to `send`, which is handed the kept ones first; rank
    0's does. What a killed run had logged past its checkpoint `at` = (round, step) is dropped: it will be logged again."""
    if distributed.rank():
        return lambda record, steps=None: None
    path, kept = os.path.join(cfg.out_dir, "metrics.jsonl"), []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            try:
                for number, text in enumerate(f, 1):
                    record = (
                        json.loads(text) if text.endswith("\n") else {"round": math.inf}
                    )  # cut short by a kill
                    if (
                        record["round"] < at[0]
                        or record["round"] == at[0]
                        and record["step"] + (record["kind"] == "step") <= at[1]
                    ):
                        kept.append(text)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise SystemExit(
                    f"{path}:{number}: not a record of a run; mend or remove this line"
                )
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
    out = open(path, "a", encoding="utf-8", buffering=1)
    for text in kept:
        send(json.loads(text))
    last = [began]  # loading and a teacher's samples are part of the run's time

    def log(record, steps=None):
        now = time.time()
        record = record | {"seconds": now - last[0]}
        last[0] = now
        out.write(json.dumps(record) + "\n")
        if record["kind"] != "step" or (record["step"] + 1) % cfg.log_interval == 0:
            print(format_record(record, steps), flush=True)
        send(record)

    return log


def format_record(record, steps=None):
    """A record as one line."""
    head = f"round {record['round']} step {record['step'] + (steps is not None)}" + (
        f"/{steps}" if steps else ""
    )
    if record["kind"] == "step":
        acc = f" | acc {record['acc']:.2f}" if "acc" in record else ""
        mfu = "-" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
        return (
            f"{head} | loss {record['loss']:.4f}{acc} | lr {record['lr']:.1e} | norm {record['norm']:.2f} | {record['ms']:.0f} ms "
            f"| {record['tokens_per_second'] / 1000:.1f}k tok/s | mfu {mfu}"
        )
    rest = {
        k: v
        for k, v in record.items()
        if k not in ("kind", "round", "step", "seconds") and not isinstance(v, list)
    }
    return f"{head} | {record['kind']}: " + ", ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()
    )
