"""The section `inputs`: what a user gets wrong.

Each mistake must end the run within seconds, before the first step, with one line that says what is
wrong. It may change no file that was there before.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import tokenizer
from studies.taylor import train as taylor
from tests.faults.harness import Result, Workspace, start
from tests.faults.payloads import harmful_config
from tests.faults.spoil import (
    CHECKPOINT,
    CONTROL,
    EVAL,
    SAMPLE,
    Place,
    begun,
    change_config,
    changed_data,
    changed_run,
    check_cases,
    flip_last_bit,
    one_response_each,
    ppo,
    preference,
    pretrain,
    read_bytes,
    reward,
    rows_with,
    sft,
    sft_from,
    spin,
    spin_with_teacher,
    swapped_tokenizer,
    tokens,
    train_rows,
    weights_with_header,
    write_file,
)

SECONDS = 5  # in which a mistake must be found


@dataclass
class Mistake:
    """A mistake: arguments(place) makes it. `line` must be in the error."""

    line: str
    arguments: Callable
    ranks: int = 1
    main: Callable | None = None


def inputs(workspace: Workspace, short: bool) -> Result:
    """mistakes of a user: each ends the run with one line, non-zero status and no traceback, in 5
    seconds and before the first step"""
    return check_cases(workspace, short, mistakes(), check_mistake)


def check_mistake(place: Place, mistake: Mistake) -> tuple[str, float]:
    """Make a mistake. Returns (what went wrong or "", seconds)."""
    argv = mistake.arguments(place)
    before = file_hashes(place.folder)
    start_time = time.time()
    run = start(argv, mistake.ranks, main=mistake.main)
    run.wait(4 * SECONDS)
    seconds = time.time() - start_time
    problem = refused(run, seconds, mistake.line) or changed_files(place, before)
    run.forget()
    return problem, seconds


def refused(run, seconds: float, line: str) -> str:
    """What is wrong with the way a run was refused, or ""."""
    lines = run.errors.splitlines()
    if 0 in run.status or "hung" in run.status:
        return f"ended with {run.status}: {run.errors[-200:]!r}"
    if len(lines) != 1:
        return f"{len(lines)} lines of error: ... {run.errors[-300:]!r}"
    if line not in lines[0] or CONTROL.search(run.errors):
        return f"{line!r} is not what it says: {lines[0]!r}"
    return f"{seconds:.1f} s" if seconds > SECONDS else ""


def changed_files(place: Place, before: dict[str, str]) -> str:
    """Says which file was changed or removed, or that it trained; "" if neither. config.json and
    hashes.json of the run may change."""
    after = file_hashes(place.folder)
    for path, content in before.items():
        may_change = path in (f"{place.out}/config.json", f"{place.out}/hashes.json")
        if path not in after or (after[path] != content and not may_change):
            return f"changed {path}"
    for path in after:
        if path.endswith("metrics.jsonl") and path not in before:
            if b'"kind": "step"' in read_bytes(path):
                return "it trained"
    return ""


def file_hashes(folder: str) -> dict[str, str]:
    hashes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            hashes[path] = hashlib.sha256(read_bytes(path)).hexdigest()
    return hashes


def mistakes() -> dict[str, Mistake]:
    """{name: mistake}, all tables."""
    return SETTINGS | CONFIG_FILES | FOLDERS | STREAMS | ROWS | CHECKPOINTS | PLAYERS | RUNS | TOOLS


# --------------------------------------------------------------------------------------- settings

SETTINGS = {
    "unknown setting": Mistake(
        "did you mean 'batch_size'", lambda place: pretrain(place, "--batch_sizes=8")
    ),
    "method that is another stage": Mistake(
        "GRPO is stage=ppo with advantage=grpo", lambda place: preference(place, "--stage=grpo")
    ),
    "no value": Mistake("--compile needs a value", lambda place: pretrain(place, "--compile")),
    "text for a number": Mistake("lr must be float", lambda place: pretrain(place, "--lr=fast")),
    "float for an int": Mistake("rounds must be int", lambda place: spin(place, "--rounds=1e1")),
    "no bool": Mistake("compile must be bool", lambda place: pretrain(place, "--compile=yes")),
    "no literal": Mistake("lr must be", lambda place: pretrain(place, "--lr={[]: 1}")),
    "deep literal": Mistake("lr must be", lambda place: pretrain(place, "--lr=" + "(" * 5000)),
    "infinite number": Mistake("lr must be", lambda place: pretrain(place, "--lr=1e999")),
    "negative": Mistake("max_rows must not be negative", lambda place: sft(place, "--max_rows=-1")),
    "too small": Mistake(
        "batch_size must be at least 1", lambda place: sft(place, "--batch_size=0")
    ),
    "top_p out of range": Mistake(
        "top_p must be from 1e-06 to 1", lambda place: spin(place, "--top_p=1.5")
    ),
    "unknown stage": Mistake("stage must be one of", lambda place: sft(place, "--stage=finetune")),
    "bad model setting": Mistake(
        "position must be one of", lambda place: pretrain(place, "--position=absolute")
    ),
    "heads do not divide": Mistake(
        "multiple of n_head", lambda place: pretrain(place, "--n_embd=33")
    ),
    "no layers": Mistake(
        "n_layer must be from 1 to 10000", lambda place: pretrain(place, "--n_layer=0")
    ),
    "negative model number": Mistake(
        "logit_softcap must not be negative", lambda place: pretrain(place, "--logit_softcap=-1")
    ),
    "negative norm_eps": Mistake("norm_eps must", lambda place: pretrain(place, "--norm_eps=-1")),
    "enormous seed": Mistake(
        "seed must be below", lambda place: pretrain(place, "--seed=99999999999999999999999")
    ),
    "too few lr": Mistake(
        "lr has 2 values for 3 rounds", lambda place: spin(place, "--rounds=3", "--lr=[1e-3,1e-4]")
    ),
    "empty list": Mistake("beta has 0 values", lambda place: spin(place, "--beta=[]")),
    "three betas": Mistake(
        "adam_betas must be two", lambda place: sft(place, "--adam_betas=[0.9,0.9,0.9]")
    ),
    "two token losses": Mistake(
        "set one", lambda place: sft(place, "--focal=1", "--taylor_order=2"), main=taylor.main
    ),
    "rounds of sft": Mistake("has one round", lambda place: sft(place, "--rounds=2")),
    "reward without ppo": Mistake(
        "needs `reward`", lambda place: sft(place, f"--reward={place.run('reward')}")
    ),
    "no steps": Mistake("needs max_steps", lambda place: pretrain(place, "--max_steps=0")),
    "no init": Mistake("needs init", lambda place: preference(place, "--init=")),
    "players without teacher": Mistake(
        "exactly when players include teacher",
        lambda place: spin(place, "--players=data,teacher,self"),
    ),
    "unknown player": Mistake(
        "players are data, teacher", lambda place: spin(place, "--players=data,me")
    ),
    "one player": Mistake("two or more", lambda place: spin(place, "--players=data")),
    "template without prompt": Mistake(
        "template must contain {prompt} once", lambda place: sft(place, "--template=Q: {promt}")
    ),
    "control characters": Mistake(
        "control characters",
        lambda place: sft(place, f"--out_dir={place.folder}/a\x1b]0;b\x07\nc"),
    ),
    "no UTF-8": Mistake(
        "control characters", lambda place: sft(place, f"--out_dir={place.folder}/a\udcff")
    ),
    "not a GPU": Mistake("no GPU", lambda place: pretrain(place, "--device=cuda")),
    "batch of two ranks": Mistake(
        "multiple of the number of ranks, 2", lambda place: sft(place, "--batch_size=5"), ranks=2
    ),
    "shards": Mistake(
        "must divide the number of ranks", lambda place: sft(place, "--hsdp_shard_size=3"), ranks=2
    ),
}

CONFIG_FILES = {
    "missing config file": Mistake("No such file", lambda place: [f"{place.folder}/none.py"]),
    "syntax error": Mistake(
        "c.py:2:", lambda place: [write_file(place, "c.py", "lr = 1\nbatch size = 2\n")]
    ),
    "config that raises": Mistake(
        "ZeroDivisionError", lambda place: [write_file(place, "c.py", "lr = 1 / 0\n")]
    ),
    "config that raises at length": Mistake(
        "one two three",
        lambda place: [write_file(place, "c.py", "raise ValueError('one\\ntwo\\nthree')\n")],
    ),
    "config not UTF-8": Mistake(
        "c.py:", lambda place: [write_file(place, "c.py", b"lr = '\xff'\n")]
    ),
    "config of another program": Mistake(
        "c.py: unknown setting 'learning_rate'",
        lambda place: [write_file(place, "c.py", "learning_rate = 1\n")],
    ),
    "not a number": Mistake(
        "temperature must be",
        lambda place: sft(place, write_file(place, "c.py", "temperature = float('nan')")),
    ),
}


# ------------------------------------------------------------------------------------------- data


def pretrain_with_tokenizer(place, content: str):
    return pretrain(place, f"--tokenizer={write_file(place, 'a.tiktoken', content)}")


FOLDERS = {
    "no data": Mistake("make it with", lambda place: sft(place, "--data=/nowhere/data")),
    "no data, two ranks": Mistake(
        "make it with", lambda place: sft(place, "--data=/nowhere/data"), ranks=2
    ),
    "no meta.json": Mistake(
        "meta.json: No such file",
        lambda place: sft(place, changed_data(place, {"meta.json": None})),
    ),
    "meta.json is no JSON": Mistake(
        "is not JSON", lambda place: sft(place, changed_data(place, {"meta.json": "{"}))
    ),
    "meta.json is a list": Mistake(
        "meta.json", lambda place: sft(place, changed_data(place, {"meta.json": "[1]"}))
    ),
    "meta.json is deep": Mistake(
        "is not JSON", lambda place: sft(place, changed_data(place, {"meta.json": "[" * 100000}))
    ),
    "meta.json is binary": Mistake(
        "is not JSON", lambda place: sft(place, changed_data(place, {"meta.json": b"\xff\xfe"}))
    ),
    "meta.json without files": Mistake(
        "files", lambda place: sft(place, changed_data(place, files=None))
    ),
    "meta.json without source": Mistake(
        "source", lambda place: sft(place, changed_data(place, source=None))
    ),
    "meta.json without dtype": Mistake(
        "dtype", lambda place: pretrain(place, changed_data(place, dtype=None))
    ),
    "meta.json with another dtype": Mistake(
        "dtype", lambda place: pretrain(place, changed_data(place, dtype="float64"))
    ),
    "meta.json with sizes of text": Mistake(
        "meta.json",
        lambda place: sft(
            place, changed_data(place, files={"train.jsonl": {"bytes": "many", "sha256": 1}})
        ),
    ),
    "meta.json with a number for a tokenizer": Mistake(
        "tokenizer", lambda place: pretrain(place, changed_data(place, tokenizer=7))
    ),
    "file missing": Mistake(
        "val.jsonl is missing", lambda place: sft(place, changed_data(place, {"val.jsonl": None}))
    ),
    "data of another tokenizer": Mistake(
        "was written with the tokenizer",
        lambda place: pretrain(place, f"--tokenizer={swapped_tokenizer(place)}"),
    ),
    "tokenizer not the checkpoint's": Mistake(
        "is not the checkpoint's",
        lambda place: sft(place, f"--tokenizer={swapped_tokenizer(place)}"),
    ),
    "tokenizer missing": Mistake(
        "gpt2, bytes, a .tiktoken file or a tokenizer.json",
        lambda place: pretrain(place, "--tokenizer=none.tiktoken"),
    ),
    "tokenizer broken": Mistake(
        "not a .tiktoken file", lambda place: pretrain_with_tokenizer(place, "hello\n")
    ),
    "tokenizer with holes": Mistake(
        "hold every byte", lambda place: pretrain_with_tokenizer(place, "YQ== 0\n")
    ),
}


def stream_case(line: str, file: str, content: bytes, update_meta=True, ranks=1) -> Mistake:
    """Pretraining on another token stream."""

    def arguments(place):
        return pretrain(place, changed_data(place, {file: content}, update_meta))

    return Mistake(line, arguments, ranks)


def no_tokenizer_for_stream(place):
    data = changed_data(place, tokenizer=None, tokenizer_sha256=None)
    return pretrain(place, data, "--tokenizer=bytes")


def bad_pretraining_stream(place):
    folder = changed_data(place, {"train.bin": tokens(300)}).removeprefix("--data=")
    return sft(place, "--pretrain_coef=1", f"--pretrain_data={folder}")


STREAMS = {
    "stream without a tokenizer": Mistake("tokenizer", no_tokenizer_for_stream),
    "stream cut": stream_case(
        "bytes, meta.json says", "train.bin", tokens()[:-3], update_meta=False
    ),
    "stream of half a token": stream_case("no multiple of", "train.bin", tokens()[:-1]),
    "stream empty": stream_case("val.bin is empty", "val.bin", b""),
    "stream too short": stream_case("block_size 64 needs", "val.bin", tokens()[:100]),
    "id out of range": stream_case(
        "token id 999 at position 0",
        "train.bin",
        np.array([999], np.uint16).tobytes() + tokens(),
    ),
    "id out of range at the end": stream_case(
        "token id 257 at position 4001", "train.bin", tokens(66, 257)
    ),
    "id out of range in validation": stream_case(
        "val.bin: token id 65535", "val.bin", tokens(65535)
    ),
    "id out of range, two ranks": stream_case(
        "token id 300 at position 4000", "train.bin", tokens(300), ranks=2
    ),
    "id out of range beside sft": Mistake("token id 300 at position 4000", bad_pretraining_stream),
}


def rows_case(line: str, content, stage=sft, *more: str) -> Mistake:
    """A stage with other training rows: a list, or the content of train.jsonl."""
    return Mistake(line, lambda place: stage(place, train_rows(place, content), *more))


def val_rows_case(line: str, content, stage=sft) -> Mistake:
    """A stage with other validation rows."""
    return Mistake(line, lambda place: stage(place, changed_data(place, {"val.jsonl": content})))


def rows_changed_in_place(place):
    content = read_bytes(f"{place.data}/train.jsonl").replace(b"train 3", b"train X")
    return sft(place, changed_data(place, {"train.jsonl": content}, update_meta=False))


def escaped(rows: list[dict]) -> str:
    """Rows as JSON lines in ASCII, which can hold what UTF-8 cannot."""
    return "".join(json.dumps(row) + "\n" for row in rows)


TWO_ROWS = '{"prompt": "a", "responses": ["b"]}\n' * 2
LONG_PROMPTS = [row | {"prompt": "long " * 40} for row in rows_with()]

ROWS = {
    "rows are no JSON": rows_case("train.jsonl:3: not JSON", TWO_ROWS + "{'prompt'}\n"),
    "rows are deep": rows_case("train.jsonl:1: not JSON", "[" * 100000 + "\n"),
    "rows with an endless number": rows_case(
        "train.jsonl:1: not JSON", '{"prompt": ' + "9" * 5000 + "}\n"
    ),
    "rows not UTF-8": rows_case("not UTF-8", b'{"prompt": "\xff", "responses": ["b"]}\n'),
    "rows empty": val_rows_case("no rows", "\n\n"),
    "rows changed in place": Mistake("sha256", rows_changed_in_place),
    "row is a list": rows_case("train.jsonl:1: a row must be an object", "[1]\n"),
    "lone surrogate": rows_case(
        "train.jsonl:3: text must be Unicode", escaped(rows_with(prompt="\ud800"))
    ),
    "prompt missing": rows_case("train.jsonl:3: a row needs prompt", rows_with(prompt=None)),
    "prompt a number": rows_case("train.jsonl:3: prompt must be", rows_with(prompt=7)),
    "no responses": rows_case("train.jsonl:3: responses must be", rows_with(responses=[])),
    "best response null": rows_case(
        "the best response must be there", rows_with(responses=[None, "a"])
    ),
    "group a list": rows_case("train.jsonl:3: group must be", rows_with(group=["a"])),
    "ids of words": rows_case("train.jsonl:3: ids must be", rows_with(ids=["a", "b", "c"])),
    "ids of no tokenizer": rows_case(
        "has ids and does not name their tokenizer", rows_with(ids=[[9999], [1], [2]])
    ),
    "ids of another vocabulary": rows_case(
        "outside the vocabulary",
        rows_with(ids=[[9999], [1], [2]], tokenizer=tokenizer.fingerprint(tokenizer.load("bytes"))),
    ),
    "a system message": rows_case("the template has no {system}", rows_with(system="Be brief.")),
    "a text beside a prompt": rows_case("train.jsonl:3: a row with text", rows_with(text="a")),
    "ended neither true nor false": rows_case("ended must be", rows_with(ended="no")),
    "scores too few": rows_case("train.jsonl:3: scores must be", rows_with(scores=[1]), reward),
    "scores rise": rows_case("scores must fall", rows_with(scores=[1, 2, 3]), reward),
    "scores not numbers": rows_case(
        "train.jsonl:3: scores must be", rows_with(scores=[3, 2, float("nan")]), reward
    ),
    "scores enormous": rows_case(
        "train.jsonl:3: scores must be", rows_with(scores=[10**400, 2, 1]), reward
    ),
    "scores missing": Mistake(
        "score_margin needs scores", lambda place: reward(place, "--score_margin=1")
    ),
    "nothing to rank in validation": val_rows_case(
        "val.jsonl: none of its", one_response_each(), reward
    ),
    "one response": rows_case("none of its 12 rows can be used", one_response_each(), preference),
    "whole texts in self-play": rows_case("have no prompt", [{"text": "a b"}] * 8, spin),
    "no room": rows_case("none of its", LONG_PROMPTS),
}


# ------------------------------------------------------------------------------------ checkpoints


def flipped_weights(place):
    path = f"{place.run('pretrain')}/{CHECKPOINT}/model.safetensors"
    return sft_from(place, {"model.safetensors": flip_last_bit(path)}, update=False)


def cut_weights(place):
    content = weights_with_header(place, "pretrain", dict.clear)
    return sft_from(place, {"model.safetensors": content[:-50]})


def renamed_tensor(place):
    def rename(header):
        header["mine"] = header.pop("wte.weight")

    return sft_from(place, {"model.safetensors": weights_with_header(place, "pretrain", rename)})


def reshaped_tensor(place):
    def reshape(header):
        header["wte.weight"]["shape"].reverse()

    return sft_from(place, {"model.safetensors": weights_with_header(place, "pretrain", reshape)})


def template_of_number(place):
    config = harmful_config(place) | {"template": 5}
    return [changed_run(place, "sft", config=config), "--prompt", "a"]


def other_tokenizer_file(place):
    content = read_bytes(swapped_tokenizer(place))
    return sft_from(place, {"tokenizer.tiktoken": content}, tokenizer="tokenizer.tiktoken")


CHECKPOINTS = {
    "init missing": Mistake("no checkpoint found", lambda place: sft(place, "--init=/nowhere/run")),
    "init missing, two ranks": Mistake(
        "no checkpoint found", lambda place: sft(place, "--init=/nowhere/run"), ranks=2
    ),
    "init without checkpoint": Mistake(
        "no checkpoint found", lambda place: sft(place, f"--init={place.data}")
    ),
    "init a file": Mistake(
        "no checkpoint found",
        lambda place: sft(place, f"--init={write_file(place, 'file', 'mine')}"),
    ),
    "weights damaged": Mistake("model.safetensors is damaged", flipped_weights),
    "weights damaged, two ranks": Mistake(
        "model.safetensors is damaged",
        lambda place: sft_from(place, {"model.safetensors": b"x"}, update=False),
        ranks=2,
    ),
    "weights cut": Mistake("cannot be read", cut_weights),
    "weights of other tensors": Mistake("other tensors", renamed_tensor),
    "weights of another shape": Mistake("has shape", reshaped_tensor),
    "checkpoint of another format": Mistake(
        "another version", lambda place: sft_from(place, format=1)
    ),
    "checkpoint without a format": Mistake(
        "another version", lambda place: sft_from(place, format=None)
    ),
    "meta.json damaged": Mistake(
        "meta.json is damaged", lambda place: sft_from(place, {"meta.json": "{}"}, update=False)
    ),
    "meta.json lacks the model": Mistake(
        "meta.json cannot be read", lambda place: sft_from(place, model=None)
    ),
    "meta.json lacks the config": Mistake(
        "KeyError: 'config'", lambda place: sft_from(place, config=None)
    ),
    "meta.json lacks the tokenizer": Mistake(
        "KeyError: 'tokenizer'", lambda place: sft_from(place, tokenizer=None)
    ),
    "tokenizer is a number": Mistake(
        "tokenizer must be str", lambda place: sft_from(place, tokenizer=5)
    ),
    "width is no integer": Mistake(
        "n_embd must be int", lambda place: sft_from(place, model={"n_embd": 32.0})
    ),
    "template is a number": Mistake("template must be str", template_of_number, main=SAMPLE),
    "manifest is deep": Mistake(
        "RecursionError",
        lambda place: sft_from(place, {"manifest.json": "[" * 100000}, update=False),
    ),
    "manifest missing": Mistake(
        "manifest.json", lambda place: sft_from(place, {"manifest.json": None}, update=False)
    ),
    "manifest is no JSON": Mistake(
        "cannot be read", lambda place: sft_from(place, {"manifest.json": "{"}, update=False)
    ),
    "manifest is a list": Mistake(
        "cannot be read", lambda place: sft_from(place, {"manifest.json": "[]"}, update=False)
    ),
    "another number of layers": Mistake(
        "n_layer is 3, but the checkpoint", lambda place: sft(place, "--n_layer=3")
    ),
    "block_size above the checkpoint's": Mistake(
        "block_size is 128, but the checkpoint", lambda place: sft(place, "--block_size=128")
    ),
    "tokenizer file missing": Mistake(
        "tokenizer.tiktoken: No such file",
        lambda place: sft_from(place, tokenizer="tokenizer.tiktoken"),
    ),
    "tokenizer file of another": Mistake(
        "is not the one that the checkpoint", other_tokenizer_file
    ),
}


# ----------------------------------------------------------------------------- teachers and rewards


def teacher_file(place, **fields) -> list[str]:
    """Self-play with a teacher's file whose rows say that our tokenizer made their ids."""
    fingerprint = tokenizer.fingerprint(tokenizer.load("bytes"))
    rows = []
    for split in ("train", "val"):
        for i in range(16):
            row = {"prompt": f"{split} {i}", "responses": ["a"], "tokenizer": fingerprint}
            rows.append(row | fields)
    return spin_with_teacher(place, write_file(place, "t.jsonl", rows))


