"""Rows and token streams -> batches. Every batch is a pure function of (data, seed, step).

A data folder holds
    {train,val}.bin      a token stream: uint16, or uint32 above 65,535 tokens; documents end in end-of-text
    {train,val}.jsonl    ranked rows: {"prompt": str, "responses": [best, ..., worst], "group": str?, "scores": [float]?,
                         "history": [[prompt, response], ...]?}, the earlier turns of a conversation, which are not asked for;
                         or whole texts: {"text": str, "group": str?}, a response without a prompt or template
    meta.json            written last: tokenizer, vocabulary, dtype, sizes, source, sha256 of each file
"""

import bisect
import functools
import glob
import hashlib
import json
import os
import re

import numpy as np
import torch

from data import tokenizer as tokenizers
from data.template import prompt_ids

# ---------------------------------------------------------------------------------------------- writing a data folder


def split_of(group, val_share=0.1):
    """ "train" or "val" by a hash of the group: rows that share a group stand together, and adding rows moves none."""
    return (
        "val"
        if int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32 < val_share
        else "train"
    )


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path, value):
    """Write beside and rename, so that the file is whole or absent."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def write_rows(path, rows):
    """Ranked rows as JSON lines, whole or absent."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".tmp", path)


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


# ---------------------------------------------------------------------------------------------- reading a data folder


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


def read_json(path, need=(), advice=""):
    """The object in a JSON file, with the names in `need`. Exits with one line if it is not there."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}{advice}")
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"{path} is not JSON ({e}){advice}")
    missing = [name for name in need if name not in value] if isinstance(value, dict) else need
    if missing or not isinstance(value, dict):
        raise SystemExit(f"{path} is not what it should be: it has no {', '.join(missing)}{advice}")
    return value


def read_arrays(path):
    """The arrays of an .npz file, by name; none of objects, which would be pickles. Exits with one line if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:  # numpy and zipfile raise many kinds
        raise SystemExit(f"{path} is damaged: it is no .npz file of numbers ({type(e).__name__})")


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


def first_outside(tokens, vocab_size, part=0, of=1, length=2**24):
    """Where the first id outside the vocabulary stands in a stream, len(tokens) if there is none; a `part` of some looks at every so
    many pieces of it."""
    for start in range(part * length, len(tokens), of * length):
        piece = tokens[start : start + length]
        if piece.max() >= vocab_size:
            return start + int((piece >= vocab_size).argmax())
    return len(tokens)


def read_rows(path):
    """Ranked rows of a .jsonl file, each checked. Exits with file, line and what is wrong."""
    rows = []
    try:
        f = open(path, encoding="utf-8")
    except OSError as e:
        raise SystemExit(
            f"{path}: {e.strerror}; make it with: {prepare_command(os.path.dirname(path))}"
        )
    with f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append(check_row(json.loads(line), f"{path}:{number}"))
        except UnicodeDecodeError as e:
            raise SystemExit(f"{path}: not UTF-8 after line {len(rows)}: {e.reason}")
        except (ValueError, RecursionError) as e:
            raise SystemExit(f"{path}:{number}: not JSON: {e}")
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def is_unicode(text):
    """Whether UTF-8 can write it; JSON may smuggle in half a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def printable(text):
    """A text for a terminal, which must not obey it: control characters but newline and tab are escaped."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text
    )


