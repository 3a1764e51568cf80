"""Runs of train.py, made and broken by the hundred: each is forked from this process, which has imported everything and
run nothing, so a run of two ranks starts in a twentieth of a second instead of five.

    run = start(["config/x.py", "--max_steps=5"], ranks=2, fault=Fault("checkpoint.write", "kill", rank=1))
    run.wait() -> exit status of each rank;  run.said -> what they wrote
"""

import contextlib
import dataclasses
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

from safetensors import safe_open

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from nanospin import checkpoint  # noqa: E402
import conftest  # noqa: E402
from nanospin import elastic  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from data.files import sha256  # noqa: E402

LIMIT = 120  # seconds after which a run counts as hanging


@dataclasses.dataclass
class Fault:
    """Before the `call`-th call of the function `where`, as "checkpoint.write", a rank is hit by `what`: kill, hang, raise, full (no space left),
    or the name of a signal."""

    where: str
    what: str
    rank: int = 0
    call: int = 1

    def __str__(self):
        return f"{self.what} of rank {self.rank} in {self.where}, call {self.call}"

    def arm(self):
        module, _, path = self.where.partition(".")
        owner = importlib.import_module(module)
        *owners, name = path.split(".")
        for part in owners:
            owner = getattr(owner, part)
        good, calls = getattr(owner, name), [0]

        @functools.wraps(good)
        def faulty(*args, **options):
            calls[0] += 1
            if calls[0] == self.call:
                strike(self.what)
            return good(*args, **options)

        for holder in [owner] + [
            m
            for m in list(sys.modules.values())
            if getattr(m, "__file__", None) and m.__file__.startswith(ROOT)
        ]:
            if getattr(holder, name, None) is good:  # from x import name: everywhere
                setattr(holder, name, faulty)


def strike(what):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(10 * LIMIT)
    elif what == "raise":
        raise RuntimeError("an injected error")
    elif what == "full":
        raise OSError(28, "No space left on device")
    else:
        os.kill(os.getpid(), getattr(signal, what))


