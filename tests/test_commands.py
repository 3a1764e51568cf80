"""The commands of README.md and docs/ work.

All are checked without being run: make has the target, the script or module exists, its own parser
takes the arguments, and what it reads is in the repository, is made by an earlier command, or is in
GIVEN. The slow tests run both demos, docs/tools.md and the README's own-data example, made small.
"""

import argparse
import contextlib
import functools
import glob
import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch.distributed.run
from conftest import ROOT, make_data

from data.folder import prepare_command
from model import GPTConfig
from nanospin import config

DOCUMENTS = ["README.md", *sorted(glob.glob("docs/*.md"))]

# what the reader brings: rows, a text, a folder with a model or with several files of rows
GIVEN = ["chats.jsonl.gz", "ranked.jsonl.gz", "input.txt", "FOLDER", "folder", "RUN"]
INPUT_FOLDERS = ("bench", "config", "data", "out", "studies", "tests")
INPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".py")
OUTPUT_OPTIONS = ("--out", "--out_dir")
OUTPUT_SUFFIXES = (".png", ".html")


def commands_of(document: str) -> list[str]:
    """The lines of the sh blocks, and the commands between backticks, in their order."""
    with open(document, encoding="utf-8") as f:
        parts = f.read().split("```")
    commands = []
    for i, part in enumerate(parts):
        if i % 2 and part.startswith("sh\n"):
            commands += part[3:].replace("\\\n", " ").splitlines()
        elif i % 2 == 0:
            for code in part.replace("\n", " ").split("`")[1::2]:
                if is_command(code):
                    commands.append(code)
    commands = [command.partition(" #")[0].strip() for command in commands]
    return [command for command in commands if words_of(command)]


def is_command(code: str) -> bool:
    program, _, args = code.partition(" ")
    is_python = program in ("python", "torchrun")
    return program == "make" and args != "" or is_python and (".py" in args or "-m " in args)


def words_of(command: str) -> list[str]:
    """The words of a command, without comments, assignments, redirections and pipes."""
    command = re.sub(r"\$\(.*?\)", "HOST", command)  # in the SLURM script
    command = command.split(" | ")[0].split(" 2>")[0].split(" > ")[0]
    words = shlex.split(command, comments=True)
    while words and (words[0] in ("export", "srun") or "=" in words[0]):
        words.pop(0)
    return words


@functools.cache
def all_commands() -> list[tuple[str, str]]:
    """(document, command), each command once."""
    documents = {}
    for document in DOCUMENTS:
        for command in commands_of(document):
            documents.setdefault(command, document)
    return [(document, command) for command, document in documents.items()]


@functools.cache
def calls(command: str) -> list[tuple[str, list[str]]]:
    """(script or module, arguments) of each Python program, such as ("tools.hf", ["export"])."""
    program, *args = words_of(command)
    name = os.path.basename(program)
    if name == "make":
        return calls_printed(["make", "--dry-run", "--always-make", *args])
    if name.endswith(".sh"):
        return calls_of_script(program)
    if name == "torchrun":
        options = torch.distributed.run.parse_args(args)
        args = [options.training_script, *options.training_script_args]
        name = "python"
    assert name.startswith("python"), f"{program}: not a program that this test knows"
    if args[0] == "-m":
        is_package = os.path.isdir(args[1].replace(".", "/"))
        return [(args[1] + ".__main__" if is_package else args[1], args[2:])]
    assert os.path.isfile(args[0]), f"{args[0]}: no such script"
    return [(args[0].removesuffix(".py").replace("/", "."), args[1:])]


def calls_of_script(path: str) -> list[tuple[str, list[str]]]:
    """Those of a shell script. With `echo` as its Python, a copy of it only prints them."""
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(os.path.dirname(f"{folder}/{path}"))
        shutil.copy(path, f"{folder}/{path}")
        os.makedirs(f"{folder}/folder")
        for name in ("pretrain", "sft", "ranked"):  # what studies/rlhf reads
            open(f"{folder}/folder/{name}.jsonl.gz", "x").close()
        return calls_printed([path, "folder"], "python ", folder, PY="echo")


