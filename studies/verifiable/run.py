"""Train and measure every method of this study. One command, all results:

    python -m studies.verifiable.run --seeds 1 2 3 --jobs=2
    python -m studies.verifiable.run --seeds 1 --only online_pl_8
    python -m studies.verifiable.run --task=countdown --seeds 1 2 3 --jobs=2
    python -m studies.verifiable.summarize --seeds 1 2 3

An interrupted run resumes. A finished one is looked at by train.py, which refuses other settings,
and measured again only if it was trained further or the command of eval.py is another. --list
prints the commands only. METHODS is the whole study: a config, and settings on top of it. TASKS
says where a task's data and scorer are. All methods of a seed start from the same fine-tuned model.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from data import cli
from data.files import read_json, write_json
from nanospin import checkpoint

SFT = "config/demo/addition_sft.py"
SFT_MORE = "config/demo/addition_sft_more.py"
SPIN = "config/demo/addition_spin.py"
ONLINE = "config/demo/addition_online_pl.py"
GRPO = "config/demo/addition_grpo.py"


@dataclass(frozen=True)
class Task:
    prepare: str  # module that writes the data
    scorer: str
    few: str  # folder with 1,500 answers, and prompts without
    all: str  # folder with all answers
    limits: list[str] = field(default_factory=list)
    metric: str = "exact_match"  # of eval.py
    best_of_8: str = "pass_at_8"


TASKS = {
    "sums": Task(
        prepare="data.addition.prepare",
        scorer="data.addition.scorer:exact_match",
        few="sums",
        all="all_sums",
    ),
    "countdown": Task(
        prepare="data.countdown.prepare",
        scorer="data.countdown.scorer:reaches",
        few="games",
        all="all_games",
        limits=["--max_prompt=40", "--max_response=16"],
        metric="score",  # many answers are right
        best_of_8="score_best_of_8",
    ),
}

ANSWERS_KEPT = 1500
ANSWERS = "--data={few}/answers"  # the 1,500 that the model was fine-tuned on
NEW = "--data={all}"  # 1,500 others, drawn from all
RATES = "--lr=[2e-4,2e-4,2e-4,2e-4,1e-4,1e-4,4e-5,4e-5]"
SLOW_RATES = "--lr=[1e-4,1e-4,1e-4,1e-4,5e-5,5e-5,2e-5,2e-5]"
SPIN_NEW = [SPIN, NEW, RATES, "--max_rows=1500"]
TEACHER = "--teacher={teacher}"  # fine-tuned on all answers, wider
PROMPTS = "--data={few}/prompts"
RANKED = [ONLINE, PROMPTS, "--ranked_by={scorer}"]
REWARDED = [GRPO, PROMPTS, "--rounds=8", "--reward={scorer}"]
# 65,536 samples each
ONLINE_2 = [*RANKED, '--players=["self:2"]', "--max_rows=4096"]
ONLINE_4 = [*RANKED, '--players=["self:4"]', "--max_rows=2048"]
ONLINE_8 = [*RANKED, '--players=["self:8"]', "--max_rows=1024"]

METHODS = {
    # the same answers again
    "sft_more": [SFT_MORE, ANSWERS, "--max_steps=800"],
    "spin": [SPIN, ANSWERS, SLOW_RATES, "--nll_coef=0"],
    "spin_nll": [SPIN, ANSWERS, RATES],
    "spin_history": [SPIN, ANSWERS, RATES, '--players=["data","self","self-1"]'],
    # new answers
    "sft_new": [SFT_MORE, NEW, "--max_rows=1500", "--max_steps=376", "--batch_size=32"],
    "spin_new": [SPIN, NEW, SLOW_RATES, "--max_rows=1500", "--nll_coef=0"],
    "spin_new_nll": SPIN_NEW,
    # new answers, and a teacher's
    "spin_k3_new": [*SPIN_NEW, '--players=["data","teacher","self"]', TEACHER],
    # no answers, but a teacher
    "sft_teacher": [SFT_MORE, "--data={teacher_text}", "--max_rows=1500", "--max_steps=376"]
    + ["--batch_size=32"],
    "spin_teacher": [SPIN, "--data={teacher_text}", RATES, "--max_rows=1500"],
    "distill": [GRPO, PROMPTS, "--rounds=8", "--max_rows=1500", "--batch_size=32", "--reward="]
    + ["--advantage=reverse_kl", "--samples_per_prompt=1", "--lr=7e-5", TEACHER],
    # no answers, but a function that checks
    "best_of_8": [*ONLINE_8, "--loss_type=best_of_n", "--nll_coef=0"],
    "online_pl_2": ONLINE_2,
    "online_pl_4": ONLINE_4,
    "online_pl_8": ONLINE_8,
    "online_pairs_8": [*ONLINE_8, "--loss_type=pairs"],
    "best_against_worst_8": [*ONLINE_8, "--best_and_worst=True"],
    "grpo_8": [*REWARDED, "--max_rows=1024"],
    "ppo": [*REWARDED, "--max_rows=8192", "--advantage=gae"]
    + ["--samples_per_prompt=1", "--batch_size=512"],
}


def names_of(args) -> dict[str, str]:
    """What the names in METHODS stand for."""
    task = TASKS[args.task]
    folders = {"few": task.few, "all": task.all, "teacher_text": "teacher_text"}
    names = {name: f"{args.data}/{folder}" for name, folder in folders.items()}
    return names | {"teacher": f"{args.data}/teacher", "scorer": task.scorer}


def check_folders(args):
    """Exit with one line if OUT has runs after another number of steps of SFT, or the data another
    number of answers: they would be taken for this study's."""
    for seed in args.seeds:
        config_path = f"{args.out}/{seed}/sft/config.json"
        if os.path.exists(config_path):
            steps = read_json(config_path, ("config",))["config"]["max_steps"]
            if steps != args.sft_steps:
                raise SystemExit(
                    f"{args.out}/{seed}/sft was trained for {steps} steps, not {args.sft_steps}: "
                    "use another --out"
                )
    meta_path = f"{names_of(args)['few']}/answers/meta.json"
    if os.path.exists(meta_path):
        answers = read_json(meta_path, ("train_rows",))["train_rows"]
        if answers != ANSWERS_KEPT:
            raise SystemExit(
                f"{meta_path}: {answers} answers, not {ANSWERS_KEPT}: use another --data"
            )


