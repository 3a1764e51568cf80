"""Start small runs of train.py by the hundred, break them, and compare them.

Each run is forked from this process, which has imported everything and computed nothing: a run of
two ranks starts in a twentieth of a second instead of five.

    fault = Fault("nanospin.checkpoint:write", "kill", rank=1)
    run = start(["config/x.py", "--max_steps=5"], ranks=2, fault=fault)
    run.wait()      # exit status of each rank
    run.output      # what they printed
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

# before torch is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

from safetensors import safe_open

import train
from data.files import sha256
from nanospin import checkpoint, elastic, rounds
from tests.conftest import ROOT, TEMPLATE, TINY, make_data, make_runs

LIMIT = 120  # seconds after which a run counts as hanging
CLOCK = ("seconds", "ms", "tokens_per_second", "mfu")  # metrics that depend on the machine


@dataclass
class Result:
    """What a section found."""

    held: int
    tried: int
    failures: list[str]  # a line for each case that did not hold
    note: str = ""  # what was measured


def count(tried: int, failures: list[str], note: str = "") -> Result:
    """The result of a section with one failure line per case."""
    return Result(tried - len(failures), tried, failures, note)


# ----------------------------------------------------------------------------------------- faults


@dataclass
class Fault:
    """Before call number `call` of a function, something happens to a rank.

    function: "module:function" or "module:Class.method".
    action: kill, hang, raise, full (no space left on the disk), or the name of a signal.
    delay: seconds between the call and a kill, in which the rank goes on.
    """

    function: str
    action: str
    rank: int = 0
    call: int = 1
    delay: float = 0.0

    def __str__(self):
        return f"{self.action} of rank {self.rank} in {self.function}, call {self.call}"

    def arm(self):

        def act(call):
            if call == self.call and self.delay:
                signal.setitimer(signal.ITIMER_REAL, self.delay)  # SIGALRM ends the process
            elif call == self.call:
                strike(self.action)

        before_calls(self.function, act)


def before_calls(function: str, act):
    """act(number of the call, from 1) before every call of a function, wherever a module of the
    project has imported it."""
    module, _, path = function.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def faulty(*args, **options):
        nonlocal calls
        calls += 1
        act(calls)
        return original(*args, **options)

    for holder in [owner, *project_modules()]:
        if getattr(holder, name, None) is original:
            setattr(holder, name, faulty)


def project_modules() -> list:
    """The imported modules whose files are in the repository."""
    found = []
    for module in list(sys.modules.values()):
        if (getattr(module, "__file__", None) or "").startswith(ROOT):
            found.append(module)
    return found


def strike(action: str):
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        time.sleep(10 * LIMIT)
    elif action == "raise":
        raise RuntimeError("an injected error")
    elif action == "full":
        raise OSError(28, "No space left on device")
    else:
        os.kill(os.getpid(), getattr(signal, action))


# ------------------------------------------------------------------------------------------- runs


class Run:
    """A started run: a process per rank, and a folder with what they print."""

    def __init__(self, pids: list[int], folder: str):
        self.pids = pids
        self.folder = folder
        # exit status of each rank: None while it runs, minus the signal that killed it
        self.status = [None] * len(pids)
        self.start_time = time.time()

    def poll(self) -> list:
        for i, pid in enumerate(self.pids):
            if self.status[i] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.status[i] = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, limit: float = LIMIT) -> list:
        """The status when all ranks have ended. Those that have not after `limit` seconds are
        killed, and their status is "hung"."""
        while None in self.poll():
            if time.time() - self.start_time > limit:
                self.kill()
                self.reap()
                self.status = ["hung" if s == -signal.SIGKILL else s for s in self.status]
                break
            time.sleep(0.005)
        return self.status

    def reap(self):
        """Wait for ranks that are about to end."""
        while None in self.poll():
            time.sleep(0.002)

    def kill(self, number=signal.SIGKILL, ranks=None):
        """Send a signal to some ranks, or to all."""
        for i in range(len(self.pids)) if ranks is None else ranks:
            if self.status[i] is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[i], number)

    @property
    def output(self) -> str:
        """Standard output and error of all ranks."""
        return self.read("")

    @property
    def errors(self) -> str:
        """Standard error of all ranks."""
        return self.read("err")

    def read(self, prefix: str) -> str:
        texts = []
        for name in sorted(os.listdir(self.folder)):
            if name.startswith(prefix):
                path = os.path.join(self.folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    texts.append(f.read())
        return "".join(texts)

    def forget(self):
        """Remove what it printed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def start(argv, ranks: int = 1, fault=None, env=None, main=None, before=None) -> Run:
    """Start train.py on some ranks, without an agent that would end the others.

    main: another program's, called with argv. before(rank) is called in each rank first.
    """
    folder = tempfile.mkdtemp(prefix="run")
    env = dict(env or {})
    if ranks > 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(free_port()))
        env.setdefault("WORLD_SIZE", str(ranks))
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            redirect_output(folder, rank)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
            # a pool whose thread is not in this process would wait for it for ever
            checkpoint.save_thread = ThreadPoolExecutor(1, thread_name_prefix="save")
            os.environ.update(env)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if before:
                before(rank)
            if fault and fault.rank == rank:
                fault.arm()
            code = elastic.run(main or train.main, argv)
        except BaseException:  # of `before`, or of the guard itself
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # closed, or its reader has left
                    stream.flush()
            os._exit(code)
    return Run(pids, folder)


