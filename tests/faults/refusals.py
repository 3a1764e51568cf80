"""What a user gets wrong, and what somebody else would like: each mistake must end a run at once with one line that says what it
is, and no file that a run reads may be more than data."""

import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import types
import zipfile

import numpy as np

from tests.faults.harness import forget, start

import eval
import sample
from data.files import sha256, write_json
from data import tokenizer
from data.folder import write_meta, write_stream
from data.rows import write_rows

SECONDS = 5  # in which a mistake must be found
SHORT = 8  # cases of a short run
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)  # what a terminal may obey; newline and tab are text
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64"]
LIGHT = [
    "--device=cpu",
    "--batch_size=4",
    "--eval_rows=4",
    "--eval_batches=1",
    "--gen_batch_size=16",
]
WORDS = "the loss of a model falls when it reads what people write and stops at the end".split()


# ------------------------------------------------------------------------------------------------- good runs, to be spoilt


def good(work):
    """A data folder, and a run of each kind that is begun from another."""
    made = types.SimpleNamespace(
        work=work,
        **{
            name: os.path.join(work, name)
            for name in ("data", "pretrain", "sft", "reward", "spin", "ppo")
        },
    )
    rng, enc = random.Random(0), tokenizer.load("bytes")

    def text(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    os.makedirs(made.data)
    for split, n in (("train", 16), ("val", 8)):
        write_stream(f"{made.data}/{split}.bin", [text(40) for _ in range(n)], enc)
        write_rows(
            f"{made.data}/{split}.jsonl",
            [
                {
                    "prompt": f"{split} {i}",
                    "responses": [text(3), text(2), text(1)],
                    "group": f"{i}",
                }
                for i in range(n)
            ],
        )
    write_meta(made.data, "bytes", "made up")
    here = made.__dict__ | {"folder": work}
    for stage in ("pretrain", "sft", "reward", "spin", "ppo"):
        at = types.SimpleNamespace(**here | {"out": here[stage]})
        run = start(STAGES[stage](at))
        if run.wait() != [0]:
            raise SystemExit(f"{stage} of the good runs failed: {run.said}")
        forget(run)
    return made


def pretrain(at, *more):
    return [
        "--stage=pretrain",
        f"--data={at.data}",
        f"--out_dir={at.out}",
        "--max_steps=2",
        *LIGHT,
        *SHAPE,
        *more,
    ]


def later(stage, at, *more):
    return [
        f"--stage={stage}",
        f"--data={at.data}",
        f"--init={at.pretrain}",
        f"--out_dir={at.out}",
        "--max_steps=2",
        "--max_response=8",
        *LIGHT,
        *more,
    ]


def sft(at, *more):
    return later("sft", at, *more)


def reward(at, *more):
    return later("reward", at, *more)


def preference(at, *more):
    return later("preference", at, *more)


def spin(at, *more):
    return later("spin", at, f"--init={at.sft}", *more)


def taught(at, teacher, *more):
    return spin(at, "--players=data,teacher,self", f"--teacher={teacher}", *more)


def ppo(at, *more):
    return later("ppo", at, f"--init={at.sft}", f"--reward={at.reward}", *more)


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "spin": spin, "ppo": ppo}


# ---------------------------------------------------------------------------------------------------- ways to spoil them


def write(at, name, content):
    """A file of a case -> its path. content: bytes, a text, or rows."""
    path = os.path.join(at.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, list):
        write_rows(path, content)
    else:
        with open(path, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
    return path


def data(at, changes={}, seal=True, **meta):
    """--data of a copy with other files (None: removed); meta.json says what they are if `seal`, and some things otherwise (None: nothing)."""
    folder = os.path.join(at.folder, "data")
    shutil.copytree(at.data, folder)
    for name, content in changes.items():
        os.remove(f"{folder}/{name}") if content is None else write(at, f"data/{name}", content)
    if "meta.json" not in changes:
        with open(f"{folder}/meta.json", encoding="utf-8") as f:
            said = json.load(f)
        for name in changes if seal else ():
            if os.path.exists(f"{folder}/{name}"):
                said["files"][name] = {
                    "sha256": sha256(f"{folder}/{name}"),
                    "bytes": os.path.getsize(f"{folder}/{name}"),
                }
        write_json(
            f"{folder}/meta.json",
            {name: value for name, value in (said | meta).items() if value is not None},
        )
    return f"--data={folder}"


def row(**changes):
    """Rows of which the third is changed."""
    rows = [{"prompt": f"p {i}", "responses": ["a b", "c", "d"]} for i in range(12)]
    rows[2] = {name: value for name, value in (rows[2] | changes).items() if value != "nothing"}
    return rows


def ids(*some, dtype=np.uint16):
    return np.array([65] * 4000 + list(some), dtype=dtype).tobytes()


def run_folder(at, kind, changes={}, seal=True, **meta):
    """A copy of a good run with other files in its checkpoint, or beside it under ../ (None: removed); its manifest says so if `seal`."""
    folder = os.path.join(at.folder, kind)
    shutil.copytree(getattr(at, kind), folder)
    step = os.path.join(folder, "round_0", "step_000002")
    for name, content in changes.items():
        path = os.path.normpath(os.path.join(step, name))
        shutil.rmtree(path) if content is None and os.path.isdir(path) else os.remove(
            path
        ) if content is None else write(at, os.path.relpath(path, at.folder), content)
    if seal:
        reseal(step, meta)
    return folder


def reseal(step, meta={}):
    """What an attacker who knows the format does: every hash is right again."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"{step}/meta.json", encoding="utf-8") as f:
            said = json.load(f)
        said |= {"weights_sha256": sha256(f"{step}/model.safetensors")} | meta
        write_json(
            f"{step}/meta.json", {name: value for name, value in said.items() if value is not None}
        )
    names = sorted(
        os.path.relpath(os.path.join(folder, name), step)
        for folder, _, files in os.walk(step)
        for name in files
    )
    write_json(
        f"{step}/manifest.json",
        {
            n: {"sha256": sha256(f"{step}/{n}"), "bytes": os.path.getsize(f"{step}/{n}")}
            for n in names
            if n != "manifest.json"
        },
    )


def weights(at, kind, change):
    """The bytes of a good run's model.safetensors after change(its header)."""
    with open(f"{getattr(at, kind)}/round_0/step_000002/model.safetensors", "rb") as f:
        raw = f.read()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + n :]


