"""Starting and ending a run's ranks, on signals and failures too.

`run(main, argv)` is the entry point of a program. With one process it handles signals and errors.
With several, as torchrun starts them, the ranks share a key-value store. In it each rank leaves a
pulse twice a second, from a thread: when a rank dies or hangs, the others exit and name it.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data import cli
from data.files import one_line
from nanospin import distributed
from nanospin.distributed import heartbeat

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PULSE_INTERVAL = 0.5  # seconds
SILENT_PULSES = 20  # a rank that misses so many has stopped; code that holds the GIL delays them
ANSWER_TIMEOUT = 10.0  # seconds to wait for an answer of the store

# Words in the RuntimeError that a collective call raises when another rank is lost.
CONNECTION_WORDS = ("gloo", "NCCL", "Connection", "Timed out", "timeout", "peer")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
received_signals = []  # signals that asked this process to stop
interrupts = threading.Event()  # set within `interrupted_by_signals`


# ------------------------------------------------------------------------------ joining the ranks


@dataclass
class Environment:
    """The place of this process in its group, from torchrun's environment variables."""

    rank: int
    world_size: int
    address: str  # of rank 0's store, or of torchrun's agent
    port: int


def read_environment() -> Environment | None:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; None if this is the only process.

    Exits with one line if some of them are missing or wrong.
    """
    whole_number("LOCAL_RANK", 0, 2**31, required=False)
    if "RANK" not in os.environ:
        if whole_number("WORLD_SIZE", 1, 2**31, required=False) > 1:
            refuse_environment("RANK is not set, but WORLD_SIZE is above 1")
        return None
    world_size = whole_number("WORLD_SIZE", 1, 2**31)
    rank = whole_number("RANK", 0, world_size - 1)
    if not os.environ.get("MASTER_ADDR"):
        refuse_environment("RANK is set, but MASTER_ADDR is not")
    return Environment(
        rank, world_size, os.environ["MASTER_ADDR"], whole_number("MASTER_PORT", 1, 65535)
    )


def whole_number(name: str, least: int, most: int, required: bool = True) -> int:
    """An environment variable as a whole number in [least, most]; `least` if it is optional."""
    text = os.environ.get(name, "")
    if not text and not required:
        return least
    if not text:
        refuse_environment(f"RANK is set, but {name} is not")
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        refuse_environment(f"{name} must be a whole number from {least} to {most}, got {text!r}")
    return int(text)


def refuse_environment(problem: str):
    exit_each_rank(
        f"environment: {problem}; start several processes with torchrun, or unset its variables"
    )


def join_process_group(device, timeout: float):
    """Join torchrun's process group, if there is one. `timeout` is in seconds without progress.

    Besides the default group this makes a gloo group for the thread that writes checkpoints, and
    starts the threads that watch the other ranks.
    """
    environment = read_environment()
    if environment is None or dist.is_initialized():
        return
    with ended_by_signals():
        store = join_ranks(environment, device, timeout)
    start_watching(store.clone(), timeout, device)


@contextlib.contextmanager
def ended_by_signals():
    """While a rank waits for the others to start, a signal ends it at once: nothing is to be saved,
    and a wait inside torch would hear it only at its end."""
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) == handle_signal]
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    if handled and received_signals:
        raise SystemExit(128 + received_signals[-1])
    yield
    for number in handled:
        signal.signal(number, handle_signal)


def join_ranks(environment: Environment, device, timeout: float) -> dist.TCPStore:
    """Make the process groups when all ranks are there. Returns the store that they share."""
    store = open_store(environment, timeout)
    wait_for_ranks(store, environment, timeout)
    # The watcher ends the process first, with a better message.
    group_timeout = timedelta(seconds=2 * timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=group_timeout,
        device_id=device if device.type == "cuda" else None,
    )
    distributed.process_groups["saves"] = dist.new_group(backend="gloo", timeout=group_timeout)
    distributed.process_groups["store"] = store
    # Rank 0 serves the store. If it left before the others have joined, they would wait for hours.
    store.add("joined", 1)
    deadline = time.monotonic() + timeout
    world_size = environment.world_size
    while environment.rank == 0 and store.add("joined", 0) < world_size:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return store


def open_store(environment: Environment, timeout: float) -> dist.TCPStore:
    """The key-value store of this start, served by rank 0.

    torchrun's agent has a store too, but it outlives its workers: a restarted worker would read
    the addresses of dead ones. So rank 0 serves a new store for each start and writes its address
    to the agent's. Until a restart has replaced it, that address is stale: nobody answers at it,
    or another start does.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return open_store_of_agent(environment, timeout)
    address, port = environment.address, environment.port
    if environment.rank != 0:
        return connect_to_store(address, port, timeout)
    try:
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as e:
        text = f"cannot serve a store at MASTER_ADDR {address}, MASTER_PORT {port}"
        if "EADDRINUSE" in str(e):
            text = f"MASTER_PORT {port} is in use by another program; choose another one"
        exit_each_rank(text)