def check_seeds(seeds: list[str]):
    """Exit with one line if a seed is given twice: it would count twice."""
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"--seeds: {' '.join(seeds)} has one seed twice")


def make_data(args):
    """The task with 1,500 answers, the same with all of them, and a teacher's answers to all."""
    folder = names_of(args)
    prepare = [sys.executable, "-m", TASKS[args.task].prepare]
    if not os.path.exists(f"{folder['few']}/prompts/meta.json"):
        few = [f"--answers={ANSWERS_KEPT}", f"--out={folder['few']}"]
        subprocess.run([*prepare, *few], check=True)
    if not os.path.exists(f"{folder['all']}/meta.json"):
        subprocess.run([*prepare, f"--out={folder['all']}"], check=True)
    if os.path.exists(f"{folder['teacher_text']}/meta.json") or not needs_teacher(args.only):
        return
    log, text = f"{args.data}/teacher.log", f"{args.data}/teacher.jsonl"
    teacher = [SFT, f"--data={folder['all']}", "--max_steps=1500", "--n_embd=192"]
    teacher = [sys.executable, "train.py", *teacher, f"--out_dir={folder['teacher']}"]
    run(teacher, log, False)
    prompts = f"{folder['all']}/train.jsonl"
    sample = [sys.executable, "sample.py", folder["teacher"], "--prompts", prompts]
    run([*sample, "--out", text], log, False)
    prepare = [sys.executable, "-m", "data.jsonl.prepare", text, "--tokenizer=bytes"]
    # their groups are on the side of training; a larger share has some of them on the other
    run([*prepare, "--val_share=0.12", f"--out={folder['teacher_text']}"], log, False)


def needs_teacher(names: list[str]) -> bool:
    """Whether one of these methods reads what a teacher wrote."""
    for name in names:
        if "{teacher" in " ".join(METHODS[name]):
            return True
    return False


