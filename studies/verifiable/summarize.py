"""The table and the figure of studies/verifiable, from the runs of run.py.

    python -m studies.verifiable.summarize --seeds 1 2 3 --figures=FOLDER
    python -m studies.verifiable.summarize --task=countdown --seeds 1 2 3

A difference is paired: both methods of a seed start from the same fine-tuned model, see the same
prompts and are measured on the same held-out sums. Intervals are Student's, over seeds.
"""

import os
import sys

import numpy as np

from data import cli
from data.files import printable, read_json, write_json
from nanospin import checkpoint, same_run
from studies.verifiable.run import METHODS, TASKS, Task, check_seeds
from tools.plot import (
    GREY,
    PALETTE,
    markdown_table,
    plt,
    read_metrics,
    round_lengths,
    save_figure,
    style,
    t_interval,
)

BASELINE = "sft_more"
GROUPS = {  # what a method learns from: the first and the last of METHODS
    "the same 1,500 answers": ("sft_more", "spin_history"),
    "1,500 new answers": ("sft_new", "spin_k3_new"),
    "no answers, a teacher": ("sft_teacher", "distill"),
    "no answers, a checker": ("best_of_8", "ppo"),
}
LABELS = {
    "sft": "SFT, where all start",
    "sft_more": "SFT continued",
    "spin": "SPIN, K = 2",
    "spin_nll": "SPIN + next-token loss",
    "spin_history": "SPIN with history, K = 3",
    "sft_new": "SFT",
    "spin_new": "SPIN, K = 2",
    "spin_new_nll": "SPIN + next-token loss",
    "spin_k3_new": "data > teacher > self, K = 3",
    "sft_teacher": "SFT on its text",
    "spin_teacher": "teacher > self, K = 2",
    "distill": "on-policy distillation",
    "best_of_8": "best-of-8 SFT",
    "online_pl_2": "online Plackett-Luce, K = 2",
    "online_pl_4": "online Plackett-Luce, K = 4",
    "online_pl_8": "online Plackett-Luce, K = 8",
    "online_pairs_8": "all pairs, K = 8",
    "best_against_worst_8": "best against worst of 8",
    "grpo_8": "GRPO, K = 8",
    "ppo": "PPO",
}


def check_is_newest(run: str, measured: str):
    """Exit with one line if a run has gone on since eval.py measured a checkpoint of it."""
    newest = checkpoint.latest(run)
    if not newest:  # its checkpoints were removed to save space
        return
    if newest.split("/")[-2:] != measured.split("/")[-2:]:
        raise SystemExit(
            printable(f"{run} has gone on since {measured} was measured; measure it with run.py")
        )


def measured(task: Task, out: str, seed: str, name: str) -> dict:
    """Metrics of one run: those of eval.py, greedily and sampled, and its steps."""
    run = f"{out}/{seed}/{name}"
    table = read_json(f"{run}/eval/eval.json")
    sampled = table[name]
    check_is_newest(run, sampled["checkpoint"])
    return {
        "greedy": 100 * table[f"{name}_greedy"][task.metric],
        "sampled": 100 * sampled[task.metric],
        "pass_at_8": 100 * sampled[task.best_of_8],
        "val_loss": sampled["val_loss"],
        "kl": sampled["kl"],
        "steps": sum(round_lengths(read_metrics(run)).values()),
    }


def methods_of(group: str) -> list[str]:
    names = list(METHODS)
    first, last = GROUPS[group]
    return names[names.index(first) : names.index(last) + 1]


def format_difference(differences: list[float]) -> str:
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    mean, half_width = t_interval(differences)
    return f"{mean:+.1f} ± {half_width:.1f}"


def make_table(results: dict[str, list[dict]]) -> list[str]:
    """Markdown. results: {method: metrics of each seed}."""
    rows = []
    group_of = {}
    for group in GROUPS:
        group_of |= dict.fromkeys(methods_of(group), group)
    last = None
    for name, by_seed in results.items():
        group = group_of.get(name)  # None of the start
        if group != last:
            rows.append([f"*{group}*", *[""] * 8])
        last = group
        mean = {}
        for metric in by_seed[0]:
            mean[metric] = np.mean([m[metric] for m in by_seed])
        against = {}
        for metric in ("greedy", "sampled"):
            differences = gains_over(results, name, BASELINE, metric)
            against[metric] = "" if name == BASELINE else format_difference(differences)
        rows.append(
            [
                LABELS[name],
                f"{mean['greedy']:.1f} %",
                against["greedy"],
                f"{mean['sampled']:.1f} %",
                against["sampled"],
                f"{mean['pass_at_8']:.1f} %",
                f"{mean['val_loss']:.3f}",
                f"{mean['kl']:.2f}",
                f"{mean['steps']:.0f}",
            ]
        )
    head = ["method", "greedy", "against SFT continued", "sampled", "against SFT continued"]
    return markdown_table([*head, "pass at 8", "validation loss", "KL from SFT", "steps"], rows)


