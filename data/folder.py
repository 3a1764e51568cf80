"""Read and write data folders: meta.json, token streams, the train/val split."""

import contextlib
import fcntl
import hashlib
import os

import numpy as np

from data import tokenizer
from data.files import (
    DATA_FILES,
    UNFINISHED,
    atomic_write,
    check_foreign,
    own_files,
    prepared,
    read_json,
    sha256,
    write_json,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The commands for folders that no data/NAME/prepare.py writes without arguments
JSONL = "python -m data.jsonl.prepare"
COMMANDS = {
    "data/shakespeare": "python -m data.shakespeare.prepare FILE",
    "data/pretrain": f"{JSONL} FILE.jsonl.gz --out=data/pretrain --tokenizer=gpt2",
    # config/local
    "data/local": f"{JSONL} data/stackexchange/threads/*.jsonl --out=data/local --tokenizer=gpt2",
    "data/local_sft": f"{JSONL} data/gsm8k_sft/*.jsonl data/tldr_pages/*.jsonl"
    " data/stackexchange/sft/*.jsonl --out=data/local_sft",
    "data/ranked": f"{JSONL} data/gsm8k_solutions/*.jsonl data/stackexchange/ranked/*.jsonl"
    " --out=data/ranked",
    "data/gsm8k_sft": "python -m data.gsm8k.prepare --val_share=0.1 --out=data/gsm8k_sft",
    "data/gsm8k_solutions": "python -m data.gsm8k.prepare --solutions=all"
    " --out=data/gsm8k_solutions",
    "data/gsm8k_ranked": "python -m data.gsm8k.prepare --solutions=175b_verification"
    " --out=data/gsm8k_ranked",
    # sums with few answers
    "data/sums/answers": "python -m data.addition.prepare --answers=1500 --out=data/sums",
    "data/sums/prompts": "python -m data.addition.prepare --answers=1500 --out=data/sums",
    # studies
    "data/commands": f"{JSONL} data/tldr_pages/*.jsonl --where='prompt=Write a shell command'"
    " --tokenizer=bytes --val_share=0.9 --out=data/commands",
    "out/frontier/ranked": "python -m studies.frontier.frontier",
    # other forms of the hub's data sets
    "data/fineweb_all": "python -m data.fineweb.prepare --hub=HuggingFaceFW/fineweb"
    " --out=data/fineweb_all",
    "data/openwebtext": "python -m data.fineweb.prepare --hub=Skylion007/openwebtext"
    " --out=data/openwebtext",
    "data/shp_pairs": "python -m data.shp_ranked.prepare --pairs --out=data/shp_pairs",
    "data/tldr_sft": "python -m data.tldr.prepare --sft --out=data/tldr_sft",
    "data/ultrachat_full": "python -m data.ultrachat.prepare --full --sample=0"
    " --out=data/ultrachat_full",
    "data/ultrafeedback_overall": "python -m data.ultrafeedback.prepare --by=overall_score"
    " --out=data/ultrafeedback_overall",
}


def prepare_command(folder: str) -> str:
    """The command that makes a data folder, for error messages."""
    path = os.path.relpath(os.path.abspath(folder), ROOT)
    if path in COMMANDS:
        return COMMANDS[path]
    parts = path.split(os.sep)  # such as data, shp, small, row
    script = os.path.join(ROOT, *parts[:2], "prepare.py")
    if parts[0] != "data" or len(parts) == 1 or not os.path.exists(script):
        return f"{JSONL} FILE.jsonl --out={folder}"
    command = f"python -m data.{parts[1]}.prepare"
    if len(parts) > 3:  # data/shp/prepare.py writes OUT/row and OUT/group
        command += f" --out={os.path.dirname(os.path.normpath(folder))}"
    return command


# ---- writing


def split_of(group: str, val_share: float = 0.1) -> str:
    """The side of the split, "train" or "val", that a group falls on.

    It is a hash of the group: rows of one group stay together, and new rows move no old one.
    """
    digest = hashlib.sha256(group.encode()).hexdigest()
    fraction = int(digest[:8], 16) / 2**32  # in [0, 1)
    return "val" if fraction < val_share else "train"


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a token stream."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_stream(path: str, documents, enc) -> int:
    """Encode documents (strings) into one token stream, as `tokenizer.document_ids`.

    Returns the number of tokens.
    """
    dtype = token_dtype(enc.n_vocab)
    num_tokens = 0
    with atomic_write(path, "wb") as f:
        for text in documents:
            ids = tokenizer.document_ids(enc, text)
            np.array(ids, dtype=dtype).tofile(f)
            num_tokens += len(ids)
    return num_tokens


def check_other_data(folder: str, extensions: tuple[str, ...]):
    """Exit with one line if a folder has data of another kind than .bin or .jsonl, whichever is
    about to be written: an earlier preparation made it, maybe with another tokenizer."""
    for name in ("train.bin", "val.bin", "train.jsonl", "val.jsonl"):
        path = os.path.join(folder, name)
        if not name.endswith(extensions) and os.path.exists(path):
            raise SystemExit(
                f"{path} is of an earlier preparation and would not be written again: "
                "use another --out, or remove it"
            )


@contextlib.contextmanager
def lock_folder(folder: str):
    """Make a data folder, and keep other preparations out of it while this one writes there: files
    of two would be mixed. The lock is on the folder itself and ends with the process.

    Exits with one line if files of the user would be replaced.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise SystemExit(f"{folder}: {e.strerror}")
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(
                    f"{folder} is being prepared by another command: wait for its end, or use "
                    "another --out"
                )
        check_foreign(folder, DATA_FILES)
        prepared[os.path.realpath(folder)] = {"before": own_files(folder), "files": {}}
        try:
            yield
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, UNFINISHED))
        finally:
            del prepared[os.path.realpath(folder)]
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock_folders(folders: list[str]):
    """`lock_folder` for data folders that belong together. When the first file is put in place, the
    old meta.json of all goes: after a kill none is taken for a companion of a new folder."""
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(lock_folder(folder))
        yield


def tokenizer_path(folder: str, name: str) -> str:
    """What `tokenizer.load` takes for the tokenizer named in a folder's meta.json."""
    return name if name in ("gpt2", "bytes") else os.path.join(folder, name)


def write_meta(folder: str, tokenizer_name: str | None, source, **details):
    """Write meta.json, after all other files of the folder.

    tokenizer_name: "gpt2", "bytes", or the name of a tokenizer file in the folder; None for rows
    without one. source: where the data comes from. details: further entries, such as
    train_rows=100.
    """
    meta = {"tokenizer": tokenizer_name or None}
    if tokenizer_name:
        enc = tokenizer.load(tokenizer_path(folder, tokenizer_name))
        meta["tokenizer_sha256"] = tokenizer.fingerprint(enc)
        meta["vocab_size"] = enc.n_vocab
        meta["dtype"] = token_dtype(enc.n_vocab).name
    meta["source"] = source
    meta |= details
    meta["files"] = {}
    names = os.listdir(folder)
    if os.path.realpath(folder) in prepared:
        names = own_files(folder)  # not those of the user
    for name in sorted(set(names)):
        if name.endswith((".bin", ".jsonl", ".tiktoken")) or name.startswith("tokenizer"):
            path = os.path.join(folder, name)
            meta["files"][name] = {"sha256": sha256(path), "bytes": os.path.getsize(path)}
    write_json(os.path.join(folder, "meta.json"), meta)


# ---- reading


def read_meta(folder: str, files_needed) -> dict:
    """Read meta.json and check the files named in `files_needed` against it.

    Sizes are checked, and the sha256 too unless the file is a token stream, which may be large.
    Exits with one line: what is wrong, and the command that makes the folder.
    """
    advice = f"; make it with: {prepare_command(folder)}"
    meta = read_json(f"{folder}/meta.json", ("tokenizer", "source", "files"), advice)

    def must(ok, message):
        if not ok:
            raise SystemExit(message + advice)

    files = meta["files"]
    must(isinstance(files, dict), f"{folder}/meta.json: files must be an object")
    for entry in files.values():
        must(
            is_file_entry(entry),
            f"{folder}/meta.json: files must give bytes and sha256 for each file",
        )
    name = meta["tokenizer"]
    if name is not None:
        must(
            is_file_name(name),
            f"{folder}/meta.json: tokenizer must be gpt2, bytes or the name of a file in the"
            f" folder, got {name!r}",
        )
        dtype = meta.get("dtype")
        must(
            dtype in ("uint16", "uint32"),
            f"{folder}/meta.json: dtype must be uint16 or uint32, got {dtype!r}",
        )
        must(
            isinstance(meta.get("tokenizer_sha256"), str),
            f"{folder}/meta.json: tokenizer_sha256 must be given with the tokenizer",
        )
    for file in files_needed:
        path = os.path.join(folder, file)
        must(os.path.exists(path) and file in files, f"{path} is missing")
        size, expected = os.path.getsize(path), files[file]["bytes"]
        must(size == expected, f"{path} has {size} bytes, meta.json says {expected}")
        if file.endswith(".bin"):
            must(name is not None, f"{folder}/meta.json names no tokenizer for {file}")
        else:
            must(
                sha256(path) == files[file]["sha256"],
                f"{path} was changed: its sha256 differs from the one in meta.json",
            )
    return meta


def is_file_entry(entry) -> bool:
    """Whether it is {"bytes": int, "sha256": str}."""
    if not isinstance(entry, dict):
        return False
    return type(entry.get("bytes")) is int and type(entry.get("sha256")) is str


def is_file_name(name) -> bool:
    """Whether it is the name of a file inside a folder, safe to join to the folder and to print."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and name == os.path.basename(name)


def read_stream(folder: str, split: str) -> np.memmap:
    """The token stream of a split as a read-only memory map, (num_tokens,)."""
    meta = read_meta(folder, [f"{split}.bin"])
    path = os.path.join(folder, f"{split}.bin")
    size = meta["files"][f"{split}.bin"]["bytes"]
    dtype = np.dtype(meta["dtype"])
    if size == 0:
        raise SystemExit(f"{path} is empty: no document fell on this side of the split")
    if size % dtype.itemsize:
        raise SystemExit(f"{path}: {size} bytes are no multiple of the size of {dtype}")
    return np.memmap(path, dtype=dtype, mode="r")


def find_invalid_token(
    tokens, vocab_size: int, part: int = 0, num_parts: int = 1, chunk_size: int = 2**24
) -> int:
    """Position of the first token id outside the vocabulary, or len(tokens) if there is none.

    The stream is read in chunks; process `part` of `num_parts` reads every num_parts-th one.
    """
    for start in range(part * chunk_size, len(tokens), num_parts * chunk_size):
        chunk = tokens[start : start + chunk_size]
        invalid = chunk >= vocab_size
        if invalid.any():
            return start + int(invalid.argmax())
    return len(tokens)
