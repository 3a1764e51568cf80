"""Sections about what a run reads: files that cannot be read now, inputs that change between two
rounds, rewards and weights that are not finite.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import builtins
import errno
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file, save_file

import rollout
import train
from data.folder import write_meta
from data.rows import read_rows, write_rows
from nanospin import checkpoint
from tests.faults import spoil
from tests.faults.harness import (
    Result,
    Workspace,
    attempt,
    compare,
    count,
    difference,
    not_refused,
    pick,
    read_metrics,
    run_to_end,
    tree,
)

# ---------------------------------------------------------------------- files that cannot be read


@dataclass
class Unreadable:
    """Opening a file fails on one rank.

    pattern: of the path. failures: how many calls fail; the ones after it succeed.
    """

    pattern: str
    error: int
    rank: int
    failures: float = math.inf

    def arm(self):
        for name in ("open",):
            self.wrap(builtins, name)
        self.wrap(os, "open")
        for module in list(sys.modules.values()):
            if hasattr(module, "safe_open") and getattr(module, "__name__", "") != "safetensors":
                self.wrap(module, "safe_open")

    def wrap(self, owner, name: str):
        original = getattr(owner, name)

        def failing(path, *args, **options):
            is_path = isinstance(path, str | bytes | os.PathLike)
            reads = not args or not isinstance(args[0], str) or set(args[0]) <= set("rbt")
            if name == "open" and owner is os:
                reads = not args or not args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            matches = is_path and re.search(self.pattern, os.fsdecode(path))
            if matches and reads and self.failures > 0:
                self.failures -= 1
                raise OSError(self.error, os.strerror(self.error), path)
            return original(path, *args, **options)

        setattr(owner, name, failing)


@dataclass
class Late:
    """For some seconds a rank does not see a checkpoint, as on a network file system."""

    name: str  # of the checkpoint's folder
    rank: int
    seconds: float

    def arm(self):
        end = time.monotonic() + self.seconds
        for owner, name in ((builtins, "open"), (os, "stat"), (os, "lstat"), (os, "open")):
            self.hide_path(owner, name, end)
        self.hide_path(os, "scandir", end)
        self.hide_path(os, "listdir", end)
        listdir = os.listdir

        def listdir_without(path="."):
            names = listdir(path)
            if time.monotonic() < end:
                names = [name for name in names if name != self.name]
            return names

        os.listdir = listdir_without

    def hide_path(self, owner, name: str, end: float):
        original = getattr(owner, name)

        def hiding(*args, **options):
            path = args[0] if args else options.get("path")
            is_path = isinstance(path, str | bytes | os.PathLike)
            if is_path and time.monotonic() < end and self.name in os.fsdecode(path).split("/"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return original(*args, **options)

        setattr(owner, name, hiding)


FILES = ("model.safetensors", "meta.json", "manifest.json", r"optimizer/.*\.safetensors")
ERRORS = {"EIO": errno.EIO, "EACCES": errno.EACCES, "ESTALE": errno.ESTALE}


def unreadable(workspace: Workspace, short: bool) -> Result:
    """checkpoints that one rank cannot read once (the run goes on) or for ever (it stops in one
    line, changes nothing, and goes on later), that it sees late, that are all damaged (it never
    begins at step 0), and a lost config.json (rebuilt): equal bit for bit"""
    cases = {}
    for error in ERRORS:
        for file in FILES:
            for ranks, rank in ((1, 0), (2, 0), (2, 1)):
                for times in ("once", "always"):
                    name = f"{error} in {file}, rank {rank} of {ranks}, {times}"
                    cases[name] = (read_badly, ERRORS[error], file, ranks, rank, times)
    chosen = workspace.rng.sample(sorted(cases), 4 if short else 18)
    others = {
        "seen late on rank 0 of 1": (seen_late, 1, 0),
        "seen late on rank 0 of 2": (seen_late, 2, 0),
        "seen late on rank 1 of 2": (seen_late, 2, 1),
        "all damaged": (all_damaged, 1),
        "all damaged, two ranks": (all_damaged, 2),
        "all checkpoints without a manifest": (all_without, "manifest.json"),
        "all checkpoints without weights": (all_without, "model.safetensors"),
    }
    for content in CONFIGS:
        others[f"config.json {content}"] = (lost_config, content)
        others[f"config.json {content}, and another lr"] = (lost_config_other_lr, content)
    cases |= others
    chosen += pick(workspace, short, others, 4)
    failures = []
    for name in chosen:
        case, *arguments = cases[name]
        problem = attempt(case, workspace, *arguments)
        if problem:
            failures.append(f"{name}: {problem}")
    return count(len(chosen), failures)


def contents(out: str) -> dict[str, str]:
    """What is in a run, without what a start may write: config.json, the lock, cached hashes."""
    found = {}
    for path, content in tree(out).items():
        name = os.path.relpath(path, out)
        if name not in ("config.json", "hashes.json") and "lock" not in name:
            found[name] = content
    return found


def read_badly(workspace: Workspace, error: int, file: str, ranks: int, rank: int, times: str):
    undisturbed = workspace.undisturbed("pretrain", ranks)
    out = workspace.half("pretrain", ranks)
    argv = workspace.args("pretrain", out)
    before = contents(out)
    pattern = f"/round_0/step_000003/{file}$"
    fault = Unreadable(pattern, error, rank, 1 if times == "once" else math.inf)

    def arm(this_rank):
        quick_retries()
        if this_rank == rank:
            fault.arm()

    run = run_to_end(argv, ranks, before=arm)
    if times == "once":
        return compare(run, undisturbed, out, warnings=False)
    if set(run.status) == {0} and ranks > 1:
        # a file that only the other rank reads: the run was not disturbed
        return difference(undisturbed, out, warnings=False)
    problem = not_refused(run, os.strerror(error), "step_000003")
    if problem or contents(out) != before:
        return f"{problem or 'it changed the folder'}; {run.output[-300:]!r}"
    return compare(run_to_end(argv, ranks), undisturbed, out, warnings=False)


def quick_retries():
    """Shorten the pauses between two tries to read, which are for slow file systems."""
    if hasattr(checkpoint, "RETRY_SECONDS"):
        checkpoint.RETRY_SECONDS = (0.1, 0.1, 0.1)


def seen_late(workspace: Workspace, ranks: int, rank: int) -> str:
    """The newest checkpoint appears on a rank one second after its start. If rank 0 does not see
    it, the one before it may be used."""
    undisturbed = workspace.undisturbed("pretrain", ranks)
    out = workspace.half("pretrain", ranks)

    def arm(this_rank):
        if this_rank == rank:
            Late("step_000003", rank, 1.0).arm()

    run = run_to_end(workspace.args("pretrain", out), ranks, before=arm)
    return compare(run, undisturbed, out, warnings=False)


def all_damaged(workspace: Workspace, ranks: int) -> str:
    out = workspace.half("pretrain", ranks)
    for path in checkpoint.list_steps(f"{out}/round_0"):
        content = spoil.flip_last_bit(f"{path}/model.safetensors")
        with open(f"{path}/model.safetensors", "wb") as f:
            f.write(content)
    return never_from_zero(workspace, out, ranks)


def all_without(workspace: Workspace, file: str) -> str:
    out = workspace.half("pretrain", 1)
    for path in checkpoint.list_steps(f"{out}/round_0"):
        os.remove(f"{path}/{file}")
    return never_from_zero(workspace, out, 1)


def never_from_zero(workspace: Workspace, out: str, ranks: int) -> str:
    """However often the command is tried, it stops in one line, and no log is shortened."""
    before = spoil.read_bytes(f"{out}/metrics.jsonl")
    for _ in range(3):
        run = run_to_end(workspace.args("pretrain", out), ranks)
        problem = not_refused(run)
        if problem:
            return problem
        if spoil.read_bytes(f"{out}/metrics.jsonl") != before:
            return "metrics.jsonl was changed"
    return ""


CONFIGS = {
    "missing": None,
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "of zeros": lambda text: "\x00" * len(text),
    "of another JSON": lambda text: "[]",
}


def lose_config(out: str, how: str):
    path = f"{out}/config.json"
    with open(path, encoding="utf-8") as f:
        text = f.read()
    os.remove(path)
    if CONFIGS[how]:
        spoil_text = CONFIGS[how](text)
        with open(path, "w", encoding="utf-8") as f:
            f.write(spoil_text)


def lost_config(workspace: Workspace, how: str) -> str:
    undisturbed = workspace.undisturbed("sft", 1)
    out = workspace.half("sft", 1)
    with open(f"{out}/config.json", encoding="utf-8") as f:
        before = json.load(f)["config"]
    lose_config(out, how)
    problem = compare(run_to_end(workspace.args("sft", out)), undisturbed, out, warnings=False)
    if problem:
        return problem
    with open(f"{out}/config.json", encoding="utf-8") as f:
        after = json.load(f)["config"]
    changed = [name for name in before if before[name] != after.get(name)]
    changed = [name for name in changed if name != "out_dir"]
    return f"{changed} are not as they were" if changed else ""


def lost_config_other_lr(workspace: Workspace, how: str) -> str:
    undisturbed = workspace.undisturbed("sft", 1)
    out = workspace.half("sft", 1)
    lose_config(out, how)
    before = contents(out)
    run = run_to_end(workspace.args("sft", out, "--lr=0.5"))
    problem = not_refused(run, "lr")
    if problem or contents(out) != before:
        return problem or "it changed the folder"
    return compare(run_to_end(workspace.args("sft", out)), undisturbed, out, warnings=False)


# ------------------------------------------------------------------------------- inputs that move


@dataclass
class Input:
    """An input that a run reads again in its second round.

    stage, more: the run; {inputs} in them is a folder with copies of all inputs. change(inputs,
    out): changes it after the first round. words: one of them must be in the line.
    """

    stage: str
    more: list[str]
    change: Callable
    words: tuple
    warned: bool = False  # a change is said, and the run goes on


def change_rows(path: str):
    rows = [row | {"responses": ["POISON"]} for row in read_rows(path)]
    write_rows(path, rows)


def change_data(split: str):
    """Other rows in a data folder whose meta.json fits to them."""

    def change(inputs, out):
        change_rows(f"{inputs}/data/{split}.jsonl")
        write_meta(f"{inputs}/data", "bytes", "made up")

    return change


def change_data_alone(inputs, out):
    change_rows(f"{inputs}/data/train.jsonl")


def change_stream(inputs, out):
    """Other tokens, and the same size."""
    path = f"{inputs}/data/train.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[:] = 65
    tokens.tofile(path)
    write_meta(f"{inputs}/data", "bytes", "made up")


def change_stream_alone(inputs, out):
    path = f"{inputs}/data/train.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[: len(tokens) // 2] = 65
    tokens.tofile(path)


def change_weights(run: str):
    """Other weights in the checkpoint of a run, with all hashes right."""
    path = checkpoint.latest(run)
    tensors = load_file(f"{path}/model.safetensors")
    tensors = {name: 3 * tensor for name, tensor in tensors.items()}
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    spoil.update_hashes(path)


def go_on(run: str):
    """What a run does that is continued: a newer checkpoint, of other weights."""
    path = checkpoint.latest(run)
    newer = os.path.join(os.path.dirname(path), "step_000099")
    shutil.copytree(path, newer)
    spoil.update_hashes(newer, {"step": 99})
    change_weights(run)


def change_file(path: str):
    def change(inputs, out):
        change_rows(path.format(inputs=inputs, out=out))

    return change


def change_reward_source(inputs, out):
    with open(f"{inputs}/moving_reward.py", "a", encoding="utf-8") as f:
        f.write("# another version\n")


SPIN = ["--data={inputs}/data", "--init={inputs}/sft"]
PPO = ["--data={inputs}/data", "--init={inputs}/sft", "--max_steps=2"]
TEACHER = [*SPIN, "--players=data,teacher,self"]
STREAM = [*PPO, "--pretrain_coef=0.1", "--pretrain_batch_size=8", "--pretrain_data={inputs}/data"]
INPUTS = {
    "training rows": Input("spin2", SPIN, change_data("train"), ("data",)),
    "training rows alone": Input("spin2", SPIN, change_data_alone, ("data",)),
    "validation rows": Input("spin2", SPIN, change_data("val"), ("data",)),
    "rows of PPO": Input("ppo", PPO, change_data("train"), ("data",)),
    "token stream": Input("ppo", STREAM, change_stream, ("train.bin", "data")),
    "token stream alone": Input("ppo", STREAM, change_stream_alone, ("train.bin", "data")),
    "teacher's file": Input(
        "spin2",
        [*TEACHER, "--teacher={inputs}/teacher.jsonl"],
        change_file("{inputs}/teacher.jsonl"),
        ("teacher",),
    ),
    "init of PPO": Input(
        "ppo", PPO, lambda inputs, out: change_weights(f"{inputs}/sft"), ("sft", "init")
    ),
    "init of PPO goes on": Input(
        "ppo", PPO, lambda inputs, out: go_on(f"{inputs}/sft"), ("sft", "init")
    ),
    "reward model": Input(
        "ppo",
        [*PPO, "--reward={inputs}/reward"],
        lambda inputs, out: change_weights(f"{inputs}/reward"),
        ("reward",),
    ),
    "reward model goes on": Input(
        "ppo",
        [*PPO, "--reward={inputs}/reward"],
        lambda inputs, out: go_on(f"{inputs}/reward"),
        ("reward",),
    ),
    "reward function": Input(
        "ppo", [*PPO, "--reward=moving_reward:f"], change_reward_source, ("reward",), warned=True
    ),
    "earlier samples": Input(
        "spin2",
        [*SPIN, "--players=data,self,self-1"],
        change_file("{out}/round_0/self_train.jsonl"),
        ("self_train.jsonl",),
    ),
    "replayed rows": Input(
        "spin2",
        [*SPIN, "--replay_rounds=1"],
        change_file("{out}/round_0/train.jsonl"),
        ("train.jsonl",),
    ),
}
GOOD_REWARD = 'def f(row, text):\n    return float(text.count("e"))\n'


def moves(workspace: Workspace, short: bool) -> Result:
    """inputs that are read again in every round: another one stops the run in one line that names
    it, and is not trained on; an equal one elsewhere is accepted, equal bit for bit"""
    cases = []
    for name in INPUTS:
        cases.append((name, "changes between rounds", 1))
        cases.append((name, "changes before a resume", 1))
        cases.append((name, "is moved before a resume", 1))
    for name in workspace.rng.sample(sorted(INPUTS), 3):
        cases.append((name, "changes between rounds", 2))
    chosen = pick(workspace, True, cases, 5 if short else 18)
    failures = []
    for name, event, ranks in chosen:
        problem = attempt(change_input, workspace, INPUTS[name], event, ranks)
        if problem:
            failures.append(f"{name} {event}, {ranks} ranks: {problem}")
    return count(len(chosen), failures)


def fresh_inputs(workspace: Workspace) -> str:
    """A folder with copies of everything that the runs of this section read."""
    inputs = workspace.new_run()
    shutil.copytree(workspace.data, f"{inputs}/data")
    shutil.copytree(workspace.base_runs["sft"], f"{inputs}/sft")
    shutil.copytree(reward_model(workspace), f"{inputs}/reward")
    rows = read_rows(f"{workspace.data}/train.jsonl") + read_rows(f"{workspace.data}/val.jsonl")
    write_rows(f"{inputs}/teacher.jsonl", [row | {"responses": ["teacher"]} for row in rows])
    with open(f"{inputs}/moving_reward.py", "w", encoding="utf-8") as f:
        f.write(GOOD_REWARD)
    return inputs


def reward_model(workspace: Workspace) -> str:
    return workspace.undisturbed("preference", 1, "--stage=reward", "--max_steps=2")


def input_argv(workspace: Workspace, case: Input, inputs: str, out: str) -> list[str]:
    return workspace.args(case.stage, out, *[text.format(inputs=inputs) for text in case.more])


def importing(inputs: str, more: Callable | None = None) -> Callable:
    """A `before` that lets a run import from a folder."""

    def before(rank):
        sys.path.insert(0, inputs)
        sys.dont_write_bytecode = True
        if more:
            more(rank)

    return before


def after_round_0(act: Callable) -> Callable:
    """A `before`: act() when the first round is trained, on rank 0."""

    def before(rank):
        fit = train.fit

        def fit_and_act(run, round_id, *args):
            fit(run, round_id, *args)
            if round_id == 0 and rank == 0:
                act()

        train.fit = fit_and_act

    return before


def change_input(workspace: Workspace, case: Input, event: str, ranks: int) -> str:
    inputs, out = fresh_inputs(workspace), workspace.new_run()
    argv = input_argv(workspace, case, inputs, out)
    original = f"{inputs}_original"
    shutil.copytree(inputs, original)
    undisturbed = f"{out}_undisturbed"
    whole = run_to_end(
        input_argv(workspace, case, inputs, undisturbed), ranks, before=importing(inputs)
    )
    if whole.status != [0] * ranks:
        return f"the undisturbed run: {whole.output[-600:]}"
    if event == "changes between rounds":
        act = after_round_0(lambda: case.change(inputs, out))
        run = run_to_end(argv, ranks, before=importing(inputs, act))
    else:
        run = run_to_end(argv, ranks, before=importing(inputs, after_round_0(stop)))
        if run.status != [143] * ranks:
            return f"it did not stop after the first round: {run.status} {run.output[-300:]}"
        if event == "is moved before a resume":
            moved = f"{inputs}_moved"
            os.rename(inputs, moved)
            argv = input_argv(workspace, case, f"{moved}/../{os.path.basename(moved)}/", out)
            run = run_to_end(argv, ranks, before=importing(moved))
            return compare(run, undisturbed, out, warnings=False)
        case.change(inputs, out)
        run = run_to_end(argv, ranks, before=importing(inputs))
    if case.warned:
        # between rounds it is not imported again: the run goes on with the function that it has
        resumed = event == "changes before a resume"
        if (
            resumed
            and "reward" not in "".join(warnings_of(out))
            and "has changed" not in run.output
        ):
            return f"nothing is said: {run.status} {run.output[-300:]!r}"
        return compare(run, undisturbed, out, warnings=False)
    if set(run.status) == {0}:
        # right only if it went on with what it began with
        problem = difference(undisturbed, out, warnings=False)
        return f"it went on: {problem}" if problem else ""
    problem = not_refused(run, *case.words)
    if problem:
        return problem
    steps = [r for r in read_metrics(out) if r["kind"] == "step" and r["round"] == 1]
    if steps:
        return f"it trained {len(steps)} steps on it"
    restore(inputs, original, out, undisturbed)
    again = run_to_end(argv, ranks, before=importing(inputs))
    problem = compare(again, undisturbed, out, warnings=False)
    return f"with the original back: {problem}" if problem else ""


def stop():
    """What a signal does: the run ends after what it is at."""
    train.elastic.received_signals.append(15)
    train.elastic.exit_if_signalled()


def restore(inputs: str, original: str, out: str, undisturbed: str):
    """Put every input back as it was, also the run's own files of the first round."""
    shutil.rmtree(inputs)
    shutil.copytree(original, inputs)
    for name in ("self_train.jsonl", "train.jsonl"):
        if os.path.exists(f"{undisturbed}/round_0/{name}"):
            shutil.copy(f"{undisturbed}/round_0/{name}", f"{out}/round_0/{name}")


