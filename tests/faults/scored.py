"""Sections about scored stages: spin under a scorer, and policy gradients on groups of samples.

A section is called with (workspace, short) and returns a Result. Its docstring is what it promises.
"""

import glob
import itertools
import os
import shutil
import signal
import time

from tests.faults.harness import (
    Fault,
    Result,
    Workspace,
    attempt,
    before_calls,
    compare,
    count,
    difference,
    not_refused,
    run_to_end,
    sample_in_small_parts,
    start,
)
from tests.faults.kills import read_bytes, spoilt, write_or_remove
from tests.faults.reads import (
    PPO,
    SPIN,
    Input,
    bad_reward,
    change_input,
    change_reward_source,
    change_weights,
    reward_model,
)

LETTERS = "tests.conftest:letters"
# name -> (stage, more arguments), {NAME} is a base run. The second round begins the data again.
RUNS = {
    "function": (
        "spin2",
        ["--players=data,self:3", "--top_players=data", f"--ranked_by={LETTERS}"],
    ),
    "reward model": (
        "spin2",
        ["--players=self:4", "--ranked_by={reward}", "--best_and_worst=True"],
    ),
    "judge": ("spin2", ["--players=data,self:2", "--ranked_by={pretrain}", "--replay_rounds=1"]),
    "grpo": (
        "ppo",
        [f"--reward={LETTERS}", "--advantage=grpo", "--samples_per_prompt=4", "--kl_in=loss"],
    ),
    "reverse_kl": ("ppo", ["--reward=", "--advantage=reverse_kl", "--teacher={pretrain}"]),
}
PHASES = ("sampling", "scoring", "reference", "fit", "save")
LATER = 0.03  # seconds: a rank is killed up to so long after a call


def options_of(workspace: Workspace, name: str) -> list[str]:
    runs = workspace.base_runs | {"reward": reward_model(workspace)}
    more = [text.format(**runs) for text in RUNS[name][1]]
    return ["--max_rows=24", "--max_steps=3", *more]


def scored_argv(workspace: Workspace, name: str, out: str) -> list[str]:
    return workspace.args(RUNS[name][0], out, *options_of(workspace, name))


def phase_function(name: str, phase: str) -> str:
    """The function that a run calls again and again in a phase."""
    is_ppo = RUNS[name][0] == "ppo"
    functions = {
        "sampling": "players:respond",
        "scoring": "ppo:token_scores" if name == "reverse_kl" else "scorer:score_responses",
        "reference": "ppo:checkpoint_logps" if is_ppo else "rollout:row_logps",
        "fit": "train:lr_factor",
        "save": "nanospin.checkpoint:write",
    }
    return functions[phase]


# ------------------------------------------------------------------------------------------- kills


def scored(workspace: Workspace, short: bool) -> Result:
    """scored stages x ranks x phases: one rank or both are killed at a random instant; the same
    command ends as the undisturbed run, bit for bit"""
    cases = list(itertools.product(RUNS, (1, 2), PHASES))
    if short:
        cases = workspace.rng.sample(cases, 3)
    failures = []
    for name, ranks, phase in cases:
        problem = attempt(kill_in_phase, workspace, name, ranks, phase)
        if problem:
            failures.append(f"{name} on {ranks} ranks, {phase}: {problem}")
    return count(len(cases), failures)


def undisturbed_run(workspace: Workspace, name: str, ranks: int) -> tuple[str, dict[str, int]]:
    """(the folder of a run that nothing happened to, calls of each phase's function on rank 0)."""
    key = ("scored", name, ranks)
    if key not in workspace.undisturbed_runs:
        out = workspace.new_run()
        calls = f"{out}_calls"
        os.makedirs(calls)

        def count_calls(rank):
            if rank == 0:
                for phase in PHASES:
                    before_calls(phase_function(name, phase), note(f"{calls}/{phase}"))

        run = run_to_end(scored_argv(workspace, name, out), ranks, before=count_calls)
        assert run.status == [0] * ranks, run.output
        run.forget()
        numbers = {phase: os.path.getsize(f"{calls}/{phase}") for phase in PHASES}
        workspace.undisturbed_runs[key] = (out, numbers)
    return workspace.undisturbed_runs[key]


def note(path: str):
    """A function that makes a file one byte longer whenever it is called."""

    def act(call):
        with open(path, "ab") as f:
            f.write(b".")

    return act


def kill_in_phase(workspace: Workspace, name: str, ranks: int, phase: str) -> str:
    """Returns what went wrong, or ""."""
    undisturbed, calls = undisturbed_run(workspace, name, ranks)
    rng, out = workspace.rng, workspace.new_run()
    argv = scored_argv(workspace, name, out)
    call = rng.randint(1, max(1, calls[phase] - 1))
    delay = rng.uniform(0, LATER)
    victims = rng.choice([[0], [1], [0, 1]]) if ranks == 2 else [0]

    def arm(rank):
        sample_in_small_parts(rank)
        if rank in victims:
            Fault(phase_function(name, phase), "kill", rank, call, delay).arm()

    run = start(argv, ranks, before=arm)
    while run.poll() == [None] * ranks and time.time() - run.start_time < 60:
        time.sleep(0.005)
    time.sleep(0.05)
    run.kill()
    run.reap()
    where = f"killed {victims} in call {call} + {1000 * delay:.0f} ms"
    if all(run.status[rank] not in (-signal.SIGALRM, -signal.SIGKILL) for rank in victims):
        return f"{where}: it ended with {run.status} {run.output[-400:]}"
    run.forget()
    again = run_to_end(argv, ranks)
    problem = compare(again, undisturbed, out)
    again.forget()
    return f"{where}: {problem}" if problem else ""