def train_command(args, seed: str, name: str, settings: list[str], init: str = "") -> list[str]:
    names = names_of(args)
    settings = [setting.format(**names) if "={" in setting else setting for setting in settings]
    command = [sys.executable, "train.py", *settings, *TASKS[args.task].limits, f"--seed={seed}"]
    command.append(f"--out_dir={args.out}/{seed}/{name}")
    return command + [f"--init={args.out}/{seed}/{init}"] if init else command


def eval_command(args, seed: str, name: str) -> list[str]:
    """Greedy, and eight samples at temperature 1, on all held-out sums."""
    run = f"{args.out}/{seed}/{name}"
    command = [sys.executable, "eval.py", f"{name}={run}", f"{name}_greedy={run}@0", "--samples=8"]
    command += [f"--reference={args.out}/{seed}/sft", f"--seed={1000 + int(seed)}"]
    task = TASKS[args.task]
    if task.metric == "score":
        command.append(f"--scorer={task.scorer}")
    return [*command, f"--data={args.data}/{task.few}/prompts", "--rows=2000", f"--out={run}/eval"]


def run(command: list[str], log: str, list_only: bool):
    """Run a command with one thread, its output in `log`. Exits with the log's last line if the
    command fails."""
    if list_only:
        print(shlex.join(command))
        return
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=f, stderr=f, env=environment)
    if done.returncode:
        with open(log, encoding="utf-8") as f:
            last = f.read().strip().splitlines()[-1:]
        raise SystemExit(f"{shlex.join(command)}: exit {done.returncode}: {''.join(last)}")


def check_start(run: str, init: str):
    """Exit with one line if a run began with other weights than `init` has now. train.py says it,
    and leaves a run with checkpoints as it is."""
    settings = read_json(f"{run}/config.json", ["config"])["config"]
    if settings["players_sha256"]["init"] != checkpoint.weights_sha256(init):
        raise SystemExit(f"{run} began with other weights than {init} has now: remove that run")


def train_and_measure(args, seed: str, name: str, settings: list[str], init: str = ""):
    folder = f"{args.out}/{seed}/{name}"
    run(train_command(args, seed, name, settings, init), f"{folder}.log", args.list)
    measure = eval_command(args, seed, name)
    if args.list:
        run(measure, f"{folder}.log", True)
        return
    if init:
        check_start(folder, f"{args.out}/{seed}/{init}")
    record = {"checkpoint": checkpoint.resolve(folder), "command": measure[1:]}
    path = f"{folder}/eval/command.json"
    if not os.path.exists(path) or read_json(path) != record:
        run(measure, f"{folder}.log", False)
        write_json(path, record)
    print(f"seed {seed}: {name} is done", flush=True)


def run_all(work: list[tuple], jobs: int):
    """train_and_measure(*arguments) of all, `jobs` at a time. If one fails, no other is started."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train_and_measure, *arguments) for arguments in work]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="sums", help="default: sums")
    parser.add_argument("--out", help="folder of the runs; default: out/verifiable/TASK")
    parser.add_argument("--data", default="data", help="folder for the data")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"], help="seeds of the runs")
    parser.add_argument(
        "--sft_steps",
        type=cli.number_type(int, 1),
        default=350,
        help="of the model that all methods start from; take another OUT for each",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=METHODS,
        help="methods; default: all, but no teacher's in countdown",
    )
    parser.add_argument("--jobs", type=cli.number_type(int, 1), default=2, help="at a time")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    args.out = args.out or f"out/verifiable/{args.task}"
    if not args.only:
        args.only = [name for name in METHODS if args.task == "sums" or not needs_teacher([name])]
    if args.task != "sums" and needs_teacher(args.only):
        parser.error("only --task=sums has a teacher")

    check_seeds(args.seeds)
    check_folders(args)
    if not args.list:
        make_data(args)
    sft = [SFT, ANSWERS, f"--max_steps={args.sft_steps}"]
    starts = [(args, seed, "sft", sft) for seed in args.seeds]
    work = []
    for seed in args.seeds:
        for name in args.only:
            work.append((args, seed, name, METHODS[name], "sft"))
    for part in (starts, work):
        run_all(part, args.jobs)


if __name__ == "__main__":
    sys.exit(cli.run(main))
