"""Sections about run folders: odd names, two writers, strange files in them, special files.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import contextlib
import glob
import json
import os
import shutil
import signal
import stat
import threading
import time

from data.files import sha256
from data.jsonl import prepare
from nanospin import checkpoint
from tests.faults.harness import (
    Fault,
    Result,
    Workspace,
    attempt,
    compare,
    count,
    difference,
    not_refused,
    pick,
    run_to_end,
    start,
    tree,
)
from tests.faults.spoil import EVAL, SAMPLE
from tools import hf

# ---------------------------------------------------------------------------------------- odd names

# Every one is a legal name of a folder. Control characters are refused, so they are left out.
ODD_NAMES = [
    "lr[1e-3]",
    "[!a]",
    "[]]",
    "a*b?",
    "**",
    "two  spaces ",
    "a#b",
    "a::b",
    "100%s%n%(a)s",
    'it\'s "quoted"',
    "na\u00efve \u4e2d\u6587 \U0001f600",
    "e\u0301",
    "\u200bzero width",
    "--stage=sft",
    "-",
    "~",
    "$HOME",
    "{prompt}{0}",
    "a;b&c|d>e",
    "back\\slash",
    "a=b,c",
    ".hidden",
    "...",
    "step_000002",
    "round_0",
    "writing_000002",
    "model.safetensors",
    "rows.jsonl",
    "x" * 255,
    "\u00e9" * 127,
]


def names(workspace: Workspace, short: bool) -> Result:
    """odd but legal names of out_dir, init, data and teacher: trained, stopped, resumed and sampled
    from, equal bit for bit to plain names"""
    chosen = ODD_NAMES[:3] + pick(workspace, True, ODD_NAMES[3:], 2 if short else 12)
    failures = []
    for name in chosen:
        problem = attempt(run_under_name, workspace, name)
        if problem:
            failures.append(f"{name!r}: {problem}")
    for name in pick(workspace, True, ODD_NAMES[:8], 1 if short else 3):
        problem = attempt(all_inputs_under_name, workspace, name)
        if problem:
            failures.append(f"self-play, all of it in {name!r}: {problem}")
    return count(len(chosen) + (1 if short else 3), failures)


def run_under_name(workspace: Workspace, name: str) -> str:
    undisturbed = workspace.undisturbed("pretrain", 1)
    out = f"{workspace.new_run()}/{name}"
    argv = workspace.args("pretrain", out)
    first = run_to_end(argv, 1, Fault("train:lr_factor", "SIGTERM", 0, 3))
    if first.status != [128 + signal.SIGTERM]:
        return f"{first.status} {first.output[-500:]}"
    problem = compare(run_to_end(argv), undisturbed, out)
    if problem:
        return problem
    samples = [sampled(path) for path in (undisturbed, out)]
    return "" if samples[0] == samples[1] else f"sampled {samples[1]!r}, not {samples[0]!r}"


def sampled(run: str) -> tuple:
    """(status, text) of sample.py. A name that begins with a dash needs a path before it."""
    argv = [run, "--prompt=the", "--raw", "--temperature=0", "--max_new_tokens=8"]
    sampling = start(argv, main=SAMPLE)
    return sampling.wait(), sampling.output


def all_inputs_under_name(workspace: Workspace, name: str) -> str:
    """Self-play of three players whose data, init and teacher are in a folder of this name."""
    undisturbed = workspace.undisturbed("spin3", 1)
    folder = f"{workspace.new_run()}/{name}"
    os.makedirs(folder)
    paths = {"data": workspace.data, "init": workspace.base_runs["sft"]}
    paths["teacher"] = workspace.base_runs["pretrain"]
    more = []
    for setting, path in paths.items():
        shutil.copytree(path, f"{folder}/{setting}")
        more.append(f"--{setting}={folder}/{setting}")
    argv = workspace.args("spin3", f"{folder}/run", *more)
    first = run_to_end(argv, 1, Fault("players:respond", "kill", 0, 3))
    if first.status != [-signal.SIGKILL]:
        return f"{first.status} {first.output[-500:]}"
    again = run_to_end(argv)
    return compare(again, undisturbed, f"{folder}/run")


# ------------------------------------------------------------------------------- two writers


def writers(workspace: Workspace, short: bool) -> Result:
    """two runs of one out_dir, stale locks, locks taken over, folders that vanish: one run goes on,
    equal bit for bit; every other one ends with one line and makes nothing"""
    cases = {
        "the same moment": at_once,
        "a moment later": later,
        "a killed run's lock": after_kill,
        "another host's lock, not refreshed": other_host,
        "another host's lock, refreshed": other_host_alive,
        "a reused process id": reused_pid,
        "an empty lock": empty_lock,
        "taken over": taken_over,
        "folder deleted": folder_deleted,
        "folder renamed": folder_renamed,
    }
    chosen = []
    for name in cases:
        for ranks in (1, 2):
            chosen.append((name, ranks))
    chosen = pick(workspace, True, chosen, 4 if short else 12)
    failures = []
    for name, ranks in chosen:
        problem = attempt(cases[name], workspace, ranks)
        if problem:
            failures.append(f"{name}, {ranks} ranks: {problem}")
    return count(len(chosen), failures)


LONG = ["--max_steps=60", "--save_interval=5", "--eval_interval=20"]  # a run of seconds


def one_of_two(runs, undisturbed: str, out: str) -> str:
    """Exactly one of two runs has gone on, to the undisturbed end; the other was refused."""
    finished = [run for run in runs if set(run.status) == {0}]
    others = [run for run in runs if set(run.status) != {0}]
    if len(finished) != 1:
        texts = [f"{run.status} {run.output[-300:]!r}" for run in runs]
        return f"{len(finished)} of two runs have finished: {texts}"
    return not_refused(others[0], out) or difference(undisturbed, out)


def at_once(workspace: Workspace, ranks: int) -> str:
    out, undisturbed = workspace.new_run(), workspace.undisturbed("pretrain", ranks, *LONG)
    argv = workspace.args("pretrain", out, *LONG)
    runs = [start(argv, ranks), start(argv, ranks)]
    for run in runs:
        run.wait()
    return one_of_two(runs, undisturbed, out)


def later(workspace: Workspace, ranks: int) -> str:
    out, undisturbed = workspace.new_run(), workspace.undisturbed("pretrain", ranks, *LONG)
    argv = workspace.args("pretrain", out, *LONG)
    runs = [start(argv, ranks)]
    wait_for_checkpoint(out, runs[0])
    runs.append(start(argv, ranks))
    for run in reversed(runs):
        run.wait()
    return one_of_two(runs, undisturbed, out)


def wait_for_checkpoint(out: str, run):
    while not (os.path.isdir(out) and checkpoint.latest(out)) and None in run.poll():
        time.sleep(0.01)


def find_lock(out: str) -> str:
    """The lock file of a run, in its folder or beside it; "" if there is none."""
    escaped = glob.escape(out)
    found = glob.glob(f"{escaped}/*lock*") + glob.glob(f"{escaped}/.*lock*")
    found += glob.glob(f"{escaped}*lock*")
    return found[0] if found else ""


def change_owner(lock: str, age: float, **changes):
    """Change what a lock says of its owner, and its time of change to `age` seconds ago."""
    with open(lock, encoding="utf-8") as f:
        owner = json.load(f)
    for name, value in changes.items():
        if name in owner:
            owner[name] = value
    with open(lock, "w", encoding="utf-8") as f:
        json.dump(owner, f)
    os.utime(lock, (time.time() - age, time.time() - age))


def goes_on(workspace: Workspace, ranks: int, argv) -> str:
    out = argv_out(argv)
    return compare(run_to_end(argv, ranks), workspace.undisturbed("pretrain", ranks), out)


def argv_out(argv) -> str:
    for arg in argv:
        if arg.startswith("--out_dir="):
            return arg.removeprefix("--out_dir=")
    raise KeyError("out_dir")


def killed_run(workspace: Workspace, ranks: int) -> tuple[str, list[str]]:
    """(lock file, arguments) of a run that was killed in its third step."""
    out = workspace.new_run()
    argv = workspace.args("pretrain", out)

    def arm(rank):
        Fault("train:lr_factor", "kill", rank, 3).arm()

    run_to_end(argv, ranks, before=arm)
    return find_lock(out), argv


NO_LOCK = "the killed run left no lock"


def after_kill(workspace: Workspace, ranks: int) -> str:
    lock, argv = killed_run(workspace, ranks)
    return goes_on(workspace, ranks, argv) if lock else NO_LOCK


def other_host(workspace: Workspace, ranks: int) -> str:
    lock, argv = killed_run(workspace, ranks)
    if not lock:
        return NO_LOCK
    change_owner(lock, 3600, host="elsewhere", machine="another boot", boot="x", pid=1)
    return goes_on(workspace, ranks, argv)


def other_host_alive(workspace: Workspace, ranks: int) -> str:
    lock, argv = killed_run(workspace, ranks)
    if not lock:
        return NO_LOCK
    change_owner(lock, 0, host="elsewhere", machine="another boot", boot="x", pid=1)
    done = threading.Event()

    def refresh():
        while not done.wait(0.5):
            os.utime(lock)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        run = run_to_end(argv, ranks)
    finally:
        done.set()
        thread.join()
    return not_refused(run, "elsewhere")


def reused_pid(workspace: Workspace, ranks: int) -> str:
    """The process id in the lock is now that of this process, which began at another time."""
    lock, argv = killed_run(workspace, ranks)
    if not lock:
        return NO_LOCK
    change_owner(lock, 60, pid=os.getpid())
    return goes_on(workspace, ranks, argv)


def empty_lock(workspace: Workspace, ranks: int) -> str:
    """What a power loss leaves."""
    lock, argv = killed_run(workspace, ranks)
    if not lock:
        return NO_LOCK
    open(lock, "w").close()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    return goes_on(workspace, ranks, argv)


ENDLESS = ["--max_steps=20000", "--save_interval=20", "--eval_interval=20000"]


def taken_over(workspace: Workspace, ranks: int) -> str:
    out = workspace.new_run()
    run = start(workspace.args("pretrain", out, *ENDLESS), ranks)
    wait_for_checkpoint(out, run)
    lock = find_lock(out)
    if not lock:
        run.kill()
        run.reap()
        return "a running run has no lock"
    change_owner(lock, 0, host="elsewhere", pid=1, token="another", since="now")
    run.wait(30)
    problem = not_refused(run, out)
    path = checkpoint.latest(out)
    return problem or (checkpoint.find_corruption(path) if path else "no checkpoint is left")


def folder_deleted(workspace: Workspace, ranks: int) -> str:
    out = workspace.new_run()
    run = start(workspace.args("pretrain", out, *ENDLESS), ranks)
    wait_for_checkpoint(out, run)
    while os.path.exists(out):
        shutil.rmtree(out, ignore_errors=True)
    return vanished(run, out)


def folder_renamed(workspace: Workspace, ranks: int) -> str:
    out = workspace.new_run()
    run = start(workspace.args("pretrain", out, *ENDLESS), ranks)
    wait_for_checkpoint(out, run)
    os.rename(out, f"{out}_renamed")
    problem = vanished(run, out)
    paths = checkpoint.list_steps(f"{out}_renamed/round_0")
    damaged = [path for path in paths if checkpoint.find_corruption(path)]
    if not problem and (damaged or not paths):
        problem = f"of the renamed folder's checkpoints {paths} these are damaged: {damaged}"
    return problem


def vanished(run, out: str) -> str:
    run.wait(30)
    problem = not_refused(run, out)
    if not problem and os.path.exists(out):
        problem = f"it made {sorted(tree(out))}"
    return problem


# ------------------------------------------------------------------------------------ strange files


def stray_file(path: str, target: str):
    with open(path, "w", encoding="utf-8") as f:
        f.write("mine")


def stray_folder(path: str, target: str):
    os.makedirs(path)
    stray_file(f"{path}/notes", target)


def stray_link(path: str, target: str):
    os.symlink(f"{target}/file", path)


def stray_folder_link(path: str, target: str):
    os.symlink(target, path)


def stray_dangling(path: str, target: str):
    os.symlink(f"{target}/none", path)


def stray_pipe(path: str, target: str):
    os.mkfifo(path)


MAKE_STRAY = [
    stray_file,
    stray_folder,
    stray_link,
    stray_folder_link,
    stray_dangling,
    stray_pipe,
]
STRAY_NAMES = [
    ".DS_Store",
    ".nfs0001",
    "meta.json~",
    "#meta.json#",
    "meta.json.tmp",
    "notes",
    "model.safetensors.bak",
]
# Names that a run makes itself; {} is a step that it will write, write again, or never write.
OWN_NAMES = [
    "step_{}",
    "step_{}.bak",
    "step_",
    "step_1a",
    "writing_{}",
    "removing_{}",
    "damaged_{}",
    "lost+found",
]
# Where a run looks for the names of rounds.
ROUND_NAMES = ["round_1", "round_", "round_x", "round_00", "step_000009", "round_0.bak"]


def strays(workspace: Workspace, short: bool) -> Result:
    """files, folders, pipes and links that somebody left in a run, its rounds and its checkpoints:
    it resumes, equal bit for bit; what links point to is intact"""
    cases = []
    for make in MAKE_STRAY:
        for name in STRAY_NAMES:
            for place in ("{step}", "{step}/optimizer", "{old}", "{round}", "{out}"):
                cases.append((make.__name__, f"{place}/{name}"))
        for name in OWN_NAMES:
            step = workspace.rng.choice(("000001", "000004", "000005"))
            cases.append((make.__name__, "{round}/" + name.format(step)))
        for name in ROUND_NAMES:
            cases.append((make.__name__, "{out}/" + name))
    chosen = workspace.rng.sample(cases, 8 if short else 50)
    links = ["older checkpoint", "newest checkpoint", "round", "run"]
    chosen_links = pick(workspace, short, links, 2)
    failures = []
    for make, place in chosen:
        problem = attempt(resume_beside_stray, workspace, make, place)
        if problem:
            failures.append(f"{make} {place}: {problem}")
    for what in chosen_links:
        problem = attempt(resume_through_link, workspace, what)
        if problem:
            failures.append(f"{what} moved, with a link in its place: {problem}")
    return count(len(chosen) + len(chosen_links), failures)


def resume_beside_stray(workspace: Workspace, make: str, place: str) -> str:
    undisturbed = workspace.undisturbed("pretrain", 1)
    out = workspace.half("pretrain", 1)
    old, step = checkpoint.list_steps(f"{out}/round_0")
    path = place.format(out=out, round=f"{out}/round_0", old=old, step=step)
    target = f"{workspace.folder}/target"
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    stray_file(f"{target}/file", target)
    before = tree(target)
    globals()[make](path, target)
    argv = workspace.args("pretrain", out)
    run = run_to_end(argv)
    if tree(target) != before:
        return "what a link points to was changed"
    is_checkpoint_name = os.path.basename(place).startswith(("step_0", "round_1"))
    if is_checkpoint_name and run.status != [0]:
        # it looks like a checkpoint and is none: to stop and say so is right too
        problem = not_refused(run, os.path.basename(path))
        if problem or not os.path.lexists(path):
            return problem or "it stopped and removed it"
        remove_stray(path)
        run = run_to_end(argv)
    if run.status == [0] and os.path.lexists(path):
        remove_stray(path)  # so that `difference` finds the run's own latest checkpoint
    return compare(run, undisturbed, out, warnings=False)


def remove_stray(path: str):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def resume_through_link(workspace: Workspace, what: str) -> str:
    """A part of a run was moved to another disk, and a link put in its place."""
    undisturbed = workspace.undisturbed("pretrain", 1)
    out = workspace.half("pretrain", 1)
    old, step = checkpoint.list_steps(f"{out}/round_0")
    paths = {"older checkpoint": old, "newest checkpoint": step, "round": f"{out}/round_0"}
    path = paths.get(what, out)
    moved = f"{workspace.new_run()}_moved"
    shutil.move(path, moved)
    os.symlink(moved, path)
    before = tree(moved)
    argv = workspace.args("pretrain", out)
    run = run_to_end(argv)
    problem = compare(run, undisturbed, out, warnings=False)
    if not problem and what.endswith("checkpoint") and tree(moved) != before:
        problem = "what the link points to was changed"
    return problem


# ------------------------------------------------------------------------------- special files


def special_files(workspace: Workspace, short: bool) -> Result:
    """outputs that are devices, pipes, links, folders or own inputs: refused in one line, and what
    is there stays as it was"""
    kinds = {
        "device": make_device,
        "pipe": make_pipe,
        "link": make_link,
        "dangling link": make_dangling_link,
        "folder": make_folder,
    }
    cases = []
    for output in OUTPUTS:
        for kind in kinds:
            cases.append((output, kind))
    if not can_make_devices(workspace):
        cases = [case for case in cases if case[1] != "device"]
    chosen = pick(workspace, True, cases, 8 if short else 30)
    failures = []
    for output, kind in chosen:
        problem = attempt(write_onto, workspace, output, kinds[kind])
        if problem:
            failures.append(f"{output} onto a {kind}: {problem}")
    own_inputs = pick(workspace, short, OWN_INPUTS, 2)
    for name in own_inputs:
        problem = attempt(write_onto_input, workspace, name)
        if problem:
            failures.append(f"{name}: {problem}")
    return count(len(chosen) + len(own_inputs), failures)


def make_device(path: str):
    """A device like /dev/null, at a place of our own: the real one must not be at risk."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def make_pipe(path: str):
    os.mkfifo(path)


