"""A data folder."""

import glob
import hashlib
import os
import numpy as np
from data import tokenizer as tokenizers
from data.files import read_json, sha256, write_json


def split_of(group, val_share=0.1):
    """ "train" or "val" by a hash of the group: rows that share a group stand together, and adding rows moves none."""
    return (
        "val"
        if int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32 < val_share
        else "train"
    )


def write_stream(path, documents, enc):
    """Encode documents (strings) into one stream, each ended by end-of-text. Returns the number of tokens."""
    dtype, n = np.uint16 if enc.n_vocab <= 2**16 else np.uint32, 0
    with open(path + ".tmp", "wb") as f:
        for text in documents:
            ids = enc.encode_ordinary(text) + [enc.eot_token]
            np.array(ids, dtype=dtype).tofile(f)
            n += len(ids)
    os.replace(path + ".tmp", path)
    return n


def write_meta(folder, tokenizer, source, **sizes):
    """meta.json, last of all. tokenizer: "gpt2", "bytes", the name of a .tiktoken or .json file in the folder; None for rows alone."""
    enc = tokenizers.load(tokenizer_path(folder, tokenizer)) if tokenizer else None
    of_tokenizer = (
        {
            "tokenizer": tokenizer,
            "tokenizer_sha256": tokenizers.fingerprint(enc),
            "vocab_size": enc.n_vocab,
            "dtype": "uint16" if enc.n_vocab <= 2**16 else "uint32",
        }
        if enc
        else {"tokenizer": None}
    )
    paths = {
        f: os.path.join(folder, f)
        for f in sorted(os.listdir(folder))
        if f.endswith((".bin", ".jsonl", ".tiktoken")) or f.startswith("tokenizer")
    }
    write_json(
        os.path.join(folder, "meta.json"),
        of_tokenizer
        | {"source": source}
        | sizes
        | {
            "files": {
                f: {"sha256": sha256(path), "bytes": os.path.getsize(path)}
                for f, path in paths.items()
            }
        },
    )


def tokenizer_path(folder, name):
    return name if name in ("gpt2", "bytes") else os.path.join(folder, name)


def prepare_command(folder):
    """What makes this folder: its own prepare.py, or what a header in config/ or data/ says."""
    here = os.path.dirname(os.path.abspath(__file__))
    name = os.path.relpath(os.path.abspath(folder), here).split(os.sep)[0]
    script = os.path.join(here, name, "prepare.py")
    if os.path.exists(script):
        with open(script, encoding="utf-8") as f:
            command = f"python -m data.{name}.prepare" + (
                " FILE" if 'add_argument("file",' in f.read() else ""
            )
        deeper = os.path.relpath(os.path.abspath(folder), os.path.join(here, name)).count(
            os.sep
        )  # as data/shp/small/row
        return command + (f" --out={os.path.dirname(os.path.normpath(folder))}" if deeper else "")
    for file in sorted(glob.glob(os.path.join(here, "..", "config", "*.py"))) + sorted(
        glob.glob(os.path.join(here, "*", "prepare.py"))
    ):
        with open(file, encoding="utf-8") as f:
            for line in f:
                if f"--out={os.path.normpath(folder)} " in line.strip() + " ":
                    return line.partition(" #")[0].strip()
    return f"python -m data.jsonl.prepare FILE.jsonl --out={folder}"


def read_meta(folder, need):
    """meta.json of a data folder, checked for the files in `need`. Exits with one line and the command that makes them."""
    advice = f"; make it with: {prepare_command(folder)}"
    meta = read_json(f"{folder}/meta.json", ("tokenizer", "source", "files"), advice)

    def must(ok, message):
        if not ok:
            raise SystemExit(message + advice)

    name, files = meta["tokenizer"], meta["files"]
    must(
        isinstance(files, dict)
        and all(
            isinstance(f, dict) and type(f.get("bytes")) is int and type(f.get("sha256")) is str
            for f in files.values()
        ),
        f"{folder}/meta.json: files must say the bytes and the sha256 of each",
    )
    must(
        name is None
        or type(name) is str
        and name.isprintable()
        and name == os.path.basename(name) not in ("", ".", ".."),
        f"{folder}/meta.json: tokenizer must be gpt2, bytes or the name of a file in the folder, got {name!r}",
    )
    must(
        name is None
        or meta.get("dtype") in ("uint16", "uint32")
        and type(meta.get("tokenizer_sha256")) is str,
        f"{folder}/meta.json: with a tokenizer go its tokenizer_sha256 and a dtype, uint16 or uint32, got {meta.get('dtype')!r}",
    )
    for file in need:
        path = os.path.join(folder, file)
        must(os.path.exists(path) and file in files, f"{path} is missing")
        size = os.path.getsize(path)
        must(
            size == files[file]["bytes"],
            f"{path} has {size} bytes, meta.json says {files[file]['bytes']}",
        )
        must(
            file.endswith(".bin") or sha256(path) == files[file]["sha256"],
            f"{path} was changed: its sha256 is not the one in meta.json",
        )
        must(
            name or not file.endswith(".bin"),
            f"{folder}/meta.json names no tokenizer that {file} was written with",
        )
    return meta


def read_stream(folder, split):
    """The token stream as a read-only memory map."""
    meta = read_meta(folder, [f"{split}.bin"])
    if not meta["files"][f"{split}.bin"]["bytes"]:
        raise SystemExit(
            f"{folder}/{split}.bin is empty: no document fell to its side of the split"
        )
    if meta["files"][f"{split}.bin"]["bytes"] % np.dtype(meta["dtype"]).itemsize:
        raise SystemExit(
            f"{folder}/{split}.bin: its {meta['files'][f'{split}.bin']['bytes']} bytes are no multiple of a token's, of {meta['dtype']}"
        )
    return np.memmap(os.path.join(folder, f"{split}.bin"), dtype=meta["dtype"], mode="r")


def find_invalid_token(tokens, vocab_size, part=0, of=1, length=2**24):
    """Where the first id outside the vocabulary stands in a stream, len(tokens) if there is none; a `part` of some looks at every so
    many pieces of it."""
    for start in range(part * length, len(tokens), of * length):
        piece = tokens[start : start + length]
        if piece.max() >= vocab_size:
            return start + int((piece >= vocab_size).argmax())
    return len(tokens)
