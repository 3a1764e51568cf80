"""Coming, going, being lost: what starts the ranks of a run, ends them together, and names one that the others wait for.

One process has signals alone. Several, as torchrun starts them, share a store, where each leaves a sign of life twice a second.
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

import torch.distributed as dist

from nanospin import distributed


def join_process_group(device, timeout):
    """Join torchrun's process group if there is one, and beside it make the one that saves use, and the pulse.

    torchrun's agent keeps a store that outlives its workers: a restarted one would be handed the dead ones' addresses. So
    rank 0 opens a store for each start and leaves its address with the agent's; an address that nobody answers at, or that
    another start answers at, is an old one.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent = dist.TCPStore(address, port, is_master=False)
        if rank == 0:
            store = dist.TCPStore(
                own_address(address, port), 0, is_master=True, wait_for_workers=False
            )
            name = f"{store.host}:{store.port}:{time.time_ns()}"
            store.set("name", name)
            agent.set("nanospin", name)
        else:
            store = find_store(agent, time.monotonic() + timeout)
    else:
        store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=2 * timeout),
    )
    distributed.process_groups["saves"] = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=2 * timeout)
    )
    distributed.process_groups["store"] = store
    store.add(
        "joined", 1
    )  # rank 0 has the store: should it leave before the others are in, they would wait for hours
    deadline = time.monotonic() + timeout
    while rank == 0 and store.add("joined", 0) < world and time.monotonic() < deadline:
        time.sleep(0.01)
    threading.Thread(target=watch_ranks, args=(store.clone(), timeout), daemon=True).start()


def own_address(address, port):
    """The address by which the others, who reach the master at `address`, reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, port))
        return s.getsockname()[0]


def find_store(agent, deadline):
    """The store of rank 0 of this start."""
    while time.monotonic() < deadline:
        name = agent.get("nanospin").decode()
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
    raise SystemExit("rank 0 opened no store")


def run(main, argv):
    """main(argv) as a program: heed signals, run, leave. Returns the exit status. What a user can mend is one line, said
    by one rank; so is the loss of another rank."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handle_signal)
    status, alone = 1, False
    try:
        main(argv)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1 if e.code else 0
        if isinstance(e.code, str):
            print_error_once(e.code)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            traceback.print_exc()
        else:
            print_error_once(
                f"{e.filename or 'a file'}: {e.strerror}; what was saved before is there"
            )
    except Exception as e:
        if (
            distributed.world_size() > 1
            and isinstance(e, RuntimeError)
            and any(
                word in str(e)
                for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout", "peer")
            )
        ):
            print_error_once(describe_lost_ranks())
            alone = True
        else:
            traceback.print_exc()
    if dist.is_initialized():  # gloo's threads sometimes abort an interpreter that winds down
        distributed.heartbeat["leaving"] = True
        if status == 0:
            dist.barrier()
            dist.destroy_process_group()
        elif not alone:
            leave_last()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def leave_last():
    """Rank 0, which holds the store, stays some seconds for the others to leave."""
    with contextlib.suppress(dist.DistError):
        distributed.process_groups["store"].set(f"left/{distributed.rank()}", "")
        deadline = time.monotonic() + 5 * (distributed.rank() == 0)
        while time.monotonic() < deadline and not distributed.process_groups["store"].check(
            [f"left/{r}" for r in range(distributed.world_size())]
        ):
            time.sleep(0.02)


received_signals = []  # what asked this process to leave


def handle_signal(number, frame):
    """A signal is heard at the end of the step or of the part that is being sampled; a second Ctrl-C ends at once."""
    if number == signal.SIGINT and signal.SIGINT in received_signals:
        raise KeyboardInterrupt
    received_signals.append(number)
    if distributed.rank() == 0:  # not by print, which the signal may have interrupted
        os.write(
            1,
            f"{signal.Signals(number).name}: leaving after this step{'; once more to leave at once' if number == signal.SIGINT else ''}\n".encode(),
        )