def flipped(path):
    with open(path, "rb") as f:
        raw = bytearray(f.read())
    raw[-1] ^= 1
    return bytes(raw)


def begun(at, kind, change=None):
    """A run folder that is begun, as this case's out_dir."""
    shutil.copytree(getattr(at, kind), at.out)
    if change:
        path = os.path.join(at.out, change[0])
        with open(path, "wb") as f:
            f.write(change[1])
    return at


def bpe(at, name="other.tiktoken", swap=(1, 0)):
    """A tokenizer that is not "bytes": two of its ids are exchanged."""
    order = {swap[0]: swap[1], swap[1]: swap[0]}
    return write(
        at,
        name,
        b"".join(base64.b64encode(bytes([order.get(i, i)])) + b" %d\n" % i for i in range(256)),
    )


def file_in_the_way(at):
    return write(at, "file", "mine")


# --------------------------------------------------------------------------------------------------------- the mistakes
# name -> (what the line must contain, at -> arguments[, options of start])

SAMPLE, EVAL = {"main": sample.main}, {"main": eval.main}
INPUTS = {
    # the command line and config files
    "unknown setting": ("did you mean 'batch_size'", lambda at: pretrain(at, "--batch_sizes=8")),
    "not an override": ("--name=value", lambda at: pretrain(at, "--compile")),
    "text for a number": ("lr must be float", lambda at: pretrain(at, "--lr=fast")),
    "float for an int": ("rounds must be int", lambda at: spin(at, "--rounds=1e1")),
    "no bool": ("compile must be bool", lambda at: pretrain(at, "--compile=yes")),
    "no literal": ("lr must be", lambda at: pretrain(at, "--lr={[]: 1}")),
    "deep literal": ("lr must be", lambda at: pretrain(at, "--lr=" + "(" * 5000)),
    "infinite number": ("lr must be", lambda at: pretrain(at, "--lr=1e999")),
    "not a number": (
        "temperature must be",
        lambda at: sft(at, write(at, "c.py", "temperature = float('nan')")),
    ),
    "negative": ("max_rows must not be negative", lambda at: sft(at, "--max_rows=-1")),
    "too small": ("batch_size must be at least 1", lambda at: sft(at, "--batch_size=0")),
    "top_p out of range": ("top_p must be in (0, 1]", lambda at: spin(at, "--top_p=1.5")),
    "unknown stage": ("stage must be one of", lambda at: sft(at, "--stage=finetune")),
    "bad model setting": (
        "position must be one of",
        lambda at: pretrain(at, "--position=absolute"),
    ),
    "heads do not divide": ("multiple of n_head", lambda at: pretrain(at, "--n_embd=33")),
    "no layers": ("n_layer must be at least 1", lambda at: pretrain(at, "--n_layer=0")),
    "negative model number": (
        "softcap must not be negative",
        lambda at: pretrain(at, "--logit_softcap=-1"),
    ),
    "norm_eps of nothing": ("norm_eps must be", lambda at: pretrain(at, "--norm_eps=-1")),
    "enormous seed": (
        "seed must be below",
        lambda at: pretrain(at, "--seed=99999999999999999999999"),
    ),
    "lr a round": (
        "lr has 3 values for 2 rounds",
        lambda at: spin(at, "--rounds=2", "--lr=[1e-3,1e-4,1e-5]"),
    ),
    "empty list": ("beta has 0 values", lambda at: spin(at, "--beta=[]")),
    "three betas": ("adam_betas must be two", lambda at: sft(at, "--adam_betas=[0.9,0.9,0.9]")),
    "two token losses": ("set one", lambda at: sft(at, "--focal=1", "--taylor_order=2")),
    "rounds of sft": ("has one round", lambda at: sft(at, "--rounds=2")),
    "reward without ppo": ("has a reward", lambda at: sft(at, f"--reward={at.reward}")),
    "no steps": ("needs max_steps", lambda at: pretrain(at, "--max_steps=0")),
    "no init": ("needs init", lambda at: preference(at, "--init=")),
    "players without teacher": (
        "players names teacher exactly when",
        lambda at: spin(at, "--players=data,teacher,self"),
    ),
    "unknown player": ("players are data, teacher", lambda at: spin(at, "--players=data,me")),
    "one player": ("two or more", lambda at: spin(at, "--players=data")),
    "template without prompt": (
        "template must contain {prompt} once",
        lambda at: sft(at, "--template=Q: {promt}"),
    ),
    "control characters": (
        "control characters",
        lambda at: sft(at, f"--out_dir={at.folder}/a\x1b]0;b\x07\nc"),
    ),
    "no UTF-8": ("control characters", lambda at: sft(at, f"--out_dir={at.folder}/a\udcff")),
    "not a GPU": ("no GPU", lambda at: pretrain(at, "--device=cuda")),
    "missing config file": ("No such file", lambda at: [f"{at.folder}/none.py"]),
    "syntax error": ("c.py:2:", lambda at: [write(at, "c.py", "lr = 1\nbatch size = 2\n")]),
    "config that raises": ("ZeroDivisionError", lambda at: [write(at, "c.py", "lr = 1 / 0\n")]),
    "config that raises at length": (
        "one two three",
        lambda at: [write(at, "c.py", "raise ValueError('one\\ntwo\\nthree')\n")],
    ),
    "config not UTF-8": ("c.py:", lambda at: [write(at, "c.py", b"lr = '\xff'\n")]),
    "config of another kind": (
        "c.py: unknown setting 'learning_rate'",
        lambda at: [write(at, "c.py", "learning_rate = 1\n")],
    ),
    "ranks": (
        "multiple of the number of ranks, 2",
        lambda at: sft(at, "--batch_size=5"),
        {"ranks": 2},
    ),
    "shards": (
        "must divide the number of ranks",
        lambda at: sft(at, "--hsdp_shard_size=3"),
        {"ranks": 2},
    ),
    # the data
    "no data": ("make it with", lambda at: sft(at, "--data=/nowhere/data")),
    "no data for two": ("make it with", lambda at: sft(at, "--data=/nowhere/data"), {"ranks": 2}),
    "no meta.json": ("meta.json: No such file", lambda at: sft(at, data(at, {"meta.json": None}))),
    "meta.json is no JSON": ("is not JSON", lambda at: sft(at, data(at, {"meta.json": "{"}))),
    "meta.json is a list": ("meta.json", lambda at: sft(at, data(at, {"meta.json": "[1]"}))),
    "meta.json is deep": ("is not JSON", lambda at: sft(at, data(at, {"meta.json": "[" * 100000}))),
    "meta.json is binary": (
        "is not JSON",
        lambda at: sft(at, data(at, {"meta.json": b"\xff\xfe"})),
    ),
    "meta.json without files": ("files", lambda at: sft(at, data(at, files=None))),
    "meta.json without source": ("source", lambda at: sft(at, data(at, source=None))),
    "meta.json without dtype": ("dtype", lambda at: pretrain(at, data(at, dtype=None))),
    "meta.json with another dtype": ("dtype", lambda at: pretrain(at, data(at, dtype="float64"))),
    "meta.json with sizes of text": (
        "meta.json",
        lambda at: sft(at, data(at, files={"train.jsonl": {"bytes": "many", "sha256": 1}})),
    ),
    "meta.json with a number for a tokenizer": (
        "tokenizer",
        lambda at: pretrain(at, data(at, tokenizer=7)),
    ),
    "stream without a tokenizer": (
        "tokenizer",
        lambda at: pretrain(
            at, data(at, tokenizer=None, tokenizer_sha256=None), "--tokenizer=bytes"
        ),
    ),
    "file missing": ("val.jsonl is missing", lambda at: sft(at, data(at, {"val.jsonl": None}))),
    "stream cut": (
        "bytes, meta.json says",
        lambda at: pretrain(at, data(at, {"train.bin": ids()[:-3]}, seal=False)),
    ),
    "stream of half a token": (
        "no multiple of",
        lambda at: pretrain(at, data(at, {"train.bin": ids()[:-1]})),
    ),
    "stream empty": ("val.bin is empty", lambda at: pretrain(at, data(at, {"val.bin": b""}))),
    "stream too short": (
        "block_size 64 needs",
        lambda at: pretrain(at, data(at, {"val.bin": ids()[:100]})),
    ),
    "id out of range": (
        "token id 999 at position 0",
        lambda at: pretrain(
            at, data(at, {"train.bin": np.array([999], np.uint16).tobytes() + ids()})
        ),
    ),
    "id out of range at the end": (
        "token id 257 at position 4001",
        lambda at: pretrain(at, data(at, {"train.bin": ids(66, 257)})),
    ),
    "id out of range in validation": (
        "val.bin: token id 65535",
        lambda at: pretrain(at, data(at, {"val.bin": ids(65535)})),
    ),
    "id out of range for two": (
        "token id 300 at position 4000",
        lambda at: pretrain(at, data(at, {"train.bin": ids(300)})),
        {"ranks": 2},
    ),
    "id out of range beside": (
        "token id 300 at position 4000",
        lambda at: sft(
            at, "--pretrain_coef=1", "--pretrain_" + data(at, {"train.bin": ids(300)})[2:]
        ),
    ),
    "rows are no JSON": (
        "train.jsonl:3: not JSON",
        lambda at: sft(
            at,
            data(at, {"train.jsonl": '{"prompt": "a", "responses": ["b"]}\n' * 2 + "{'prompt'}\n"}),
        ),
    ),
    "rows are deep": (
        "train.jsonl:1: not JSON",
        lambda at: sft(at, data(at, {"train.jsonl": "[" * 100000 + "\n"})),
    ),
    "rows with an endless number": (
        "train.jsonl:1: not JSON",
        lambda at: sft(at, data(at, {"train.jsonl": '{"prompt": ' + "9" * 5000 + "}\n"})),
    ),
    "rows not UTF-8": (
        "not UTF-8",
        lambda at: sft(at, data(at, {"train.jsonl": b'{"prompt": "\xff", "responses": ["b"]}\n'})),
    ),
    "rows empty": ("no rows", lambda at: sft(at, data(at, {"val.jsonl": "\n\n"}))),
    "rows changed in place": (
        "sha256",
        lambda at: sft(
            at,
            data(
                at,
                {
                    "train.jsonl": open(f"{at.data}/train.jsonl")
                    .read()
                    .replace("train 3", "train X")
                },
                seal=False,
            ),
        ),
    ),
    "row is a list": (
        "train.jsonl:1: a row must be an object",
        lambda at: sft(at, data(at, {"train.jsonl": "[1]\n"})),
    ),
    "lone surrogate": (
        "train.jsonl:3: text must be Unicode",
        lambda at: sft(
            at,
            data(at, {"train.jsonl": "".join(json.dumps(r) + "\n" for r in row(prompt="\ud800"))}),
        ),
    ),
    "prompt missing": (
        "train.jsonl:3: prompt must be",
        lambda at: sft(at, data(at, {"train.jsonl": row(prompt="nothing")})),
    ),
    "prompt a number": (
        "train.jsonl:3: prompt must be",
        lambda at: sft(at, data(at, {"train.jsonl": row(prompt=7)})),
    ),
    "no responses": (
        "train.jsonl:3: responses must be",
        lambda at: sft(at, data(at, {"train.jsonl": row(responses=[])})),
    ),
    "best response null": (
        "the best response must be there",
        lambda at: sft(at, data(at, {"train.jsonl": row(responses=[None, "a"])})),
    ),
    "group a list": (
        "train.jsonl:3: group must be",
        lambda at: sft(at, data(at, {"train.jsonl": row(group=["a"])}), "--calibration=True"),
    ),
    "ids of words": (
        "train.jsonl:3: ids must be",
        lambda at: sft(at, data(at, {"train.jsonl": row(ids=["a", "b", "c"])})),
    ),
    "ids of another vocabulary": (
        "outside the vocabulary",
        lambda at: sft(at, data(at, {"train.jsonl": row(ids=[[9999], [1], [2]])})),
    ),
    "scores too few": (
        "train.jsonl:3: scores must be",
        lambda at: reward(at, data(at, {"train.jsonl": row(scores=[1])})),
    ),
    "scores rise": (
        "scores must fall",
        lambda at: reward(at, data(at, {"train.jsonl": row(scores=[1, 2, 3])})),
    ),
    "scores not numbers": (
        "train.jsonl:3: scores must be",
        lambda at: reward(at, data(at, {"train.jsonl": row(scores=[3, 2, float("nan")])})),
    ),
    "scores enormous": (
        "train.jsonl:3: scores must be",
        lambda at: reward(at, data(at, {"train.jsonl": row(scores=[10**400, 2, 1])})),
    ),
    "nothing to rank in validation": (
        "val.jsonl: none of its",
        lambda at: reward(at, data(at, {"val.jsonl": [r | {"responses": ["a"]} for r in row()]})),
    ),
    "scores missing": ("score_margin needs scores", lambda at: reward(at, "--score_margin=1")),
    "one response": (
        "none of its 12 rows is left",
        lambda at: preference(
            at, data(at, {"train.jsonl": [r | {"responses": ["a"]} for r in row()]})
        ),
    ),
    "whole texts to play on": (
        "no prompt to play on",
        lambda at: spin(at, data(at, {"train.jsonl": [{"text": "a b"}] * 8})),
    ),
    "no room": (
        "none of its",
        lambda at: sft(
            at, data(at, {"train.jsonl": [r | {"prompt": "long " * 40} for r in row()]})
        ),
    ),
    "data of another tokenizer": (
        "was written with the tokenizer",
        lambda at: pretrain(at, f"--tokenizer={bpe(at)}"),
    ),
    "tokenizer not the checkpoint's": (
        "is not the checkpoint's",
        lambda at: sft(at, f"--tokenizer={bpe(at)}"),
    ),
    "tokenizer missing": (
        "gpt2, bytes, a .tiktoken file or a tokenizer.json",
        lambda at: pretrain(at, "--tokenizer=none.tiktoken"),
    ),
    "tokenizer broken": (
        "not a .tiktoken file",
        lambda at: pretrain(at, "--tokenizer=" + write(at, "a.tiktoken", "hello\n")),
    ),
    "tokenizer with holes": (
        "hold every byte",
        lambda at: pretrain(at, "--tokenizer=" + write(at, "a.tiktoken", "YQ== 0\n")),
    ),
    # checkpoints
    "init missing": ("no checkpoint there", lambda at: sft(at, "--init=/nowhere/run")),
    "init missing for two": (
        "no checkpoint there",
        lambda at: sft(at, "--init=/nowhere/run"),
        {"ranks": 2},
    ),
    "init without checkpoint": ("no checkpoint there", lambda at: sft(at, f"--init={at.data}")),
    "init a file": ("no checkpoint there", lambda at: sft(at, f"--init={file_in_the_way(at)}")),
    "weights damaged": (
        "model.safetensors is damaged",
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at,
                "pretrain",
                {
                    "model.safetensors": flipped(
                        f"{at.pretrain}/round_0/step_000002/model.safetensors"
                    )
                },
                seal=False,
            ),
        ),
    ),
    "weights damaged for two": (
        "model.safetensors is damaged",
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"model.safetensors": b"x"}, seal=False)
        ),
        {"ranks": 2},
    ),
    "weights cut": (
        "cannot be read",
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at, "pretrain", {"model.safetensors": weights(at, "pretrain", dict.clear)[:-50]}
            ),
        ),
    ),
    "weights of other tensors": (
        "other tensors",
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at,
                "pretrain",
                {
                    "model.safetensors": weights(
                        at, "pretrain", lambda header: header.update(mine=header.pop("wte.weight"))
                    )
                },
            ),
        ),
    ),
    "weights of another shape": (
        "has shape",
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at,
                "pretrain",
                {
                    "model.safetensors": weights(
                        at, "pretrain", lambda header: header["wte.weight"]["shape"].reverse()
                    )
                },
            ),
        ),
    ),
    "checkpoint's meta.json damaged": (
        "meta.json is damaged",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", {"meta.json": "{}"}, seal=False)),
    ),
    "checkpoint's meta.json lacks the model": (
        "meta.json cannot be read",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", model=None)),
    ),
    "checkpoint's meta.json lacks the config": (
        "KeyError: 'config'",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", config=None)),
    ),
    "checkpoint's meta.json lacks the tokenizer": (
        "KeyError: 'tokenizer'",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", tokenizer=None)),
    ),
    "checkpoint's tokenizer is a number": (
        "tokenizer must be str",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", tokenizer=5)),
    ),
    "checkpoint's width is no integer": (
        "n_embd must be int",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", model={"n_embd": 32.0})),
    ),
    "checkpoint's template is a number": (
        "template must be str",
        lambda at: [
            run_folder(at, "sft", config=spelled_config(at) | {"template": 5}),
            "--prompt",
            "a",
        ],
        SAMPLE,
    ),
    "manifest is deep": (
        "RecursionError",
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"manifest.json": "[" * 100000}, seal=False)
        ),
    ),
    "manifest missing": (
        "manifest.json",
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"manifest.json": None}, seal=False)
        ),
    ),
    "manifest is no JSON": (
        "cannot be read",
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"manifest.json": "{"}, seal=False)
        ),
    ),
    "manifest is a list": (
        "cannot be read",
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"manifest.json": "[]"}, seal=False)
        ),
    ),
    "another shape": ("n_layer is 3, but the checkpoint", lambda at: sft(at, "--n_layer=3")),
    "block_size over the checkpoint's": (
        "block_size is 128, but the checkpoint",
        lambda at: sft(at, "--block_size=128"),
    ),
    "checkpoint's tokenizer missing": (
        "tokenizer.tiktoken: No such file",
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", tokenizer="tokenizer.tiktoken")),
    ),
    "checkpoint's tokenizer another": (
        "is not the one that the checkpoint",
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at,
                "pretrain",
                {"tokenizer.tiktoken": open(bpe(at), "rb").read()},
                tokenizer="tokenizer.tiktoken",
            ),
        ),
    ),
    # teachers and rewards
    "teacher's file missing": (
        "no such file; make it with",
        lambda at: taught(at, f"{at.folder}/none.jsonl"),
    ),
    "teacher missing": ("no checkpoint there", lambda at: taught(at, f"{at.folder}/none")),
    "teacher without prompts": (
        "no response to 16 of 16 prompts",
        lambda at: taught(at, f"{at.data}/val.jsonl"),
    ),
    "teacher without validation prompts": (
        "no response to 4 of 4 prompts",
        lambda at: taught(at, f"{at.data}/train.jsonl"),
    ),
    "teacher's ids of another vocabulary": (
        "outside the vocabulary",
        lambda at: taught(
            at,
            write(
                at,
                "t.jsonl",
                [
                    {
                        "prompt": f"{split} {i}",
                        "responses": ["a"],
                        "ids": [[70000]],
                        "tokenizer": tokenizer.fingerprint(tokenizer.load("bytes")),
                    }
                    for split in ("train", "val")
                    for i in range(16)
                ],
            ),
        ),
    ),
    "teacher's ids missing": (
        "has no ids",
        lambda at: taught(
            at,
            write(
                at,
                "t.jsonl",
                [
                    {
                        "prompt": f"{split} {i}",
                        "responses": ["a"],
                        "tokenizer": tokenizer.fingerprint(tokenizer.load("bytes")),
                    }
                    for split in ("train", "val")
                    for i in range(16)
                ],
            ),
        ),
    ),
    "teacher that is a reward model": ("is a reward model", lambda at: taught(at, at.reward)),
    "second responses missing": (
        "have one response",
        lambda at: taught(
            at, "rows", data(at, {"train.jsonl": [r | {"responses": ["a"]} for r in row()]})
        ),
    ),
    "reward that is none": ("is not a reward model", lambda at: ppo(at, f"--reward={at.sft}")),
    "reward's module missing": ("No module named", lambda at: ppo(at, "--reward=nowhere:f")),
    "reward's function missing": ("has no attribute", lambda at: ppo(at, "--reward=math:f")),
    "reward without a module": ("reward :f", lambda at: ppo(at, "--reward=:f")),
    "reward that is no function": ("reward math:pi", lambda at: ppo(at, "--reward=math:pi")),
    "policy that is a reward model": (
        "is a reward model, no policy",
        lambda at: ppo(at, f"--init={at.reward}"),
    ),
    "player that is a reward model": (
        "is a reward model, no policy",
        lambda at: spin(at, f"--init={at.reward}"),
    ),
    # run folders
    "begun with another lr": (
        "was begun with lr",
        lambda at: pretrain(begun(at, "pretrain"), "--lr=0.1"),
    ),
    "begun with other data": (
        "was begun with data",
        lambda at: pretrain(begun(at, "pretrain"), data(at)),
    ),
    "begun with data since changed": (
        "was begun with data_sha256",
        lambda at: (
            begun(at, "sft"),
            data(at, {"train.jsonl": row()}),
            os.rename(f"{at.folder}/data", f"{at.folder}/d"),
            in_place(at, data=f"{at.folder}/d"),
            sft(at, f"--data={at.folder}/d"),
        )[-1],
    ),
    "begun with init since changed": (
        "was begun with players_sha256",
        lambda at: (
            begun(at, "spin"),
            in_place(at, init=other_init(at)),
            spin(at, f"--init={at.folder}/pretrain"),
        )[-1],
    ),
    "config.json damaged": (
        "config.json",
        lambda at: pretrain(begun(at, "pretrain", ("config.json", b"{"))),
    ),
    "config.json of something else": (
        "config.json",
        lambda at: (
            write(at, "run/config.json", '{"architectures": ["LlamaForCausalLM"]}'),
            pretrain(at),
        )[-1],
    ),
    "config.json of something like it": (
        "config.json",
        lambda at: (write(at, "run/config.json", '{"config": 5}'), pretrain(at))[-1],
    ),
    "metrics.jsonl damaged": (
        "metrics.jsonl:1",
        lambda at: pretrain(begun(at, "pretrain", ("metrics.jsonl", b"{}\n"))),
    ),
    "collected rows damaged": (
        "train.jsonl:1: not JSON",
        lambda at: spin(begun(at, "spin", ("round_0/train.jsonl", b"{\n")), "--max_steps=2"),
    ),
    "reference damaged": (
        "train.ref.npz",
        lambda at: spin(begun(at, "spin", ("round_0/train.ref.npz", b"PK"))),
    ),
    "rollout damaged": (
        "rollout.npz is damaged",
        lambda at: ppo(begun(at, "ppo", ("round_0/rollout.npz", b"PK"))),
    ),
    "collect.json damaged": (
        "collect.json",
        lambda at: ppo(begun(at, "ppo", ("round_0/collect.json", b"{"))),
    ),
    "out_dir a file": ("is a file", lambda at: pretrain(at, f"--out_dir={file_in_the_way(at)}")),
    "out_dir below a file": (
        "out_dir",
        lambda at: pretrain(at, f"--out_dir={file_in_the_way(at)}/run"),
    ),
    "out_dir below a file for two": (
        "out_dir",
        lambda at: pretrain(at, f"--out_dir={file_in_the_way(at)}/run"),
        {"ranks": 2},
    ),
    "out_dir too long": ("out_dir", lambda at: pretrain(at, f"--out_dir={at.folder}/{'x' * 300}")),
    # sample.py
    "sample of nothing": (
        "no checkpoint there",
        lambda at: ["/nowhere/run", "--prompt", "a"],
        SAMPLE,
    ),
    "empty prompt": ("the prompt is empty", lambda at: [at.sft, "--prompt", " "], SAMPLE),
    "no prompt": ("is required", lambda at: [at.sft], SAMPLE),
    "negative temperature": (
        "must be at least 0",
        lambda at: [at.sft, "--prompt", "a", "--temperature=-1"],
        SAMPLE,
    ),
    "temperature of words": (
        "must be a number",
        lambda at: [at.sft, "--prompt", "a", "--temperature=hot"],
        SAMPLE,
    ),
    "sample's top_p": (
        "must be at most 1",
        lambda at: [at.sft, "--prompt", "a", "--top_p=1.5"],
        SAMPLE,
    ),
    "sample's device": (
        "must be cpu, or cuda",
        lambda at: [at.sft, "--prompt", "a", "--device=tpu"],
        SAMPLE,
    ),
    "prompts without out": (
        "go together",
        lambda at: [at.sft, "--prompts", f"{at.data}/val.jsonl"],
        SAMPLE,
    ),
    "prompts missing": (
        "No such file",
        lambda at: [
            at.sft,
            "--prompts",
            f"{at.folder}/none.jsonl",
            "--out",
            f"{at.folder}/o.jsonl",
        ],
        SAMPLE,
    ),
    "prompts broken": (
        "not JSON",
        lambda at: [
            at.sft,
            "--prompts",
            write(at, "p.jsonl", "{\n"),
            "--out",
            f"{at.folder}/o.jsonl",
        ],
        SAMPLE,
    ),
    "out in no folder": (
        "No such folder",
        lambda at: [
            at.sft,
            "--prompts",
            f"{at.data}/val.jsonl",
            "--out",
            f"{at.folder}/none/o.jsonl",
        ],
        SAMPLE,
    ),
    "sample of a reward model": (
        "is a reward model",
        lambda at: [at.reward, "--prompt", "a"],
        SAMPLE,
    ),
    # eval.py
    "eval of nothing": (
        "no checkpoint there",
        lambda at: ["a=/nowhere/run", f"--data={at.data}"],
        EVAL,
    ),
    "eval without a name": (
        "given as NAME=CHECKPOINT",
        lambda at: [at.sft, f"--data={at.data}"],
        EVAL,
    ),
    "eval without data": ("make it with", lambda at: [f"a={at.sft}", "--data=/nowhere/data"], EVAL),
    "eval without a judge": (
        "no checkpoint there",
        lambda at: [f"a={at.sft}", f"--data={at.data}", "--judge=/nowhere/run"],
        EVAL,
    ),
    "eval without a reference": (
        "no checkpoint there",
        lambda at: [f"a={at.sft}", f"--data={at.data}", "--reference=/nowhere/run"],
        EVAL,
    ),
    "eval's rows": (
        "must be at least 1",
        lambda at: [f"a={at.sft}", f"--data={at.data}", "--rows=0"],
        EVAL,
    ),
    "eval into a file": (
        "File exists",
        lambda at: [f"a={at.sft}", f"--data={at.data}", f"--out={file_in_the_way(at)}"],
        EVAL,
    ),
    "eval without room": (
        "no room",
        lambda at: [
            f"a={at.sft}",
            data(at, {"val.jsonl": [{"prompt": "long " * 40, "responses": ["a"]}] * 3}),
        ],
        EVAL,
    ),
    "eval of whole texts under a judge": (
        "nothing to judge",
        lambda at: [
            f"a={at.sft}",
            data(at, {"val.jsonl": [{"text": "a b"}] * 3}),
            f"--judge={at.reward}",
        ],
        EVAL,
    ),
    "eval with nothing to rank": (
        "no row has two responses",
        lambda at: [
            f"a={at.reward}",
            data(at, {"val.jsonl": [r | {"responses": ["a"]} for r in row()]}),
        ],
        EVAL,
    ),
    "judged reward model": (
        "has no samples to judge",
        lambda at: [f"a={at.reward}", f"--data={at.data}", f"--judge={at.sft}"],
        EVAL,
    ),
}


