"""Every command in the README works: what moved, was renamed or was never there fails here.

bash runs each command, and make its recipes, in a folder with a space in its name; python, torchrun and srun are stand-ins
that write down how they were called. Each call is then made in this process, with what SMALL appends so that it is small.
A call that SMALL or OTHERWISE does not know is an error: a new script has its line there, a new input in `world`.
"""

from data.folder import prepare_command
from data.rows import write_rows
import argparse
import functools
import glob
import gzip
import importlib
import inspect
import io
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from concurrent.futures import Future

import matplotlib.figure
import pytest
import tiktoken
import torch.distributed.run

from nanospin import config
import data
import test_hub
import train
from conftest import ROOT, WORDS
from data import tokenizer

HUB = ("fineweb", "ultrachat", "hh_rlhf", "ultrafeedback", "nectar", "shp_ranked", "tldr")
SMALL = (
    {f"data.{name}.prepare": [f"--hub=hub/{name}"] for name in HUB}
    | {"data.fineweb.prepare": ["--hub=hub/fineweb", "--val_share=0.1"]}
    | {  # a script or module: what makes it small
        "eval": ["--rows=4"],
        "sample": ["--max_new_tokens=4"],
        "plot": [],
        "taylor": [],
        "hf": [],
        "rebuild": [],
        "data.show": [],
        "data.pydocs.prepare": [],
        "data.jsonl.prepare": [],
        "data.shp.prepare": ["--rows=240", "--vocab_size=300"],
        "frontier": ["--seeds=1", "--values=1"],
    }
)
OTHERWISE = {  # what is done instead, of what cannot be small
    "train": lambda args: fit(args),
    "pytest": lambda args: [
        must(os.path.exists(a), f"{a}: no such tests") for a in args if not a.startswith("-")
    ],
    "pip": lambda args: (
        [must(os.path.isfile(args[args.index("-r") + 1]), f"{args}: no such file")]
        if "-r" in args
        else None
    ),
    "venv": lambda args: None,
    "bench": lambda args: [
        must(name in importlib.import_module("bench").BENCHMARKS, f"{name}: no such benchmark")
        for name in parsed("bench", args).what
    ],
    "tests/peers/adapter": lambda args: need(
        args[args.index("--model_args") + 1].removeprefix("run=")
    ),  # which runs in tests/peers
    "tests/peers/smollm2": lambda args: None,
    "tests.faults": lambda args: parsed("tests.faults.__main__", args),
}
MADE_BY = {
    "FOLDER": "python hf.py export out/demo/sft --out=FOLDER",
    "out/smollm2": "python hf.py import FOLDER --out=out/smollm2",
    "out/zephyr-7b-sft-full": "python hf.py import FOLDER --out=out/zephyr-7b-sft-full",
} | {f"out/demo_seeds/{seed}/sft": "make demo-seeds" for seed in (1, 2, 3)}


def readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        return commands(f.read())


def commands(text):
    """The commands of the sh blocks, and those between backticks, in their order."""
    found = []
    for kind, block, inline in re.findall(
        r"^```(\w*)\n(.*?)^```|`(make [a-z][^`\n]*|(?:python3?|torchrun|srun) [^`\n]*(?:\.py|-m )[^`\n]*)`",
        text,
        flags=re.M | re.S,
    ):
        lines = block.replace("\\\n", " ").splitlines() if kind == "sh" else [inline]
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return list(
        {tuple(shlex.split(line, comments=True)): line for line in reversed(found)}.values()
    )[::-1]  # each once


def must(ok, message):
    if not ok:
        raise AssertionError(message)