def connect_to_store(address: str, port: int, timeout: float) -> dist.TCPStore:
    """Connect to a store. Exits with one line if none answers within `timeout` seconds.

    First wait until somebody listens: TCPStore prints pages if nobody does. Then connect in a
    thread: TCPStore waits for ever if a program listens that is not a store.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        exit_each_rank(f"rank 0 did not answer at {address}:{port} within {timeout:.0f} seconds")
    found = []

    def connect():
        with contextlib.suppress(dist.DistError):
            found.append(dist.TCPStore(address, port, is_master=False, wait_for_workers=False))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if not found:
        exit_each_rank(f"what listens at {address}:{port} is not the store of rank 0")
    return found[0]


def open_store_of_agent(environment: Environment, timeout: float) -> dist.TCPStore:
    """`open_store` for a process that torchrun has started."""
    address, port = environment.address, environment.port
    agent_store = connect_to_store(address, port, timeout)
    if environment.rank != 0:
        agent_store.set_timeout(timedelta(seconds=timeout))
        try:
            return find_store(agent_store, time.monotonic() + timeout)
        except dist.DistError:
            exit_each_rank(f"rank 0 did not start within {timeout:.0f} seconds")
    host = own_address(address, port)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    name = f"{store.host}:{store.port}:{time.time_ns()}"
    store.set("name", name)
    agent_store.set("nanospin", name)
    return store


def wait_for_ranks(store, environment: Environment, timeout: float):
    """Wait until every rank has opened the store. After `timeout` seconds each rank that is there
    exits with a line that says which are not. Rank 0 decides."""
    names = [f"here/{rank}" for rank in range(environment.world_size)]
    deadline = time.monotonic() + timeout
    try:
        store.set(names[environment.rank], "")
        while not store.check(["all here"]):
            if environment.rank == 0 and store.check(names):
                store.set("all here", "")
            elif environment.rank == 0 and time.monotonic() > deadline:
                text = describe_missing(store, names, timeout)
                store.set("missing", text)
                time.sleep(1)  # the others read it before the store is gone
                exit_each_rank(text)
            elif environment.rank != 0 and store.check(["missing"]):
                exit_each_rank(store.get("missing").decode())
            else:
                time.sleep(0.02)
    except dist.DistError:
        exit_each_rank("rank 0 is gone, and the store with it")


def describe_missing(store, names: list[str], timeout: float) -> str:
    """Which of the ranks have not started, in one line."""
    missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
    came = len(names) - len(missing)
    listed = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return f"{came} of {len(names)} ranks came within {timeout:.0f} seconds; missing: {listed}"


def exit_each_rank(text: str):
    """Exit with one line that each rank prints: they have no store yet to agree who does."""
    print(one_line(text), file=sys.stderr, flush=True)
    raise SystemExit(1)


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
    exit_each_rank("could not connect to the store of rank 0")


# ------------------------------------------------------------------------------- running the main


def run(main, argv) -> int:
    """Run main(argv) as a program. Returns the exit status, or exits with it if there are ranks.

    Signals stop the run after the current step. An error that the user can fix (SystemExit with a
    text, a full disk) is one line, printed by one rank. So is the loss of another rank. A console
    that was closed does not end the run.
    """
    faulthandler.enable(2)  # a crash of native code prints the line of Python that called it
    with cli.guarded_console(on_closed=cli.go_on_without):
        for number in STOP_SIGNALS:
            # nohup starts a run with SIGHUP ignored
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handle_signal)
        status, lost_ranks = run_main(main, argv)
        if dist.is_initialized():
            # Not sys.exit: gloo's threads sometimes abort an interpreter that shuts down.
            leave(status, lost_ranks)
    return status


def run_main(main, argv) -> tuple[int, bool]:
    """Call main(argv) and report its error. Returns (exit status, whether a rank was lost)."""
    try:
        read_environment()
        main(argv)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0, False
        print_error_once(str(e.code))
        return 1, False
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, False
    except BaseException as e:
        if is_connection_error(e):
            print_error_once(describe_broken_connection())
            return 1, True
        text = cli.describe_error(e)
        if text and not is_users_error(e):
            print_error_once(f"{text}; everything saved before is intact")
        else:
            cli.print_traceback(e)
        return 1, False
    return 0, False


def is_users_error(error: BaseException) -> bool:
    """Whether an exception went through code that is neither ours nor an installed package's, such
    as a reward function: then its traceback is shown."""
    installed = (ROOT + os.sep, sys.prefix + os.sep, sys.base_prefix + os.sep, "<frozen ")
    frames = traceback.walk_tb(error.__traceback__)
    return not all(frame.f_code.co_filename.startswith(installed) for frame, _ in frames)


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective call failed because another rank is gone.

    It is an error of torch.distributed, or a RuntimeError that was raised inside of it: gloo raises
    nothing better. The same words in an error of other code, such as a reward function's, do not
    count.
    """
    if distributed.world_size() == 1:
        return False
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    folder = os.path.dirname(dist.__file__)
    frames = traceback.walk_tb(error.__traceback__)
    raised_inside = any(f.f_code.co_filename.startswith(folder + os.sep) for f, _ in frames)
    return raised_inside and any(word in str(error) for word in CONNECTION_WORDS)


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