class Run:
    def __init__(self, pids, folder):
        self.pids, self.folder, self.status, self.began = (
            pids,
            folder,
            [None] * len(pids),
            time.time(),
        )

    def poll(self):
        """The exit status of each rank, None while it runs; of a killed one minus the signal."""
        for i, pid in enumerate(self.pids):
            if self.status[i] is None and (done := os.waitpid(pid, os.WNOHANG))[0]:
                self.status[i] = os.waitstatus_to_exitcode(done[1])
        return self.status

    def wait(self, limit=LIMIT):
        """The same when all have ended; ranks that have not after `limit` seconds are killed and count as "hung"."""
        while None in self.poll():
            if time.time() - self.began > limit:
                self.kill()
                self.poll_all()
                self.status = ["hung" if s == -9 else s for s in self.status]
                break
            time.sleep(0.005)
        return self.status

    def poll_all(self):
        while None in self.poll():
            time.sleep(0.002)

    def kill(self, number=signal.SIGKILL, ranks=None):
        for i in range(len(self.pids)) if ranks is None else ranks:
            if self.status[i] is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[i], number)

    @property
    def said(self):
        """Standard output and error of all ranks."""
        return "".join(
            open(os.path.join(self.folder, name), encoding="utf-8", errors="replace").read()
            for name in sorted(os.listdir(self.folder))
        )

    @property
    def err(self):
        return "".join(
            open(os.path.join(self.folder, name), encoding="utf-8", errors="replace").read()
            for name in sorted(os.listdir(self.folder))
            if name.startswith("err")
        )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, ranks=1, fault=None, env={}, main=None, before=None):
    """Begin train.py with some arguments on some ranks, without an agent that would end the others. main: another program's,
    called with argv; before(rank): called in each rank first. Returns a Run."""
    folder, pids = tempfile.mkdtemp(prefix="run"), []
    env = (
        dict(env)
        if ranks == 1
        else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        | dict(env)
    )
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            os.setsid()
            for fd, name in ((1, "out"), (2, "err")):
                os.dup2(
                    os.open(
                        os.path.join(folder, f"{name}{rank}"),
                        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                    ),
                    fd,
                )
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ |= env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            if before:
                before(rank)
            if fault and fault.rank == rank:
                fault.arm()
            code = elastic.run(main or train.main, argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Run(pids, folder)


def forget(run):
    shutil.rmtree(run.folder, ignore_errors=True)


class Left(BaseException):
    pass


def elastic(restarts=0, before=None, nodes=1, endpoint="127.0.0.1:0"):
    """A main for `start`: torchrun's own agent with its part of two workers, which are forked too."""

    def worker(argv):
        leave = os._exit

        def left(status):  # multiprocessing's workers return to the agent
            if threading.current_thread() is not threading.main_thread() or status:
                leave(status)
            raise Left

        os._exit = left
        if before:
            before(int(os.environ["RANK"]))
        try:
            sys.exit(elastic.run(train.main, argv))
        except Left:
            os._exit = leave

    def main(argv):
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        elastic_launch(
            LaunchConfig(
                min_nodes=nodes,
                max_nodes=nodes,
                nproc_per_node=2 // nodes,
                run_id="x",
                max_restarts=restarts,
                start_method="fork",
                rdzv_backend="c10d",
                rdzv_endpoint=endpoint,
                monitor_interval=0.05,
            ),
            worker,
        )(argv)

    return main


# ----------------------------------------------------------------------------------------------- small runs, and whether two are the same


TINY, TEMPLATE = conftest.TINY, "--template=Q: {prompt}\nA: "


class Place:
    """The scratch folder with data, base runs and undisturbed runs to compare with."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.n, self.whole = folder, random.Random(seed), 0, {}
        self.data, self.runs = (
            f"{folder}/data",
            {stage: f"{folder}/runs/{stage}" for stage in ("pretrain", "sft")},
        )
        made = start(
            [],
            main=lambda argv: conftest.make_runs(f"{folder}/runs", conftest.make_data(self.data)),
        )
        assert made.wait() == [0], made.said

    def new(self):
        self.n += 1
        return f"{self.folder}/out/{self.n}"

    def args(self, stage, out, *more):
        """A small run of a stage: two to four saves, evaluations between them."""
        common = [
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
            return ["--stage=pretrain", "--max_steps=6", "--dropout=0.1", *common, *TINY, *more]
        common += [
            f"--init={self.runs['sft' if stage != 'sft' else 'pretrain']}",
            TEMPLATE,
            "--max_response=16",
        ]
        if stage in ("sft", "preference"):
            return [f"--stage={stage}", "--max_steps=6", *common, *more]
        if stage == "ppo":
            return [
                "--stage=ppo",
                "--rounds=2",
                "--reward=data.pydocs.scorer:concrete",
                "--max_rows=16",
                *common,
                *more,
            ]
        teacher = (
            ["--players=data,teacher,self", f"--teacher={self.runs['pretrain']}"]
            if stage == "spin3"
            else []
        )
        return ["--stage=spin", "--rounds=2", "--max_steps=3", *common, *teacher, *more]

    def undisturbed(self, stage, ranks, *more):
        """Such a run that nothing happened to."""
        key = stage, ranks, more
        if key not in self.whole:
            run = go(self.args(stage, self.new(), *more), ranks)
            assert run.status == [0] * ranks, run.said
            self.whole[key] = f"{self.folder}/out/{self.n}"
            forget(run)
        return self.whole[key]


def small_parts(rank):
    rollout.PART = 16  # prompts: several parts a round


def go(argv, ranks=1, fault=None, before=lambda rank: None, **options):
    """A run to its end."""

    def first(rank):
        small_parts(rank)
        before(rank)

    run = start(argv, ranks, fault, before=first, **options)
    run.wait()
    return run


TIMES = ("seconds", "ms", "tokens_per_second", "mfu")


def numbers(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def difference(a, b):
    """What of two runs is not bit for bit the same: every logged number but the clock's, weights, optimizer, samples, rows; or ""."""
    if numbers(a) != numbers(b):
        return "logged numbers differ"
    one, two = checkpoint.latest(a), checkpoint.latest(b)
    if not two or os.path.relpath(one, a) != os.path.relpath(two, b):
        return f"newest checkpoints are {one} and {two}"
    if tensors_of(one) != tensors_of(two):
        return "weights or optimizer states differ"
    names = [
        f"{r}/{f}"
        for r in sorted(os.listdir(a))
        if r.startswith("round_")
        for f in sorted(os.listdir(f"{a}/{r}"))
        if f.endswith((".jsonl", ".npz"))
    ]
    other = [
        name
        for name in names
        if not os.path.exists(f"{b}/{name}") or sha256(f"{a}/{name}") != sha256(f"{b}/{name}")
    ]
    return f"files differ: {other}" if other else ""


def tensors_of(path):
    """{tensor's name and place: sha256} of a checkpoint."""
    found = {}
    for name in checkpoint.list_files(path):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(path, name), framework="np") as f:
                found |= {
                    (name, key): hashlib.sha256(f.get_tensor(key).tobytes()).hexdigest()
                    for key in f.keys()
                }
    return found
