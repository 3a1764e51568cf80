"""Runs of train.py, made and broken by the hundred: each is forked from this process, which has imported everything and
run nothing, so a run of two ranks starts in a twentieth of a second instead of five.

    run = start(["config/x.py", "--max_steps=5"], ranks=2, fault=Fault("checkpoint.write", "kill", rank=1))
    run.wait() -> exit status of each rank;  run.said -> what they wrote
"""
import contextlib
import dataclasses
import functools
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import parallel     # noqa: E402
import train        # noqa: E402

LIMIT = 120         # seconds after which a run counts as hanging


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
        for holder in [owner] + [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) and m.__file__.startswith(ROOT)]:
            if getattr(holder, name, None) is good:         # from x import name: everywhere
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
        self.pids, self.folder, self.status, self.began = pids, folder, [None] * len(pids), time.time()

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
        return "".join(open(os.path.join(self.folder, name), encoding="utf-8", errors="replace").read() for name in sorted(os.listdir(self.folder)))

    @property
    def err(self):
        return "".join(open(os.path.join(self.folder, name), encoding="utf-8", errors="replace").read() for name in sorted(os.listdir(self.folder)) if name.startswith("err"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, ranks=1, fault=None, env={}, main=None, before=None):
    """Begin train.py with some arguments on some ranks, without an agent that would end the others. main: another program's,
    called with argv; before(rank): called in each rank first. Returns a Run."""
    folder, pids = tempfile.mkdtemp(prefix="run"), []
    env = dict(env) if ranks == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)} | dict(env)
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
                os.dup2(os.open(os.path.join(folder, f"{name}{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ |= env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            if before:
                before(rank)
            if fault and fault.rank == rank:
                fault.arm()
            code = parallel.run(main or train.main, argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Run(pids, folder)


def forget(run):
    shutil.rmtree(run.folder, ignore_errors=True)