def exit_if_signalled():
    """End all ranks if one was sent a signal, with the status that a shell gives it."""
    number = max(distributed.all_gather_object(received_signals[-1] if received_signals else 0))
    if number:
        if distributed.rank() == 0:
            print(
                f"{signal.Signals(number).name}: nothing is lost; the same command goes on from here",
                flush=True,
            )
        raise SystemExit(128 + number)


def print_error_once(text):
    """An error's line, on standard error, from the first rank that comes with it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if distributed.process_groups:
        try:
            me = f"{distributed.rank()}"
            first = (
                distributed.process_groups["store"]
                .compare_set(hashlib.sha256(text.encode()).hexdigest(), "", me)
                .decode()
                == me
            )
        except dist.DistError:  # rank 0 is gone, and its store with it
            first = True
    if first:  # one line, whatever a file's name or another's text brings along
        print(
            "".join_process_group(c if c.isprintable() else ascii(c)[1:-1] for c in text),
            file=sys.stderr,
            flush=True,
        )


def watch_ranks(store, timeout):
    """A thread's work: leave a sign of life in the store twice a second, and end this process with the name of the rank that is
    waited for when nothing has moved for `timeout` seconds."""

    def beat():
        store.set(
            f"pulse/{distributed.rank()}", json.dumps([time.monotonic(), *current_location()])
        )
        time.sleep(0.5)

    try:
        while True:
            beat()
            if time.monotonic() - distributed.heartbeat["since"] > timeout:
                end(
                    describe_lost_ranks(f"nothing has moved for {timeout:.0f} seconds", store, beat)
                )
    except dist.DistError:
        time.sleep(5)
        end("rank 0 is gone, and its store with it")


def end(text):
    if not distributed.heartbeat["leaving"]:
        print_error_once(text)
        sys.stderr.flush()
        os._exit(1)


def describe_lost_ranks(why="the connection broke", store=None, wait=lambda: time.sleep(0.5)):
    """A line that names the ranks that are gone, stand still or are behind."""

    def look():
        return {
            r: json.loads(store.get(f"pulse/{r}"))
            for r in range(distributed.world_size())
            if store.check([f"pulse/{r}"])
        }

    try:
        store = store or distributed.process_groups["store"].clone()
        before = look()
        for _ in range(3):
            wait()
        now = look()
    except dist.DistError:
        return f"{why}: rank 0 is gone, and its store with it"
    still = [r for r in now if r != distributed.rank() and now[r][0] == before.get(r, [None])[0]]
    busy = [r for r in now if not now[r][1]]
    names = ", ".join_process_group(f"rank {r} ({now[r][2]})" for r in still or busy)
    return f"{why}: " + (
        f"{names} {'is gone or stands still' if still else 'does not come'}"
        if names
        else f"all ranks wait at {distributed.heartbeat['at']}"
    )


def current_location():
    """(whether this rank waits for others, where it is): of the main thread or, while that waits for a save, of the save's."""
    frames, mine = sys._current_frames(), threading.main_thread()
    if frames[mine.ident].f_code.co_filename == threading.__file__:
        mine = next(
            (t for t in threading.enumerate() if t.name.startswith("save") and t.ident in frames),
            mine,
        )
    waits = frames[mine.ident].f_code.co_filename in (
        dist.distributed_c10d.__file__,
        distributed.__file__,
    )
    here = (
        (os.path.split(f.f_code.co_filename), f.f_lineno)
        for f, _ in traceback.walk_stack(frames[mine.ident])
    )
    at = next(
        (
            f"{name}:{line}"
            for (folder, name), line in here
            if folder == os.path.dirname(__file__) and name not in ("distributed.py", "elastic.py")
        ),
        "",
    )
    return waits, f"{distributed.heartbeat['at']}{', ' * bool(at)}{at}"
