"""metrics.jsonl of any runs -> the figures; and the report of the demo.

python plot.py loss out.png T_0=out/a_1,out/a_2 T_1=out/b_1,out/b_2       validation loss, seeds as a band
python plot.py rounds out.png out/demo/spin_k3                            rewards and log-probabilities of each player
python plot.py report out/demo [out/demo_seeds/*]                         report.md and its plots; several: mean and spread
python plot.py table studies/rlhf/results out/rlhf/*                              report.md: held-out figures, first and last; and the runs' logs
"""

import json
import logging
import os
import shutil
import sys

logging.getLogger("matplotlib").setLevel(
    logging.ERROR
)  # it warns at length where the home folder cannot be written to

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read_metrics(run, kind=None):
    """Records of a run's metrics.jsonl, of one kind if asked."""
    path = os.path.join(run, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            records = [json.loads(line) for line in f]
    except OSError as e:
        raise SystemExit(f"{path}: {e.strerror}; train the run first")
    except ValueError as e:
        raise SystemExit(f"{path}: not JSON lines ({e})")
    return [r for r in records if kind in (None, r["kind"])]


def along(records):
    """Steps since the run began, over its rounds."""
    x, before = [], {}
    for r in records:
        before[r["round"]] = max(before.get(r["round"], 0), r["step"])
    for r in records:
        x.append(
            r["step"] + sum(steps for round_id, steps in before.items() if round_id < r["round"])
        )
    return x


def save(fig, path):
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
    print(path)


def plot_loss(out, named):
    """named: {label: [run of each seed]}. Raw values; the band is the seeds' least and greatest."""
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for i, (label, runs) in enumerate(named.items()):
        curves = [
            (along(records), [r["val_loss"] for r in records])
            for records in (read_metrics(run, "eval") for run in runs)
        ]
        steps = sorted(set.intersection(*(set(x) for x, _ in curves)))
        values = np.array([[dict(zip(x, y))[s] for s in steps] for x, y in curves])
        ax.plot(
            steps,
            values.mean(0),
            "o-",
            ms=3,
            color=f"C{i}",
            label=label + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""),
        )
        if len(runs) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.2, lw=0)
    ax.set(xlabel="step", ylabel="validation cross-entropy (nats a token)")
    ax.legend()
    ax.grid(alpha=0.3)
    save(fig, out)


def plot_stages(out, demos):
    """Validation loss through the student's stages. demos: the demo folders, one a seed."""
    fig, axes = plt.subplots(1, 3, figsize=(14, 4))
    panels = [
        ("pretraining", ["pretrain"]),
        ("fine-tuning", ["sft"]),
        ("SFT continued, or self-play, from there", ["sft_more", "spin_k2", "spin_k3"]),
    ]
    for ax, (title, stages) in zip(axes, panels):
        for i, stage in enumerate(stages):
            for n, demo in enumerate(demos):
                records = read_metrics(os.path.join(demo, stage), "eval")
                ax.plot(
                    along(records),
                    [r["val_loss"] for r in records],
                    "o-",
                    ms=3,
                    lw=1,
                    color=f"C{i}",
                    label=None if n else stage,
                )
        ax.set(title=title, xlabel="step")
        ax.legend()
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="validation cross-entropy (nats a token)")
    save(fig, out)


