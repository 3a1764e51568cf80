"""What the commands share: the guard around each of them, a parser, and argument types.

A program ends in `sys.exit(cli.run(main))`. `run` reports mistakes and full disks in one line,
and escapes whatever the command prints.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

from data.files import one_line, printable

# Errors of the file system that are reported in one line: disk full, no permission, read-only, a
# name that is too long.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

# What writing to a pipe without a reader, or to a terminal that was closed, raises.
CLOSED_ERRORS = (errno.EPIPE, errno.EIO, errno.ENXIO)

# Temperatures above 0. Lower ones overflow in float32; higher ones are uniform sampling.
MIN_TEMPERATURE = 1e-4
MAX_TEMPERATURE = 1e4
MIN_TOP_P = 1e-6
MAX_SEED = 2**63 - 1  # the largest one that a torch.Generator takes


# ------------------------------------------------------------------------------ the guard


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Call main(argv) as a command. Returns the exit status.

    argv: default sys.argv[1:]. A SystemExit with a text, an error with a file and missing memory
    are one line on stderr. Ctrl-C has no traceback. A pipe whose reader has left ends the command
    quietly. An exception that is a bug keeps its traceback. All output is escaped: see `Console`.
    """
    with guarded_console():
        try:
            status = main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except ConsoleClosed:
            return 128 + signal.SIGPIPE
        except BaseException as e:
            return report_error(e)
    return status if isinstance(status, int) else 0


def report_error(error: BaseException) -> int:
    """Print an exception as `run` does. Returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        text = str(error.code)
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = describe_error(error)
    if text:
        print(one_line(text), file=sys.stderr, flush=True)
    else:
        print_traceback(error)
    return 1


def describe_error(error: BaseException) -> str:
    """The line for an exception that is no bug: a disk error, missing memory. "" for others."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'a file'}: {error.strerror}"
    # torch's allocator on a CPU raises a RuntimeError
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory: use a smaller model, batch or input"
    return ""


def print_traceback(error: BaseException):
    """Print a traceback to stderr, escaped."""
    lines = traceback.format_exception(error)
    print(printable("".join(lines)), end="", file=sys.stderr, flush=True)


class ConsoleClosed(BaseException):
    """Nobody reads standard output any more. Not an Exception: nothing but `run` handles it."""


class Console:
    """A text stream that escapes what could drive a terminal, as `printable` does.

    All else is the attribute of the wrapped stream: isatty, fileno, buffer, encoding.

    stream: the stream to wrap. name: what messages call it.
    kept: a character that is not escaped; progress bars need a carriage return on stderr.
    on_closed(name, error): called when nobody reads the stream any more. Later text is dropped.
    """

    def __init__(self, stream, name: str, kept: str = "", on_closed: Callable | None = None):
        self.stream = stream
        self.name = name
        self.kept = kept
        self.on_closed = on_closed

    def __getattr__(self, attribute):
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, self.escape(text))
        return len(text)

    def write_styled(self, text: str):
        """Write text that is escaped already, with the program's own colours in it."""
        self.attempt(self.stream.write, text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self.attempt(self.stream.flush)

    def escape(self, text: str) -> str:
        if not self.kept:
            return printable(text)
        return self.kept.join(map(printable, text.split(self.kept)))

    def attempt(self, function: Callable, *args):
        """Call a method of the stream. If it fails, what is left in its buffer goes nowhere."""
        try:
            function(*args)
        except OSError as e:
            with contextlib.suppress(OSError, ValueError):  # it may have no file descriptor
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            if self.on_closed:
                self.on_closed(self.name, e)


def end_command(name: str, error: OSError):
    """`on_closed` of a command's standard output."""
    if error.errno in CLOSED_ERRORS:
        raise ConsoleClosed
    error.filename = name
    raise error


def go_on_without(name: str, error: OSError):
    """`on_closed` of a training run's standard output."""
    print(f"{name}: {error.strerror}; going on without it", file=sys.stderr, flush=True)


@contextlib.contextmanager
def guarded_console(on_closed: Callable = end_command):
    """Wrap standard output and error in a Console while the block runs.

    on_closed: what happens when standard output cannot be written. Standard error is never missed.
    """
    open_missing_descriptors()
    before = sys.stdout, sys.stderr
    streams = []
    for stream in before:
        if stream is None:  # closed by the shell
            stream = open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            # what the terminal cannot encode is escaped: a row's text must not end a run
            stream.reconfigure(errors="backslashreplace")
        streams.append(stream)
    sys.stdout = Console(streams[0], "standard output", on_closed=on_closed)
    sys.stderr = Console(streams[1], "standard error", kept="\r")
    try:
        yield
    finally:
        for console in (sys.stdout, sys.stderr):
            with contextlib.suppress(ConsoleClosed, OSError, ValueError):
                console.flush()
        sys.stdout, sys.stderr = before


def open_missing_descriptors():
    """Open the null device where standard input, output or error is closed. Otherwise the next
    file that is opened would be standard output, and messages would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number


# ------------------------------------------------------------------------------- arguments


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with two changes: the description keeps its line breaks, and an error exits
    with one escaped line, without the usage."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        self.color = False  # Python 3.14 prints help in colours, which a Console would escape

    def error(self, message: str):
        sys.exit(one_line(message))


def number_type(kind: type, least: float, most: float = 2**63 - 1) -> Callable:
    """An argparse type: an int or float in [least, most]. The default `most` is what torch can
    read."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text[:60]!r}")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text[:60]}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text[:60]}")
        return value

    return parse


seed_type = number_type(int, 0, MAX_SEED)
vocab_size_type = number_type(int, 257, 2**20)  # at least the bytes and end-of-text


def is_temperature(value: float) -> bool:
    """Whether `sample.sample_token` can divide by it, or it is 0, which is greedy."""
    return value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE


TEMPERATURES = f"0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"


def temperature_type(text: str) -> float:
    """An argparse type."""
    value = number_type(float, 0)(text)
    if not is_temperature(value):
        raise argparse.ArgumentTypeError(f"must be {TEMPERATURES}, got {text[:60]}")
    return value


def device_type(text: str) -> str:
    """An argparse type: a device that is present."""
    if text != "cpu" and text != default_device():
        raise argparse.ArgumentTypeError(f"must be cpu, or cuda if torch sees a GPU, got {text!r}")
    return text


def add_dtype(parser):
    """Add --dtype, that of the matrix products. Its value is a torch.dtype."""
    parser.add_argument(
        "--dtype",
        type=dtype_type,
        default="float32",
        help="of matrix products: float32 (default), or bfloat16, which is faster and rounds",
    )


def dtype_type(text: str):
    """An argparse type: a torch.dtype."""
    import torch

    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"must be float32 or bfloat16, got {text!r}")
    return getattr(torch, text)


def default_device() -> str:
    import torch  # takes a second, and most command lines do not need it

    return "cuda" if torch.cuda.is_available() else "cpu"