PLAYERS = {
    "teacher's file missing": Mistake(
        "no such file; make it with",
        lambda place: spin_with_teacher(place, f"{place.folder}/none.jsonl"),
    ),
    "teacher missing": Mistake(
        "no checkpoint found", lambda place: spin_with_teacher(place, f"{place.folder}/none")
    ),
    "teacher without training prompts": Mistake(
        "no response to 16 of 16 prompts",
        lambda place: spin_with_teacher(place, f"{place.data}/val.jsonl"),
    ),
    "teacher without validation prompts": Mistake(
        "no response to 4 of 4 prompts",
        lambda place: spin_with_teacher(place, f"{place.data}/train.jsonl"),
    ),
    "teacher's ids of another vocabulary": Mistake(
        "outside the vocabulary", lambda place: teacher_file(place, ids=[[70000]])
    ),
    "teacher's ids missing": Mistake("has no ids", teacher_file),
    "teacher that is a reward model": Mistake(
        "is a reward model", lambda place: spin_with_teacher(place, place.run("reward"))
    ),
    "second responses missing": Mistake(
        "have one response",
        lambda place: spin_with_teacher(place, "rows", train_rows(place, one_response_each())),
    ),
    "reward that is a policy": Mistake(
        "is not a reward model", lambda place: ppo(place, f"--reward={place.run('sft')}")
    ),
    "reward's module missing": Mistake(
        "No module named", lambda place: ppo(place, "--reward=nowhere:f")
    ),
    "reward's function missing": Mistake(
        "has no attribute", lambda place: ppo(place, "--reward=math:f")
    ),
    "reward without a module": Mistake("scorer :f: ", lambda place: ppo(place, "--reward=:f")),
    "reward that is no function": Mistake(
        "scorer math:pi: ", lambda place: ppo(place, "--reward=math:pi")
    ),
    "PPO of a reward model": Mistake(
        "is a reward model, not a policy", lambda place: ppo(place, f"--init={place.run('reward')}")
    ),
    "self-play of a reward model": Mistake(
        "is a reward model, not a policy",
        lambda place: spin(place, f"--init={place.run('reward')}"),
    ),
}