def in_place(at, **changes):
    """Let a begun run's config.json have other settings."""
    path = f"{at.out}/config.json"
    with open(path, encoding="utf-8") as f:
        said = json.load(f)
    said["config"] |= changes
    write_json(path, said)


def other_init(at):
    """A copy of a run with other weights."""
    return run_folder(
        at,
        "pretrain",
        {"model.safetensors": flipped(f"{at.pretrain}/round_0/step_000002/model.safetensors")},
    )


def snapshot(folder):
    """{path: hash} of what lies in a folder."""
    return {
        path: hashlib.sha256(open(path, "rb").read()).hexdigest()
        for where, _, names in os.walk(folder)
        for path in (os.path.join(where, name) for name in names)
    }


def refused(run, seconds, says):
    """What is wrong with the way a run was refused, or ""."""
    lines = run.err.splitlines()
    if any(s in (0, "hung") for s in run.status):
        return f"ended with {run.status}: {run.err[-200:]!r}"
    if len(lines) != 1:
        return f"{len(lines)} lines of error: ... {run.err[-300:]!r}"
    if says not in lines[0] or CONTROL.search(run.err):
        return f"{says!r} is not what it says: {lines[0]!r}"
    return f"{seconds:.1f} s" if seconds > SECONDS else ""


def inputs(place, short):
    """mistakes of a user: each ends the run with one line, non-zero status and no traceback, in 5 seconds and before the first step"""
    return tally(place, short, INPUTS, mistake)


