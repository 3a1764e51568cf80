"""Good data and good runs, and ways to spoil copies of them.

The sections `inputs` and `payloads` have a table of cases each. A case gets a `Place`: where the
good runs are, and an empty folder of its own. It returns the arguments of a run.
"""

import base64
import contextlib
import json
import os
import random
import re
import shutil
from dataclasses import dataclass

import numpy as np

import eval  # noqa: A004
import sample
from data import tokenizer
from data.files import sha256, write_json
from data.folder import write_meta, write_stream
from data.rows import write_rows
from tests.conftest import WORDS
from tests.faults.harness import Result, Workspace, count, start

CASES_IN_SHORT = 8  # how many cases of a table a short run takes
CHECKPOINT = "round_0/step_000002"  # the only one of each good run
MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64"]
SMALL = [
    "--device=cpu",
    "--batch_size=4",
    "--eval_rows=4",
    "--eval_batches=1",
    "--gen_batch_size=16",
    "--max_steps=2",
]

# what a terminal may obey; newline and tab are text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

SAMPLE = sample.main
EVAL = eval.main


@dataclass
class Place:
    """Where a case finds the good data and runs, and where it writes."""

    good: str  # folder of the good data and runs
    folder: str  # of the case

    @property
    def data(self) -> str:
        return f"{self.good}/data"

    @property
    def out(self) -> str:
        """The out_dir of the case's run."""
        return f"{self.folder}/run"

    @property
    def marker(self) -> str:
        """A file that exists only if something was executed."""
        return f"{self.folder}/executed"

    def run(self, stage: str) -> str:
        """The folder of the good run of a stage."""
        return f"{self.good}/{stage}"


# -------------------------------------------------------------------------- arguments of small runs


def pretrain(place: Place, *more: str) -> list[str]:
    out, data = f"--out_dir={place.out}", f"--data={place.data}"
    return ["--stage=pretrain", out, data, *SMALL, *MODEL, *more]


def later(stage: str, place: Place, init: str, *more: str) -> list[str]:
    """Arguments of a stage that starts from the good run of another one."""
    return [
        f"--stage={stage}",
        f"--data={place.data}",
        f"--init={place.run(init)}",
        f"--out_dir={place.out}",
        "--max_response=8",
        *SMALL,
        *more,
    ]


def sft(place, *more):
    return later("sft", place, "pretrain", *more)


def reward(place, *more):
    return later("reward", place, "pretrain", *more)


def preference(place, *more):
    return later("preference", place, "pretrain", *more)


def spin(place, *more):
    return later("spin", place, "sft", *more)


def spin_with_teacher(place, teacher, *more):
    return spin(place, "--players=data,teacher,self", f"--teacher={teacher}", *more)


def ppo(place, *more):
    return later("ppo", place, "sft", f"--reward={place.run('reward')}", *more)


# ---------------------------------------------------------------------------- good data and runs


def make_good_runs(folder: str):
    """Write the data, and a run of each stage from which another one may start."""
    place = Place(folder, folder)
    make_good_data(place.data)
    for arguments in (pretrain, sft, reward, spin, ppo):
        out = place.run(arguments.__name__)
        run = start(arguments(place, f"--out_dir={out}"))
        assert run.wait() == [0], run.output
        run.forget()