def calls_printed(command: list[str], prefix="", cwd=".", **env) -> list[tuple[str, list[str]]]:
    """Those in the lines that a command prints. Lines such as touch and for are left out."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = []
    printed = done.stdout.replace("\\\n", " ").replace(f"{os.path.abspath(cwd)}/", "")
    for line in printed.splitlines():
        program = "" if line.startswith("for ") else (words_of(prefix + line) or [""])[0]
        if "python" in program or program.endswith(".sh"):
            found += calls(prefix + line)
    return found


def check(command: str, made: list[str]):
    """Check a command. made: what earlier commands have written."""
    made = list(made)
    for name, args in calls(command):
        parse(name, args)
        reads, writes = files(name, args)
        for path in reads:
            assert is_available(path, made), f"{command!r} reads {path}, and nothing makes it"
        made += writes


class Parsed(BaseException):
    """Raised when a program has parsed its arguments, so that it goes no further."""


def parse(name: str, args: list[str]):
    """Let a program's own parser read the arguments."""
    if name == "train":
        load_config(args)
    if name in ("train", "venv", "tests.peers.adapter"):  # the adapter needs lm_eval
        return
    if name in ("pip", "pytest"):
        for path in args[args.index("-r") + 1 :] if "-r" in args else args:
            assert "/" not in path or os.path.exists(path), f"{path}: no such file"
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None):
        parse_args(parser, args)
        raise Parsed

    main = importlib.import_module(name).main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        main(args)


def load_config(args: list[str]) -> config.Config:
    return config.load([arg for arg in args if arg != "--help"] or ["--max_steps=1"], GPTConfig)


def files(name: str, args: list[str]) -> tuple[list[str], list[str]]:
    """The paths that a call (reads, writes)."""
    if name == "train":
        cfg = load_config(args)
        paths = [cfg.data, cfg.init, cfg.teacher, cfg.reward, cfg.pretrain_data]
        reads = [path for path in paths if path and path != "rows" and ":" not in path]
        return reads, [cfg.out_dir]
    reads, writes, option = [], [], ""
    for arg in args:
        option, value = arg.rsplit("=", 1) if "=" in arg else (option, arg)
        for path in value.split(","):
            path = path.partition("@")[0]
            in_folder = "/" in path and path.split("/")[0] in INPUT_FOLDERS
            is_output = name == "tools.plot" and option == "table"  # followed by its folder
            if is_output or option in OUTPUT_OPTIONS or path.endswith(OUTPUT_SUFFIXES):
                writes.append(path)
            elif in_folder or path.endswith(INPUT_SUFFIXES) or path in GIVEN:
                reads.append(path)
        option = arg
    return reads, writes


def is_available(path: str, made: list[str]) -> bool:
    if path.split("/")[0] in GIVEN or any(f"{path}/".startswith(f"{p}/") for p in made):
        return True
    if path.startswith("out/"):  # the folder of several runs, or the out_dir of a config
        path = path.rstrip("/*")
        return any(p.startswith(f"{path}/") for p in made) or config.command_for_run(path) != ""
    if path.startswith("data/") and not os.path.isfile(path):
        folder = os.path.dirname(path) if path.endswith(".jsonl") else path
        return "FILE.jsonl " not in prepare_command(folder)  # it has a command of its own
    return os.path.exists(path)


def made_before(command: str) -> list[str]:
    """What the commands before this one write."""
    made = []
    for _, earlier in all_commands():
        if earlier == command:
            return made
        with contextlib.suppress(AssertionError, SystemExit):  # it has a test of its own
            for name, args in calls(earlier):
                made += files(name, args)[1]


@pytest.mark.parametrize("document, command", all_commands())
def test_a_command_of_the_documents(document, command):
    check(command, made_before(command))


@pytest.mark.parametrize(
    "command, message",
    [
        ("curl -O x", "not a program"),
        ("make nothing", "nothing"),
        ("python nothing.py", "no such script"),
        ("python -m data.none.prepare", "data.none"),
        ("python train.py config/spin_k3.py --bta=1", "did you mean 'beta'"),
        ("python train.py config/demo/sft.py --init=out/none", "out/none"),
        ("python train.py config/demo/sft.py --data=data/none", "data/none"),
        ("python sample.py out/none --chat", "out/none"),
        ("python sample.py out/demo/sft --chat --temprature=1", "--temprature"),
        ("python -m data.jsonl.prepare none.jsonl --out=data/x", "none.jsonl"),
        ("python -m pytest tests/nothing.py", "no such file"),
        ("torchrun --nproc=8 train.py config/spin_k3.py", "2"),
    ],
)
def test_a_command_that_does_not_work_is_noticed(command, message):
    with pytest.raises((AssertionError, SystemExit, ImportError)) as e:
        check(command, [])
    assert message in str(e.value)