def check_row(row, where):
    def must(ok, message):
        if not ok:
            raise SystemExit(f"{where}: {message}")

    must(isinstance(row, dict), "a row must be an object with prompt and responses, or a text")
    must(
        row.get("group") is None or isinstance(row["group"], str) and is_unicode(row["group"]),
        "group must be a string",
    )
    if "text" in row and "prompt" not in row and "responses" not in row:
        must(
            isinstance(row["text"], str) and row["text"].strip() and is_unicode(row["text"]),
            "text must be a Unicode string that is not empty",
        )
        return {"prompt": "", "responses": [row["text"]]} | (
            {"group": row["group"]} if "group" in row else {}
        )
    must(
        isinstance(row.get("prompt"), str) and row["prompt"].strip(),
        "prompt must be a string that is not empty",
    )
    responses = row.get("responses")
    must(
        isinstance(responses, list)
        and responses
        and all(isinstance(r, str) or r is None for r in responses),
        "responses must be a list of strings, best first (null: absent)",
    )
    must(responses[0] is not None, "the best response must be there")
    must(
        all(is_unicode(text) for text in [row["prompt"], *responses] if text is not None),
        "text must be Unicode, without lone surrogates",
    )
    scores = row.get("scores")
    must(
        scores is None
        or (
            isinstance(scores, list)
            and len(scores) == len(responses)
            and all(type(s) in (int, float) and abs(s) < 1e30 for s in scores)
        ),
        "scores must be a number for each response",
    )
    must(
        scores is None or all(a >= b for a, b in zip(scores, scores[1:])),
        "scores must fall from best to worst",
    )
    history = row.get("history", [])
    must(
        isinstance(history, list)
        and all(
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(said, str) and said.strip() and is_unicode(said) for said in turn)
            for turn in history
        ),
        "history must be a list of [prompt, response], Unicode strings that are not empty",
    )
    ids = row.get("ids")
    must(
        ids is None
        or isinstance(ids, list)
        and len(ids) == len(responses)
        and all(
            y is None or isinstance(y, list) and set(map(type, y)) == {int} and min(y) >= 0
            for y in ids
        ),
        "ids must be a list of token ids, or null, for each response",
    )
    return row


# ---------------------------------------------------------------------------------------------- rows -> ids -> batches


def asked(row):
    """What of a row a response answers, to look it up by."""
    return tuple(map(tuple, row.get("history", []))) + (row["prompt"],)


def question(row):
    """The part of a row that asks: prompt, history and group, where it has them."""
    return {name: row[name] for name in ("prompt", "history", "group") if name in row}


def encode_rows(rows, enc, template, block_size, max_prompt=0, max_response=0):
    """Rows to ids under one template and one set of limits, the same for every player.

    A row becomes {"prompt": ids, "responses": [ids or None], "ranks": [int], "group": its group?}; a response is
    encode(text) + [eot], cut at its end (then it has no eot), a prompt is cut at its start. Responses that come with "ids"
    were sampled: taken as they are, unless another "tokenizer" made them; a whole text has no prompt and no template. Returns the rows, None for those whose prompt
    leaves no room, and counts of what was cut and dropped.
    """
    max_prompt, max_response = max_prompt or block_size, max_response or block_size
    counts = {"rows": len(rows), "prompts cut": 0, "responses cut": 0, "dropped": 0}
    encoded, mine = [], tokenizers.fingerprint(enc)
    for row in rows:
        prompt = (
            prompt_ids(enc, template, row["prompt"], row.get("history", ()))
            if row["prompt"]
            else []
        )
        room = min(max_response, block_size - min(max_prompt, len(prompt)))
        if room < 1:
            counts["dropped"] += 1
            encoded.append(None)
            continue
        counts["prompts cut"] += len(prompt) > max_prompt
        prompt = prompt[-max_prompt:]
        responses = []
        for text, ids in zip(
            row["responses"],
            (row.get("tokenizer") or mine) == mine
            and row.get("ids")
            or [None] * len(row["responses"]),
        ):
            if ids is not None and max(ids) >= enc.n_vocab:
                raise SystemExit(
                    f"the row with the prompt {row['prompt'][:60]!r} has the id {max(ids)}, outside the vocabulary of {enc.n_vocab}"
                )
            if ids is None and text is not None:
                ids = tokenizers.encode(enc, text, "within" if prompt else "start") + [
                    enc.eot_token
                ]
                counts["responses cut"] += len(ids) > room
            responses.append(None if ids is None else ids[:room])
        if not prompt and max(len(y or []) for y in responses) < 2:  # a first token is not asked
            counts["dropped"] += 1
            encoded.append(None)
            continue
        scores = row.get("scores") or range(len(responses), 0, -1)
        ranks = [sum(better > s for better in scores) for s in scores]
        encoded.append(
            {"prompt": prompt, "responses": responses, "ranks": ranks}
            | ({"group": row["group"]} if "group" in row else {})
        )
    return encoded, counts