def make_good_data(folder: str):
    os.makedirs(folder)
    rng, enc = random.Random(0), tokenizer.load("bytes")

    def text(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for split, n in (("train", 16), ("val", 8)):
        write_stream(f"{folder}/{split}.bin", [text(40) for _ in range(n)], enc)
        rows = []
        for i in range(n):
            responses = [text(3), text(2), text(1)]
            rows.append({"prompt": f"{split} {i}", "responses": responses, "group": f"{i}"})
        write_rows(f"{folder}/{split}.jsonl", rows)
    write_meta(folder, "bytes", "made up")


# ------------------------------------------------------------------------------- files of a case


def write_file(place: Place, name: str, content: bytes | str | list) -> str:
    """Write a file of the case and return its path. content: bytes, a text, or rows."""
    path = os.path.join(place.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, list):
        write_rows(path, content)
        return path
    with open(path, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
    return path


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def flip_last_bit(path: str) -> bytes:
    """The content of a file with its last bit flipped."""
    content = bytearray(read_bytes(path))
    content[-1] ^= 1
    return bytes(content)


def swapped_tokenizer(place: Place, name: str = "other.tiktoken", swap=(1, 0)) -> str:
    """Write a tokenizer that is not "bytes": two of its ids are exchanged. If both are the same,
    it is "bytes" under another name."""
    order = {swap[0]: swap[1], swap[1]: swap[0]}
    lines = []
    for i in range(256):
        token = base64.b64encode(bytes([order.get(i, i)]))
        lines.append(token + b" %d\n" % i)
    return write_file(place, name, b"".join(lines))


# -------------------------------------------------------------------------------------- spoilt data


def changed_data(place: Place, changes=None, update_meta: bool = True, **meta) -> str:
    """--data of a copy of the good data.

    changes: {file: content, or None to remove it}. update_meta: meta.json has the hashes of the
    changed files. meta: other values in meta.json, None to remove one.
    """
    changes = changes or {}
    folder = os.path.join(place.folder, "data")
    shutil.copytree(place.data, folder)
    for name, content in changes.items():
        if content is None:
            os.remove(f"{folder}/{name}")
        else:
            write_file(place, f"data/{name}", content)
    if "meta.json" in changes:
        return f"--data={folder}"

    values = read_json(f"{folder}/meta.json")
    for name in changes:
        if update_meta and os.path.exists(f"{folder}/{name}"):
            values["files"][name] = file_entry(f"{folder}/{name}")
    write_json(f"{folder}/meta.json", without_none(values | meta))
    return f"--data={folder}"


def train_rows(place: Place, rows) -> str:
    """--data with other training rows: a list of rows, or the content of the file."""
    return changed_data(place, {"train.jsonl": rows})


def rows_with(**changes) -> list[dict]:
    """Twelve rows, of which the third has other values; None removes one."""
    rows = [{"prompt": f"p {i}", "responses": ["a b", "c", "d"]} for i in range(12)]
    rows[2] = without_none(rows[2] | changes)
    return rows


def one_response_each() -> list[dict]:
    return [row | {"responses": ["a"]} for row in rows_with()]


def tokens(*more: int, dtype=np.uint16) -> bytes:
    """A token stream: 4,000 times "A", and what follows."""
    return np.array([65] * 4000 + list(more), dtype=dtype).tobytes()


def read_json(path: str):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def file_entry(path: str) -> dict:
    return {"sha256": sha256(path), "bytes": os.path.getsize(path)}


def without_none(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


# -------------------------------------------------------------------------------------- spoilt runs


def changed_run(place: Place, stage: str, changes=None, update: bool = True, **meta) -> str:
    """The folder of a copy of a good run.

    changes: {file of its checkpoint: content, or None to remove it}. update: the checkpoint's
    hashes are right again. meta: other values in its meta.json, None to remove one.
    """
    folder = os.path.join(place.folder, stage)
    shutil.copytree(place.run(stage), folder)
    for name, content in (changes or {}).items():
        if content is None:
            os.remove(f"{folder}/{CHECKPOINT}/{name}")
        else:
            write_file(place, f"{stage}/{CHECKPOINT}/{name}", content)
    if update:
        update_hashes(f"{folder}/{CHECKPOINT}", meta)
    return folder


def sft_from(place: Place, changes=None, update: bool = True, **meta) -> list[str]:
    """Arguments of an SFT run that starts from a changed checkpoint."""
    return sft(place, f"--init={changed_run(place, 'pretrain', changes, update, **meta)}")


def update_hashes(path: str, meta=None):
    """What an attacker who knows the format does: every hash of a checkpoint is right again."""
    with contextlib.suppress(OSError, ValueError):
        values = read_json(f"{path}/meta.json")
        values |= {"weights_sha256": sha256(f"{path}/model.safetensors")} | (meta or {})
        write_json(f"{path}/meta.json", without_none(values))
    names = []
    for folder, _, files in os.walk(path):
        names += [os.path.relpath(os.path.join(folder, file), path) for file in files]
    manifest = {}
    for name in sorted(names):
        if name != "manifest.json":
            manifest[name] = file_entry(f"{path}/{name}")
    write_json(f"{path}/manifest.json", manifest)


def weights_with_header(place: Place, stage: str, change) -> bytes:
    """The bytes of a good run's model.safetensors after change(header)."""
    content = read_bytes(f"{place.run(stage)}/{CHECKPOINT}/model.safetensors")
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def begun(place: Place, stage: str, file: str = "", content: bytes = b"") -> Place:
    """Copy a good run to the case's out_dir, and replace one of its files."""
    shutil.copytree(place.run(stage), place.out)
    if file:
        write_file(place, f"run/{file}", content)
    return place


def remove_checkpoints(place: Place) -> Place:
    """Remove the checkpoint of the case's run, as if it had not come so far."""
    shutil.rmtree(f"{place.out}/{CHECKPOINT}")
    return place


def change_config(place: Place, **changes):
    """Change settings in the config.json of the case's run, and in its checkpoint."""
    path = f"{place.out}/config.json"
    values = read_json(path)
    values["config"] |= changes
    write_json(path, values)
    step = f"{place.out}/{CHECKPOINT}"
    update_hashes(step, {"settings": read_json(f"{step}/meta.json")["settings"] | changes})


# -------------------------------------------------------------------------------- tables of cases


def check_cases(workspace: Workspace, short: bool, cases: dict, check) -> Result:
    """Go through a table {name: case}. check(place, case) -> (what went wrong or "", seconds)."""
    good = os.path.join(workspace.folder, check.__name__)
    os.makedirs(good)
    make_good_runs(good)
    names = list(cases)
    if short:
        names = sorted(workspace.rng.sample(sorted(cases), CASES_IN_SHORT))
    failures = []
    slowest = 0.0
    for name in names:
        place = Place(good, os.path.join(good, "case"))
        os.makedirs(place.folder)
        problem, seconds = check(place, cases[name])
        slowest = max(slowest, seconds)
        if problem:
            failures.append(f"{name}: {problem}")
        shutil.rmtree(place.folder)
    shutil.rmtree(good)
    return count(len(names), failures, f"slowest {slowest:.1f} s")