# ------------------------------------------------------------------------------ running them small

SMALL = {
    "train": ["--device=cpu", "--max_steps=2", "--batch_size=4", "--max_rows=8", "--eval_rows=8"],
    "eval": ["--device=cpu", "--rows=4"],
    "sample": ["--device=cpu", "--max_new_tokens=4"],
}
SMALL_MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=96", "--eval_batches=1"]


def run_small(command: str, names=None, options=()):
    """Run the programs of a command in this process. names: only these. options: more of them for
    those that have ranked_by."""
    for name, args in calls(command):
        if names is None or name in names:
            args = [*args, *SMALL.get(name, [])]
            if options and load_config(args).ranked_by:
                args += options
            if name == "train" and not load_config(args).init:
                args += SMALL_MODEL
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO("what does it do?\nand this?\n"))
                importlib.import_module(name).main(args)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """A folder with the configs, small data instead of data/pydocs, and the runs of the demo."""
    for _, command in all_commands():
        calls(command)  # cached now: elsewhere it would not find the scripts
    folder = tmp_path_factory.mktemp("demo")
    os.symlink(os.path.join(ROOT, "config"), folder / "config")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_data("data/pydocs")
        run_small("make demo-text", names=("train", "eval", "tools.plot"))
        os.makedirs("out/demo_seeds")
        for seed in (1, 2):
            os.symlink(folder / "out/demo", folder / "out/demo_seeds" / str(seed))
        yield folder


@pytest.mark.slow
def test_the_demo_runs(tmp_path, monkeypatch):
    """On few sums. Its curves begin where SFT ends, and every method has a row in the table."""
    calls("make demo")  # cached now: elsewhere it would not find the scripts
    os.symlink(os.path.join(ROOT, "config"), tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    sums = ["--rows=300", "--answers=60", "--out=data/sums"]
    importlib.import_module("data.addition.prepare").main(sums)
    (tmp_path / "size.py").write_text("def of(row, text):\n    return float(len(text))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(globals(), "SMALL_MODEL", [])  # sft_more names the size again
    by_size = ["--ranked_by=size:of", "--rounds=2", "--lr=1e-4"]  # untrained, no sum is right
    run_small("make demo", names=("train",), options=by_size)
    importlib.import_module("tools.demo").main(["out/addition", "--rows=20"])
    report = (tmp_path / "out/addition/report.md").read_text()
    for title in ("SFT continued", "SPIN", "online Plackett-Luce"):
        assert f"| {title}" in report
    assert report.count("What is ") == 10
    assert os.path.exists("out/addition/exact_match.svg")


@pytest.mark.slow
def test_the_demo_on_text_runs(small_demo):
    assert "spin_k3.round_1" in (small_demo / "out/demo/report.md").read_text()


@pytest.mark.slow
def test_own_data_of_the_readme(small_demo, monkeypatch):
    with gzip.open("chats.jsonl.gz", "wt", encoding="utf-8") as f:
        for i in range(80):
            f.write(json.dumps({"prompt": f"{i} plus 1?", "response": f"{i + 1}"}) + "\n")
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        scorer = f.read().split("```python\n")[1].split("```")[0]
    (small_demo / "my_scorer.py").write_text(scorer)
    monkeypatch.syspath_prepend(small_demo)
    commands = []
    for document, command in all_commands():
        if document == "README.md" and "=data/mine" in command:
            commands.append(command)
    assert len(commands) == 5
    for command in commands:
        run_small(command)
    assert os.path.exists("out/mine/spin/round_1/train.jsonl")
    with open("out/mine/online/round_0/train.jsonl", encoding="utf-8") as f:
        scores = json.loads(f.readline())["scores"]
    assert max(scores) > min(scores)


@pytest.mark.slow
def test_the_tools_of_the_docs(small_demo):
    for document, command in all_commands():
        if document == "docs/tools.md" and not command.startswith("make"):
            run_small(command)
    for path in ("samples.jsonl", "report.html", "spin_k3.png", "loss.png", "out/again"):
        assert os.path.exists(path), path
