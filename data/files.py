"""JSON and .npz files, checksums, and text for a terminal."""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time

import numpy as np

RETRY_SECONDS = (0.5, 1.0, 1.5)  # pauses before what cannot be read is tried again
# Errors that say that there is no such file, whatever the disk and the network do
OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
MAX_TEXT_BYTES = 2**28  # of a JSON file; a large tokenizer.json has 2**25


def sha256(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def retried(function, *args):
    """function(*args), tried again for three seconds if the disk or the network is at fault."""
    for pause in RETRY_SECONDS:
        try:
            return function(*args)
        except OSError as e:
            if e.errno in OF_THE_PATH:
                raise
            time.sleep(pause)
    return function(*args)


def is_there(path: str) -> bool:
    """Whether a path exists. If that cannot be said now it is tried again, then OSError is raised:
    `os.path.exists` would say no, and a run would make again what it has."""
    try:
        retried(os.stat, path)
    except OSError as e:
        if e.errno in OF_THE_PATH:
            return False
        raise
    return True


def list_folder(folder: str) -> list[str]:
    """The names in a folder; none if there is no folder. Raises OSError as `is_there` does. Exits
    with one line for a link to what is not there, on a disk that is not mounted, say."""
    try:
        return retried(os.listdir, folder)
    except OSError as e:
        if e.errno not in OF_THE_PATH:
            raise
        if e.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(folder):
            raise SystemExit(printable(f"{folder} is a link to a folder that is not there"))
        return []


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w"):
    """Open PATH.tmp and rename it to PATH at the end: PATH is either complete or untouched, also
    after a loss of power. mode is "w" (text in UTF-8) or "wb".

    Exits with one line if PATH is not a regular file but a link, a folder, a pipe or a device, and
    if another process writes the same file.
    """
    require_regular(path)
    temporary = path + ".tmp"
    if os.path.isdir(temporary) and not os.path.islink(temporary):
        raise SystemExit(printable(f"{temporary} is a folder, and is needed as a file: move it"))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    # O_EXCL: nothing that someone puts there meanwhile is followed or overwritten
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    own = os.fstat(fd)
    try:
        with open(fd, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(fd)
        if not is_at(temporary, own):
            raise SystemExit(printable(f"{path}: another process has written it meanwhile"))
        put_in_place(temporary, path)
    except BaseException as e:
        if is_at(temporary, own):
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = path  # a full disk does not say which file
        raise
    fsync_folder(os.path.dirname(path))


def is_at(path: str, status: os.stat_result) -> bool:
    """Whether the file that had this status when it was opened is still at `path`."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except OSError:
        return False


def put_in_place(temporary: str, path: str):
    """Rename a complete file. In a data folder that is being prepared, note first what it is."""
    folder, name = os.path.split(os.path.realpath(path))
    if folder in prepared and name not in (UNFINISHED, STATE):
        entry = {"bytes": os.path.getsize(temporary)}
        if not name.endswith(".bin"):  # a token stream may be large
            entry["sha256"] = sha256(temporary)
        prepared[folder]["files"][name] = entry
        withdraw_old_data()
    os.replace(temporary, path)


def withdraw_old_data():
    """Remove the old meta.json of each data folder that this process prepares. It will not describe
    the folder, nor what stands in the folders beside it.

    UNFINISHED is written first: without either, the next preparation would take the files that are
    there for the user's.
    """
    for folder, noted in prepared.items():
        write_json(os.path.join(folder, UNFINISHED), noted)
        if "meta.json" not in noted["files"]:  # else it is the new one
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, "meta.json"))


def require_regular(path: str):
    """Exit with one line if something is at `path` that is not a regular file."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
        raise SystemExit(printable(f"{path} is {kind}: it is neither followed nor replaced"))


def write_line(file, line: str):
    """Append a line to an open file. An error, such as that of a full disk, names the file."""
    try:
        file.write(line + "\n")
    except OSError as e:
        e.filename = file.name
        raise


def fsync_file(path: str):
    """Wait until the content of a file is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: str):
    """Wait until the names in a folder are on the disk. "" is the current folder."""
    try:
        fsync_file(path or ".")
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it
            raise


def write_json(path: str, value):
    """Write a value as JSON. Bytes of file names that are not UTF-8 (in Python lone surrogates)
    become escapes, which JSON can have."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path, "wb") as f:
        f.write(text.encode("utf-8", "backslashreplace"))


# A folder with one of these is a checkpoint or a round of a run: nothing else is written there.
RUN_FOLDER_MARKS = ("manifest.json", "collect.json", "policy.json")
# What stands beside the config.json of a run or a model, and beside the meta.json of a data folder.
RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "hashes.json",
    "lock",
    "teacher_train.jsonl",
    "teacher_val.jsonl",
    "model.safetensors",
)
DATA_FILES = ("meta.json", "train.jsonl", "val.jsonl", "train.bin", "val.bin")

# In a data folder while it is written, and after that was interrupted: {"before": {name: its bytes
# and sha256}} of what earlier preparations had put there, and "files", the same of what this one
# has put there or is about to. After a kill at any time each file is of one of the two.
UNFINISHED = ".preparing"
STATE = "state.json"  # what a preparation in data/hub continues from
prepared = {}  # {data folder that this process writes: what its UNFINISHED says}


def check_output(path: str, inputs=(), is_data: bool = False):
    """Exit with one line if a command must not write to `path`: something is there that is not a
    regular file, it is one of the files that the command reads, or it would be a file of a run, a
    checkpoint or a data folder. is_data: the command makes a data folder."""
    require_regular(path)
    for place in (path, f"{path}.tmp"):  # it is written there first, see `atomic_write`
        for other in inputs:
            if os.path.exists(place) and os.path.exists(other) and os.path.samefile(place, other):
                raise SystemExit(f"{place} is what this command reads; choose another output")
    folder, name = os.path.split(os.path.abspath(path))
    marks = []
    for mark in RUN_FOLDER_MARKS:
        marks += [os.path.join(folder, mark), os.path.join(os.path.dirname(folder), mark)]
    if name in RUN_FILES:
        marks.append(os.path.join(folder, "config.json"))
    if is_data:
        marks.append(os.path.join(folder, "config.json"))
        marks.append(os.path.join(os.path.dirname(folder), "config.json"))
    elif name in DATA_FILES:
        marks.append(os.path.join(folder, "meta.json"))
    for mark in marks:
        if os.path.exists(mark):
            text = f"{path} would be a file of a run or of data: {mark} is there"
            raise SystemExit(printable(f"{text}; choose another output"))


def check_foreign(folder: str, names):
    """Exit with one line if one of these files of a data folder is not of a preparation."""
    ours = own_files(folder)
    for name in names:
        path = os.path.join(folder, name)
        if name not in ours and os.path.lexists(path):
            text = f"{path} is not what an earlier preparation has written"
            raise SystemExit(printable(f"{text}: move it, or use another --out"))


def own_files(folder: str) -> dict:
    """{name: entry} of the files of a data folder that a preparation has written: those that
    meta.json names, or UNFINISHED after one was interrupted. One that has changed since is not of
    them."""
    entries = read_entries(os.path.join(folder, "meta.json"), "files")
    found = {"meta.json": {}} if entries else {}
    marker = os.path.join(folder, UNFINISHED)
    for noted in (entries, read_entries(marker, "before"), read_entries(marker, "files")):
        for name, entry in noted.items():
            if name not in found and is_entry_of(entry, os.path.join(folder, name)):
                found[name] = entry
    return found


def read_entries(path: str, key: str) -> dict:
    """The entries that a meta.json or UNFINISHED has under a key; {} if there are none."""
    with contextlib.suppress(SystemExit):
        entries = read_json(path, (key,))[key]
        if isinstance(entries, dict):
            return entries
    return {}


def is_entry_of(entry, path: str) -> bool:
    """Whether an entry of meta.json, {"bytes", "sha256"}, is that of a file. Of a token stream,
    which may be large, only the size is compared."""
    if not isinstance(entry, dict) or not os.path.isfile(path):
        return False
    if entry.get("bytes") != os.path.getsize(path):
        return False
    return path.endswith(".bin") or entry.get("sha256") == sha256(path)


def check_input(path: str):
    """Exit with one line if a file is not a regular one of at most MAX_TEXT_BYTES: reading a pipe
    could block for ever. Raises OSError if it cannot be found."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise SystemExit(f"{path} is not a regular file")
    if info.st_size > MAX_TEXT_BYTES:
        raise SystemExit(
            f"{path} has {info.st_size:,} bytes; at most {MAX_TEXT_BYTES:,} are read at once"
        )


def read_text(path: str) -> str:
    """The text of a file, after `check_input`. Raises OSError and UnicodeDecodeError."""
    check_input(path)
    with open(path, encoding="utf-8") as f:
        return f.read()


def parse_json(text):
    """json.loads, but a name that stands twice in an object is a ValueError: the last one would win
    without a word."""
    return json.loads(text, object_pairs_hook=unique_names)


def unique_names(pairs: list[tuple]) -> dict:
    """The (name, value) pairs of a JSON object as a dictionary."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} stands twice in an object")
    return found


