"""Sections about saves: the order of syncs, saves that came out wrong, steps past a million.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

from nanospin import checkpoint
from tests.faults.harness import (
    ROOT,
    Fault,
    Result,
    Workspace,
    attempt,
    compare,
    count,
    not_refused,
    pick,
    run_to_end,
    tree,
)
from tests.faults.spoil import update_hashes


def syncs(workspace: Workspace, short: bool) -> Result:
    """every file and folder of a checkpoint is synced before it gets its name, the name before an
    older one goes; a save that came out wrong is noticed, never replaces a good one, is never
    "done" """
    failures = sync_order(workspace)
    wrong = list(WRONG_SAVES)
    cases = []
    for name in wrong:
        for part in ("model", "optimizer"):
            for when in ("once", "always"):
                cases.append((name, part, when))
    cases = pick(workspace, True, cases, 4 if short else 18)
    for name, part, when in cases:
        problem = attempt(save_wrong, workspace, name, part, when)
        if problem:
            failures.append(f"{part} {name}, {when}: {problem}")
    return count(len(SYNC_RULES) + len(cases), failures)


# --------------------------------------------------------------------------------- order of syncs

SYNC_RULES = (
    "files of a checkpoint are synced",
    "folders of a checkpoint are synced",
    "the name is synced before an older checkpoint goes",
    "config.json is synced",
)
CALLS = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"


def sync_order(workspace: Workspace) -> list[str]:
    """Trace a run of three saves. One failure line for each rule that is broken."""
    out = workspace.new_run()
    argv = workspace.args("pretrain", out, "--keep_last=1")
    traced = f"{workspace.folder}/trace"
    if shutil.which("strace"):
        command = ["strace", "-f", "-qq", "-y", "-s", "9999", "-e", f"trace={CALLS}", "-o", traced]
        done = subprocess.run(
            [*command, sys.executable, "train.py", *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return [f"{rule}: {done.stderr[-300:]}" for rule in SYNC_RULES]
        with open(traced, encoding="utf-8") as f:
            events = parse_trace(f.read().splitlines(), out)
    else:
        run = run_to_end(argv, before=lambda rank: record_calls(traced))
        if run.status != [0]:
            return [f"{rule}: {run.output[-300:]}" for rule in SYNC_RULES]
        with open(traced, encoding="utf-8") as f:
            events = [json.loads(line) for line in f]
    return broken_rules(events, out)


def parse_trace(lines: list[str], out: str) -> list[list[str]]:
    """strace's lines -> ["sync", path], ["rename", from, to] and ["remove", path], in order."""
    events = []
    pending = {}  # process -> the beginning of a call that another one has interrupted
    for line in lines:
        pid, _, call = line.partition(" ")
        call = call.strip()
        if "<unfinished ...>" in call:
            pending[pid] = call.partition("<unfinished")[0]
            continue
        if call.startswith("<... "):
            call = pending.pop(pid, "") + call.partition(">")[2]
        name = call.partition("(")[0]
        if not call.endswith("= 0"):
            continue
        if name in ("fsync", "fdatasync"):
            found = re.search(r"<(.*)>\)", call)
            event = ["sync", found[1] if found else ""]
        else:
            base = re.search(r"\d+<(.*?)>, \"", call)  # the folder that unlinkat's path is in
            paths = re.findall(r'"((?:[^"\\]|\\.)*)"', call)
            if base and paths and not paths[0].startswith("/"):
                paths = [os.path.join(base[1], path) for path in paths]
            event = ["rename" if name.startswith("rename") else "remove", *paths]
        if any(out in path for path in event[1:]):
            events.append(event)
    return events


