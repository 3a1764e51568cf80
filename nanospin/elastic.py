"""Starting and ending a run's ranks, on signals and failures too.

`run(main, argv)` is the entry point of a program. With one process it handles signals and errors.
With several, as torchrun starts them, the ranks share a key-value store. In it each rank leaves a
pulse twice a second, from a thread: when a rank dies or hangs, the others exit and name it.
"""

import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from nanospin import distributed
from nanospin.distributed import heartbeat

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PULSE_INTERVAL = 0.5  # seconds

# Errors of the file system that are reported in one line: disk full, no permission, read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

# Words in the RuntimeError that gloo or NCCL raises when another rank is lost.
CONNECTION_WORDS = ("gloo", "NCCL", "Connection", "Timed out", "timeout", "peer")

received_signals = []  # signals that asked this process to stop


# ------------------------------------------------------------------------------ joining the ranks


def join_process_group(device, timeout: float):
    """Join torchrun's process group, if there is one. `timeout` is in seconds without progress.

    Besides the default group this makes a gloo group for the thread that writes checkpoints, and
    starts the thread that watches the other ranks.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    store = open_store(rank, timeout)
    # The watcher ends the process first, with a better message.
    group_timeout = timedelta(seconds=2 * timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=group_timeout,
        device_id=device if device.type == "cuda" else None,
    )
    distributed.process_groups["saves"] = dist.new_group(backend="gloo", timeout=group_timeout)
    distributed.process_groups["store"] = store
    # Rank 0 serves the store. If it left before the others have joined, they would wait for hours.
    store.add("joined", 1)
    deadline = time.monotonic() + timeout
    while rank == 0 and store.add("joined", 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    args = (store.clone(), timeout, device)
    threading.Thread(target=watch_ranks, args=args, daemon=True).start()


def open_store(rank: int, timeout: float) -> dist.TCPStore:
    """The key-value store of this start, served by rank 0.

    torchrun's agent has a store too, but it outlives its workers: a restarted worker would read
    the addresses of dead ones. So rank 0 serves a new store for each start and writes its address
    to the agent's. Until a restart has replaced it, that address is stale: nobody answers at it,
    or another start does.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    agent_store = dist.TCPStore(address, port, is_master=False)
    if rank != 0:
        return find_store(agent_store, time.monotonic() + timeout)
    host = own_address(address, port)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    name = f"{store.host}:{store.port}:{time.time_ns()}"
    store.set("name", name)
    agent_store.set("nanospin", name)
    return store


def own_address(address: str, port: int) -> str:
    """This machine's address, as seen by the machines that reach the master at `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, port))
        return s.getsockname()[0]


def find_store(agent_store, deadline: float) -> dist.TCPStore:
    """Connect to the store that rank 0 of this start serves."""
    while time.monotonic() < deadline:
        name = agent_store.get("nanospin").decode()
        host, port, _ = name.rsplit(":", 2)
        with contextlib.suppress(dist.DistError):
            store = dist.TCPStore(
                host,
                int(port),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=2),
            )
            if store.get("name").decode() == name:
                store.set_timeout(timedelta(minutes=5))
                return store
        time.sleep(0.1)
    raise SystemExit("could not connect to the store of rank 0")


# ------------------------------------------------------------------------------- running the main


def run(main, argv) -> int:
    """Run main(argv) as a program. Returns the exit status, or exits with it if there are ranks.

    Signals stop the run after the current step. An error that the user can fix (SystemExit with a
    text, a full disk) is one line, printed by one rank. So is the loss of another rank.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handle_signal)
    status, lost_ranks = run_main(main, argv)
    if dist.is_initialized():
        # Not sys.exit: gloo's threads sometimes abort an interpreter that shuts down.
        leave(status, lost_ranks)
    return status


def run_main(main, argv) -> tuple[int, bool]:
    """Call main(argv) and report its error. Returns (exit status, whether a rank was lost)."""
    try:
        main(argv)
    except SystemExit as e:
        if isinstance(e.code, int):
            return e.code, False
        if isinstance(e.code, str):
            print_error_once(e.code)
        return (1 if e.code else 0), False
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, False
    except OSError as e:
        if e.errno in DISK_ERRORS:
            print_error_once(
                f"{e.filename or 'a file'}: {e.strerror}; everything saved before is intact"
            )
        else:
            traceback.print_exc()
        return 1, False
    except Exception as e:
        if is_connection_error(e):
            print_error_once(describe_lost_ranks())
            return 1, True
        traceback.print_exc()
        return 1, False
    return 0, False


def is_connection_error(error: Exception) -> bool:
    """Whether a collective call failed because another rank is gone."""
    if distributed.world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return any(word in str(error) for word in CONNECTION_WORDS)


def leave(status: int, lost_ranks: bool):
    """Exit this rank. After success all ranks leave together."""
    heartbeat.leaving = True
    if status == 0:
        dist.barrier()
        dist.destroy_process_group()
    elif not lost_ranks:
        leave_last()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_last():
    """On rank 0, which serves the store, wait up to five seconds for the others to leave."""
    store = distributed.process_groups["store"]
    with contextlib.suppress(dist.DistError):
        store.set(f"left/{distributed.rank()}", "")
        if distributed.rank() != 0:
            return
        deadline = time.monotonic() + 5
        names = [f"left/{r}" for r in range(distributed.world_size())]
        while time.monotonic() < deadline and not store.check(names):
            time.sleep(0.02)