def read_json(path: str, required=(), advice: str = "") -> dict:
    """Read a JSON object that has the keys in `required`.

    Exits with one line, which ends in `advice`, if it cannot.
    """
    try:
        value = parse_json(read_text(path))
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}{advice}")
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"{path} is not JSON ({e}){advice}")
    if not isinstance(value, dict):
        raise SystemExit(f"{path} must hold a JSON object, got a {type(value).__name__}{advice}")
    missing = [key for key in required if key not in value]
    if missing:
        raise SystemExit(f"{path} has no {', '.join(missing)}{advice}")
    return value


def read_arrays(path: str) -> dict:
    """Read an .npz file: {name: array}. Arrays of objects are refused: they are pickles."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:  # numpy and zipfile raise many kinds
        raise SystemExit(f"{path} is damaged: not an .npz file of numbers ({type(e).__name__})")


# Characters that can drive a terminal or reorder its text: controls but newline and tab, halves of
# surrogate pairs, line separators, and the bidirectional controls.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """Escape UNPRINTABLE characters, so that a text cannot drive the terminal."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def shorten(value, show=repr) -> str:
    """A value in one short line, also one that cannot be printed. show: str or repr."""
    try:
        return " ".join(show(value).split())[:200]
    except (Exception, SystemExit):  # of whatever type it is
        return f"a {type(value).__name__} that cannot be printed"


def one_line(text: str) -> str:
    """Escape line breaks and whatever else str.isprintable refuses, for a message of one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