def warnings_of(out: str) -> list[str]:
    return [record["text"] for record in read_metrics(out) if record["kind"] == "warning"]


# ------------------------------------------------------------------------------ numbers, not finite

BAD_REWARDS = {
    "nan": ("float('nan')", "nan"),
    "inf": ("float('inf')", "inf"),
    "-inf": ("-float('inf')", "inf"),
    "None": ("None", "None"),
    "a text": ("'good'", "good"),
    "a list": ("[1.0, 2.0]", "[1.0"),
    "an exception": ("1 / 0", "ZeroDivisionError"),
    "a peer's exception": ("refuse()", "Connection refused by peer"),
}
REWARD_MODULE = """
calls = -1  # none is bad before calls is 0


def refuse():
    raise RuntimeError("reward server: Connection refused by peer")


def f(row, text):
    global calls
    calls += calls >= 0
    if calls == 3:
        return {value}
    return float(text.count("e"))
"""


def bad_from(round_id: int) -> Callable:
    """A `before`: the third call from a round on is a bad one, on every rank."""

    def before(rank):
        import moving_reward

        if round_id == 0:
            moving_reward.calls = 0
        fit = train.fit

        def fit_and_spoil(run, this_round, *args):
            fit(run, this_round, *args)
            if this_round == round_id - 1:
                moving_reward.calls = 0

        train.fit = fit_and_spoil

    return before