# ------------------------------------------------------------------------------------ run folders


def other_data_in_place(place):
    """The data folder of a begun run has other rows now."""
    begun(place, "sft")
    data = train_rows(place, rows_with())
    change_config(place, data=data.removeprefix("--data="))
    return sft(place, data)


def pretrain_over(content: str, place):
    """An out_dir with a config.json that is not a run's."""
    write_file(place, "run/config.json", content)
    return pretrain(place)


def out_dir_below_file(place):
    return pretrain(place, f"--out_dir={write_file(place, 'file', 'mine')}/run")


RUNS = {
    "begun with another lr": Mistake(
        "was begun with lr", lambda place: pretrain(begun(place, "pretrain"), "--lr=0.1")
    ),
    "begun with other data": Mistake(
        "was begun with data",
        lambda place: pretrain(
            begun(place, "pretrain"), changed_data(place, {"val.bin": b"a\0" * 2000})
        ),
    ),
    "begun with data since changed": Mistake("was begun with data_sha256", other_data_in_place),
    "config.json damaged, and another lr": Mistake(
        "was begun with lr",
        lambda place: pretrain(begun(place, "pretrain", "config.json", b"{"), "--lr=1.0"),
    ),
    "config.json of a model": Mistake(
        "config.json", functools.partial(pretrain_over, '{"architectures": ["LlamaForCausalLM"]}')
    ),
    "config.json of a number": Mistake(
        "config.json", functools.partial(pretrain_over, '{"config": 5}')
    ),
    "metrics.jsonl damaged": Mistake(
        "metrics.jsonl:1",
        lambda place: pretrain(begun(place, "pretrain", "metrics.jsonl", b"{}\n")),
    ),
    "collected rows damaged": Mistake(
        "train.jsonl was changed",
        lambda place: spin(begun(place, "spin", "round_0/train.jsonl", b"{\n")),
    ),
    "reference damaged": Mistake(
        "train.ref.npz", lambda place: spin(begun(place, "spin", "round_0/train.ref.npz", b"PK"))
    ),
    "rollout damaged": Mistake(
        "rollout.npz is damaged",
        lambda place: ppo(begun(place, "ppo", "round_0/rollout.npz", b"PK")),
    ),
    "collect.json damaged": Mistake(
        "collect.json", lambda place: ppo(begun(place, "ppo", "round_0/collect.json", b"{"))
    ),
    "out_dir a file": Mistake(
        "is a file",
        lambda place: pretrain(place, f"--out_dir={write_file(place, 'file', 'mine')}"),
    ),
    "out_dir below a file": Mistake("out_dir", out_dir_below_file),
    "out_dir below a file, two ranks": Mistake("out_dir", out_dir_below_file, ranks=2),
    "out_dir too long": Mistake(
        "out_dir", lambda place: pretrain(place, f"--out_dir={place.folder}/{'x' * 300}")
    ),
}