STAND_IN = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" "
" >> "$CALLS"
case $0 in *scontrol) echo node1;; esac
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The repository, with stand-ins for what the README's commands read, as the current folder."""
    top = tmp_path_factory.mktemp("with a space")
    here, bin = top / "nanospin", top / "bin"
    for folder in ("data", "results", "bench", "folder"):
        os.makedirs(here / folder)
    for name in os.listdir(ROOT):
        if name.endswith(".py") or name in (
            "config",
            "report",
            "tests",
            "Makefile",
            "requirements.txt",
        ):
            os.symlink(os.path.join(ROOT, name), here / name)
    os.symlink(os.path.join(ROOT, "bench", "requirements.txt"), here / "bench" / "requirements.txt")
    for name in os.listdir(os.path.join(ROOT, "results")):
        os.makedirs(here / "results" / name)
    for folder, _, files in os.walk(os.path.join(ROOT, "data")):
        for name in files:
            if name.endswith(".py"):
                os.makedirs(here / os.path.relpath(folder, ROOT), exist_ok=True)
                os.symlink(os.path.join(folder, name), here / os.path.relpath(folder, ROOT) / name)
    for path in [bin / name for name in ("python", "python3", "torchrun", "srun", "scontrol")] + [
        here / venv / "bin" / "python" for venv in (".venv", ".venv-peers", ".venv-bench")
    ]:
        os.makedirs(path.parent, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    threads = [
        {
            "prompt": f"{i} {WORDS[i % 12]} {WORDS[i % 7]}?",
            "group": f"{i}",
            "source": "forum",
            "responses": [{"text": f"{WORDS[(i + k) % 11]} {k}", "rank": k + 1} for k in range(3)],
        }
        for i in range(240)
    ]
    sums = [
        {
            "prompt": f"{i} and {i + 1}?",
            "source": "gsm8k/test",
            "responses": [
                {"text": f"{2 * i + 1} #### {2 * i + 1}", "rank": 1, "author": "human"},
                {"text": f"it is {i} #### {i}", "rank": 2, "author": "175b_verification"},
            ],
        }
        for i in range(60)
    ]
    chats = [
        {"prompt": f"{i} plus 1?", "response": f"{i + 1} #### {i + 1}", "source": "gsm8k/train"}
        for i in range(80)
    ]
    texts = [
        {"text": f"{i}: " + " ".join(WORDS[(i * k) % 16] for k in range(50))} for i in range(80)
    ]
    for name, lines in (
        ("ranked", threads + sums),
        ("sft", chats),
        ("chats", chats),
        ("pretrain", texts),
        ("texts", texts),
        ("FILE", chats + texts),
    ):
        for folder in (here, here / "folder", top / "shared" / "data"):
            os.makedirs(folder, exist_ok=True)
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)
    sets = {
        "fineweb": {"train": [{"text": line["text"]} for line in texts]},
        "hh_rlhf": {},
        "shp_ranked": {"train": [test_hub.shp(f"p{i}", "a", "b", (9, 3), 1) for i in range(9)]},
        "ultrachat": {
            "train_sft": [test_hub.chat(f"c{i}", f"{i} plus 1?", f"{i + 1}") for i in range(40)]
        },
        "tldr": {
            "train": [
                {
                    "prompt": f"SUBREDDIT: r/a\n\nTITLE: {i}\n\nPOST: b\n\nTL;DR:",
                    "chosen": " a",
                    "rejected": " b",
                }
                for i in range(9)
            ]
        },
        "nectar": {
            "train": [
                {
                    "prompt": f"\n\nHuman: {i}\n\nAssistant: ",
                    "answers": [{"answer": t, "rank": r} for r, t in ((2.0, "b"), (1.0, "a"))],
                }
                for i in range(300)
            ]
        },
        "ultrafeedback": {
            "train": [test_hub.feedback(i, ["1", "2", "3", "4"], [1.0] * 4) for i in range(300)]
        },
    }
    sets["hh_rlhf"]["train"] = [
        {side: f"\n\nHuman: {i}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
        for i in range(9)
    ]
    others = {
        "hh_rlhf": {
            "test": [
                {side: f"\n\nHuman: v\n\nAssistant: {side}" for side in ("chosen", "rejected")}
            ]
        },
        "ultrachat": {
            "test_sft": [test_hub.chat(f"v{i}", f"{i} plus 2?", f"{i + 2}") for i in range(9)]
        },
        "shp_ranked": {"validation": [test_hub.shp("v", "a", "b", (9, 3), 1)]},
        "tldr": {
            "validation": [
                {
                    "prompt": "SUBREDDIT: r/a\n\nTITLE: v\n\nPOST: b\n\nTL;DR:",
                    "chosen": " a",
                    "rejected": " b",
                }
            ]
        },
    }
    for name in HUB:
        test_hub.parquet(here / "hub" / name, **sets[name] | others.get(name, {}))
    # the teacher's responses, which any model may have written
    write_rows(
        str(here / "data" / "ultrachat" / "teacher.jsonl"),
        [
            {"prompt": row["prompt"], "responses": ["no idea"]}
            for some in (sets, others)
            for side in some["ultrachat"].values()
            for row in side
        ],
    )

    with pytest.MonkeyPatch.context() as m:
        m.chdir(here)
        m.setattr(data.folder, "ROOT", str(here))  # where prepare_command looks
        pydocs, shp = (
            importlib.import_module(f"data.{name}.prepare") for name in ("pydocs", "shp")
        )
        stdlib = os.path.dirname(os.__file__)
        m.setattr(
            pydocs,
            "sources",
            lambda: [
                (name, os.path.join(stdlib, f"{name}.py"))
                for name in ("heapq", "textwrap", "stat", "queue", "cgitb")
            ],
        )
        m.setattr(pydocs, "HERE", str(here / "data" / "pydocs"))
        for name in HUB:  # where they write
            m.setattr(
                importlib.import_module(f"data.{name}.prepare"),
                "__file__",
                str(here / "data" / name / "prepare.py"),
            )
        m.setattr(shp, "HERE", str(here / "data" / "shp"))
        m.setattr(shp, "hub_pairs", lambda path, revision: shp.ranked_pairs(["ranked.jsonl.gz"]))
        m.setattr(
            tiktoken,
            "get_encoding",
            functools.cache(
                lambda name: tokenizer.make_encoding(name, {bytes([i]): i for i in range(256)})
            ),
        )
        frontier = importlib.import_module("frontier")
        m.setattr(frontier, "fit", lambda args: fit(args))
        m.setattr(frontier, "ROWS", 16)
        m.setattr(frontier, "VAL_ROWS", 8)
        m.setattr(frontier, "TEMPERATURES", frontier.TEMPERATURES[-2:])
        m.setattr(frontier, "ProcessPoolExecutor", InThisProcess)
        m.setattr(
            matplotlib.figure.Figure,
            "savefig",
            lambda self, path, **options: open(path, "wb").close(),
        )  # drawing is tested where the figures are
        m.setattr(matplotlib.figure.Figure, "tight_layout", lambda self: None)
        yield here


class InThisProcess:
    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def map(self, function, jobs):
        return map(function, jobs)


# ------------------------------------------------------------------------------------------------------------- the calls


def check(command):
    """Run a command of the README small. Raises what it raises, or says what is not known."""
    must(
        re.match(r"(\w+=\S* )*(make|python|torchrun|srun|export)\b", command),
        f"test_readme.py does not know what to do with {command!r}",
    )
    found = calls(command)
    must(found or command.startswith("export"), f"{command!r} calls nothing")
    for program, *args in found:
        call(program, args)


def calls(command):
    """What a command calls, by the stand-ins: [program, arguments ...] of each."""
    here = os.getcwd()
    for venv in (".venv", ".venv-peers", ".venv-bench"):
        with open(f"{venv}/ready", "w"):  # newer than requirements.txt
            pass
    env = {
        "PATH": f"{os.path.dirname(here)}/bin:/usr/bin:/bin",
        "CALLS": f"{here}/calls",
        "JOBS": "1",
        "SLURM_NNODES": "4",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node[1-4]",
    }
    open("calls", "w").close()
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    must(done.returncode == 0, f"{command!r}: {done.stderr}")
    with open("calls", encoding="utf-8") as f:
        return [one.split("\0") for one in f.read().split("\0\n\0")[:-1]]


def call(program, args):
    if program == "srun":
        program, *args = args
    if program == "torchrun":
        options = torch.distributed.run.parse_args(args)
        args = [options.training_script, *options.training_script_args]
    if program == "scontrol":
        return
    args = [
        path for a in args for path in (sorted(glob.glob(a)) if "*" in a else [a])
    ]  # of what is there by now
    args = [
        "FOLDER" if re.fullmatch(r"[\w-]+/[\w.-]+@\w+", a) else a for a in args
    ]  # a model of the hub
    if args[0] == "-m":
        name, args = args[1], args[2:]
    else:
        must(os.path.isfile(args[0]), f"{args[0]}: no such script")
        name, args = args[0].removesuffix(".py"), args[1:]
    must(
        name in SMALL or name in OTHERWISE,
        f"test_readme.py does not know {name}: give it a line in SMALL or OTHERWISE",
    )
    if name in OTHERWISE:
        return OTHERWISE[name](args)
    for a in args:
        for path in re.findall(
            r"(?:^|[=,])((?:out|data)/[\w./-]+|FOLDER)", "" if a.startswith("--out") else a
        ):
            need(path)
    program = importlib.import_module(name).main
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", [name, *args, *SMALL[name]])
        m.setattr(sys, "stdin", io.StringIO("what does it do?\nand this?\n"))
        program(*[sys.argv[1:]] * len(inspect.signature(program).parameters))


def parsed(name, args):
    """What the parser of a script makes of its arguments, which goes no further."""

    class Parsed(Exception):
        pass

    def parse(parser, args=None):
        raise Parsed(original(parser, args))

    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as m:
        original = argparse.ArgumentParser.parse_args
        m.setattr("argparse.ArgumentParser.parse_args", parse)
        m.setattr(sys, "argv", [name, *args])
        with pytest.raises(Parsed) as e:
            module.main()
    return e.value.args[0]


fitted = {}  # (config file, names of the settings given beside it) -> the run
STEPS = [
    "--device=cpu",
    "--dtype=float32",
    "--compile=False",
    "--max_steps=2",
    "--batch_size=4",
    "--pretrain_batch_size=2",
    "--eval_batches=1",
    "--eval_interval=1",
    "--max_prompt=48",
    "--max_response=12",
    "--wandb=off",
]
SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=96"]
ELSE = [
    "--data",
    "--init",
    "--teacher",
    "--reward",
    "--pretrain_data",
    "--out_dir",
    "--seed",
    "--lr",
    "--rounds",
    "--max_rows",
    "--eval_rows",
]  # places and sizes


def fit(args):
    """Train two steps. Of lines that differ in places, sizes and values alone the first is trained, and the others are links to it."""
    if "--help" in args:
        with pytest.raises(SystemExit) as e:
            config.load(args)
        return must(not e.value.code, str(e.value.code))
    cfg = config.load(args)
    kind = {
        a if a == "--taylor_order=0" else a.partition("=")[0] for a in args
    }  # tables ask what T_n differs from T_0
    kind = frozenset(kind - {a.partition("=")[0] for a in ELSE + STEPS + SHAPE})
    if os.path.exists(cfg.out_dir):
        return
    if kind in fitted:
        os.makedirs(os.path.dirname(cfg.out_dir), exist_ok=True)
        return os.symlink(os.path.abspath(fitted[kind]), cfg.out_dir)
    for path in (cfg.init, cfg.teacher, cfg.reward):
        need(path)
    need(cfg.data)
    need(cfg.pretrain_data if cfg.pretrain_coef else "")
    rows = (
        ["--eval_rows=100", "--max_rows=0"]
        if cfg.calibration
        else ["--eval_rows=8", "--max_rows=8"]
    )  # of all posts: it halves them
    lists = [
        f"--{name}={value[:2]}"
        for name, value in (("lr", cfg.lr), ("beta", cfg.beta))
        if isinstance(value, list)
    ]
    shape = SHAPE + ["--n_kv_head=1"] * bool(cfg.n_kv_head)
    train.main(
        [
            *args,
            *STEPS,
            *rows,
            *lists,
            f"--rounds={min(2, cfg.rounds)}",
            *([] if cfg.init else shape),
        ]
    )
    fitted[kind] = cfg.out_dir


def need(path):
    """Make an input that no command before has made, as the repository says that it is made."""
    if (
        path in ("", "rows")
        or ":" in path
        or os.path.exists(
            f"{path}/meta.json"
            if path.startswith("data/") and not path.endswith(".jsonl")
            else path
        )
    ):
        return
    path = re.sub(r"/round_\d+.*", "", path)
    command = (
        MADE_BY.get(path)
        or config.maker(path)
        or (prepare_command(path) if path.startswith("data/") else "")
    )
    must(command, f"{path}: no such file or folder, and nothing says how it is made")
    check(command.partition("    ")[0])


# ------------------------------------------------------------------------------------------------------------- the tests


def snapshot():
    """The files of the repository that a command might touch, with their times; of out/ the names."""
    found = {
        "out": sorted(os.listdir(os.path.join(ROOT, "out")))
        if os.path.exists(os.path.join(ROOT, "out"))
        else []
    }
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            n
            for n in names
            if not n.startswith(".")
            and n not in ("__pycache__", "wandb")
            and not (n == "out" and folder == ROOT)
        ]
        found |= {
            path: os.stat(path).st_mtime_ns
            for path in (os.path.join(folder, name) for name in files)
            if os.path.exists(path)
        }
    return found


