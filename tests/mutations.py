"""Mutations of bytes, texts and JSON, and a runner of many small cases with a time limit each.

The cases run in a forked process: one that never returns, or that kills the interpreter, is a
failure like any other, and the cases after it still run.
"""

import contextlib
import copy
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

SECONDS = 5  # of computing, in which a case must end
WALL_SECONDS = 20  # on a busy machine
MEMORY = 4 * 2**30  # bytes that a case may ask for

# What a terminal may obey. Newline, tab and carriage return (of progress bars) are text.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

DEEP = "a placeholder of deep nesting"
HUGE = "a placeholder of a huge integer"

# Values that programs tend to forget.
TRAPS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    -0.0,
    2**31,
    2**53 + 1,
    2**64,
    10**400,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "\n",
    "a",
    "0",
    "nan",
    "null",
    "\ud800",
    "\udc80b",
    "\ufeff",
    "\u2028",
    "\u202egnp.exe",
    "e\u0301" * 5,
    "\x00",
    "\x1b[31m\x9b\x07",
    "<|endoftext|>",
    "{prompt}",
    "{0.__class__}%s%n",
    "../../etc/passwd",
    "/dev/null",
    "x" * 3000,
    " " * 3000,
    [],
    [None],
    [[]],
    [1, 2, 3],
    ["a", "b"],
    [True],
    {},
    {"a": 1},
    {"": None},
    DEEP,
    HUGE,
]


# ------------------------------------------------------------------------------- JSON and bytes


def to_text(value) -> str:
    """JSON of a value, with the placeholders replaced by what json.dumps cannot write."""
    text = json.dumps(value, ensure_ascii=False)
    text = text.replace(json.dumps(DEEP), "[" * 20000 + "]" * 20000)
    return text.replace(json.dumps(HUGE), "9" * 5000)


def to_bytes(value) -> bytes:
    """The same in UTF-8; half of a surrogate pair is written as UTF-8 would, which is not valid."""
    return to_text(value).encode("utf-8", "surrogatepass")