def plot_rounds(out, run):
    """Mean implicit reward and log-probability of each player on held-out rows; dashed lines part the rounds, each of which
    has a reference and self samples of its own."""
    records = read_metrics(run, "eval")
    players = list(
        dict.fromkeys(k[len("reward/") :] for r in records for k in r if k.startswith("reward/"))
    )
    if not players:
        raise SystemExit(f"{run}: no round with ranked responses in its metrics")
    colours = {player: f"C{i}" for i, player in enumerate(players)}
    fig, axes = plt.subplots(1, 3, figsize=(14, 4))
    x = along(records)
    borders = [a for a, r in zip(x, records) if r["step"] == 0 and r["round"] > 0]
    for ax, prefix, title in zip(
        axes,
        ("reward/", "logp/"),
        ("mean implicit reward", "mean log-probability of the response (nats)"),
    ):
        for player in players:
            for round_id in sorted({r["round"] for r in records}):
                points = [
                    (a, r[prefix + player])
                    for a, r in zip(x, records)
                    if r["round"] == round_id and prefix + player in r
                ]
                if points:
                    ax.plot(
                        *zip(*points),
                        "o-",
                        ms=3,
                        color=colours[player],
                        label=player if player not in ax.get_legend_handles_labels()[1] else None,
                    )
        ax.set(title=title, xlabel="step")
        ax.legend()
    for name, label in (
        ("acc", "every pair"),
        *((f"acc/{p}", f"{p} above the worse") for p in players[:-1]),
    ):
        points = [(a, r[name]) for a, r in zip(x, records) if name in r and r["step"] > 0]
        if points:
            axes[2].plot(*zip(*points), "o-", ms=3, label=label)
    axes[2].set(title="held-out ranking accuracy", xlabel="step", ylim=(0, 1))
    axes[2].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
        for border in borders:
            ax.axvline(border, color="0.5", ls="--", lw=1)
    fig.suptitle(os.path.basename(os.path.normpath(run)))
    save(fig, out)


# ------------------------------------------------------------------------------------------------------------ the report


def minutes(run):
    return sum(r["seconds"] for r in read_metrics(run)) / 60


def stage_rows(demo):
    """(what, figures) of each line of the demo's table."""
    try:
        with open(os.path.join(demo, "eval", "eval.json"), encoding="utf-8") as f:
            table = json.load(f)
    except OSError as e:
        raise SystemExit(f"{demo}/eval/eval.json: {e.strerror}; `make demo` writes it")
    rows = {}
    for name, figures in table.items():
        stage, _, rest = name.partition(".")
        run = os.path.join(demo, stage)
        figures = dict(figures)
        if os.path.isdir(run):
            evals = [
                r
                for r in read_metrics(run, "eval")
                if not rest.startswith("round_") or r["round"] == int(rest[6:])
            ]
            if stage.startswith("spin"):
                figures |= {"acc": evals[-1]["acc"]}
                figures["minutes"] = (
                    sum(r["seconds"] for r in read_metrics(run) if r["round"] <= evals[-1]["round"])
                    / 60
                )
            elif not rest:
                figures["minutes"] = minutes(run)
        rows[name] = figures
    return rows


COLUMNS = [
    ("val_loss", "validation loss", "{:.4f}", 1),
    ("acc", "ranking accuracy", "{:.1f} %", 100),
    ("win_rate", "win rate against sft", "{:.1f} %", 100),
    ("f1", "F1 with the data", "{:.1f} %", 100),
    ("length", "mean length", "{:.1f}", 1),
    ("ended", "ended by eot", "{:.1f} %", 100),
    ("minutes", "minutes", "{:.1f}", 1),
]


def cell(values, form, scale):
    values = [v * scale for v in values if v is not None]
    if not values:
        return "-"
    text = form.format(np.mean(values))
    spread = np.std(values, ddof=1) if len(values) > 1 else None
    return (
        text
        if spread is None
        else text + (f" ± {spread:.2g}" if spread < 100 else f" ± {spread:.0f}")
    )