@pytest.fixture(scope="module")
def untouched():
    before = snapshot()
    yield
    assert snapshot() == before


@pytest.mark.parametrize("command", readme(), ids=lambda command: command.partition("  ")[0])
def test_a_command_of_the_readme(command, untouched, world):
    check(command)


def test_environments_are_made_of_files_that_are_there(world):
    check("make --always-make .venv/ready .venv-peers/ready .venv-bench/ready PYTHON=python3")


@pytest.mark.parametrize(
    "command, message",
    [
        ("curl -O x", "does not know what to do with"),
        ("python nothing.py", "nothing.py: no such script"),
        ("python loss.py", "does not know loss"),
        ("python -m data.none.prepare", "does not know data.none.prepare"),
        ("make nothing", "nothing"),
        ("python train.py config/nothing.py", "No such file"),
        ("python train.py config/spin_k3.py --bta=1", "did you mean 'beta'"),
        ("python -m pytest tests/nothing", "no such tests"),
        ("python sample.py out/demo/sft --chat --temprature=1", "--temprature"),
        ("python plot.py loss x.png T=out/nowhere", "nowhere"),
        ("python bench.py speed", "no such benchmark"),
        ("torchrun --nproc=8 train.py config/spin_k3.py", "2"),
    ],
)
def test_a_command_that_does_not_work_is_noticed(command, message, world, capsys):
    with pytest.raises((AssertionError, SystemExit)) as e:
        check(command)
    assert message in str(e.value)


def test_commands_are_found():
    text = "See `make x`.\n\n```sh\npython a.py \\\n   --b     # c\n\n# d\nmake e\n```\n\n```\nmake f\n```\n\n| `torchrun g.py h` | `python` |\n"
    assert commands(text) == ["make x", "python a.py     --b     # c", "make e", "torchrun g.py h"]
    assert len(readme()) > 20