def mistake(at, case):
    """Make a mistake -> (what went wrong or "", seconds)."""
    says, make, options = (*case, {})[:3]
    argv = make(at)
    before = snapshot(at.folder)
    began = time.time()
    run = start(argv, **options)
    run.wait(4 * SECONDS)
    seconds = time.time() - began
    wrong = refused(run, seconds, says)
    after = snapshot(at.folder)
    lost = [
        path
        for path, was in before.items()
        if after.get(path) != was and path != f"{at.out}/config.json" or path not in after
    ]
    steps = [
        line
        for path in after
        if path.endswith("metrics.jsonl") and path not in before
        for line in open(path, encoding="utf-8")
        if '"kind": "step"' in line
    ]
    wrong = wrong or (f"changed {lost[0]}" if lost else "") or ("it trained" if steps else "")
    forget(run)
    return wrong, seconds


def tally(place, short, cases, check):
    """Go through cases, a section's way."""
    made = good(os.path.join(place.folder, check.__name__))
    names = sorted(place.rng.sample(sorted(cases), SHORT)) if short else list(cases)
    failures, slowest = [], 0.0
    for name in names:
        folder = os.path.join(made.work, "case")
        os.makedirs(folder)
        at = types.SimpleNamespace(
            **made.__dict__,
            folder=folder,
            out=os.path.join(folder, "run"),
            marker=os.path.join(folder, "executed"),
        )
        wrong, seconds = check(at, cases[name])
        slowest = max(slowest, seconds)
        failures += [f"{name}: {wrong}"] * bool(wrong)
        shutil.rmtree(folder)
    shutil.rmtree(made.work)
    return len(names) - len(failures), len(names), failures, f"slowest {slowest:.1f} s"