def redirect_output(folder: str, rank: int):
    """Make this forked process a session of its own that prints to files and reads nothing."""
    os.setsid()
    for fd, name in ((1, "out"), (2, "err")):
        path = os.path.join(folder, f"{name}{rank}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ReturnToAgent(BaseException):
    """Raised instead of os._exit(0) in a worker that torchrun's agent has forked."""


def torchrun(max_restarts: int = 0, before=None, nodes: int = 1, endpoint: str = "127.0.0.1:0"):
    """A `main` for `start`: torchrun's agent, whose two workers, over all nodes, are forked."""

    def worker(argv):
        exit_process = os._exit

        def exit_or_return(status):
            if status or threading.current_thread() is not threading.main_thread():
                exit_process(status)
            raise ReturnToAgent  # the agent counts only a worker that returns as successful

        os._exit = exit_or_return
        if before:
            before(int(os.environ["RANK"]))
        try:
            sys.exit(elastic.run(train.main, argv))
        except ReturnToAgent:
            os._exit = exit_process

    def main(argv):
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        launch_config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=2 // nodes,
            run_id="x",
            max_restarts=max_restarts,
            start_method="fork",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            monitor_interval=0.05,
        )
        elastic_launch(launch_config, worker)(argv)

    return main


# ------------------------------------------------------------------------------------- small runs


class Workspace:
    """A scratch folder with data, two base runs, and undisturbed runs to compare with."""

    def __init__(self, folder: str, seed: int):
        self.folder = folder
        self.rng = random.Random(seed)
        self.num_runs = 0
        self.undisturbed_runs = {}  # (stage, ranks, arguments) -> run folder
        self.half_runs = {}  # the same, of runs that a signal has stopped
        self.data = f"{folder}/data"
        self.base_runs = {}
        for stage in ("pretrain", "sft"):
            self.base_runs[stage] = f"{folder}/runs/{stage}"

        def make(argv):
            make_runs(f"{folder}/runs", make_data(self.data))

        made = start([], main=make)
        assert made.wait() == [0], made.output

    def new_run(self) -> str:
        """The path of a run folder that does not exist yet."""
        self.num_runs += 1
        return f"{self.folder}/out/{self.num_runs}"

    def args(self, stage: str, out: str, *more: str) -> list[str]:
        """Arguments of a small run: two to four checkpoints, and evaluations between them.

        stage: a stage of train.py, spin2 (data, self) or spin3 (data, teacher, self).
        """
        args = [
            f"--out_dir={out}",
            f"--data={self.data}",
            "--device=cpu",
            "--eval_rows=8",
            "--save_interval=2",
            "--eval_interval=2",
            "--batch_size=8",
            "--gen_batch_size=8",
            "--lr=1e-3",
        ]
        if stage == "pretrain":
            return ["--stage=pretrain", "--max_steps=6", "--dropout=0.1", *args, *TINY, *more]
        init = self.base_runs["pretrain" if stage == "sft" else "sft"]
        args += [f"--init={init}", f"--template={TEMPLATE}", "--max_response=16"]
        if stage in ("sft", "preference"):
            args += [f"--stage={stage}", "--max_steps=6"]
        elif stage == "ppo":
            reward = "data.pydocs.scorer:concrete"
            args += ["--stage=ppo", "--rounds=2", f"--reward={reward}", "--max_rows=16"]
        else:
            args += ["--stage=spin", "--rounds=2", "--max_steps=3"]
        if stage == "spin3":
            args += ["--players=data,teacher,self", f"--teacher={self.base_runs['pretrain']}"]
        return [*args, *more]

    def undisturbed(self, stage: str, ranks: int, *more: str) -> str:
        """The folder of such a run that nothing happened to."""
        key = (stage, ranks, more)
        if key not in self.undisturbed_runs:
            out = self.new_run()
            run = run_to_end(self.args(stage, out, *more), ranks)
            assert run.status == [0] * ranks, run.output
            self.undisturbed_runs[key] = out
            run.forget()
        return self.undisturbed_runs[key]

    def half(self, stage: str, ranks: int, *more: str, function="train:lr_factor", call=2) -> str:
        """A fresh copy of such a run that SIGTERM has stopped, by default after its third step, so
        that it has checkpoints of steps 2 and 3."""
        key = (stage, ranks, more, function, call)
        if key not in self.half_runs:
            out = self.new_run()
            fault = Fault(function, "SIGTERM", 0, call)
            run = run_to_end(self.args(stage, out, *more), ranks, fault)
            assert run.status == [128 + signal.SIGTERM] * ranks, run.output
            self.half_runs[key] = out
            run.forget()
        out = self.new_run()
        shutil.copytree(self.half_runs[key], out)
        return out