def collect_table(demos):
    """Lines of a table of what each round's collect saw on the held-out prompts, means over seeds."""
    columns = [
        ("length/data", "length: data", "{:.1f}", 1),
        ("length/teacher", "teacher", "{:.1f}", 1),
        ("length/self", "self", "{:.1f}", 1),
        ("ended/self", "self ended by eot", "{:.1f} %", 100),
        ("tie/self", "self equal to a better one", "{:.1f} %", 100),
        ("length_acc/self", "length alone tells data from self", "{:.1f} %", 100),
    ]
    lines = [
        "| round | " + " | ".join(title for _, title, _, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for stage in ("spin_k2", "spin_k3"):
        by_seed = [read_metrics(os.path.join(demo, stage), "collect") for demo in demos]
        for records in zip(*by_seed):
            lines.append(
                f"| {stage}.round_{records[0]['round']} | "
                + " | ".join(
                    cell([r.get(key) for r in records], form, scale)
                    for key, _, form, scale in columns
                )
                + " |"
            )
    return lines


def verdict(tables):
    """What the figures say of self-play against its controls, in words that they decide."""
    lines = []
    for spin in ("spin_k2", "spin_k3"):
        last = max(n for n in tables[0] if n.startswith(spin))
        for other in ("sft", "sft_more", "sft@1.0", "sft@0.7", "sft@0.5"):
            pairs = [
                (t[last], {"win_rate": 0.5, "win_rate_se": 0.0} | t[other])
                for t in tables
                if other in t
            ]
            if pairs:
                lines.append(
                    compare(
                        f"In win rate **{last} is %s {other}**",
                        [100 * (a["win_rate"] - b["win_rate"]) for a, b in pairs],
                        "{:+.1f} points",
                        [100 * np.hypot(a["win_rate_se"], b["win_rate_se"]) for a, b in pairs],
                        +1,
                    )
                )
        for other in ("sft", "sft_more"):
            lines.append(
                compare(
                    f"In validation loss {last} is %s {other}",
                    [t[last]["val_loss"] - t[other]["val_loss"] for t in tables],
                    "{:+.4f} nats a token",
                    None,
                    -1,
                )
            )
    return lines


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % point for so many seeds


def compare(sentence, differences, form, errors, better):
    """One line: the mean difference over seeds, and which word it earns. Of several seeds the interval is Student's for their
    mean; of one it is the error of the held-out prompts alone, where that is known, and says nothing of another training."""
    mean, n = float(np.mean(differences)), len(differences)
    if n > 1:
        error = STUDENT.get(n, 2.57) * float(np.std(differences, ddof=1)) / np.sqrt(n)
        about = f"95 % interval over {n} seeds"
    elif errors:
        error, about = 1.96 * errors[0], "95 % interval of the prompts, one training"
    else:
        word = ("better than" if mean * better > 0 else "worse than") + ", in this one training,"
        return f"- {sentence % word}: {form.format(mean)}."
    word = (
        "not told apart from"
        if abs(mean) <= error
        else "better than"
        if mean * better > 0
        else "worse than"
    )
    return f"- {sentence % word}: {form.format(mean)}, {about} {form.format(mean - error).split()[0]} to {form.format(mean + error).split()[0]}."


def report(demos):
    """report.md in the first demo's folder (or, of several seeds, beside them)."""
    tables = [stage_rows(demo) for demo in demos]
    folder = demos[0] if len(demos) == 1 else os.path.dirname(os.path.normpath(demos[0]))
    plot_stages(os.path.join(folder, "stages.png"), demos)
    pictures = ["stages.png"]
    for stage in ("spin_k2", "spin_k3"):
        plot_rounds(os.path.join(folder, f"{stage}.png"), os.path.join(demos[0], stage))
        pictures.append(f"{stage}.png")
    with open(os.path.join(demos[0], "spin_k3", "config.json"), encoding="utf-8") as f:
        setup = json.load(f)["starts"][0]
    starts = [
        r
        for demo in demos
        for stage in ("spin_k2", "spin_k3")
        for r in read_metrics(os.path.join(demo, stage), "start")
    ]
    worst = max(r["off"] for r in starts)
    out = [
        f"# Self-play on the documentation of installed packages, {len(demos)} seed"
        + ("s, mean ± standard deviation" if len(demos) > 1 else ""),
        "",
        f"Made by `{'make demo' if len(demos) == 1 else 'make demo-seeds'}`. torch {setup['torch']}, {setup['device']}, {setup['threads']} threads, "
        f"commit {setup['git']}.",
        "",
        "| stage | " + " | ".join(title for _, title, _, _ in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name in tables[0]:
        out.append(
            f"| {name} | "
            + " | ".join(
                cell([t[name].get(key) for t in tables], form, scale)
                for key, _, form, scale in COLUMNS
            )
            + " |"
        )
    out += [
        "",
        "`data` are the data's own responses, `sft_more` is SFT continued on the same rows for as many steps as both self-play rounds took, "
        "`sft@0.5` and so on are SFT's own samples at other temperatures (`sft@1.0` with other random numbers); everyone else samples at 1.0. "
        "Validation loss is cross-entropy a token on held-out responses. Ranking accuracy is of held-out pairs under the round's implicit rewards. "
        "Win rate is the share of prompts on which the judge gives a response a higher mean log-probability a token than `sft`'s sample. "
        "**The judge is the fine-tuned teacher**: K=3 has been trained on the judge's own samples and sharper samples please any such judge, "
        "so win rate alone shows nothing that the temperatures do not show for free.",
        "",
        "What each round sampled, on the held-out prompts:",
        "",
        *collect_table(demos),
        "",
        "## What it says",
        "",
        *verdict(tables),
        "",
        "No interval is widened for there being so many of them.",
        "",
        f"Each of the {len(starts)} rounds started at the loss of equal scores (ln 2 or ln 6, less what absent responses take, plus the `nll_coef` term); "
        f"the largest difference was {worst:.1e}.",
        "",
    ]
    if len(demos) > 1:
        out += ["The plots of the rounds are the first seed's.", ""]
    out += [line for p in pictures for line in (f"![{p}]({p})", "")]
    path = os.path.join(folder, "report.md")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(out))
    print("\n".join(out[4 : 6 + len(tables[0])] + [""] + verdict(tables)))
    print(path)


FIGURES = {
    "reward": ["acc", "pair_nll"],
    "preference": ["acc", "rank_nll", "val_loss"],
    "spin": ["acc", "rank_nll", "val_loss"],
    "ppo": ["reward", "kl", "length", "ended", "pretrain_loss"],
}


def table(out, runs):
    """report.md: each run's held-out figures at its first evaluation and at its last, and how long it took; its metrics.jsonl beside."""
    lines = [
        "| run | stage | steps | minutes | figure | first | last | standard error |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for run in runs:
        evals, name = read_metrics(run, "eval"), os.path.basename(os.path.normpath(run))
        if not evals:
            raise SystemExit(f"{run}: no evaluation yet; train the run first")
        with open(os.path.join(run, "config.json"), encoding="utf-8") as f:
            stage = json.load(f)["config"]["stage"]
        cells = [name, stage, str(len(read_metrics(run, "step"))), f"{minutes(run):.1f}"]
        for figure in FIGURES.get(stage, ["val_loss"]):
            if figure in evals[-1]:
                error = f"{evals[-1][figure + '_se']:.4f}" if figure + "_se" in evals[-1] else ""
                lines.append(
                    "| "
                    + " | ".join(
                        [
                            *cells,
                            figure,
                            f"{evals[0][figure]:.4f}",
                            f"{evals[-1][figure]:.4f}",
                            error,
                        ]
                    )
                    + " |"
                )
                cells = [""] * 4
        os.makedirs(os.path.join(out, name), exist_ok=True)
        shutil.copy(os.path.join(run, "metrics.jsonl"), os.path.join(out, name))
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as f:
        f.write(
            "\n".join(
                ["# Held-out figures at each run's first and last evaluation", "", *lines, ""]
            )
        )
    print("\n".join(lines))


def main(args):
    if args in (["-h"], ["--help"]):
        print(__doc__)
    elif args[:1] == ["loss"] and len(args) > 2 and all("=" in a for a in args[2:]):
        plot_loss(
            args[1],
            {name: runs.split(",") for name, _, runs in (a.partition("=") for a in args[2:])},
        )
    elif args[:1] == ["rounds"] and len(args) == 3:
        plot_rounds(args[1], args[2])
    elif args[:1] == ["table"] and len(args) > 2:
        table(args[1], args[2:])
    elif args[:1] == ["report"] and len(args) > 1:
        report([a for a in args[1:] if os.path.isdir(a)] or args[1:])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