# --------------------------------------------------------------------------------------------------------- the payloads
# name -> (at -> arguments[, options of start]); whatever is executed touches at.marker


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def pickled(at):
    return pickle.dumps(Payload(at.marker))


def zipped(at):
    """What torch.save writes: a zip with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled(at))
        z.writestr("archive/version", "3\n")
    return out.getvalue()


def objects(at, **more):
    """An .npz file that holds an array of objects."""
    out = io.BytesIO()
    np.savez(
        out,
        **{
            name: np.array([Payload(at.marker)], dtype=object)
            for name in ("refs", "logps", "values", "advantages", "returns")
        }
        | more,
    )
    return out.getvalue()


def spells(at):
    """Texts that something might interpret."""
    return [
        "{prompt}{0.__class__.__init__.__globals__}{{prompt}}%(prompt)s%s%n${prompt}",
        f"$(touch {at.marker}) `touch {at.marker}` ; touch {at.marker} | touch {at.marker}",
        f"__import__('os').system('touch {at.marker}')",
        f'""" + __import__(\'os\').system(\'touch {at.marker}\') + """',
        "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b31m\r\x08\x7f",
        f"../../{at.marker}",
        "<|endoftext|>",
        "\x00",
        "!!python/object/apply:os.system ['touch " + at.marker + "']",
    ]


