"""One run per out_dir: rank 0 holds the file out_dir/lock while the run lasts.

The file names its owner. On the owner's machine it is seen at once whether that process still runs.
On another machine a newcomer watches for a while whether the owner touches the file. A run whose
lock is gone (the folder was removed or renamed) or belongs to another run stops.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time

from data.files import printable, require_regular
from nanospin import distributed

TOUCH_SECONDS = 5  # between two touches by the owner
WATCH_SECONDS = 20  # how long a newcomer watches a lock of another machine

held = None  # the Lock of this process, on rank 0 of a run


class Lock:
    def __init__(self, out_dir: str):
        self.out_dir = out_dir
        self.path = os.path.join(os.path.abspath(out_dir), "lock")
        self.owner = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": secrets.token_hex(8),
        }
        self.noticed = ""  # the problem that the thread has found
        self.released = threading.Event()

    def problem(self) -> str:
        """Why the run must stop, in one line, or ""."""
        try:
            with open(self.path, "rb") as f:
                owner, _ = read(f)
        except (FileNotFoundError, NotADirectoryError):
            return f"out_dir {self.out_dir} was removed or renamed during the run: the run stops"
        except OSError:
            return ""  # it cannot be read now, so nothing is known
        if owner.get("token") != self.owner["token"]:
            return f"out_dir {self.out_dir} was taken over by {name(owner)}: this run stops"
        return ""

    def look_after(self):
        """The thread: look every second whether the lock is still ours, and touch it."""
        touched = time.monotonic()
        while not self.noticed and not self.released.wait(1):
            self.noticed = self.problem()
            if not self.noticed and time.monotonic() - touched >= TOUCH_SECONDS:
                touched = time.monotonic()
                with contextlib.suppress(OSError):
                    os.utime(self.path)


def acquire(out_dir: str):
    """Take the lock of an existing folder, on rank 0. Exits with one line, which names the owner,
    if another run has it."""
    global held
    lock = Lock(out_dir)
    require_regular(lock.path)
    watched = None
    while True:
        with open_exclusively(lock.path, os.O_CREAT) as f:
            owner, state = read(f)
            if not owner and not is_cut_short(state[0]):
                raise SystemExit(
                    f"{lock.path} is not the lock of a run, so it is left alone: move it, or use "
                    "another out_dir"
                )
            if not state[0] or has_ended(owner) or state == watched:
                f.truncate(0)
                f.seek(0)
                f.write(json.dumps(lock.owner).encode() + b"\n")
                break
        if is_here(owner) or not watch(lock.path, owner, state):
            raise SystemExit(
                f"out_dir {out_dir} is in use by {name(owner)}; use another out_dir, or stop that "
                f"run (if there is none, remove {lock.path})"
            )
        watched = state
    if state[0] and owner.get("pid") != os.getpid():
        print(f"{out_dir}: took over the lock of {name(owner)}, which has ended", flush=True)
    held = lock
    threading.Thread(target=lock.look_after, name="lock", daemon=True).start()


def release():
    """Remove the lock if it is still this run's."""
    global held
    lock, held = held, None
    if lock:
        lock.released.set()
        with contextlib.suppress(OSError), open_exclusively(lock.path) as f:
            if read(f)[0].get("token") == lock.owner["token"]:
                os.unlink(lock.path)


def noticed() -> bool:
    """Whether there was a problem a second ago. It costs nothing."""
    return bool(held and held.noticed)


def problem() -> str:
    """Why this run must stop, in one line, or "". On other ranks than 0 always ""."""
    return held.problem() if held else ""


def check():
    """Exit with one line if this run must stop. All ranks call this together."""
    distributed.run_on_rank0(exit_if_lost)


def exit_if_lost():
    """`check` for rank 0 alone."""
    text = problem()
    if text:
        raise SystemExit(text)


@contextlib.contextmanager
def open_exclusively(path: str, flags: int = 0):
    """Open the lock file while no other process has it open so, where the file system has locks."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o644)
        with open(fd, "r+b") as f:
            with contextlib.suppress(OSError):
                fcntl.lockf(f, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.stat(path), os.fstat(fd))
            except FileNotFoundError:
                is_current = False  # its owner has removed it meanwhile: open the next one
            if is_current:
                yield f
                return


def watch(path: str, owner: dict, state: tuple) -> bool:
    """Watch another machine's lock. Returns whether its owner seems to have ended."""
    print(f"{path}: looks for {WATCH_SECONDS} s whether {name(owner)} is alive", flush=True)
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        distributed.heartbeat.touch()
        try:
            with open(path, "rb") as f:
                if read(f)[1] != state:
                    return False
        except FileNotFoundError:
            return True
    return True


def read(f) -> tuple[dict, tuple]:
    """(the owner that a lock file names, what changes when its owner touches it)."""
    content = f.read(10_000)
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        owner = None
    if not isinstance(owner, dict) or not {"host", "pid"} <= owner.keys():
        owner = {}
    return owner, (content, os.fstat(f.fileno()).st_mtime_ns)


def is_cut_short(content: bytes) -> bool:
    """Whether a lock file that names no owner is the beginning of one, as a full disk leaves it, or
    has nothing but zeros, as a loss of power does."""
    begin = b'{"host": "'
    return content[: len(begin)] == begin[: len(content)] or not content.strip(b"\0")


def name(owner: dict) -> str:
    if not owner:
        return "a run whose name was not written to the end"
    text = f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"
    return printable(text.replace("\n", " "))[:200]


def machine() -> str:
    """What a process id is unique in: a boot of a machine, and a container's process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str:
    """When a process started, in the kernel's unit; "" if it has ended. "?" without /proc."""
    try:
        if os.path.exists("/proc/self/stat"):
            with open(f"/proc/{pid}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()  # the program's name may have spaces
            return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except PermissionError:
        pass
    return "?"


def is_here(owner: dict) -> bool:
    """Whether the owner is a process of this machine."""
    return owner.get("machine") == machine() and type(owner.get("pid")) is int


def has_ended(owner: dict) -> bool:
    """Whether the owner was a process of this machine that has ended, or is this process."""
    if not is_here(owner):
        return False
    start = process_start(owner["pid"])
    return owner["pid"] == os.getpid() or not start or start != owner.get("process_start")