class Interrupted(BaseException):
    """A signal came within `interrupted_by_signals`."""


@contextlib.contextmanager
def interrupted_by_signals():
    """A signal raises Interrupted here, as Ctrl-C raises KeyboardInterrupt in other programs: a
    function of the user may wait for processes that the signal has ended."""
    interrupts.set()
    try:
        yield
    finally:
        interrupts.clear()


def handle_signal(number, frame):
    """Note the signal; `exit_if_signalled` acts on it. A second Ctrl-C stops immediately."""
    if number == signal.SIGINT and signal.SIGINT in received_signals:
        raise KeyboardInterrupt
    received_signals.append(number)
    if distributed.rank() == 0:
        text = f"{signal.Signals(number).name}: stopping after the current step"
        if number == signal.SIGINT:
            text += "; press Ctrl-C again to stop immediately"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(1, f"{text}\n".encode())  # not print, which the signal may have interrupted
    if interrupts.is_set():
        raise Interrupted


def hold_signals():
    """Before a scorer forks a process: a signal waits until `release_signals`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release_signals():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def restore_signals():
    """In the forked process: a signal ends it, as by itself. If it only noted the signal, who tells
    a pool to end would wait for ever."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == handle_signal:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    release_signals()


os.register_at_fork(
    before=hold_signals, after_in_parent=release_signals, after_in_child=restore_signals
)


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
    first = os.environ.get("LOCAL_RANK", "0") in ("", "0")
    if distributed.process_groups:
        store = distributed.process_groups["store"]
        key = hashlib.sha256(one_line(text).encode()).hexdigest()
        rank = str(distributed.rank())
        try:
            first = store.compare_set(key, "", rank).decode() == rank
        except dist.DistError:  # rank 0 is gone, and the store with it
            first = True
    if first:
        print(one_line(text), file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- watching the others


class Watch:
    """What the watcher threads know about this rank."""

    def __init__(self, timeout: float):
        self.timeout = timeout  # seconds without progress
        self.idle = 0.0  # seconds since the last progress
        self.silent = 0.0  # seconds since this rank's last pulse: then it waits for the store
        self.place = None  # `current_location`, once there has been no progress for long


def start_watching(store, timeout: float, device):
    watch = Watch(timeout)
    for function, args in ((count_seconds, (watch,)), (watch_ranks, (watch, store, device))):
        threading.Thread(target=function, args=args, daemon=True).start()


def count_seconds(watch: Watch):
    """A thread that counts how long nothing has happened. It never waits for the store: if rank 0,
    which serves the store, is stopped, only this thread can end the process.

    Time in which it did not run does not count: the job was suspended.
    """
    touches = heartbeat.touches
    while True:
        time.sleep(PULSE_INTERVAL)
        watch.silent += PULSE_INTERVAL
        watch.idle += PULSE_INTERVAL
        if heartbeat.touches != touches:
            touches, watch.idle = heartbeat.touches, 0.0
        hangs = watch.idle > watch.timeout and watch.silent > ANSWER_TIMEOUT
        if hangs and not heartbeat.leaving:
            why = f"no progress for {watch.timeout:.0f} seconds, in {heartbeat.stage}"
            text = f"rank {distributed.rank()}: {why}, and rank 0 does not answer"
            # not print_error_once, which asks the store
            print(one_line(text), file=sys.stderr, flush=True)
            os._exit(1)


def watch_ranks(watch: Watch, store, device):
    """The watcher thread: send this rank's pulse, and end the process when rank 0 is gone, or when
    no rank has made progress for `timeout` seconds."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    try:
        while True:
            send_pulse(store, watch)
            if watch.idle <= watch.timeout / 2:
                watch.place = None
            elif watch.place is None:
                watch.place = current_location()
            if watch.idle > watch.timeout:
                before, now = two_pulses(store, SILENT_PULSES, watch)
                if not is_progress(before, now, watch.timeout):
                    why = f"no progress for {watch.timeout:.0f} seconds"
                    exit_with_error(describe_lost_ranks(why, before, now))
    except dist.DistError:
        time.sleep(5)
        exit_with_error("rank 0 is gone, and the store with it")


def send_pulse(store, watch: Watch):
    """Write what this rank is doing to the store, and sleep until the next pulse is due."""
    waiting, location = watch.place or (True, heartbeat.stage)
    pulse = {
        "time": time.monotonic(),
        "idle": watch.idle,
        "collectives": heartbeat.collectives,
        "waiting": waiting,
        "location": location,
    }
    store.set(f"pulse/{distributed.rank()}", json.dumps(pulse))
    watch.silent = 0.0
    time.sleep(PULSE_INTERVAL)


def read_pulses(store) -> dict[int, dict]:
    """{rank: its latest pulse}."""
    pulses = {}
    for rank in range(distributed.world_size()):
        if store.check([f"pulse/{rank}"]):
            pulses[rank] = json.loads(store.get(f"pulse/{rank}"))
    return pulses


def two_pulses(store, wait: int, watch: Watch | None = None) -> tuple[dict, dict]:
    """`read_pulses`, and again `wait` pulses later. The watcher thread passes its Watch, and sends
    this rank's pulse meanwhile."""
    before = read_pulses(store)
    for _ in range(wait):
        if watch:
            send_pulse(store, watch)
        else:
            time.sleep(PULSE_INTERVAL)
    return before, read_pulses(store)


def has_stopped(rank: int, before: dict, now: dict) -> bool:
    """Whether a rank has sent no pulse between two looks."""
    return rank in before and now[rank]["time"] == before[rank]["time"]


def is_progress(before: dict, now: dict, timeout: float) -> bool:
    """Whether a rank that lives has made progress within `timeout` seconds. The others may wait for
    it: it may have more to score."""
    for rank, pulse in now.items():
        if not has_stopped(rank, before, now) and pulse["idle"] <= timeout:
            return True
    return False


def exit_with_error(text: str):
    if not heartbeat.leaving:
        print_error_once(text)
        sys.stderr.flush()
        os._exit(1)


def describe_broken_connection() -> str:
    """The line of a rank whose collective call has failed."""
    why = "the connection broke"
    try:
        before, now = two_pulses(distributed.process_groups["store"].clone(), 3)
    except dist.DistError:
        return f"{why}: rank 0 is gone, and the store with it"
    return describe_lost_ranks(why, before, now)


def describe_lost_ranks(why: str, before: dict, now: dict) -> str:
    """A line that names the ranks that are gone, or else those that the others wait for: they have
    made fewer collective calls, or are elsewhere."""
    most = max(pulse["collectives"] for pulse in now.values())
    gone = []
    behind = []
    for rank, pulse in now.items():
        text = f"rank {rank} ({pulse['location']})"
        if has_stopped(rank, before, now) and rank != distributed.rank():
            gone.append(text)
        if pulse["collectives"] < most or not pulse["waiting"]:
            behind.append(text)
    if gone:
        return f"{why}: lost {', '.join(gone)}"
    if behind:
        return f"{why}: the other ranks wait for {', '.join(behind)}"
    return f"{why}, in {heartbeat.stage}"


def current_location() -> tuple[bool, str]:
    """(whether this rank waits for other ranks, its stage and line of code).

    Looks at the main thread, or at the saving thread while the main thread waits for a save. Only
    for a thread that seems to hang: the frames of a thread that runs may be gone before they are
    read, and CPython 3.11 then crashes (python/cpython#111363).
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