def spelled(at):
    """--data of rows whose texts are spells."""
    rows = {
        split: [
            {"prompt": f"{spell} {split} {i}", "responses": [spell, f"{spell}."], "group": spell}
            for i, spell in enumerate(spells(at))
        ]
        for split in ("train", "val")
    }
    return data(at, {f"{split}.jsonl": some for split, some in rows.items()})


def of_run(at, kind, **arrays):
    """What a begun run's file of the reference is of."""
    with np.load(f"{getattr(at, kind)}/round_0/train.ref.npz") as f:
        return f["of"]


def sealed_rollout(at):
    """A begun PPO run whose rollout.npz holds objects, and whose collect.json has its hash."""
    begun(at, "ppo", ("round_0/rollout.npz", objects(at)))
    path = f"{at.out}/round_0/collect.json"
    with open(path, encoding="utf-8") as f:
        said = json.load(f)
    said["files"]["rollout.npz"] = sha256(f"{at.out}/round_0/rollout.npz")
    write_json(path, said)
    shutil.rmtree(f"{at.out}/round_0/step_000002")
    return at


def victim(at):
    """A file outside that must stay as it is."""
    return write(at, "victim", "mine")


def with_optimizer(at, kind):
    return {
        f"optimizer/{name}": pickled(at)
        for name in sorted(os.listdir(f"{getattr(at, kind)}/round_0/step_000002/optimizer"))
    } | {"optimizer/.metadata": pickled(at), "optimizer/x.pt": zipped(at)}