def make_link(path: str):
    with open(f"{path}.target", "w") as f:
        f.write("mine")
    os.symlink(f"{path}.target", path)


def make_dangling_link(path: str):
    os.symlink(f"{path}.nowhere", path)


def make_folder(path: str):
    os.makedirs(path)


def can_make_devices(workspace: Workspace) -> bool:
    path = f"{workspace.folder}/device"
    with contextlib.suppress(OSError):
        make_device(path)
        os.remove(path)
        return True
    return False


def sample_argv(workspace: Workspace, folder: str) -> list[str]:
    run = workspace.base_runs["sft"]
    return [run, "--prompts", f"{workspace.data}/val.jsonl", "--out", f"{folder}/o.jsonl"]


def eval_argv(workspace: Workspace, folder: str) -> list[str]:
    run = workspace.base_runs["sft"]
    return [f"a={run}", f"--data={workspace.data}", "--rows=2", f"--out={folder}"]


def prepare_argv(workspace: Workspace, folder: str) -> list[str]:
    argv = [f"{workspace.data}/train.jsonl", f"{workspace.data}/val.jsonl"]
    return [*argv, f"--out={folder}", "--val_share=0.5"]


def prepare_stream_argv(workspace: Workspace, folder: str) -> list[str]:
    texts = f"{workspace.folder}/texts.jsonl"
    with open(texts, "w", encoding="utf-8") as f:
        for i in range(20):
            f.write(json.dumps({"text": f"{i} words"}) + "\n")
    return [texts, f"--out={folder}", "--val_share=0.5", "--tokenizer=bytes"]


