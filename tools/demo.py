"""The report of `make demo`: exact match on held-out sums while each method trains.

    python -m tools.demo out/addition

Measures the checkpoints of sft, sft_more, spin and online_pl in the folder with eval.py, and writes
report.md, exact_match.png and .svg there: the curves, a table with intervals, ten samples.
"""

import os
import sys

import numpy as np

from data import cli
from data.addition.scorer import exact_match
from data.files import atomic_write, read_json
from data.rows import read_rows
from eval import main as evaluate
from nanospin.checkpoint import is_end_of_run, list_checkpoints, read_meta
from tools.plot import (
    GREY,
    PALETTE,
    check_report,
    figure_legend,
    markdown_table,
    minutes,
    plt,
    save_figure,
    style,
)

DATA = "data/sums/prompts"
ANSWERS = "data/sums/answers"
METHODS = ("sft_more", "spin", "online_pl")


def method_titles() -> dict[str, str]:
    """{method: its title}, with the number of answers that the data has."""
    answers = read_json(f"{ANSWERS}/meta.json", ("train_rows",))["train_rows"]
    return {
        "sft": f"SFT on {answers:,} answers, where all start",
        "sft_more": f"SFT continued, the same {answers:,} answers",
        "spin": f"SPIN, the same {answers:,} answers",
        "online_pl": "online Plackett-Luce, no answers, a checker",
    }


def checkpoints_of(run: str) -> list[tuple[float, str]]:
    """(minutes of training, folder) of every checkpoint that a run has kept, in order."""
    found = []
    for path in list_checkpoints(run)[::-1]:
        meta = read_meta(path)
        found.append((minutes(run, meta["round"], meta["step"]), path))
    return found


def check_finished(run: str, checkpoints: list):
    """Exit with one line if a run has not come to its end."""
    meta = read_meta(checkpoints[-1][1]) if checkpoints else None
    if meta is None:
        raise SystemExit(f"{run} has no checkpoint: it has not been trained yet")
    rounds = read_json(f"{run}/config.json", ("config",))["config"]["rounds"]
    if is_end_of_run(meta, rounds) is False:
        raise SystemExit(
            f"{run} is not finished: its last checkpoint is of round {meta['round']}, step "
            f"{meta['step']}; run its command again"
        )


def measure(folder: str, rows: int) -> dict[str, list[tuple[float, str]]]:
    """Measure all checkpoints with eval.py, into FOLDER/eval. Returns the curve of each method:
    (minutes, name in eval.json)."""
    specs, curves = [], {}
    for method in ("sft", *METHODS):
        run = f"{folder}/{method}"
        checkpoints = checkpoints_of(run)
        check_finished(run, checkpoints)
        if method == "sft":
            checkpoints = checkpoints[-1:]
        curves[method] = []
        for n, (when, path) in enumerate(checkpoints):
            name = f"{method}.{n}"
            specs.append(f"{name}={path}@0")
            curves[method].append((when, name))
        specs.append(f"{method}={checkpoints[-1][1]}")
    evaluate([*specs, f"--data={DATA}", f"--rows={rows}", "--samples=4", f"--out={folder}/eval"])
    return curves


def draw(path: str, curves: dict[str, list], table: dict):
    """Greedy exact match against minutes of training."""
    titles = method_titles()
    with style():
        fig, ax = plt.subplots(figsize=(5.6, 3.6))
        start = 100 * table[curves["sft"][-1][1]]["exact_match"]
        ax.axhline(start, color=GREY, ls="--", lw=1, label="SFT, where all start")
        for method, color in zip(METHODS, (PALETTE[0], PALETTE[4], PALETTE[2])):
            x, y = [0.0], [start]
            for when, name in curves[method]:
                x.append(when)
                y.append(100 * table[name]["exact_match"])
            ax.plot(x, y, "o-", color=color, ms=4, label=titles[method])
        ax.set_xlabel("minutes of training on one CPU core, after SFT")
        ax.set_ylabel("held-out sums answered right, greedily (%)")
        figure_legend(fig, ncols=1)
        save_figure(fig, path)


def right_answers(folder: str, name: str) -> np.ndarray:
    """Whether each held-out sum was answered right (rows,)."""
    rows = read_rows(f"{folder}/eval/{name}.jsonl")
    return np.array([exact_match(row, row["responses"][0]) for row in rows])


def results_table(folder: str, curves: dict[str, list], table: dict) -> list[str]:
    """Markdown: greedy and sampled exact match, and the paired difference from SFT continued with
    its 95 % interval over the held-out sums."""
    baseline = right_answers(folder, curves["sft_more"][-1][1])
    lines = []
    for method, title in method_titles().items():
        when, greedy = curves[method][-1]
        difference = 100 * (right_answers(folder, greedy) - baseline)
        half_width = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        lines.append(
            [
                title,
                f"{100 * table[greedy]['exact_match']:.1f} %",
                "" if method == "sft_more" else f"{difference.mean():+.1f} ± {half_width:.1f}",
                f"{100 * table[method]['exact_match']:.1f} %",
                f"{100 * table[method]['pass_at_4']:.1f} %",
                f"{when:.1f}",
            ]
        )
    head = ["", "greedy", "against SFT continued", "sampled", "one of 4 samples", "minutes"]
    return markdown_table(head, lines)


def samples_table(folder: str, curves: dict[str, list], count: int = 10) -> list[str]:
    """Markdown: the greedy answers to the first `count` held-out sums; right ones are bold."""
    answers, titles = {}, method_titles()
    for method in titles:
        answers[method] = read_rows(f"{folder}/eval/{curves[method][-1][1]}.jsonl")
    lines = []
    for n in range(count):
        cells = [answers["sft"][n]["prompt"]]
        for method in titles:
            row = answers[method][n]
            text = row["responses"][0].strip()
            cells.append(f"**{text}**" if exact_match(row, row["responses"][0]) else text)
        lines.append(cells)
    return markdown_table(["prompt", *titles], lines)


HEAD = "# Self-play on sums"


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("demo", help="folder with the runs sft, sft_more, spin and online_pl")
    parser.add_argument(
        "--rows", type=cli.number_type(int, 10), default=2000, help="held-out sums to measure on"
    )
    args = parser.parse_args(argv)
    path = os.path.join(args.demo, "report.md")
    check_report(path, HEAD)
    curves = measure(args.demo, args.rows)
    table = read_json(f"{args.demo}/eval/eval.json")
    draw(f"{args.demo}/exact_match.png", curves, table)
    results = results_table(args.demo, curves, table)
    text = [
        HEAD,
        "",
        "![Exact match while each method trains](exact_match.png)",
        "",
        *results,
        "",
        "One training run of each. ± is a 95 % interval of the paired difference over the",
        "held-out sums, in points. It says nothing about another seed: `studies/verifiable` has",
        "five.",
        "",
        "## Greedy answers",
        "",
        *samples_table(args.demo, curves),
        "",
    ]
    with atomic_write(path) as f:
        f.write("\n".join(text))
    print("\n".join([*results, "", path]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