PAYLOADS = {
    "weights that are a pickle": (
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"model.safetensors": pickled(at)})
        ),
    ),
    "weights that torch.save wrote": (
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at, "pretrain", {"model.safetensors": zipped(at), "pytorch_model.bin": zipped(at)}
            ),
        ),
    ),
    "weights whose header is huge": (
        lambda at: sft(
            at,
            "--init="
            + run_folder(
                at, "pretrain", {"model.safetensors": b"\xff" * 7 + b"\x7f" + pickled(at)}
            ),
        ),
    ),
    "weights that are sampled from": (
        lambda at: [run_folder(at, "sft", {"model.safetensors": pickled(at)}), "--prompt", "a"],
        SAMPLE,
    ),
    "a reward model that is a pickle": (
        lambda at: ppo(
            at, "--reward=" + run_folder(at, "reward", {"model.safetensors": pickled(at)})
        ),
    ),
    "a judge that is a pickle": (
        lambda at: [
            f"a={at.sft}",
            f"--data={at.data}",
            "--judge=" + run_folder(at, "reward", {"model.safetensors": pickled(at)}),
        ],
        EVAL,
    ),
    "a teacher's file that is a pickle": (
        lambda at: taught(at, write(at, "t.jsonl", pickled(at))),
    ),
    "a teacher's optimizer of pickles": (
        lambda at: taught(at, run_folder(at, "pretrain", with_optimizer(at, "pretrain"))),
    ),
    "a run's own optimizer of pickles": (
        lambda at: (
            begun(at, "pretrain"),
            in_place(at, max_steps=4),
            [
                write(at, f"run/round_0/step_000002/{name}", c)
                for name, c in with_optimizer(at, "pretrain").items()
            ],
            reseal(f"{at.out}/round_0/step_000002"),
            pretrain(at, "--max_steps=4"),
        )[-1],
    ),
    "checkpoint's settings with escapes": (
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", model={"\x1b]0;x\x07": 1})),
    ),
    "checkpoint's round with escapes": (
        lambda at: (
            begun(at, "pretrain"),
            reseal(f"{at.out}/round_0/step_000002", {"round": "\x1b[31m"}),
            pretrain(at),
        )[-1],
    ),
    "file names with escapes": (
        lambda at: (
            begun(at, "pretrain"),
            write(at, "run/round_0/step_000002/\x1b[31mx", ""),
            pretrain(at),
        )[-1],
    ),
    "reference of objects": (
        lambda at: spin(
            without_steps(
                begun(at, "spin", ("round_0/train.ref.npz", objects(at, of=of_run(at, "spin"))))
            )
        ),
    ),
    "reference that is a pickle": (
        lambda at: spin(without_steps(begun(at, "spin", ("round_0/train.ref.npz", pickled(at))))),
    ),
    "rollout of objects": (lambda at: ppo(sealed_rollout(at)),),
    "tokenizer that is a pickle": (
        lambda at: pretrain(at, "--tokenizer=" + write(at, "t.tiktoken", pickled(at))),
    ),
    "stream that is a pickle": (
        lambda at: pretrain(
            at, data(at, {"train.bin": pickled(at) + b" " * 4000 + b" " * (len(pickled(at)) % 2)})
        ),
    ),
    "rows that are a pickle": (lambda at: sft(at, data(at, {"train.jsonl": pickled(at)})),),
    "data of dtype object": (lambda at: pretrain(at, data(at, dtype="object")),),
    "data with a text that reduces": (
        lambda at: pretrain(
            at,
            data(
                at,
                dtype={"__reduce__": ["os.system", f"touch {at.marker}"]},
                source=f"__import__('os').system('touch {at.marker}')",
            ),
        ),
    ),
    "data's tokenizer outside": (
        lambda at: pretrain(
            at, data(at, tokenizer=f"../{os.path.basename(bpe(at, 'o.tiktoken', (0, 0)))}")
        ),
    ),
    "data's tokenizer with escapes": (
        lambda at: pretrain(
            at, data(at, tokenizer="\x1b]0;x\x07.tiktoken"), f"--tokenizer={bpe(at)}"
        ),
    ),
    "manifest that is a pickle": (
        lambda at: sft(
            at, "--init=" + run_folder(at, "pretrain", {"manifest.json": pickled(at)}, seal=False)
        ),
    ),
    "meta.json that is a pickle": (
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", {"meta.json": pickled(at)})),
    ),
    "manifest that names files outside": (
        lambda at: (begun(at, "pretrain"), outside(at), pretrain(at))[-1],
    ),
    "checkpoint's config with code": (
        lambda at: [
            run_folder(at, "sft", config=spelled_config(at)),
            "--prompt",
            "a",
            "--temperature=0",
        ],
        SAMPLE,
    ),
    "checkpoint's tokenizer outside": (
        lambda at: sft(
            at,
            "--init="
            + run_folder(at, "pretrain", tokenizer="../../../victim" if victim(at) else ""),
        ),
    ),
    "checkpoint's tokenizer anywhere": (
        lambda at: sft(at, "--init=" + run_folder(at, "pretrain", tokenizer=victim(at))),
    ),
    "spells as rows": (
        lambda at: sft(
            at, spelled(at), "--max_steps=12", "--loss_spike_factor=0.001", "--batch_size=2"
        ),
    ),
    "spells as rows of a game": (lambda at: spin(at, spelled(at), "--temperature=2"),),
    "spells that a teacher lacks": (lambda at: taught(at, f"{at.data}/train.jsonl", spelled(at)),),
    "spells without scores": (lambda at: reward(at, spelled(at), "--score_margin=1"),),
    "spells as prompts": (
        lambda at: [
            at.sft,
            "--prompts",
            spelled(at)[7:] + "/val.jsonl",
            "--out",
            f"{at.folder}/o.jsonl",
        ],
        SAMPLE,
    ),
    "spells to be measured": (
        lambda at: [f"a={at.sft}", spelled(at), f"--judge={at.reward}", f"--out={at.folder}/o"],
        EVAL,
    ),
    "a prompt of spells": (
        lambda at: [at.sft, "--raw", "--prompt", "".join(spells(at)[2:4]), "--temperature=1000"],
        SAMPLE,
    ),
    "a model that says anything": (
        lambda at: [at.sft, "--prompt", "a", "--temperature=1000", "--max_new_tokens=60"],
        SAMPLE,
    ),
    "a run folder of spells": (
        lambda at: pretrain(
            at,
            f"--out_dir={at.folder}/a;touch {os.path.basename(at.marker)};$(touch executed)`touch executed`&|'\"",
        ),
    ),
    "a run folder of lines": (
        lambda at: pretrain(at, f"--out_dir={at.folder}/a\ntouch {at.marker}\n"),
    ),
    "names of checkpoints that are spells": (
        lambda at: ["\x1b[31m$(touch executed)=x\ny", f"--data={at.data}"],
        EVAL,
    ),
}