def train_argv(workspace: Workspace, folder: str) -> list[str]:
    return workspace.args("pretrain", folder)


# name -> (main, arguments, the file in the folder that is written); None: train.py's
OUTPUTS = {
    "sample.py --out": (SAMPLE, sample_argv, "o.jsonl"),
    "sample.py's temporary file": (SAMPLE, sample_argv, "o.jsonl.tmp"),
    "eval.py's table": (EVAL, eval_argv, "eval.json"),
    "eval.py's answers": (EVAL, eval_argv, "a.jsonl"),
    "prepare's rows": (prepare.main, prepare_argv, "train.jsonl"),
    "prepare's meta.json": (prepare.main, prepare_argv, "meta.json"),
    "prepare's stream": (prepare.main, prepare_stream_argv, "val.bin"),
    "a run's config.json": (None, train_argv, "config.json"),
    "a run's metrics.jsonl": (None, train_argv, "metrics.jsonl"),
    "a run's round": (None, train_argv, "round_0"),
}


def write_onto(workspace: Workspace, output: str, make) -> str:
    main, arguments, file = OUTPUTS[output]
    folder = workspace.new_run()
    os.makedirs(folder)
    path = f"{folder}/{file}"
    make(path)
    before = describe(path)
    if file == "round_0" and make in (make_folder, make_link):
        return ""  # a folder there is right, and a file there is another case
    run = start(arguments(workspace, folder), main=main)
    run.wait(30)
    after = describe(path)
    if file.endswith(".tmp") and after == "nothing" and run.status == [0]:
        return ""  # a leftover temporary file may be removed, not written through
    if after != before:
        return f"it was {before}, and is {after}; {run.status} {run.output[-200:]!r}"
    if file.endswith(".tmp") and run.status == [0]:
        return ""
    return not_refused(run)