# --------------------------------------------------------------------------- sample.py and eval.py


def sample_case(line: str, *options: str) -> Mistake:
    """sample.py with the good SFT run. {data} and {folder} in the options are of the place."""

    def arguments(place):
        filled = [option.format(data=place.data, folder=place.folder) for option in options]
        return [place.run("sft"), *filled]

    return Mistake(line, arguments, main=SAMPLE)


def eval_case(line: str, stage: str, arguments=None) -> Mistake:
    """eval.py with the good run of a stage. arguments(place): more of them; default: the data."""

    def all_arguments(place):
        more = arguments(place) if arguments else []
        return [f"a={place.run(stage)}", f"--data={place.data}", *more]

    return Mistake(line, all_arguments, main=EVAL)


def broken_prompts(place):
    prompts = write_file(place, "p.jsonl", "{\n")
    return [place.run("sft"), "--prompts", prompts, "--out", f"{place.folder}/o.jsonl"]


def val_rows(place, rows) -> str:
    return changed_data(place, {"val.jsonl": rows})


def judge_whole_texts(place):
    return [val_rows(place, [{"text": "a b"}] * 3), f"--judge={place.run('reward')}"]


TOOLS = {
    "sample of nothing": Mistake(
        "no checkpoint found", lambda place: ["/nowhere/run", "--prompt", "a"], main=SAMPLE
    ),
    "empty prompt": sample_case("the prompt is empty", "--prompt", " "),
    "no prompt": sample_case("is required"),
    "negative temperature": sample_case("must be at least 0", "--prompt", "a", "--temperature=-1"),
    "temperature of words": sample_case("must be a number", "--prompt", "a", "--temperature=hot"),
    "sample's top_p": sample_case("must be at most 1", "--prompt", "a", "--top_p=1.5"),
    "sample's device": sample_case("must be cpu, or cuda", "--prompt", "a", "--device=tpu"),
    "prompts without out": sample_case("go together", "--prompts", "{data}/val.jsonl"),
    "prompts missing": sample_case(
        "No such file", "--prompts", "{folder}/none.jsonl", "--out", "{folder}/o.jsonl"
    ),
    "prompts broken": Mistake("not JSON", broken_prompts, main=SAMPLE),
    "out in no folder": sample_case(
        "No such folder", "--prompts", "{data}/val.jsonl", "--out", "{folder}/none/o.jsonl"
    ),
    "sample of a reward model": Mistake(
        "is a reward model", lambda place: [place.run("reward"), "--prompt", "a"], main=SAMPLE
    ),
    "eval of nothing": Mistake(
        "no checkpoint found", lambda place: ["a=/nowhere/run", f"--data={place.data}"], main=EVAL
    ),
    "eval of one name twice": Mistake(
        "give a checkpoint as NAME=CHECKPOINT",
        lambda place: [place.run("sft"), place.run("sft"), f"--data={place.data}"],
        main=EVAL,
    ),
    "eval without data": eval_case("make it with", "sft", lambda place: ["--data=/nowhere/data"]),
    "eval without a judge": eval_case(
        "no checkpoint found", "sft", lambda place: ["--judge=/nowhere/run"]
    ),
    "eval without a reference": eval_case(
        "no checkpoint found", "sft", lambda place: ["--reference=/nowhere/run"]
    ),
    "eval's rows": eval_case("must be at least 1", "sft", lambda place: ["--rows=0"]),
    "eval into a file": eval_case(
        "File exists", "sft", lambda place: [f"--out={write_file(place, 'file', 'mine')}"]
    ),
    "eval without room": eval_case(
        "leaves no room", "sft", lambda place: [val_rows(place, LONG_PROMPTS)]
    ),
    "eval of whole texts under a judge": eval_case("no prompts to judge", "sft", judge_whole_texts),
    "eval with nothing to rank": eval_case(
        "no row has two responses", "reward", lambda place: [val_rows(place, one_response_each())]
    ),
    "judged reward model": eval_case(
        "has no samples to judge", "reward", lambda place: [f"--judge={place.run('sft')}"]
    ),
}