def without_steps(at):
    """A begun run before its first checkpoint."""
    shutil.rmtree(f"{at.out}/round_0/step_000002")
    return at


def outside(at):
    path = f"{at.out}/round_0/step_000002/manifest.json"
    with open(path, encoding="utf-8") as f:
        said = json.load(f)
    write_json(
        path,
        said
        | {
            "../../../../victim": {"sha256": sha256(victim(at)), "bytes": 4},
            "/etc/passwd": {"sha256": "", "bytes": 0},
        },
    )


def spelled_config(at):
    with open(f"{at.sft}/round_0/step_000002/meta.json", encoding="utf-8") as f:
        said = json.load(f)["config"]
    return said | {
        "template": spells(at)[0].replace("{{prompt}}", "") + spells(at)[2],
        "reward": "os:system",
        "out_dir": f"../../{at.marker}",
        "device": f"$(touch {at.marker})",
    }


def payloads(place, short):
    """malicious files through every path a user may point at: nothing is executed, nothing reaches the terminal raw"""
    return tally(place, short, PAYLOADS, harmless)


def harmless(at, case):
    """Point a run at a payload -> (what went wrong or "", seconds)."""
    make, options = (*case, {})[:2]
    argv, began = make(at), time.time()
    run = start(argv, **options)
    run.wait(60)
    said, lines = run.said, run.err.splitlines()
    executed = [
        path
        for where, _, names in os.walk(at.work)
        for path in names
        if path.startswith("executed")
    ] + [n for n in os.listdir() if n.startswith("executed")]
    wrong = (
        "executed"
        if executed
        else f"ended with {run.status}: ... {said[-300:]!r}"
        if run.status != [0] and (len(lines) != 1 or "hung" in run.status)
        else f"a control character is written: {said[max(0, CONTROL.search(said).start() - 80) :][:200]!r}"
        if CONTROL.search(said)
        else "the file outside was changed"
        if os.path.exists(f"{at.folder}/victim") and open(f"{at.folder}/victim").read() != "mine"
        else ""
    )
    forget(run)
    return wrong, time.time() - began