def handle_signal(number, frame):
    """Note the signal; `exit_if_signalled` acts on it. A second Ctrl-C stops immediately."""
    if number == signal.SIGINT and signal.SIGINT in received_signals:
        raise KeyboardInterrupt
    received_signals.append(number)
    if distributed.rank() == 0:
        text = f"{signal.Signals(number).name}: stopping after the current step"
        if number == signal.SIGINT:
            text += "; press Ctrl-C again to stop immediately"
        os.write(1, f"{text}\n".encode())  # not print, which the signal may have interrupted


def exit_if_signalled():
    """End all ranks if one has received a signal, with the status that a shell would give it.

    Call it on all ranks, after a save or after a part of the sampling has been written.
    """
    own = received_signals[-1] if received_signals else 0
    number = max(distributed.all_gather_object(own))
    if number:
        if distributed.rank() == 0:
            name = signal.Signals(number).name
            print(f"{name}: stopped; run the same command to continue from here", flush=True)
        raise SystemExit(128 + number)


def print_error_once(text: str):
    """Print an error to stderr, from the first rank that has it. Always one printable line."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if distributed.process_groups:
        store = distributed.process_groups["store"]
        key = hashlib.sha256(text.encode()).hexdigest()
        rank = str(distributed.rank())
        try:
            first = store.compare_set(key, "", rank).decode() == rank
        except dist.DistError:  # rank 0 is gone, and the store with it
            first = True
    if first:
        printable = [c if c.isprintable() else ascii(c)[1:-1] for c in text]
        print("".join(printable), file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- watching the others


def watch_ranks(store, timeout: float, device):
    """The watcher thread: send this rank's pulse, and end the process when there has been no
    progress for `timeout` seconds or when rank 0 is gone."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    try:
        while True:
            send_pulse(store)
            if time.monotonic() - heartbeat.since > timeout:
                why = f"no progress for {timeout:.0f} seconds"
                exit_with_error(describe_lost_ranks(why, store))
    except dist.DistError:
        time.sleep(5)
        exit_with_error("rank 0 is gone, and the store with it")


def send_pulse(store):
    """Write where this rank is to the store, and sleep until the next pulse is due."""
    waiting, location = current_location()
    pulse = {"time": time.monotonic(), "waiting": waiting, "location": location}
    store.set(f"pulse/{distributed.rank()}", json.dumps(pulse))
    time.sleep(PULSE_INTERVAL)


def read_pulses(store) -> dict[int, dict]:
    """{rank: its latest pulse}."""
    pulses = {}
    for rank in range(distributed.world_size()):
        if store.check([f"pulse/{rank}"]):
            pulses[rank] = json.loads(store.get(f"pulse/{rank}"))
    return pulses


def exit_with_error(text: str):
    if not heartbeat.leaving:
        print_error_once(text)
        sys.stderr.flush()
        os._exit(1)


def describe_lost_ranks(why: str = "the connection broke", watcher_store=None) -> str:
    """A line that names the ranks that are gone, or else those that the others wait for.

    It compares two pulses of each rank. The watcher thread passes its store, and goes on sending
    this rank's pulse meanwhile.
    """
    try:
        store = watcher_store or distributed.process_groups["store"].clone()
        before = read_pulses(store)
        for _ in range(3):
            if watcher_store:
                send_pulse(store)
            else:
                time.sleep(PULSE_INTERVAL)
        now = read_pulses(store)
    except dist.DistError:
        return f"{why}: rank 0 is gone, and the store with it"
    gone = []
    behind = []
    for rank, pulse in now.items():
        text = f"rank {rank} ({pulse['location']})"
        stopped = rank in before and pulse["time"] == before[rank]["time"]
        if stopped and rank != distributed.rank():
            gone.append(text)
        if not pulse["waiting"]:
            behind.append(text)
    if gone:
        return f"{why}: lost {', '.join(gone)}"
    if behind:
        return f"{why}: the other ranks wait for {', '.join(behind)}"
    return f"{why}: all ranks wait, in {heartbeat.stage}"


def current_location() -> tuple[bool, str]:
    """(whether this rank waits for other ranks, its stage and line of code).

    Looks at the main thread, or at the saving thread while the main thread waits for a save.
    """
    frames = sys._current_frames()
    thread_id = threading.main_thread().ident
    if frames[thread_id].f_code.co_filename == threading.__file__:
        for thread in threading.enumerate():
            if thread.name.startswith("save") and thread.ident in frames:
                thread_id = thread.ident
                break
    frame = frames[thread_id]
    waiting = gpu_is_busy() or frame.f_code.co_filename in (
        dist.distributed_c10d.__file__,
        distributed.__file__,
    )
    for caller, line_number in traceback.walk_stack(frame):
        path = caller.f_code.co_filename
        if is_project_file(path):
            return waiting, f"{heartbeat.stage}, {os.path.relpath(path, ROOT)}:{line_number}"
    return waiting, heartbeat.stage


def gpu_is_busy() -> bool:
    """Whether this rank's GPU has work left. It may be a collective call that waits for another
    rank, and any line that reads a result waits for it. A rank that hangs elsewhere has none."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    return not torch.cuda.default_stream().query()


def is_project_file(path: str) -> bool:
    """Whether a hang report names lines of this file: one of the scripts in the root folder or of
    nanospin/, except those whose functions wait for other ranks."""
    folder, name = os.path.split(path)
    if folder == os.path.join(ROOT, "nanospin"):
        return name not in ("distributed.py", "elastic.py")
    return folder == ROOT
