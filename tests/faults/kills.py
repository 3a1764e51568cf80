"""Sections about runs that are killed, starved or damaged.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import glob
import io
import itertools
import os
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout, suppress

from nanospin import checkpoint
from tests.faults.harness import (
    Fault,
    Result,
    Workspace,
    compare,
    count,
    read_metrics,
    run_to_end,
    sample_in_small_parts,
    start,
    torchrun,
    weights_differ,
)

# ---------------------------------------------------------------------------- killed and resumed

STAGES = ("pretrain", "sft", "preference", "spin2", "spin3", "sampling", "ppo")


def bitwise(workspace: Workspace, short: bool) -> Result:
    """stages x ranks x dtypes: killed and resumed runs equal the undisturbed ones, bit for bit"""
    cases = list(itertools.product(STAGES, (1, 2), ("float32", "bfloat16")))
    if short:
        cases = workspace.rng.sample(cases, 2)
    failures = []
    for stage, ranks, dtype in cases:
        problem = kill_and_resume(workspace, stage, ranks, f"--dtype={dtype}")
        if problem:
            failures.append(f"{stage} on {ranks} ranks, {dtype}: {problem}")
    return count(len(cases), failures)


def kill_and_resume(workspace: Workspace, stage: str, ranks: int, *more: str) -> str:
    """Kill all ranks in a training step, or while they sample. Returns what went wrong, or ""."""
    function, call = "train:lr_factor", workspace.rng.randint(2, 4)
    if stage == "sampling":
        stage = "spin3"
        function, call = "players:respond", workspace.rng.randint(2, 8)
    undisturbed = workspace.undisturbed(stage, ranks, *more)
    out = workspace.new_run()
    argv = workspace.args(stage, out, *more)

    def arm(rank):
        Fault(function, "kill", rank, call).arm()

    killed = run_to_end(argv, ranks, before=arm).status
    again = run_to_end(argv, ranks)
    problem = compare(again, undisturbed, out)
    if problem or killed != [-signal.SIGKILL] * ranks:
        return f"killed in {function}, call {call}: {killed}, {problem}"
    return ""


# -------------------------------------------------------------------------------- injected faults

# function -> the call before which a rank is killed
KILLED_IN = {
    "data.batch:batch_rows": 3,
    "model:GPT.forward": 9,
    "nanospin.distributed:gather_full_model": 1,
    "nanospin.checkpoint:write": 2,
    "nanospin.checkpoint:prune_steps": 2,
    "players:respond": 3,
    "eval:row_logps": 2,
    "train:evaluate": 2,
    "nanospin.checkpoint:save": 3,
    "data.rows:write_rows": 2,
    "nanospin.distributed:all_reduce_sum": 8,
    "nanospin.checkpoint:load_weights": 1,
}
RANK_0_ONLY = ("nanospin.checkpoint:prune_steps", "data.rows:write_rows")
OTHER_FAULTS = [
    Fault("model:GPT.forward", "hang", rank=1, call=9),
    Fault("players:respond", "hang", rank=0, call=2),
    Fault("nanospin.checkpoint:write", "hang", rank=1, call=1),
    Fault("eval:row_logps", "hang", rank=1, call=3),
    Fault("model:GPT.forward", "freeze", rank=0, call=9),
    Fault("players:respond", "freeze", rank=1, call=2),
    Fault("data.batch:batch_rows", "raise", rank=1, call=3),
    Fault("model:GPT.forward", "raise", rank=0, call=9),
    Fault("players:respond", "raise", rank=1, call=2),
    Fault("nanospin.checkpoint:save", "raise", rank=0, call=2),
    Fault("train:lr_factor", "SIGTERM", rank=0, call=2),
    Fault("train:lr_factor", "SIGTERM", rank=1, call=4),
    Fault("players:respond", "SIGTERM", rank=1, call=2),
    Fault("eval:row_logps", "SIGTERM", rank=0, call=2),
    Fault("train:evaluate", "SIGTERM", rank=1, call=2),
    Fault("train:lr_factor", "SIGUSR1", rank=1, call=3),
    Fault("train:evaluate", "SIGUSR1", rank=0, call=1),
    Fault("train:lr_factor", "SIGINT", rank=0, call=2),
    Fault("players:respond", "SIGINT", rank=0, call=3),
    Fault("data.rows:write_rows", "full", rank=0, call=2),
    Fault("data.files:write_json", "full", rank=0, call=1),
    Fault("os:fsync", "full", rank=1, call=3),
]
HANGS = ("hang", "freeze")  # freeze: the process is stopped, and with rank 0 the store
HANG_TIMEOUT = 8  # seconds, the setting `timeout` of runs in which a rank hangs
FAULT_LIMIT = 90  # seconds in which a run with a fault must end


def all_faults() -> list[Fault]:
    faults = []
    for function, call in KILLED_IN.items():
        for rank in (0, 1):
            if rank == 0 or function not in RANK_0_ONLY:
                faults.append(Fault(function, "kill", rank, call))
    return faults + OTHER_FAULTS


def faults(workspace: Workspace, short: bool) -> Result:
    """injected faults: the other rank ends by itself and names the lost one; the same command then
    finishes, equal bit for bit"""
    chosen = all_faults()
    if short:
        by_action = {fault.action: fault for fault in reversed(chosen)}
        chosen = [by_action[action] for action in ("kill", "SIGTERM", "full")]
    failures = []
    slowest = 0.0
    for fault in chosen:
        problems, seconds = run_with_fault(workspace, fault)
        slowest = max(slowest, seconds)
        if problems:
            failures.append(f"{fault}: {'; '.join(problems)}")
    note = f"slowest end after the first rank's {slowest:.0f} s"
    return count(len(chosen), failures, note)


def run_with_fault(workspace: Workspace, fault: Fault) -> tuple[list[str], float]:
    """(what went wrong, seconds between the end of the first rank and that of the last)."""
    undisturbed = workspace.undisturbed("spin3", 2)
    out = workspace.new_run()
    timeout = HANG_TIMEOUT if fault.action in HANGS else 100
    argv = workspace.args("spin3", out, f"--timeout={timeout}")
    run = start(argv, 2, fault, before=sample_in_small_parts)
    problems, seconds = watch(run, fault)
    if not ended_as_expected(run, fault):
        problems.append(f"ended with {run.status}: {run.errors[-600:]!r}")
    if fault.action.startswith("SIG") and not nothing_lost(out, fault):
        problems.append("steps or samples are lost")

    again = run_to_end(argv, 2)
    problem = compare(again, undisturbed, out)
    if problem == "logged numbers differ" and fault.action == "full":
        problem = weights_differ(undisturbed, out)  # only this run has logged a warning
    if problem:
        problems.append(f"the same command again: {problem}")
    run.forget()
    again.forget()
    return problems, seconds


def watch(run, fault: Fault) -> tuple[list[str], float]:
    """Wait for the end of a run with a fault. A rank that hangs is killed once the other has ended,
    as torchrun does. Returns (what went wrong, seconds from the first rank's end)."""
    first_end = None
    while None in run.poll():
        if fault.action in HANGS and run.status[1 - fault.rank] is not None:
            run.kill()
        if first_end is None and run.status != [None, None]:
            first_end = time.time()
        if time.time() - run.start_time > FAULT_LIMIT:
            run.kill()
            run.reap()
            return [f"not ended after {FAULT_LIMIT} seconds: {run.output[-1000:]}"], 0.0
        time.sleep(0.01)
    return [], time.time() - (first_end or time.time())


def ended_as_expected(run, fault: Fault) -> bool:
    """Whether the exit status and the errors of both ranks are right for a fault."""
    own, other = run.status[fault.rank], run.status[1 - fault.rank]
    names_the_rank = f"rank {fault.rank} " in run.errors
    if fault.action == "kill":
        return own == -signal.SIGKILL and other == 1 and names_the_rank
    if fault.action in HANGS:
        return other == 1 and names_the_rank
    if fault.action == "raise":
        return 1 in run.status and "an injected error" in run.errors
    if fault.action == "full":
        return "No space left" in run.output
    expected = 128 + getattr(signal, fault.action)
    return run.status == [expected, expected] and run.errors == ""


def nothing_lost(out: str, fault: Fault) -> bool:
    """Whether a run that a signal stopped has saved all that it did."""
    # a part is 16 samples, the last one of a file 8
    if "respond" in fault.function and num_sampled(out) < 16 * fault.call - 8:
        return False
    if not os.path.exists(f"{out}/metrics.jsonl"):
        return True
    steps = [record for record in read_metrics(out) if record["kind"] == "step"]
    if not steps:
        return True
    meta = checkpoint.read_meta(checkpoint.latest(out))
    return (meta["round"], meta["step"]) == (steps[-1]["round"], steps[-1]["step"] + 1)


def num_sampled(out: str) -> int:
    """How many samples a run has written down, finished files and parts."""
    n = 0
    for pattern in ("teacher_*", "round_*/self_*"):
        for path in glob.glob(f"{out}/{pattern}"):
            with open(path, encoding="utf-8") as f:
                n += len(f.readlines())
    return n


# ---------------------------------------------------------------------------------- random kills


def soak(workspace: Workspace, short: bool) -> Result:
    """random kills of one rank or both, at random times, until a run finishes: each equals the
    undisturbed one, bit for bit"""
    num_kills = 4 if short else 100
    undisturbed = workspace.undisturbed("spin3", 2)
    out = workspace.new_run()
    failures = []
    kills = finished = 0
    while kills < num_kills:
        run = start(workspace.args("spin3", out), 2, before=sample_in_small_parts)
        if kill_at_random(workspace.rng, run):
            kills += 1
            if kills % 40:
                continue
            run = run_to_end(workspace.args("spin3", out), 2)  # now and then it may finish
        problem = compare(run, undisturbed, out)
        if problem:
            failures.append(f"after {kills} kills: {problem}")
        finished += 1
        out = workspace.new_run()
        run.forget()
    return count(kills, failures, f"{finished} runs finished")


def kill_at_random(rng, run) -> bool:
    """Kill one rank or both after up to three seconds, and the other one a moment later. Returns
    False if the run ended before that."""
    deadline = time.time() + rng.uniform(0.2, 3.0)
    while None in run.poll() and time.time() < deadline:
        time.sleep(0.005)
    if None not in run.poll():
        return False
    run.kill(ranks=rng.choice([[0, 1], [0], [1]]))
    time.sleep(0.05)
    run.kill()
    run.wait()
    return True


SAVING_FUNCTIONS = (
    "os:rename",
    "os:replace",
    "os:fsync",
    "os:mkdir",
    "os:remove",
    "shutil:rmtree",
    "nanospin.checkpoint:sha256",
    "nanospin.checkpoint:write_json",
    "nanospin.checkpoint:write_tensors",
)


def saves(workspace: Workspace, short: bool) -> Result:
    """kills while a checkpoint is written, renamed or removed: those that are left can be loaded"""
    num_kills = 5 if short else 100
    more = ["--save_interval=1", "--max_steps=60", "--eval_interval=1000"]
    out = workspace.new_run()
    failures = []
    kills = tries = unloadable = 0
    while kills < num_kills and tries < 3 * num_kills:
        tries += 1
        function, call = workspace.rng.choice(SAVING_FUNCTIONS), workspace.rng.randint(1, 6)
        fault = Fault(function, "kill", 0, call)
        run = run_to_end(workspace.args("pretrain", out, *more), 1, fault)
        kills += run.status == [-signal.SIGKILL]
        paths = checkpoint.list_steps(f"{out}/round_0")
        corrupted = [path for path in paths if checkpoint.find_corruption(path)]
        unloadable += len(corrupted)
        if corrupted or run.status not in ([-signal.SIGKILL], [0]):
            failures.append(f"{fault}: {run.status} {corrupted} {run.output[-800:]}")
        if run.status == [0]:
            out = workspace.new_run()
        run.forget()
    return count(kills, failures, f"{unloadable} unloadable")


# --------------------------------------------------------------------------------------- torchrun


def restarts(workspace: Workspace, short: bool) -> Result:
    """torchrun --max-restarts: workers are killed again and again; the run ends by itself and
    equals the undisturbed one, bit for bit"""
    num_kills = 20
    more = ["--max_steps=500", "--save_interval=5", "--eval_interval=50"]
    undisturbed, out = workspace.undisturbed("pretrain", 2, *more), workspace.new_run()
    pids = f"{workspace.folder}/pids"
    os.makedirs(pids, exist_ok=True)

    def write_pid(rank):
        sample_in_small_parts(rank)
        with open(f"{pids}/{rank}.tmp", "w") as f:
            f.write(str(os.getpid()))
        os.replace(f"{pids}/{rank}.tmp", f"{pids}/{rank}")

    run = start(workspace.args("pretrain", out, *more), main=torchrun(num_kills, write_pid))
    kills = 0
    last_pid = None  # of rank 1 at the last kill: another one now means that they have restarted
    while run.poll() == [None] and time.time() - run.start_time < 20 * num_kills + 60:
        time.sleep(0.02)
        pid = read_pid(pids, 1)
        if kills == num_kills or pid in (None, last_pid):
            continue
        time.sleep(workspace.rng.uniform(0.1, 2.0))
        if run.poll() == [None]:
            with suppress(ProcessLookupError):
                os.kill(read_pid(pids, workspace.rng.randint(0, 1)), signal.SIGKILL)
                kills += 1
                last_pid = pid
    run.wait(20 * num_kills + 90)
    problem = compare(run, undisturbed, out)
    if problem:
        return Result(0, kills, [problem])
    return Result(kills, kills, [])


def read_pid(folder: str, rank: int) -> int | None:
    path = f"{folder}/{rank}"
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return int(f.read())


def exits(workspace: Workspace, short: bool) -> Result:
    """finished runs of two ranks under torchrun's agent: exit status 0"""
    n = 3 if short else 50
    failures = []
    for _ in range(n):
        argv = workspace.args("pretrain", workspace.new_run(), "--max_steps=1", "--eval_batches=1")
        run = run_to_end(argv, main=torchrun())
        if run.status != [0]:
            failures.append(f"{run.status} {run.output[-800:]}")
        run.forget()
    return count(n, failures)


# -------------------------------------------------------------------------- damaged files, disks


def corruption(workspace: Workspace, short: bool) -> Result:
    """files of a checkpoint truncated, emptied, removed, swapped with another save's, or with one
    bit flipped: found, named, and the checkpoint before it is used"""
    undisturbed = workspace.undisturbed("pretrain", 2, "--tokenizer=bytes")
    older, newest = checkpoint.list_steps(f"{undisturbed}/round_0")
    files = [*checkpoint.list_files(newest), "manifest.json"]
    cases = list(itertools.product(files, ("truncated", "emptied", "swapped", "removed")))
    for _ in range(20 if short else 300):
        cases.append((workspace.rng.choice(files), "flipped"))
    failures = []
    tried = 0
    for file, damage in cases:
        content = damaged(workspace.rng, older, newest, file, damage)
        if content == read_bytes(f"{newest}/{file}"):
            continue  # both checkpoints have the same file
        tried += 1
        out = workspace.new_run()
        for path in (older, newest):
            shutil.copytree(path, path.replace(undisturbed, out))
        copy = newest.replace(undisturbed, out)
        write_or_remove(f"{copy}/{file}", content)
        found = checkpoint.find_corruption(copy)
        with redirect_stdout(io.StringIO()):
            taken = checkpoint.latest_valid(out)
        if file not in found or taken != older.replace(undisturbed, out):
            failures.append(f"{file} {damage}: {found!r}, {taken} is used")
        shutil.rmtree(out)
    problem = resume_past_damage(workspace, undisturbed)
    if problem:
        failures.append(f"a run whose latest checkpoint is damaged: {problem}")
    return count(tried + 1, failures)


def damaged(rng, older: str, newest: str, file: str, damage: str) -> bytes | None:
    """The content of a file of the newest checkpoint after some damage; None: no file."""
    if damage == "swapped":
        return read_bytes(f"{older}/{file}")
    return spoilt(rng, read_bytes(f"{newest}/{file}"), damage)


def spoilt(rng, content: bytes, damage: str) -> bytes | None:
    """The content of a file after some damage; None: no file."""
    content = bytearray(content)
    if damage == "truncated":
        return bytes(content[: len(content) // 2])
    if damage == "emptied":
        return b""
    if damage == "removed":
        return None
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def write_or_remove(path: str, content: bytes | None):
    if content is None:
        os.remove(path)
        return
    with open(path, "wb") as f:
        f.write(content)


def resume_past_damage(workspace: Workspace, undisturbed: str) -> str:
    """Damage the latest checkpoint of a finished run. The same command must continue from the one
    before, to the same end. Returns what went wrong, or ""."""
    out = workspace.new_run()
    shutil.copytree(undisturbed, out)
    folder = f"{checkpoint.latest(out)}/optimizer"
    file = f"{folder}/{os.listdir(folder)[0]}"
    content = bytearray(read_bytes(file))
    content[-1] ^= 1
    write_or_remove(file, content)
    run = run_to_end(workspace.args("pretrain", out, "--tokenizer=bytes"), 2)
    if "is damaged" not in run.output:
        return f"the damage was not found: {run.output[-1000:]}"
    return compare(run, undisturbed, out)


def disks(workspace: Workspace, short: bool) -> Result:
    """a disk that fills up or becomes read-only: reported in a line; with room again the same
    command ends with the undisturbed run's weights"""
    undisturbed = workspace.undisturbed("pretrain", 2)
    mount = f"{workspace.folder}/small"
    os.makedirs(mount, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", mount]
    if subprocess.run(command, capture_output=True).returncode:
        return Result(0, 0, [], "left out: no right to mount a small disk here")
    failures = []
    cases = {"full": "size=900k", "full later": "size=1500k", "read-only": "ro"}
    try:
        for case, options in cases.items():
            remount(mount, options)
            out = f"{mount}/{case.replace(' ', '_')}"
            argv = workspace.args("pretrain", out)
            run = run_to_end(argv, 2)
            reported = "No space left" in run.output or "Read-only" in run.output
            reported = reported and "Traceback" not in run.output
            remount(mount, "rw,size=40m")
            again = run_to_end(argv, 2)
            problem = compare(again, undisturbed, out)
            if problem == "logged numbers differ":
                problem = weights_differ(undisturbed, out)  # only this run has logged a warning
            if 0 in run.status or not reported or problem:
                failures.append(f"{case}: {run.status} {run.output[:6000]}; then {problem}")
            shutil.rmtree(out)
    finally:
        subprocess.run(["umount", mount])
    return count(len(cases), failures)


def remount(mount: str, options: str):
    subprocess.run(["mount", "-o", f"remount,{options}", mount], check=True)