def mutate_json(rng: random.Random, value):
    """A copy of a parsed JSON value with one to three changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder = {"value": value}
        change_place(rng, *rng.choice(places(holder)))
        value = holder.get("value")
    return value


def places(value) -> list[tuple]:
    """[(container, key)] of everything inside a JSON value."""
    found = []
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def change_place(rng: random.Random, container, key):
    """Replace, remove, copy, retype or extend one value."""
    old = container[key]
    action = rng.choice(("replace", "replace", "retype", "remove", "copy", "extend"))
    if action == "replace":
        container[key] = copy.deepcopy(rng.choice(TRAPS))
    elif action == "retype":
        container[key] = retyped(rng, old)
    elif action == "remove":
        del container[key]
    elif action == "copy":
        if isinstance(container, dict):
            container[rng.choice(("copy", f"{key}s", str(key).upper()))] = copy.deepcopy(old)
        else:
            container.insert(key, copy.deepcopy(old))
    elif isinstance(old, dict):
        old[rng.choice(("extra", "", "\ud800", "\x1b[31m", "__class__"))] = rng.choice(TRAPS)
    elif isinstance(old, list):
        old.append(copy.deepcopy(rng.choice(TRAPS)))
    elif isinstance(old, str):
        extra = rng.choice([trap for trap in TRAPS if isinstance(trap, str)])
        container[key] = old + extra
    else:
        container[key] = copy.deepcopy(rng.choice(TRAPS))


def retyped(rng: random.Random, value):
    """The same value as another type."""
    if isinstance(value, str):
        return rng.choice(([value], {"text": value}, list(value), len(value)))
    if isinstance(value, bool) or value is None:
        return rng.choice((0, 1, "True", [value]))
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 2**60 else 0.5
        return rng.choice((as_float, str(value)[:99], [value], -value))
    if isinstance(value, float):
        return rng.choice((int(value) if abs(value) < 1e18 else 0, str(value), [value], -value))
    if isinstance(value, list):
        return rng.choice((dict(enumerate(map(str, value))), str(value), value + value, value[:1]))
    return rng.choice((list(value), str(value), [value]))


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Content with bits flipped, cut off, doubled, removed or put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        action = rng.choice(("flip", "flip", "cut", "double", "remove", "insert"))
        if action == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif action == "cut":
            del content[at:]
        elif action == "double":
            end = min(len(content), at + rng.randint(1, 40))
            content[at:at] = content[at:end]
        elif action == "remove":
            del content[at : at + rng.randint(1, 20)]
        elif action == "insert":
            traps = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r", b'"', b"[" * 3000)
            content[at:at] = rng.choice(traps)
    return bytes(content)


def duplicate_key(rng: random.Random, value: dict) -> str:
    """JSON of an object in which one key occurs twice, first with another value."""
    key = rng.choice(list(value))
    first = to_text({key: rng.choice(TRAPS)})[1:-1]
    return "{" + first + ", " + to_text(value)[1:]


# ----------------------------------------------------------------------------------------- running


def run_cases(cases: list[tuple[str, Callable]]) -> list[str]:
    """Run named cases, each a function that returns "" or what went wrong. Returns a line for each
    that failed. SystemExit with a text is a refusal and right; every other exception is wrong, and
    so is a case that takes longer than SECONDS or prints control characters."""
    failures = []
    next_case = 0
    while next_case < len(cases):
        next_case = run_some(cases, next_case, failures)
    return failures


def run_some(cases, first: int, failures: list[str]) -> int:
    """Run the cases from `first` on in a forked process. Returns the first that is left."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            child(cases, first, writing)
        os._exit(0)
    os.close(writing)
    number, text = first, ""
    deadline = time.monotonic() + WALL_SECONDS
    with open(reading, "rb", buffering=0) as pipe:
        while True:
            remaining = deadline - time.monotonic()
            ready = select.select([pipe], [], [], max(0, remaining))[0]
            data = pipe.read(2**16) if ready else b""
            if not data:
                break
            text += data.decode()
            *lines, text = text.split("\n")
            for line in lines:
                number, problem = json.loads(line)
                if problem:
                    failures.append(f"{problem}; in {cases[number - 1][0]}")
                deadline = time.monotonic() + WALL_SECONDS
    hung = bool(not ready)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number < len(cases):
        why = (
            f"it takes longer than {WALL_SECONDS} s" if hung else f"the process died with {status}"
        )
        failures.append(f"{why}; in {cases[number][0]}")
        number += 1
    return number


def child(cases, first: int, writing: int):
    """The forked process: after each case it reports [number of the next one, problem]."""
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    output = os.memfd_create("output")
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogatepass", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="surrogatepass", closefd=False)
    for number in range(first, len(cases)):
        os.ftruncate(output, 0)
        os.lseek(output, 0, os.SEEK_SET)
        before = sum(os.times()[:4])
        problem = outcome(cases[number][1])
        seconds = sum(os.times()[:4]) - before  # of this process and of those that it started
        if not problem and seconds > SECONDS:
            problem = f"it computes for {seconds:.1f} s"
        sys.stdout.flush()
        sys.stderr.flush()
        printed = os.pread(output, 2**20, 0).decode("utf-8", "replace")
        found = CONTROL.search(printed)
        if not problem and found:
            problem = f"a control character is printed: {printed[-200:]!r}"
        os.write(writing, (json.dumps([number + 1, problem]) + "\n").encode())


def outcome(case: Callable) -> str:
    """ "" or what went wrong in a case."""
    try:
        return case() or ""
    except SystemExit as e:
        if isinstance(e.code, str) or e.code in (None, 0):
            return ""
        return f"it ends with status {e.code!r} and no text"
    except BaseException as e:  # a panic of a Rust library is no Exception
        frames = traceback.extract_tb(e.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename]
        place = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
        reason = " ".join(str(e).split())[:150]
        return f"{type(e).__name__} at {place}: {reason}"