def nonfinite(workspace: Workspace, short: bool) -> Result:
    """rewards, weights, log-probabilities and validation losses that are not finite: one line that
    names where, nothing is written; fixed, the same command ends equal bit for bit"""
    cases = {}
    for name in BAD_REWARDS:
        for round_id in (0, 1):
            for ranks in (1, 2):
                case = (bad_reward, name, round_id, ranks)
                cases[f"a reward of {name} in round {round_id}, {ranks} ranks"] = case
    for role in ("init", "teacher", "reward", "init of sft"):
        for value in (np.nan, np.inf):
            for ranks in (1, 2):
                cases[f"{value} in {role}, {ranks} ranks"] = (bad_weights, role, value, ranks)
    for ranks in (1, 2):
        cases[f"a validation loss of nan, {ranks} ranks"] = (bad_validation, ranks)
        cases[f"log-probabilities of inf, {ranks} ranks"] = (bad_logps, ranks)
    chosen = pick(workspace, True, cases, 6 if short else 20)
    failures = []
    for name in chosen:
        case, *arguments = cases[name]
        problem = attempt(case, workspace, *arguments)
        if problem:
            failures.append(f"{name}: {problem}")
    return count(len(chosen), failures)


def bad_reward(
    workspace: Workspace, name: str, round_id: int, ranks: int, stage="ppo", options=()
) -> str:
    """options: of a run whose scorer is moving_reward:f, by default as `reward`."""
    inputs, out = fresh_inputs(workspace), workspace.new_run()
    value, word = BAD_REWARDS[name]
    options = options or ["--reward=moving_reward:f"]
    more = [*options, "--max_steps=2", "--eval_interval=100"]
    key = ("a good reward", ranks, *options)
    if key not in workspace.undisturbed_runs:
        argv = workspace.args(stage, f"{out}_undisturbed", *more)
        whole = run_to_end(argv, ranks, before=importing(inputs))
        assert whole.status == [0] * ranks, whole.output
        workspace.undisturbed_runs[key] = f"{out}_undisturbed"
    with open(f"{inputs}/moving_reward.py", "w", encoding="utf-8") as f:
        f.write(REWARD_MODULE.format(value=value))
    argv = workspace.args(stage, out, *more)
    run = run_to_end(argv, ranks, before=importing(inputs, bad_from(round_id)))
    setting = "reward" if stage == "ppo" else "ranked_by"
    if "exception" in name:
        # the user's own error, with its traceback, and not a lost rank
        if 0 in run.status or word not in run.errors or "lost" in run.errors:
            return f"it ended with {run.status}: {run.errors[-300:]!r}"
    else:
        problem = not_refused(run, f"{setting} moving_reward:f")
        if not problem and word not in run.errors:
            problem = f"the value is not named: {run.errors!r}"
        if problem:
            return problem
    folder = f"{out}/round_{round_id}"
    files = ("train.jsonl", "rollout.npz", "collect.json")
    written = [file for file in files if os.path.exists(f"{folder}/{file}")]
    if written:
        return f"it wrote {written}"
    with open(f"{inputs}/moving_reward.py", "w", encoding="utf-8") as f:
        f.write(GOOD_REWARD)
    again = run_to_end(argv, ranks, before=importing(inputs))
    return compare(again, workspace.undisturbed_runs[key], out, warnings=False)