# ----------------------------------------------------------------------------------------- scorers

FUNCTION = ["--players=self:3", "--ranked_by=moving_reward:f"]
FUNCTIONS = {
    "ranked_by": ("spin2", FUNCTION),
    "reward": (
        "ppo",
        ["--reward=moving_reward:f", "--advantage=grpo", "--samples_per_prompt=3", "--kl_in=loss"],
    ),
}
JUDGED = [*SPIN, "--players=data,self:2", "--max_rows=24"]
EVENTS = ("changes between rounds", "changes before a resume", "is moved before a resume")
SCORERS = {
    "a function": Input("spin2", [*SPIN, *FUNCTION], change_reward_source, (), warned=True),
    "a reward model": Input(
        "spin2",
        [*JUDGED, "--ranked_by={inputs}/reward"],
        lambda inputs, out: change_weights(f"{inputs}/reward"),
        ("ranked_by", "reward"),
    ),
    "a judge": Input(
        "spin2",
        [*JUDGED, "--ranked_by={inputs}/sft"],
        lambda inputs, out: change_weights(f"{inputs}/sft"),
        ("ranked_by", "sft"),
    ),
    "the teacher of reverse_kl": Input(
        "ppo",
        [*PPO, "--reward=", "--advantage=reverse_kl", "--teacher={inputs}/sft"],
        lambda inputs, out: change_weights(f"{inputs}/sft"),
        ("teacher", "sft"),
    ),
}


def scorers(workspace: Workspace, short: bool) -> Result:
    """scorers that raise or give nan: one line or the user's traceback, no row is written; fixed,
    the same command ends equal bit for bit. Other weights of a scorer are refused, another source
    of a function is said"""
    cases = []
    for setting, value in itertools.product(FUNCTIONS, ("nan", "an exception")):
        for round_id, ranks in itertools.product((0, 1), (1, 2)):
            stage, options = FUNCTIONS[setting]
            what = f"{value} from {setting} in round {round_id}, {ranks} ranks"
            cases.append((what, bad_reward, value, round_id, ranks, stage, options))
    cases = workspace.rng.sample(cases, 2 if short else 8)
    changes = []
    for name, event in itertools.product(SCORERS, EVENTS):
        changes.append((f"{name} {event}", change_input, SCORERS[name], event, 1))
    cases += workspace.rng.sample(changes, 2) if short else changes
    failures = []
    for what, case, *arguments in cases:
        problem = attempt(case, workspace, *arguments)
        if problem:
            failures.append(f"{what}: {problem}")
    return count(len(cases), failures)


# ----------------------------------------------------------------------------------- damaged files

DAMAGES = ("truncated", "emptied", "removed", "flipped", "flipped")


def damages(workspace: Workspace, short: bool) -> Result:
    """files and parts of a scored round truncated, emptied, removed or with one bit flipped: made
    again, not read any more, or refused in one line; put back, the same command ends equal bit for
    bit"""
    cases = list(itertools.product(RUNS, ("sampling", "scoring", "reference", "fit"), DAMAGES))
    cases = workspace.rng.sample(cases, 3 if short else 40)
    failures = []
    num_refused = 0
    for name, phase, damage in cases:
        out, file = stopped_run(workspace, name, phase)
        content = read_bytes(f"{out}/{file}")
        write_or_remove(f"{out}/{file}", spoilt(workspace.rng, content, damage))
        run = run_to_end(scored_argv(workspace, name, out))
        num_refused += run.status != [0]
        problem = attempt(finish_damaged, workspace, name, run, out, file, content)
        if problem:
            failures.append(f"{name} stopped in {phase}, {file} {damage}: {problem}")
        shutil.rmtree(out)
        run.forget()
    return count(len(cases), failures, f"{num_refused} refused")


def stopped_run(workspace: Workspace, name: str, phase: str) -> tuple[str, str]:
    """(a copy of a run that SIGTERM has stopped in a phase of its second round, one of the files in
    its round folders)."""
    _, calls = undisturbed_run(workspace, name, 1)
    out = workspace.half(
        RUNS[name][0],
        1,
        *options_of(workspace, name),
        function=phase_function(name, phase),
        call=calls[phase] // 2 + 1,
    )
    files = []
    for pattern in ("*.jsonl*", "*.npz*", "*.json", "*.part*"):
        files += glob.glob(f"{out}/round_*/{pattern}")
    return out, os.path.relpath(workspace.rng.choice(sorted(set(files))), out)


def finish_damaged(workspace, name: str, run, out: str, file: str, content: bytes) -> str:
    """What is wrong with a run after one of its files was damaged, or ""."""
    undisturbed, _ = undisturbed_run(workspace, name, 1)
    if run.status == [0]:
        problem = difference(undisturbed, out, warnings=False)
        return "" if problem == f"files differ: {[file]}" else problem  # it was not read any more
    problem = not_refused(run, os.path.basename(file).partition(".part")[0])
    if problem:
        return problem
    write_or_remove(f"{out}/{file}", content)
    again = run_to_end(scored_argv(workspace, name, out))
    return compare(again, undisturbed, out, warnings=False)
