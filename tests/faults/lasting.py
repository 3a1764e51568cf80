"""Sections about what happens around a run: signals, pipes, memory, the environment it starts in.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import gc
import json
import os
import signal
import socket
import sys
import time

import tiktoken

import train
from nanospin import checkpoint
from tests.faults.harness import (
    Fault,
    Result,
    Workspace,
    attempt,
    compare,
    count,
    free_port,
    not_refused,
    pick,
    read_metrics,
    run_to_end,
    sample_in_small_parts,
    start,
)

# ------------------------------------------------------------------------------- signals and pipes


def signals(workspace: Workspace, short: bool) -> Result:
    """SIGHUP, nohup, closed pipes, a suspended job, SIGTERM while the reference scores: nothing is
    lost, and the same command ends equal bit for bit"""
    cases = {
        "SIGHUP in a step": (hangup, "train:lr_factor", 3),
        "SIGHUP while it samples": (hangup, "players:respond", 2),
        "SIGHUP under nohup": (ignored_hangup,),
        "stdout closed by its reader": (closed_pipe, 1, 0),
        "stdout closed by its reader later": (closed_pipe, 1, 4),
        "stderr closed by its reader": (closed_pipe, 2, 0),
        "no stdout": (no_descriptor, 1),
        "no stderr": (no_descriptor, 2),
        "no stdin": (no_descriptor, 0),
        "suspended": (suspended,),
        "SIGTERM while the reference scores": (stopped_scoring,),
    }
    chosen = []
    for name in cases:
        for ranks in (1, 2):
            chosen.append((name, ranks))
    chosen = pick(workspace, True, chosen, 5 if short else 14)
    failures = []
    for name, ranks in chosen:
        case, *arguments = cases[name]
        problem = attempt(case, workspace, ranks, *arguments)
        if problem:
            failures.append(f"{name}, {ranks} ranks: {problem}")
    return count(len(chosen), failures)


def hangup(workspace: Workspace, ranks: int, function: str, call: int) -> str:
    undisturbed = workspace.undisturbed("spin2", ranks)
    out = workspace.new_run()
    argv = workspace.args("spin2", out)
    run = run_to_end(argv, ranks, Fault(function, "SIGHUP", ranks - 1, call))
    if run.status != [128 + signal.SIGHUP] * ranks or run.errors:
        return f"it ended with {run.status}: {run.output[-400:]!r}"
    return compare(run_to_end(argv, ranks), undisturbed, out)


def ignored_hangup(workspace: Workspace, ranks: int) -> str:
    """Whoever starts a run under nohup wants it to go on."""
    undisturbed = workspace.undisturbed("spin2", ranks)
    out = workspace.new_run()

    def ignore(rank):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    fault = Fault("train:lr_factor", "SIGHUP", ranks - 1, 2)
    # `start` arms the fault after `before`; the run sets its own handlers after both
    return compare(
        run_to_end(workspace.args("spin2", out), ranks, fault, before=ignore), undisturbed, out
    )


def closed_pipe(workspace: Workspace, ranks: int, descriptor: int, num_lines: int) -> str:
    """Rank 0's output goes to a pipe whose reader leaves after some lines, as `head` does."""
    undisturbed = workspace.undisturbed("spin2", ranks)
    out = workspace.new_run()
    argv = workspace.args("spin2", out)

    def leave(rank):
        if rank == 0:
            os.dup2(pipe_to_head(num_lines), descriptor)
            renew_streams()

    run = run_to_end(argv, ranks, before=leave)
    return ended_or_saved(workspace, run, argv, ranks, undisturbed, out)