def put_into_weights(run: str, value: float):
    """One number of a run's weights is another one, and all hashes are right."""
    path = checkpoint.latest(run)
    tensors = load_file(f"{path}/model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    spoil.update_hashes(path)


def bad_weights(workspace: Workspace, role: str, value: float, ranks: int) -> str:
    inputs, out = fresh_inputs(workspace), workspace.new_run()
    case, folder = Input("spin2", SPIN, None, ()), "sft"
    if role == "init of sft":
        case = Input("sft", SPIN, None, ())
    elif role == "teacher":
        shutil.copytree(f"{inputs}/sft", f"{inputs}/teacher")
        case = Input("spin2", [*TEACHER, "--teacher={inputs}/teacher"], None, ())
        folder = "teacher"
    elif role == "reward":
        case, folder = INPUTS["reward model"], "reward"
    argv = input_argv(workspace, case, inputs, out)
    undisturbed = f"{out}_undisturbed"
    whole = run_to_end(input_argv(workspace, case, inputs, undisturbed), ranks)
    if whole.status != [0] * ranks:
        return f"the undisturbed run: {whole.output[-600:]}"
    shutil.copytree(inputs, f"{inputs}_good")
    put_into_weights(f"{inputs}/{folder}", value)
    run = run_to_end(argv, ranks)
    problem = not_refused(run, f"{inputs}/{folder}")
    if problem:
        return problem
    written = [name for name in contents(out) if name.endswith((".npz", "metrics.jsonl"))]
    written += [name for name in contents(out) if "train.jsonl" in name]
    written = [name for name in written if os.path.getsize(f"{out}/{name}")]
    if written and role != "reward":
        return f"it wrote {written}"
    shutil.rmtree(inputs)
    os.rename(f"{inputs}_good", inputs)
    return compare(run_to_end(argv, ranks), undisturbed, out, warnings=False)


def bad_validation(workspace: Workspace, ranks: int) -> str:
    """The validation loss is nan from step 4 on: what is saved then is never resumed from."""
    undisturbed = workspace.undisturbed("sft", ranks)
    out = workspace.new_run()
    argv = workspace.args("sft", out)

    def spoil_loss(rank):
        original = train.STAGES["sft"].evaluate

        def evaluate(run, round_id, step, *args):
            metrics = original(run, round_id, step, *args)
            return metrics | {"val_loss": math.nan} if step >= 4 else metrics

        train.STAGES["sft"].evaluate = evaluate

    run = run_to_end(argv, ranks, before=spoil_loss)
    problem = not_refused(run, "val_loss")
    if problem:
        return problem
    if os.path.basename(checkpoint.latest(out)) != "step_000002":
        return f"the latest checkpoint is {checkpoint.latest(out)}"
    return compare(run_to_end(argv, ranks), undisturbed, out, warnings=False)


def bad_logps(workspace: Workspace, ranks: int) -> str:
    """A log-probability under the reference is infinite."""
    undisturbed = workspace.undisturbed("spin2", ranks)
    out = workspace.new_run()
    argv = workspace.args("spin2", out)

    def spoil_logps(rank):
        original = rollout.row_logps

        def row_logps(*args, **options):
            logps = np.array(original(*args, **options))
            logps[0, 0] = -np.inf
            return logps

        rollout.row_logps = row_logps

    run = run_to_end(argv, ranks, before=spoil_logps)
    problem = not_refused(run)
    if problem:
        return problem
    written = [name for name in contents(out) if name.endswith(".ref.npz")]
    if written:
        return f"it wrote {written}"
    return compare(run_to_end(argv, ranks), undisturbed, out, warnings=False)