def draw(results: dict[str, list[dict]], path: str):
    """What every method gains over SFT continued, in answers right, greedily and sampled: each
    seed, and the mean with its 95 % interval."""
    with style():
        fig, axes = plt.subplots(1, 2, figsize=(7.6, 5.2), sharey=True)
        y, ticks = 0.0, []
        for color, group in zip(PALETTE, GROUPS):
            names = [name for name in methods_of(group) if name in results and name != BASELINE]
            if not names:
                continue
            ticks.append((y, group))
            for name in names:
                y -= 1
                ticks.append((y, LABELS[name]))
                for ax, metric in zip(axes, ("greedy", "sampled")):
                    draw_method(ax, gains_over(results, name, BASELINE, metric), y, color)
            y -= 1.4
        for ax, title in zip(axes, ("greedy", "sampled at temperature 1")):
            ax.axvline(0, color=GREY, lw=1, ls="--", zorder=0)
            ax.grid(axis="y", visible=False)
            ax.set_title(title)
            ax.set_xlabel("points above SFT continued")
        axes[0].set_yticks(*zip(*ticks))
        for tick, (_, label) in zip(axes[0].get_yticklabels(), ticks):
            if label in GROUPS:
                tick.set_fontweight("bold")
        axes[0].set_ylim(y + 0.8, 0.7)
        save_figure(fig, path)


def draw_method(ax, gains: list[float], y: float, color: str):
    """The gains of one method as a row of a figure."""
    ax.plot(gains, [y] * len(gains), "|", color=color, alpha=0.6, ms=7)
    if len(gains) > 1:
        mean, half_width = t_interval(gains)
        ax.errorbar(mean, y, xerr=half_width, fmt="o", color=color, ms=5, capsize=2)


def gains_over(
    results: dict[str, list[dict]], name: str, other: str, metric: str = "greedy"
) -> list[float]:
    """Differences in answers right, in points, one for each seed."""
    return [m[metric] - b[metric] for m, b in zip(results[name], results[other])]


def methods_of_map(by_steps: dict[str, dict], group: str) -> list[str]:
    """The methods of a group that were run after every length of SFT."""
    in_all = set(METHODS).intersection(*by_steps.values())
    return [name for name in methods_of(group) if name in in_all]


def make_map_table(by_steps: dict[str, dict]) -> list[str]:
    """Markdown: what each method adds to SFT models of other lengths."""
    starts = []
    for results in by_steps.values():
        start = np.mean([m["greedy"] for m in results["sft"]])
        starts.append(f"{start:.1f} %")
    rows = [[LABELS["sft"], *starts]]
    for group in GROUPS:
        names = methods_of_map(by_steps, group)
        if names:
            rows.append([f"*{group}*", *[""] * len(by_steps)])
        for name in names:
            gains = [gains_over(results, name, "sft") for results in by_steps.values()]
            rows.append([LABELS[name], *map(format_difference, gains)])
    return markdown_table(["gain over the start", *[f"{n} steps" for n in by_steps]], rows)


def draw_map(by_steps: dict[str, dict], path: str):
    """What each method adds to SFT models of other lengths. by_steps: {steps: results}."""
    groups = [group for group in GROUPS if methods_of_map(by_steps, group)]
    with style():
        size = (0.6 + 2.5 * len(groups), 3.4)
        fig, axes = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
        for ax, group in zip(axes[0], groups):
            for color, name in zip(PALETTE, methods_of_map(by_steps, group)):
                draw_gains(ax, by_steps, name, color)
            ax.axhline(0, color=GREY, lw=1, ls="--", zorder=0)
            ax.set_xscale("log")
            ax.set_xticks([int(steps) for steps in by_steps], list(by_steps), minor=False)
            ax.minorticks_off()
            ax.set_title(group)
            ax.set_xlabel("steps of SFT before")
            ax.legend()
        axes[0][0].set_ylabel("gain in right answers (points)")
        save_figure(fig, path)