def record_calls(path: str):
    """Without strace: write down the calls of os and shutil, in a run that is forked."""
    f = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def wrap(owner, name, event):
        original = getattr(owner, name)

        def recorded(*args, **options):
            f.write(json.dumps(event(*args)) + "\n")
            return original(*args, **options)

        setattr(owner, name, recorded)

    def path_of(target) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(target)

    wrap(os, "fsync", lambda fd: ["sync", path_of(fd)])
    for name in ("rename", "replace"):
        wrap(os, name, lambda a, b: ["rename", path_of(a), path_of(b)])
    for owner, name in ((os, "remove"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        wrap(owner, name, lambda a, *more: ["remove", path_of(a)])


def broken_rules(events, out: str) -> list[str]:
    synced = set()  # paths as they are called now
    names = []  # renames to step_S whose round folder is not synced yet
    broken = {}
    for event in events:
        kind, path = event[0], event[1]
        if kind == "sync":
            synced.add(path)
            names = [name for name in names if os.path.dirname(name) != path]
        elif kind == "rename":
            target = event[2]
            if re.fullmatch(r"step_\d+", os.path.basename(path)) and names:
                broken[SYNC_RULES[2]] = f"{path} goes before the folder of {names[0]} is synced"
            renamed = {p for p in synced if p == path or p.startswith(f"{path}/")}
            synced = {p for p in synced if p != target} - renamed
            synced |= {target + p[len(path) :] for p in renamed}
            if re.fullmatch(r"step_\d+", os.path.basename(target)):
                names.append(target)
                check_named(target, synced, broken)
            if target == f"{out}/config.json" and target not in synced:
                broken[SYNC_RULES[3]] = "it is renamed into place before it is synced"
    if not any(event[0] == "rename" and event[-1].endswith("/step_000006") for event in events):
        broken[SYNC_RULES[0]] = "the last save was not seen"
    if f"{out}/round_0" not in synced:
        broken[SYNC_RULES[2]] = "the folder of the round is never synced"
    if out not in synced:
        broken[SYNC_RULES[3]] = "its folder is never synced"
    return [f"{rule}: {why}" for rule, why in broken.items()]


def check_named(path: str, synced: set[str], broken: dict):
    """The files of a checkpoint that has just got its name must have been synced."""
    names = ("model.safetensors", "meta.json", "manifest.json")
    missing = [name for name in names if f"{path}/{name}" not in synced]
    if not any(name.startswith(f"{path}/optimizer/") for name in synced):
        missing.append("optimizer/*")
    if missing:
        broken[SYNC_RULES[0]] = f"{os.path.basename(path)} gets its name before {missing}"
    folders = [folder for folder in (path, f"{path}/optimizer") if folder not in synced]
    if folders:
        broken[SYNC_RULES[1]] = f"{folders} are not synced before the name is given"


# ---------------------------------------------------------------------- saves that came out wrong


def cut(path: str):
    os.truncate(path, os.path.getsize(path) // 2)


def emptied(path: str):
    os.truncate(path, 0)


def flipped(path: str):
    with open(path, "r+b") as f:
        f.seek(-3, os.SEEK_END)
        byte = f.read(1)
        f.seek(-3, os.SEEK_END)
        f.write(bytes([byte[0] ^ 16]))


def zeroed(path: str):
    """What some file systems leave after a power loss."""
    size = os.path.getsize(path)
    with open(path, "r+b") as f:
        header = int.from_bytes(f.read(8), "little")
        f.seek(8 + header)
        f.write(b"\x00" * (size - 8 - header))


def change_tensors(path: str, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_matrix(tensors: dict) -> str:
    """The name of a tensor of more than one number."""
    return next(name for name, tensor in sorted(tensors.items()) if tensor.size > 1)


def other_dtype(path: str):
    def change(tensors):
        name = first_matrix(tensors)
        tensors[name] = tensors[name].astype(np.float16)

    change_tensors(path, change)


def missing_tensor(path: str):
    change_tensors(path, lambda tensors: tensors.pop(first_matrix(tensors)))


def other_shape(path: str):
    def change(tensors):
        name = first_matrix(tensors)
        tensors[name] = tensors[name].reshape(-1)[:-1]

    change_tensors(path, change)


def not_finite(path: str):
    def change(tensors):
        tensors[first_matrix(tensors)].reshape(-1)[0] = np.nan

    change_tensors(path, change)


def file_gone(path: str):
    os.remove(path)


WRONG_SAVES = {
    "cut": cut,
    "emptied": emptied,
    "with a flipped bit": flipped,
    "of zeros": zeroed,
    "of another dtype": other_dtype,
    "without a tensor": missing_tensor,
    "of another shape": other_shape,
    "with a nan": not_finite,
    "without a file": file_gone,
}


def save_wrong(workspace: Workspace, name: str, part: str, when: str) -> str:
    """The second save of a run, or every one from there on, comes out wrong."""
    undisturbed = workspace.undisturbed("pretrain", 1)
    out = workspace.new_run()
    argv = workspace.args("pretrain", out)
    run = run_to_end(argv, before=lambda rank: spoil_saves(name, part, when))
    for path in checkpoint.list_steps(f"{out}/round_0"):
        if checkpoint.find_corruption(path) or is_wrong(path, undisturbed):
            return f"{path} is kept; {run.status} {run.output[-400:]!r}"
    steps = [os.path.basename(path) for path in checkpoint.list_steps(f"{out}/round_0")]
    if when == "once":
        noticed = "could not be saved" in run.output
        if run.status != [0] or not noticed or steps[-1] != "step_000006":
            return f"ended with {run.status} and {steps}: {run.output[-400:]!r}"
        return compare(run, undisturbed, out, warnings=False)
    problem = not_refused(run)
    if problem or "done" in run.output or steps != ["step_000002"]:
        return f"{problem}; it has {steps}: {run.output[-400:]!r}"
    return compare(run_to_end(argv), undisturbed, out, warnings=False)


def is_wrong(path: str, undisturbed: str) -> bool:
    """Whether the weights of a checkpoint cannot be loaded or are not the undisturbed run's, if
    that still has the step."""
    try:
        tensors = load_file(f"{path}/model.safetensors")
    except Exception:  # whatever safetensors raises
        return True
    other = f"{undisturbed}/round_0/{os.path.basename(path)}/model.safetensors"
    if not os.path.exists(other):
        return any(not np.isfinite(tensor).all() for tensor in tensors.values())
    expected = load_file(other)
    if set(tensors) != set(expected):
        return True
    return any(not np.array_equal(tensors[name], expected[name]) for name in expected)


def spoil_saves(name: str, part: str, when: str):
    """Replace what writes tensors by a function that spoils its output, from the second save on."""
    original = checkpoint.write_tensors
    calls = 0

    def write_wrong(tensors, folder, **options):
        nonlocal calls
        original(tensors, folder, **options)
        is_optimizer = os.path.basename(folder) == "optimizer"
        if is_optimizer != (part == "optimizer"):
            return
        calls += 1
        if calls == 2 or (calls > 2 and when == "always"):
            for file in os.listdir(folder):
                if file.endswith(".safetensors"):
                    WRONG_SAVES[name](os.path.join(folder, file))

    checkpoint.write_tensors = write_wrong


# ----------------------------------------------------------------------------------- past a million

MILLION = [
    "--max_steps=1000004",
    "--save_interval=2",
    "--eval_interval=1000000",
    "--schedule=constant",
]


def millions(workspace: Workspace, short: bool) -> Result:
    """runs that pass step 1,000,000 and round 10: the newest checkpoints are kept and resumed from,
    equal bit for bit"""
    cases = {
        "a million steps": past_a_million,
        "killed at a million": killed_past_a_million,
        "ten rounds": past_ten_rounds,
    }
    failures = []
    for name, case in cases.items():
        problem = attempt(case, workspace)
        if problem:
            failures.append(f"{name}: {problem}")
    return count(len(cases), failures)


def moved_run(workspace: Workspace) -> tuple[str, list[str]]:
    """(out_dir, arguments) of a run whose only checkpoint is moved from step 2 to 999,998."""
    out = workspace.half("pretrain", 1, *MILLION, call=1)
    old, new = f"{out}/round_0/step_000002", f"{out}/round_0/step_999998"
    assert os.listdir(f"{out}/round_0") == ["step_000002"]
    os.rename(old, new)
    update_hashes(new, {"step": 999998})
    os.remove(f"{out}/metrics.jsonl")
    return out, workspace.args("pretrain", out, *MILLION)


def steps_of(out: str) -> list[str]:
    folder = f"{out}/round_0"
    return sorted(name for name in os.listdir(folder) if name.startswith("step_"))


def past_a_million(workspace: Workspace) -> str:
    out, argv = moved_run(workspace)
    run = run_to_end(argv)
    expected = ["step_1000002", "step_1000004"]
    if run.status != [0] or steps_of(out) != expected or "step_1000004" not in run.output:
        return f"{run.status}, {steps_of(out)}: {run.output[-300:]!r}"
    before = tree(f"{out}/round_0")
    again = run_to_end(argv)
    if again.status != [0] or tree(f"{out}/round_0") != before:
        return f"the same command again: {again.status} {steps_of(out)} {again.output[-300:]!r}"
    workspace.undisturbed_runs["a million"] = out
    return ""


def killed_past_a_million(workspace: Workspace) -> str:
    undisturbed = workspace.undisturbed_runs.get("a million")
    if not undisturbed:
        return "there is no undisturbed run"
    for call in (2, 4, 5):  # in the steps 999,999, 1,000,001 and 1,000,002
        out, argv = moved_run(workspace)
        run = run_to_end(argv, 1, Fault("train:lr_factor", "kill", 0, call))
        if run.status != [-signal.SIGKILL]:
            return f"{run.status} {run.output[-300:]!r}"
        problem = compare(run_to_end(argv), undisturbed, out)
        if problem or steps_of(out) != steps_of(undisturbed):
            return f"killed in call {call}: {problem} {steps_of(out)}"
    return ""


def past_ten_rounds(workspace: Workspace) -> str:
    """Twelve rounds of PPO with one step each, killed in round 9 and in round 10."""
    more = ["--rounds=12", "--max_rows=8", "--max_steps=1", "--keep_rounds=1"]
    undisturbed = workspace.undisturbed("ppo", 1, *more)
    out = workspace.new_run()
    argv = workspace.args("ppo", out, *more)
    for call in (10, 1):
        run = run_to_end(argv, 1, Fault("train:lr_factor", "kill", 0, call))
        if run.status != [-signal.SIGKILL]:
            return f"{run.status} {run.output[-300:]!r}"
    problem = compare(run_to_end(argv), undisturbed, out)
    latest = checkpoint.latest(out)
    if not problem and "/round_11/" not in latest:
        problem = f"the latest is {latest}"
    return problem