def renew_streams():
    """Python's streams on the descriptors as they are now: a pipe cannot be sought, a file can."""
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def pipe_to_head(num_lines: int) -> int:
    """The writing end of a pipe to a process that reads some lines and leaves."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        with open(reading, "rb", buffering=0) as f:
            while num_lines and (byte := f.read(1)):
                num_lines -= byte == b"\n"
        os._exit(0)
    os.close(reading)
    return writing


def no_descriptor(workspace: Workspace, ranks: int, descriptor: int) -> str:
    """Standard input, output or error is closed from the start."""
    undisturbed = workspace.undisturbed("spin2", ranks)
    out = workspace.new_run()
    argv = workspace.args("spin2", out)

    def close(rank):
        os.close(descriptor)
        name = ("stdin", "stdout", "stderr")[descriptor]
        setattr(sys, name, None)  # what Python does when it starts without it

    run = run_to_end(argv, ranks, before=close)
    return ended_or_saved(workspace, run, argv, ranks, undisturbed, out)


def ended_or_saved(workspace, run, argv, ranks: int, undisturbed: str, out: str) -> str:
    """A run may end because nobody listens, but only after it has saved what it did."""
    if "hung" in run.status:
        return f"it hangs: {run.output[-300:]!r}"
    if set(run.status) != {0} and not is_saved(out):
        return f"it ended with {run.status} and lost steps: {run.output[-300:]!r}"
    return compare(run_to_end(argv, ranks), undisturbed, out, warnings=False)


def is_saved(out: str) -> bool:
    """Whether there are steps, and the latest checkpoint is of the last one that was logged."""
    if not os.path.exists(f"{out}/metrics.jsonl"):
        return False
    steps = [record for record in read_metrics(out) if record["kind"] == "step"]
    path = checkpoint.latest(out)
    if not steps or not path:
        return False
    meta = checkpoint.read_meta(path)
    return (meta["round"], meta["step"]) == (steps[-1]["round"], steps[-1]["step"] + 1)


TIMEOUT = 3  # seconds, the setting `timeout` of a run that is suspended


def suspended(workspace: Workspace, ranks: int) -> str:
    """All ranks are stopped for longer than `timeout`, as a batch system does, and continued."""
    more = ["--max_steps=30", "--save_interval=30", "--eval_interval=30"]
    undisturbed = workspace.undisturbed("pretrain", ranks, *more)
    out = workspace.new_run()
    argv = workspace.args("pretrain", out, *more, f"--timeout={TIMEOUT}")
    run = start(argv, ranks, Fault("train:lr_factor", "SIGSTOP", 0, 4))
    deadline = time.time() + 30
    while not is_stopped(run.pids[0]) and time.time() < deadline and None in run.poll():
        time.sleep(0.01)
    run.kill(signal.SIGSTOP)
    time.sleep(TIMEOUT + 2)
    run.kill(signal.SIGCONT)
    run.wait()
    return compare(run, undisturbed, out)


def is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
        return f.read().rpartition(")")[2].split()[0] == "T"


def stopped_scoring(workspace: Workspace, ranks: int) -> str:
    """SIGTERM while the reference scores more rows than a part has. The run must stop before it has
    scored all of them."""
    small = "--micro_batch_tokens=200"
    undisturbed = workspace.undisturbed("preference", ranks, small)
    out = workspace.new_run()
    argv = workspace.args("preference", out, small)
    counter = f"{workspace.new_run()}.calls"
    os.makedirs(os.path.dirname(counter), exist_ok=True)

    def watch(rank):
        sample_in_small_parts(rank)
        if rank == 0:
            signal_in_scoring(counter)

    run = run_to_end(argv, ranks, before=watch)
    if run.status != [128 + signal.SIGTERM] * ranks:
        return f"it ended with {run.status}: {run.output[-400:]!r}"
    with open(counter, encoding="utf-8") as f:
        num_after = len(f.read())
    if os.path.exists(f"{out}/round_0/train.ref.npz"):
        return f"it scored all rows first, {num_after} batches after the signal"
    return compare(run_to_end(argv, ranks), undisturbed, out)


def signal_in_scoring(counter: str):
    """SIGTERM before the third batch that a model scores; later ones are counted in a file."""
    import eval as evaluation  # noqa: A004

    original = evaluation.response_logps
    calls = 0

    def scored(*args, **options):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if calls >= 3:
            with open(counter, "a", encoding="utf-8") as f:
                f.write("x")
        return original(*args, **options)

    evaluation.response_logps = scored


# ---------------------------------------------------------------------------------------- memory

GROWTH = 5.0  # MiB that a process may grow between the first quarter of the rounds and the end

# Compiled matmuls that may stay in memory, so few that they are there after the first rounds. A
# run keeps up to 64 (distributed.limit_compiled_matmuls).
FEW_MATMULS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}


def memory_slope(workspace: Workspace, short: bool) -> Result:
    """many PPO rounds: resident memory is flat (below 5 MiB of growth over the last three quarters:
    a tokenizer that stays alive in each round would be 70 MiB) and the number of tokenizers
    alive is constant"""
    rounds = 40 if short else 200
    out = workspace.new_run()
    records = f"{workspace.folder}/memory"
    more = [f"--rounds={rounds}", "--max_rows=8", "--max_steps=1", "--keep_rounds=1"]
    more += [f"--eval_interval={rounds}", "--keep_last=1", "--max_response=4"]
    argv = workspace.args("ppo", out, *more)
    run = start(argv, env=FEW_MATMULS, before=lambda rank: record_memory(records, rounds // 20))
    run.wait(240)
    if run.status != [0]:
        return Result(0, 2, [f"{run.status} {run.output[-800:]}"])
    with open(records, encoding="utf-8") as f:
        seen = [json.loads(line) for line in f]
    quarter = seen[len(seen) // 4 :]
    growth = quarter[-1]["mib"] - quarter[0]["mib"]
    alive = {record["tokenizers"] for record in quarter}
    failures = []
    if growth > GROWTH:
        failures.append(f"{growth:.1f} MiB from round {quarter[0]['round']} to {rounds}")
    if len(alive) > 1:
        failures.append(f"from {min(alive)} to {max(alive)} tokenizers are alive")
    note = f"{rounds} rounds, {growth:+.1f} MiB, {max(alive)} tokenizers"
    return count(2, failures, note)


def record_memory(path: str, interval: int):
    """Write down, every `interval` rounds, the resident memory and the number of tokenizers."""
    fit = train.fit

    def fit_and_record(run, round_id, *args, **options):
        fit(run, round_id, *args, **options)
        if (round_id + 1) % interval:
            return
        gc.collect()
        with open("/proc/self/statm", encoding="utf-8") as f:
            pages = int(f.read().split()[1])
        alive = sum(isinstance(thing, tiktoken.Encoding) for thing in gc.get_objects())
        with open(path, "a", encoding="utf-8") as f:
            mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            record = {"round": round_id + 1, "mib": mib, "tokenizers": alive}
            f.write(json.dumps(record) + "\n")

    train.fit = fit_and_record


# ----------------------------------------------------------------------------------- environments

SECONDS = 4  # the setting `timeout` of runs in an odd environment

GOOD = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
# name -> (variables that differ; None: not set, what the line may say)
ODD_ENVIRONMENTS = {
    "no WORLD_SIZE": ({"WORLD_SIZE": None}, "WORLD_SIZE"),
    "no MASTER_ADDR": ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    "no MASTER_PORT": ({"MASTER_PORT": None}, "MASTER_PORT"),
    "no RANK": ({"RANK": None, "WORLD_SIZE": "2"}, "RANK"),
    "empty RANK": ({"RANK": ""}, "RANK"),
    "RANK is a text": ({"RANK": "first"}, "RANK"),
    "RANK is a float": ({"RANK": "0.0"}, "RANK"),
    "RANK is negative": ({"RANK": "-1"}, "RANK"),
    "RANK is WORLD_SIZE": ({"RANK": "1"}, "RANK"),
    "WORLD_SIZE is 0": ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    "WORLD_SIZE is a text": ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    "MASTER_PORT is a text": ({"MASTER_PORT": "http"}, "MASTER_PORT"),
    "MASTER_PORT is too high": ({"MASTER_PORT": "99999"}, "MASTER_PORT"),
    "MASTER_ADDR is unknown": (
        {"MASTER_ADDR": "nowhere.invalid", "RANK": "1", "WORLD_SIZE": "2"},
        "nowhere.invalid",
    ),
    "LOCAL_RANK is a text": ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    "the port is taken": ({"WORLD_SIZE": "2"}, "port"),
    "rank 1 never comes": ({"WORLD_SIZE": "2"}, "rank"),
    "rank 0 never comes": ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "rank"),
}


def environments(workspace: Workspace, short: bool) -> Result:
    """incomplete or odd distributed environments, a busy port, a rank that never comes: one line
    within `timeout`, and nothing is written"""
    chosen = pick(workspace, short, ODD_ENVIRONMENTS, 5)
    failures = []
    slowest = 0.0
    for name in chosen:
        problem, seconds = start_in(workspace, name)
        slowest = max(slowest, seconds)
        if problem:
            failures.append(f"{name}: {problem}")
    return count(len(chosen), failures, f"slowest {slowest:.1f} s, timeout {SECONDS} s")


def start_in(workspace: Workspace, name: str) -> tuple[str, float]:
    changes, word = ODD_ENVIRONMENTS[name]
    variables = GOOD | {"MASTER_PORT": str(free_port())} | changes
    env = {key: value for key, value in variables.items() if value is not None}
    out = workspace.new_run()
    argv = workspace.args("pretrain", out, f"--timeout={SECONDS}")
    with socket.socket() as taken:
        if name == "the port is taken":
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            env["MASTER_PORT"] = str(taken.getsockname()[1])
        start_time = time.time()
        run = start(argv, env=env)
        run.wait(4 * SECONDS + 10)
        seconds = time.time() - start_time
    problem = not_refused(run, word, word.lower())
    if not problem and seconds > SECONDS + 5:
        problem = f"it takes {seconds:.1f} s"
    if not problem and os.path.exists(f"{out}/metrics.jsonl"):
        problem = "it wrote to out_dir"
    return problem, seconds