def describe(path: str) -> str:
    """What is at a path: kind, content, and what a link leads to."""
    if not os.path.lexists(path):
        return "nothing"
    if os.path.islink(path):
        return f"a link to {os.readlink(path)}: {describe(os.readlink(path))}"
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        return f"a file {sha256(path)}"
    if stat.S_ISDIR(mode):
        return f"a folder of {sorted(os.listdir(path))}"
    return f"special {stat.S_IFMT(mode):o}"


OWN_INPUTS = [
    "sample.py --out is --prompts",
    "prepare's output is its input",
    "eval.py's output is its data",
    "tools.hf exports into the run",
]


def write_onto_input(workspace: Workspace, name: str) -> str:
    folder = f"{workspace.new_run()}"
    shutil.copytree(workspace.data, folder)
    run_folder = f"{folder}/sft"
    shutil.copytree(workspace.base_runs["sft"], run_folder)
    if name.startswith("sample"):
        main = SAMPLE
        argv = [run_folder, "--prompts", f"{folder}/val.jsonl", "--out", f"{folder}/val.jsonl"]
    elif name.startswith("prepare"):
        main = prepare.main
        argv = [f"{folder}/train.jsonl", f"--out={folder}", "--val_share=0.5"]
    elif name.startswith("eval"):
        main = EVAL
        argv = [f"train={run_folder}", f"--data={folder}", f"--out={folder}", "--rows=2"]
    else:
        main = hf.main
        argv = ["export", run_folder, f"--out={run_folder}"]
    before = tree(folder)
    run = start(argv, main=main)
    run.wait(30)
    changed = [path for path, content in before.items() if tree(folder).get(path) != content]
    if changed:
        return f"changed {changed}; {run.status}"
    return not_refused(run)