def longest_shared_prefix(texts, others):
    """For each of some texts (lists of ids) how many of its first tokens begin one of the others too."""
    ordered, shared = sorted(others), []
    for ids in texts:
        i = bisect.bisect(ordered, ids)  # of all others a neighbour in their order shares most
        shared.append(
            max(len(os.path.commonprefix([ids, other])) for other in ordered[max(0, i - 1) : i + 1])
        )
    return shared


INPUTS = (
    "idx",
    "targets",
    "pos",
    "doc",
    "branch",
    "at",
    "read",
)  # what of a batch model.GPT.forward takes


def row_tokens(row, layout="shared"):
    """Tokens that an encoded row costs in a layout."""
    P, lengths = len(row["prompt"]), [len(y) for y in row["responses"] if y is not None]
    return (
        P + sum(lengths) - len(lengths)
        if layout == "shared"
        else len(lengths) * (P + max(lengths) - 1)
    )


def split_by_tokens(sizes, n):
    """Cut a sequence of sizes into n parts of about the same sum -> [indices of each], none empty. Needs n <= len(sizes)."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    part = np.minimum(middles * n / sum(sizes), n - 1).astype(int)
    if len(set(part)) < n:
        return np.array_split(np.arange(len(sizes)), n)
    return [np.flatnonzero(part == i) for i in range(n)]


def batch_rows(rows, layout="shared", multiple=None):
    """Encoded rows -> one batch of int64 tensors, as `pack_rows` or `pad_rows` lays the tokens out, with

    seq: b K + k of what is asked, the shape of targets; present (B, K) bool; ranks (B, K); lengths (B, K) of what is asked;
    tokens () that are read, without the padding. Masks come from lengths, never from an id. The last token of a response is
    not read, and what an empty prompt leaves without a predecessor is not asked.
    """
    B, K = len(rows), max(len(r["responses"]) for r in rows)
    multiple = multiple or (
        128 if torch.cuda.is_available() else 64
    )  # a GPU's attention works on blocks of 128
    present, ranks, lengths = np.zeros((B, K), bool), np.full((B, K), K), np.zeros((B, K), int)
    for b, row in enumerate(rows):
        for k, y in enumerate(row["responses"]):
            if y is not None:
                present[b, k], ranks[b, k], lengths[b, k] = (
                    True,
                    row["ranks"][k],
                    len(y) - (not row["prompt"]),
                )
    batch = (pack_rows(rows, K, multiple) if layout == "shared" else pad_rows(rows, K)) | dict(
        present=present, ranks=ranks, lengths=lengths
    )
    return pinned({name: torch.from_numpy(np.asarray(a)) for name, a in batch.items()})


def reward_batch(rows, layout="shared"):
    """Encoded rows -> a batch that reads a scalar at every response's last token instead of asking for next tokens: read (r,),
    places in the flat list of tokens; slot (r,): b K + k of each. The last token is read here, so a row has one more of
    each response; idx, present, ranks and the rest as in `batch_rows`."""
    longer = [
        row | {"responses": [y and [*y, 0] for y in row["responses"]]} for row in rows
    ]  # what follows is never read
    batch = batch_rows(longer, layout)
    targets, seq = batch.pop("targets"), batch.pop("seq")
    at = batch.pop("at") if "at" in batch else (targets >= 0).flatten().nonzero().squeeze(1)
    seq = seq[targets >= 0]
    last = torch.cat([seq[1:] != seq[:-1], torch.ones(1, dtype=torch.bool)])
    return pinned(
        batch
        | {
            "read": at[last],
            "slot": seq[last],
            "lengths": batch["lengths"] - batch["present"].long(),
        }
    )


def pinned(batch):
    """In memory that a GPU copies from while it computes, where there is one."""
    return (
        {name: t.pin_memory() for name, t in batch.items()} if torch.cuda.is_available() else batch
    )


def pack_rows(rows, K, multiple):
    """The shared layout: each prompt once, its responses after it, row after row, up to a multiple of some tokens.

    idx, pos, doc, branch (n,): ids, positions, which restart after the prompt, and what model.Packed says; at, targets, seq (m,):
    every response token, and the place that predicts it: a prompt's last token predicts the first one of each response.
    """
    idx, pos, doc, branch, at, targets, seq = [], [], [], [], [], [], []
    for b, row in enumerate(rows):
        prompt, first = row["prompt"], len(idx)
        idx += prompt
        pos += range(len(prompt))
        branch += [0] * len(prompt)
        for k, y in enumerate(row["responses"]):
            if y is not None:
                at += [first + len(prompt) - 1] * bool(prompt) + list(
                    range(len(idx), len(idx) + len(y) - 1)
                )
                targets += y if prompt else y[1:]
                seq += [b * K + k] * (len(y) - (not prompt))
                idx += y[:-1]
                pos += range(len(prompt), len(prompt) + len(y) - 1)
                branch += [k + 1] * (len(y) - 1)
        doc += [b] * (len(idx) - first)
    tokens, pad = len(idx), -len(idx) % multiple
    return dict(
        idx=idx + [0] * pad,
        pos=pos + [0] * pad,
        doc=doc + [len(rows)] * pad,
        branch=branch + [0] * pad,
        at=np.array(at, int),
        targets=np.array(targets, int),
        seq=np.array(seq, int),
        tokens=tokens,
    )


def pad_rows(rows, K):
    """The padded layout, one right-padded sequence a response: idx, targets, seq (N, T), -1 where nothing is asked. It costs the
    prompt K times, and the difference to the longest."""
    texts = [
        (b * K + k, row["prompt"], y)
        for b, row in enumerate(rows)
        for k, y in enumerate(row["responses"])
        if y is not None
    ]
    T = max(len(p) + len(y) for _, p, y in texts) - 1
    idx, targets, seq = (
        np.zeros((len(texts), T), int),
        np.full((len(texts), T), -1),
        np.full((len(texts), T), -1),
    )
    for n, (slot, prompt, y) in enumerate(texts):
        ids, start = prompt + y, max(len(prompt) - 1, 0)
        idx[n, : len(ids) - 1] = ids[:-1]
        targets[n, start : len(ids) - 1] = ids[start + 1 :]
        seq[n, start : len(ids) - 1] = slot
    return dict(
        idx=idx, targets=targets, seq=seq, tokens=sum(len(p) + len(y) - 1 for _, p, y in texts)
    )


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, batch_size, seed, step):
    """Which of n samples make the global batch of a step: permutations without replacement, one after the other."""
    where = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, seed, int(e))[i] for e, i in zip(where // n, where % n)])


def stream_batch(tokens, length, batch_size, seed, step, vocab_size, part=slice(None), apart=None):
    """{"idx", "targets"} (B, T) and {"tokens"} () of a step: windows of a token stream, without replacement, T = length.

    Each epoch shifts the windows by a seeded offset, so that no two cut the text at the same places. `part` takes some
    of the global batch. apart: the id of end-of-text, if documents are not to see each other; then all is flat, (B T,), with
    pos and doc, and an end-of-text stands at the beginning of what follows it.
    Exits if a token is outside the vocabulary or the stream is shorter than two windows.
    """
    n = (len(tokens) - 1) // length - 1
    if n < 1:
        raise SystemExit(
            f"the token stream has {len(tokens)} tokens; block_size {length} needs {2 * length + 1}"
        )
    epochs = np.arange(step * batch_size, (step + 1) * batch_size) // n
    starts = [
        w * length + int(np.random.default_rng([seed, int(e), 1]).integers(length))
        for w, e in zip(batch_indices(n, batch_size, seed, step)[part], epochs[part])
    ]
    rows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
    if rows.max() >= vocab_size:
        raise SystemExit(
            f"token id {rows.max()} near position {starts[0]} of the stream is outside the vocabulary of {vocab_size}"
        )
    idx, targets = rows[:, :-1], rows[:, 1:]
    batch = {"idx": idx, "targets": targets}
    if apart is not None:
        begins = idx == apart
        begins[:, 0] = True
        places = np.arange(idx.size)
        pos = places - np.maximum.accumulate(np.where(begins.ravel(), places, 0))
        batch |= {
            "idx": idx.ravel(),
            "targets": targets.ravel(),
            "pos": pos,
            "doc": begins.ravel().cumsum(),
            "branch": np.zeros_like(pos),
        }
    return pinned(
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
        | {"tokens": torch.tensor(idx.size)}
    )