def sample_in_small_parts(rank: int):
    """A `before`: samples are written down every 16 prompts, so that a round has several parts."""
    rounds.PART_SIZE = 16


def run_to_end(argv, ranks: int = 1, fault=None, before=None, **options) -> Run:
    """Start a run and wait for its end."""

    def prepare(rank):
        sample_in_small_parts(rank)
        if before:
            before(rank)

    run = start(argv, ranks, fault, before=prepare, **options)
    run.wait()
    return run


# -------------------------------------------------------------------------------------- comparing


def logged(out: str, kind: str, key: str) -> list:
    """The values of a key in the records of one kind of metrics.jsonl."""
    values = []
    for record in read_metrics(out):
        if record["kind"] == kind and key in record:
            values.append(record[key])
    return values


def read_metrics(out: str) -> list[dict]:
    """The records of metrics.jsonl, without what depends on the clock."""
    records = []
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            for name in CLOCK:
                record.pop(name, None)
            records.append(record)
    return records


def without_warnings(records: list[dict]) -> list[dict]:
    return [record for record in records if record["kind"] != "warning"]


def difference(a: str, b: str, warnings: bool = True) -> str:
    """What is not the same, to the last bit, in two runs, or "": logged numbers, weights, optimizer
    states, samples, ranked rows and reference log-probabilities.

    warnings: False if only one of them may have logged some.
    """
    logged_by_a, logged_by_b = read_metrics(a), read_metrics(b)
    if not warnings:
        logged_by_a, logged_by_b = without_warnings(logged_by_a), without_warnings(logged_by_b)
    if logged_by_a != logged_by_b:
        return "logged numbers differ"
    first, second = checkpoint.latest(a), checkpoint.latest(b)
    if not second or os.path.relpath(first, a) != os.path.relpath(second, b):
        return f"the latest checkpoints are {first} and {second}"
    if tensor_hashes(first) != tensor_hashes(second):
        return "weights or optimizer states differ"
    differing = []
    for name in collected_files(a):
        other = f"{b}/{name}"
        if not os.path.exists(other) or sha256(f"{a}/{name}") != sha256(other):
            differing.append(name)
    return f"files differ: {differing}" if differing else ""


def compare(run: Run, undisturbed: str, out: str, warnings: bool = True) -> str:
    """What went wrong in a run that should have ended as the undisturbed one, or ""."""
    if set(run.status) != {0}:
        return f"{run.status} {run.output[-2000:]}"
    return difference(undisturbed, out, warnings)


def not_refused(run: Run, *words: str) -> str:
    """What is wrong with a run that should have ended with one line of error, or "".

    words: at least one of them is in the line; none: any line will do. All ranks must have ended by
    themselves, with a status that is not 0.
    """
    if 0 in run.status or "hung" in run.status or min(run.status) < 0:
        return f"it ended with {run.status}: {run.output[-500:]!r}"
    lines = run.errors.splitlines()
    if len(lines) != 1:
        return f"{len(lines)} lines of error: ... {run.errors[-500:]!r}"
    if words and not any(word.lower() in lines[0].lower() for word in words):
        return f"none of {words} is in {lines[0]!r}"
    return ""


def attempt(case, *arguments) -> str:
    """What a case returns, "" or what went wrong. A case that raises has gone wrong: a run has left
    something that cannot be read."""
    try:
        problem = case(*arguments) or ""
        return " ".join(problem.split())[:900]
    except Exception as e:
        text = " ".join(str(e).split())[:200]
        return f"what is left cannot be checked: {type(e).__name__}: {text}"


def pick(workspace, short: bool, cases, n: int) -> list:
    """All cases, or n of them, which the seed chooses. cases: a list, or the keys of a table."""
    cases = list(cases)
    return sorted(workspace.rng.sample(cases, min(n, len(cases)))) if short else cases


def tree(folder: str) -> dict[str, str]:
    """{path: what is there} of everything in a folder: a hash, or where a link leads."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                found[path] = sha256(path)
            else:
                found[path] = "folder" if os.path.isdir(path) else "special"
    return found


def collected_files(out: str) -> list[str]:
    """The rows and arrays in a run's round folders, relative to the run."""
    files = []
    for folder in sorted(os.listdir(out)):
        if folder.startswith("round_"):
            for name in sorted(os.listdir(f"{out}/{folder}")):
                if name.endswith((".jsonl", ".npz")):
                    files.append(f"{folder}/{name}")
    return files


def tensor_hashes(path: str) -> dict[tuple, str]:
    """{(file, tensor): sha256} of a checkpoint."""
    hashes = {}
    for file in checkpoint.list_files(path):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(path, file), framework="np") as f:
                for name in f.keys():
                    tensor = f.get_tensor(name)
                    hashes[file, name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return hashes


def weights_differ(a: str, b: str) -> str:
    """ "weights differ" if the latest checkpoints of two runs have other weights, else ""."""
    hashes = [sha256(f"{checkpoint.latest(run)}/model.safetensors") for run in (a, b)]
    return "" if hashes[0] == hashes[1] else "weights differ"