def draw_gains(ax, by_steps: dict[str, dict], name: str, color: str):
    """A method's gain over the model it started from, with its 95 % interval, by steps of SFT."""
    x, y, errors = [], [], []
    for steps, results in by_steps.items():
        gains = gains_over(results, name, "sft")
        mean, half_width = t_interval(gains) if len(gains) > 1 else (gains[0], 0)
        x.append(int(steps))
        y.append(mean)
        errors.append(half_width)
    ax.errorbar(x, y, errors, fmt="o-", color=color, capsize=2, label=LABELS[name])


def all_results(task: Task, out: str, seeds: list[str]) -> dict[str, list[dict]]:
    """{method: metrics of each seed}. Says which methods are missing."""
    results = {}
    for name in ["sft", *METHODS]:
        files = [f"{out}/{seed}/{name}/eval/eval.json" for seed in seeds]
        missing = [path for path in files if not os.path.exists(path)]
        if missing:
            print(f"{name} is left out: {missing[0]} is missing", file=sys.stderr)
            continue
        same_run.check_same_settings([f"{out}/{seed}/{name}" for seed in seeds])
        results[name] = [measured(task, out, seed, name) for seed in seeds]
    return results


def map_results(task: Task, folders: dict[str, str], seeds: list[str]) -> dict[str, dict]:
    """{steps: results} of all folders. Exits with one line if nothing can be compared."""
    by_steps = {}
    for steps, folder in folders.items():
        by_steps[steps] = all_results(task, folder, seeds)
        if "sft" not in by_steps[steps]:
            raise SystemExit(printable(f"--map: {folder} has no sft, where all start"))
    if not any(methods_of_map(by_steps, group) for group in GROUPS):
        raise SystemExit("--map: no method is in all of these folders")
    return by_steps


def read_map(pairs: list[str]) -> dict[str, str]:
    """{steps: folder} of STEPS=OUT. Exits with one line if steps are given twice."""
    folders = {}
    for pair in pairs:
        steps, equals, folder = pair.partition("=")
        if not (steps.isdecimal() and equals):
            raise SystemExit(printable(f"--map: {pair!r} must be STEPS=OUT"))
        if steps in folders:
            raise SystemExit(f"--map: {steps} steps are given twice")
        folders[steps] = folder
    return folders


def check_own(figures: str, name: str, picture: str, task: str):
    """Exit with one line if FIGURES/NAME.json is not of this command and task, or if a picture that
    would be replaced has none beside it."""
    path = f"{figures}/{name}.json"
    if os.path.exists(path) and read_json(path).get("task") != task:
        raise SystemExit(printable(f"{path} is not of this command and task: move it away"))
    for ending in ("png", "svg"):
        drawn = f"{figures}/{picture}.{ending}"
        if os.path.exists(drawn) and not os.path.exists(path):
            raise SystemExit(printable(f"{drawn} is there, without {name}.json: move it away"))


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="sums", help="default: sums")
    parser.add_argument(
        "--out", help="folder that run.py has written; default: out/verifiable/TASK"
    )
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"], help="seeds of the runs")
    parser.add_argument("--figures", help="folder for the figures and results.json; default: OUT")
    parser.add_argument(
        "--map", nargs="+", metavar="STEPS=OUT", default=[], help="folders of other --sft_steps"
    )
    args = parser.parse_args(argv)
    check_seeds(args.seeds)
    task = TASKS[args.task]
    args.out = args.out or f"out/verifiable/{args.task}"
    figures = args.figures or args.out
    check_own(figures, "results", "methods", args.task)
    folders = read_map(args.map)
    if folders:
        check_own(figures, "map", "map", args.task)
    results = all_results(task, args.out, args.seeds)
    if BASELINE not in results:
        raise SystemExit(f"{args.out} has no {BASELINE}, to which all is compared")
    if set(results) <= {"sft", BASELINE}:
        raise SystemExit(f"{args.out} has no method to compare to {BASELINE}")
    by_steps = map_results(task, folders, args.seeds) if folders else {}
    print("\n".join(make_table(results)))
    os.makedirs(figures, exist_ok=True)
    write_json(f"{figures}/results.json", {"task": args.task} | results)
    draw(results, os.path.join(figures, "methods.png"))
    if folders:
        print("\n".join(make_map_table(by_steps)))
        write_json(f"{figures}/map.json", {"task": args.task} | by_steps)
        draw_map(by_steps, os.path.join(figures, "map.png"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
