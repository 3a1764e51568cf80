"""Figures and tables from the metrics.jsonl of finished runs.

    python -m tools.plot loss OUT.png T_0=out/a_1,out/a_2 T_1=out/b_1     validation loss
    python -m tools.plot rounds OUT.png out/demo/spin_k3                  rewards of each player
    python -m tools.plot report out/demo                            report.md of make demo-text
    python -m tools.plot table OUT out/rlhf/*                             report.md of any runs

"loss" takes the runs of several seeds separated by commas; "rounds" and "report" take one run or
demo per seed. Other figures of the project share this style:
`from tools.plot import style, save_figure, PALETTE, sequential_colors`.
Every figure is written as PNG and as SVG.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from data import cli
from data.files import (
    atomic_write,
    check_output,
    printable,
    read_json,
    read_text,
    require_regular,
)
from nanospin.config import Config, player_columns
from nanospin.same_run import check_same_settings

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the home folder is read-only
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

plt.switch_backend("Agg")

# ------------------------------------------------------------------------------------------ style

# Okabe and Ito's palette: eight colours that people with any colour blindness can tell apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
GREY = "#6E6E6E"  # reference lines: chance, baseline, borders of rounds
BAND_ALPHA = 0.2
PLAYER_COLORS = {"data": PALETTE[0], "teacher": PALETTE[1], "self": PALETTE[2]}
DASHED = {"ls": (0, (4, 3)), "lw": 1.1, "zorder": 1.5}

STYLE = {
    "figure.figsize": (5.2, 3.4),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.05,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.06,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanospin",  # the same figure gives the same file
    "path.simplify_threshold": 0.5,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "patch.linewidth": 0,
    "errorbar.capsize": 2,
    "image.cmap": "viridis",
}


def style():
    """The project's figure style, as a context: `with style(): fig, ax = plt.subplots()`."""
    return plt.rc_context(STYLE)


def sequential_colors(n: int, cmap: str = "viridis") -> list[tuple]:
    """n colours for an ordered quantity, dark to light, without the palest end of the map."""
    return [plt.get_cmap(cmap)(x) for x in np.linspace(0.0, 0.85, n)]


def reference_line(ax, y: float, label: str):
    """A dashed horizontal line for chance or a baseline; `label` goes into the legend."""
    return ax.axhline(y, color=GREY, label=label, **DASHED)


def figure_legend(fig, axes=None, ncols=None):
    """One legend below all panels, each label once, so that no legend covers data."""
    entries = {}
    for ax in fig.axes if axes is None else axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    return fig.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=ncols or min(len(entries), 5),
    )


def save_figure(fig, path: str):
    """Write the figure as PNG (200 dpi) and as SVG beside it, and close it.

    path: with or without the ending .png or .svg.
    """
    stem, ending = os.path.splitext(path)
    if ending not in (".png", ".svg"):
        stem = path
    with style():
        with atomic_write(stem + ".png", "wb") as f:
            fig.savefig(f, format="png")
        with atomic_write(stem + ".svg", "wb") as f:
            fig.savefig(f, format="svg", metadata={"Date": None})
    plt.close(fig)
    print(stem + ".png")


def panel_legend(ax, extra=(), ncols=1):
    """The legend of one panel, below its x axis. extra: handles beside those of the panel."""
    handles = [*ax.get_legend_handles_labels()[0], *extra]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=ncols)


# ---------------------------------------------------------------------------------- reading runs


def read_metrics(run: str, kind: str | None = None) -> list[dict]:
    """The records of a run's metrics.jsonl, all of them or those of one kind."""
    path = os.path.join(run, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            # a kill can cut the last line short
            records = [json.loads(line) for line in f if line.endswith("\n")]
        return [r for r in records if kind in (None, r["kind"])]
    except OSError as e:
        raise SystemExit(printable(f"{path}: {e.strerror}; train this run first"))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SystemExit(printable(f"{path}: not the metrics of a run ({e!r})"))


def global_steps(records: list[dict]) -> list[int]:
    """Steps since the start of the run, over all its rounds; in a record they count per round."""
    start = round_starts([records])
    return [start[r["round"]] + r["step"] for r in records]


def round_starts(by_seed: list[list[dict]]) -> dict[int, int]:
    """{round: the step at which it begins}. Of several seeds the longest counts: where a scorer
    ranks, rounds differ in length, and a step is compared with the same step of the round."""
    lengths = [round_lengths(records) for records in by_seed]
    start, total = {}, 0
    for round_id in sorted(set().union(*lengths)):
        start[round_id] = total
        total += max(length.get(round_id, 0) for length in lengths)
    return start


def round_lengths(records: list[dict]) -> dict[int, int]:
    """{round: its steps}. The record of step n is written after it, so the last of a round that
    does not end in an evaluation is one less."""
    length = {}
    for r in records:
        done = r["step"] + (r["kind"] == "step")
        length[r["round"]] = max(length.get(r["round"], 0), done)
    return length


def minutes(run: str, last_round: int | None = None, last_step: float = np.inf) -> float:
    """Wall-clock minutes of a run, or of it up to and with a round, or a step of that round."""
    records = read_metrics(run)
    if last_round is not None:
        last = (last_round, last_step)
        records = [r for r in records if (r["round"], r["step"]) <= last]
    return sum(r["seconds"] for r in records) / 60


def eval_curve(run: str, metric: str) -> tuple[list, list]:
    """(steps, values) of one metric over the evaluations of a run."""
    # a round can have no evaluation
    records = [r for r in read_metrics(run) if r["kind"] in ("step", "eval")]
    points = {}
    for x, r in zip(global_steps(records), records):
        if r["kind"] == "eval":
            if metric not in r:
                raise SystemExit(f"{run}: an evaluation has no {metric}; it has {', '.join(r)}")
            points[x] = r[metric]
    return list(points), list(points.values())


# --------------------------------------------------------------------------------------- figures


def draw_seeds(ax, curves: list[tuple], color, label: str | None):
    """One thin line per seed and their mean as a thick one. curves: [(x, y)], one for each seed.

    The mean is taken where all seeds have a value.
    """
    if len(curves) > 1:
        for x, y in curves:
            ax.plot(x, y, color=color, lw=0.8, alpha=0.45)
    by_seed = [dict(zip(x, y)) for x, y in curves]
    shared_steps = set.intersection(*map(set, by_seed))
    steps = sorted(shared_steps)
    mean = []
    for step in steps:
        mean.append(np.mean([points[step] for points in by_seed]))
    ax.plot(steps, mean, "o-", color=color, label=label)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def seed_handles(n):
    """Legend entries that say what thick and thin lines are; none if there is one seed."""
    if n < 2:
        return []
    return [
        Line2D([], [], color=GREY, marker="o", label=f"mean of {n} seeds"),
        Line2D([], [], color=GREY, lw=0.8, alpha=0.6, label="one seed"),
    ]


def plot_loss(out: str, named: dict[str, list[str]]):
    """Validation loss of several settings. named: {label: [the run of each seed]}."""
    for runs in named.values():
        check_same_settings(runs)
    with style():
        fig, ax = plt.subplots(figsize=(5.6, 3.8))
        for color, (label, runs) in zip(cycle(PALETTE), named.items()):
            draw_seeds(ax, [eval_curve(run, "val_loss") for run in runs], color, label)
        ax.set(xlabel="step", ylabel="validation loss (nats per token)")
        panel_legend(ax, seed_handles(max(map(len, named.values()))), ncols=3)
        save_figure(fig, out)


def plot_stages(out: str, demos: list[str]):
    """Validation loss of the demo: pretraining, SFT, and the change after SFT.

    demos: the demo folders, one per seed. Seeds differ more than methods do, so the last panel
    shows each run's difference from the SFT checkpoint that it started from.
    """
    with style():
        fig, axes = plt.subplots(1, 3, figsize=(10, 3.7), width_ratios=[1, 1, 1.15])
        for ax, title, stage in zip(axes, ("Pretraining", "SFT"), ("pretrain", "sft")):
            for color, model, ending in zip(PALETTE, ("student", "teacher"), ("", "_teacher")):
                runs = [os.path.join(demo, stage + ending) for demo in demos]
                draw_seeds(ax, [eval_curve(run, "val_loss") for run in runs], color, model)
            ax.set(title=title, xlabel="step", ylabel="validation loss (nats per token)")
        panel_legend(axes[0])
        panel_legend(axes[1], seed_handles(len(demos)))

        ax = axes[2]
        reference_line(ax, 0, "student after SFT")
        names = {
            "sft_more": "SFT continued",
            "spin_k2": "self-play, K = 2",
            "spin_k3": "self-play, K = 3 (with teacher)",
        }
        for color, (stage, label) in zip(("#000000", *PALETTE[2:]), names.items()):
            curves = []
            for demo in demos:
                x, y = eval_curve(os.path.join(demo, stage), "val_loss")
                curves.append((x, np.array(y) - y[0]))
            draw_seeds(ax, curves, color, label)
        ax.set(title="After SFT, paired by seed", xlabel="step after SFT")
        ax.set_ylabel("change of validation loss\n(nats per token)")
        panel_legend(ax)
        save_figure(fig, out)


def plot_rounds(out: str, runs: list[str]):
    """Rewards, log-probabilities and ranking accuracy on held-out rows. runs: one per seed.

    Each round has its own reference model and its own samples, so curves break between rounds.
    """
    check_same_settings(runs)
    by_seed = [read_metrics(run, "eval") for run in runs]
    players = rewarded_players(runs[0], by_seed[0])
    for run, records in zip(runs, by_seed):
        if rewarded_players(run, records) != players:
            raise SystemExit(printable(f"{run} has other players than {runs[0]}"))
    colors = dict(zip(players, cycle(PALETTE[3:]))) | PLAYER_COLORS
    with style():
        fig, axes = plt.subplots(1, 3, figsize=(10, 3.9))
        for player in players:
            draw_rounds(axes[0], by_seed, f"reward/{player}", colors[player], player)
            draw_rounds(axes[1], by_seed, f"logp/{player}", colors[player], player)
        reference_line(axes[0], 0, "reference model of the round")
        reward = r"$\beta\,(\log \pi_\theta - \log \pi_{\mathrm{ref}})$ (nats)"
        axes[0].set(title="Implicit reward", ylabel=reward)
        axes[1].set(title="Log-probability of responses", ylabel="nats per response")
        columns = columns_of_run(runs[0])
        if not set(players) <= set(columns):
            columns = players  # places, "1", "2" ...: the data ranks its own responses
        is_scored = any("score_best" in r for r in read_metrics(runs[0], "collect"))
        draw_accuracy(axes[2], by_seed, [] if is_scored else columns, players, colors)
        if players == ["data", "self"] and not is_scored:
            draw_length_baseline(axes[2], runs)
        for ax in axes:
            mark_rounds(ax, by_seed)
            ax.set_xlabel("step")
        panel_legend(axes[0])
        panel_legend(axes[1], seed_handles(len(runs)))
        panel_legend(axes[2])
        save_figure(fig, out)


def rewarded_players(run: str, records: list[dict]) -> list[str]:
    """The players of a run: of the evaluation that has most of them, since one whose samples all
    equal the data's response is missing. Exits with one line if there are none."""
    players = []
    for record in records:
        found = [key.removeprefix("reward/") for key in record if key.startswith("reward/")]
        players = max(players, found, key=len)
    if not players:
        raise SystemExit(printable(f"{run}: no evaluation of ranked responses in its metrics"))
    return players


def draw_rounds(ax, by_seed, metric, color, label, after=-1):
    """One metric over the evaluations, a piece per round; steps up to `after` are left out. A round
    that a seed lacks has thin lines only."""
    for round_id, start in round_starts(by_seed).items():
        curves = []
        for records in by_seed:
            points = {}
            for r in records:
                if r["round"] == round_id and r["step"] > after and metric in r:
                    points[start + r["step"]] = r[metric]
            curves.append((list(points), list(points.values())))
        if all(x for x, _ in curves):
            draw_seeds(ax, curves, color, label)
            label = None  # one legend entry for all rounds
            continue
        for x, y in curves:
            ax.plot(x, y, color=color, lw=0.8, alpha=0.45)


def columns_of_run(run: str) -> list[str]:
    """The player of each response of a run's rows; [] if there is no config.json."""
    path = os.path.join(run, "config.json")
    if not os.path.exists(path):
        return []
    settings = read_json(path, ["config"])["config"]
    return player_columns(Config(players=settings["players"]))


def draw_accuracy(ax, by_seed, columns, players, colors):
    """Ranking accuracy with its chance levels. players: the best first. columns: the player of each
    response, the best first; none if a scorer ranks, which has no order of players.

    Step 0 is left out: all rewards are equal there, so nothing is ranked yet.
    """
    ax.axhline(1 / 2, color="#000000", **DASHED)
    if not columns:
        chance = "chance (1/2, all pairs)"
        draw_rounds(ax, by_seed, "acc", "#000000", "all pairs", after=0)
        for player in players:
            label = f"{player} above all worse"
            draw_rounds(ax, by_seed, f"acc/{player}", colors[player], label, after=0)
    elif len(players) == 2:
        label, chance = " above ".join(players), "chance (1/2)"
        draw_rounds(ax, by_seed, "acc", "#000000", label, after=0)
    else:
        chance = "chance (1/2"
        draw_rounds(ax, by_seed, "acc", "#000000", "all pairs", after=0)
        has_earlier = any(player.startswith("self-") for player in players)
        for k, player in enumerate(players[:-1]):
            label = f"{player} above {' and '.join(players[k + 1 :])}"
            draw_rounds(ax, by_seed, f"acc/{player}", colors[player], label, after=0)
            n = len(columns) - columns.index(player)
            if n > 2 and not has_earlier:  # those are absent in the first rounds
                ax.axhline(1 / n, color=colors[player], **DASHED)
                chance += f"; {player}: 1/{n}"
        chance += ")"
    ax.plot([], [], color=GREY, label=chance, **DASHED)
    ax.set(title="Ranking accuracy", ylabel="share ranked correctly, held out")


def draw_length_baseline(ax, runs):
    """How well the length of a response alone tells data from self, in each round."""
    spans, by_round = round_spans([read_metrics(run, "eval") for run in runs]), {}
    for run in runs:
        for r in read_metrics(run, "collect"):
            if "length_acc/self" in r:  # not where all samples equal the data's response
                by_round.setdefault(r["round"], []).append(r["length_acc/self"])
    label = "length alone" + (", mean of seeds" if len(runs) > 1 else "")
    for round_id, (first, last) in spans.items():
        values = by_round.get(round_id, [])
        y = np.mean(values) if len(values) == len(runs) else np.nan
        ax.plot([first, last], [y, y], color=PALETTE[3], ls=":", label=label)
        label = None


def round_spans(by_seed):
    """{round: (first, last global step)} of the evaluations of several seeds."""
    spans = {}
    start = round_starts(by_seed)
    for records in by_seed:
        for r in records:
            x = start[r["round"]] + r["step"]
            first, last = spans.get(r["round"], (x, x))
            spans[r["round"]] = (min(first, x), max(last, x))
    return dict(sorted(spans.items()))


def mark_rounds(ax, by_seed):
    """A vertical line where a round starts, and the round's number above the panel."""
    spans = round_spans(by_seed)
    end = max(last for _, last in spans.values())
    ax.set_xlim(-0.03 * end, 1.03 * end)
    ax.set_title(ax.get_title(loc="left"), pad=16)
    for round_id, (first, last) in spans.items():
        if round_id:
            ax.axvline(first, color=GREY, lw=0.8, zorder=1.2)
        if len(spans) > 1:
            above = ax.get_xaxis_transform()  # x in data, y in shares of the panel
            where = ((first + last) / 2, 1.02)
            ax.text(*where, f"round {round_id}", transform=above, ha="center", color=GREY, size=8)


# ----------------------------------------------------------------------------- the demo's report


@dataclass
class Column:
    """A column of a table: the metric's key, its title, its format, and a factor for percent."""

    key: str
    title: str
    form: str
    scale: float = 1

    def cell(self, records):
        return format_mean([r.get(self.key) for r in records], self.form, self.scale)


STAGE_COLUMNS = [
    Column("val_loss", "validation loss", "{:.4f}"),
    Column("acc", "ranking accuracy", "{:.1f} %", 100),
    Column("win_rate", "win rate against sft", "{:.1f} %", 100),
    Column("f1", "F1 against the data", "{:.1f} %", 100),
    Column("length", "mean length (tokens)", "{:.1f}"),
    Column("ended", "ended with end-of-text", "{:.1f} %", 100),
    Column("minutes", "training time (minutes)", "{:.1f}"),
]

COLLECT_COLUMNS = [
    Column("length/data", "length: data", "{:.1f}"),
    Column("length/teacher", "length: teacher", "{:.1f}"),
    Column("length/self", "length: self", "{:.1f}"),
    Column("ended/self", "self ended with end-of-text", "{:.1f} %", 100),
    Column("tie/self", "self equal to a better response", "{:.1f} %", 100),
    Column("length_acc/self", "data and self told apart by length alone", "{:.1f} %", 100),
]


def format_mean(values: list, form: str, scale: float = 1) -> str:
    """Mean over seeds, with ± standard deviation if there are several; "-" for no value."""
    values = [v * scale for v in values if v is not None]
    if not values:
        return "-"
    text = form.format(np.mean(values))
    if len(values) == 1:
        return text
    spread = np.std(values, ddof=1)
    return text + (f" ± {spread:.2g}" if spread < 100 else f" ± {spread:.0f}")


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def demo_metrics(demo: str) -> dict[str, dict]:
    """{row: metrics} of one seed: eval/eval.json, with accuracy and time from the runs' logs."""
    path = os.path.join(demo, "eval", "eval.json")
    table = read_json(path, advice="; `make demo-text` writes this file")
    for name, metrics in table.items():
        stage, _, rest = name.partition(".")  # spin_k2.round_1
        run = os.path.join(demo, stage)
        if not os.path.isdir(run):  # sft@0.7: the same run at another temperature
            continue
        round_id = int(rest.removeprefix("round_")) if rest else None
        metrics["minutes"] = minutes(run, round_id)
        if rest:
            evals = [r for r in read_metrics(run, "eval") if r["round"] == round_id]
            metrics["acc"] = evals[-1]["acc"]
    return table


def collect_table(demos: list[str]) -> list[str]:
    """A table of what each round sampled on the held-out prompts."""
    rows = []
    for stage in ("spin_k2", "spin_k3"):
        by_seed = [read_metrics(os.path.join(demo, stage), "collect") for demo in demos]
        for records in zip(*by_seed):
            name = f"{stage}.round_{records[0]['round']}"
            rows.append([name, *(column.cell(records) for column in COLLECT_COLUMNS)])
    return markdown_table(["round", *(column.title for column in COLLECT_COLUMNS)], rows)


def t_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of Student's 95 % interval of the mean) of two or more values."""
    degrees = len(values) - 1
    quantiles = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 %
    quantile = quantiles[min(degrees, len(quantiles)) - 1]  # for more, a little too wide
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / np.sqrt(len(values))


def compare(sentence, differences, form, better, standard_error=None):
    """(outcome, one line of Markdown): what the paired differences of the seeds show.

    sentence: with %s for the outcome. better: +1 if larger is better, else -1.
    Several seeds give Student's interval. One seed has the sampling error of the held-out prompts
    only, if known: it says nothing about another training run.
    """
    interval = ""
    if len(differences) > 1:
        mean, error = t_interval(differences)
        interval = f"95 % interval over {len(differences)} seeds"
    else:
        mean, error = float(differences[0]), 0.0
        if standard_error is not None:
            error = 1.96 * standard_error
            interval = "one training run, 95 % interval over the prompts"
    if abs(mean) <= error:
        outcome = "not distinguishable from"
    else:
        outcome = "better than" if mean * better > 0 else "worse than"
    if not interval:
        outcome, detail = f"in this run {outcome}", "one training run, no interval"
    else:
        low, high = (form.format(x).split()[0] for x in (mean - error, mean + error))
        detail = f"{interval}: {low} to {high}"
    return outcome, f"- {sentence % f'**{outcome}**'}: {form.format(mean)} ({detail})."


def comparisons(tables: list[dict]) -> list[tuple[str, str]]:
    """[(outcome, line)]: the last round of self-play against its baselines. tables: one a seed."""
    found = []
    for spin in ("spin_k2", "spin_k3"):
        rounds = [name for name in tables[0] if name.startswith(f"{spin}.round_")]
        last = max(rounds, key=lambda name: int(name.rpartition("_")[2]))
        for other in ("sft", "sft_more", "sft@1.0", "sft@0.7", "sft@0.5"):
            if other not in tables[0]:
                continue
            differences, errors = [], []
            for table in tables:
                ours = table[last]
                theirs = {"win_rate": 0.5, "win_rate_se": 0.0} | table[other]  # sft against itself
                differences.append(100 * (ours["win_rate"] - theirs["win_rate"]))
                errors.append(100 * np.hypot(ours["win_rate_se"], theirs["win_rate_se"]))
            sentence = f"{last} is %s {other} in win rate"
            found.append(compare(sentence, differences, "{:+.1f} points", +1, errors[0]))
        for other in ("sft", "sft_more"):
            differences = [table[last]["val_loss"] - table[other]["val_loss"] for table in tables]
            sentence = f"{last} is %s {other} in validation loss"
            found.append(compare(sentence, differences, "{:+.4f} nats per token", -1))
    return found


def summary(outcomes: list[str]) -> str:
    """The result in one sentence, from the comparisons that have an interval."""
    tested = [outcome for outcome in outcomes if not outcome.startswith("in this run")]
    better, worse = tested.count("better than"), tested.count("worse than")
    return (
        f"Of {len(tested)} comparisons with its baselines, self-play is better in {better}, "
        f"worse in {worse}, and not distinguishable in {len(tested) - better - worse}."
    )


REPORT_HEAD = "# Self-play on the documentation of installed packages"

DEFINITIONS = """\
- Rows: `data` is the response in the data set. `sft_more` continues SFT on the same rows for as
  many steps as both rounds of self-play took. `sft@0.7` and `sft@0.5` are samples of `sft` at a
  lower temperature, `sft@1.0` with another random seed. All other rows sample at temperature 1.0.
- Validation loss: cross-entropy on held-out responses, in nats per token.
- Ranking accuracy: share of held-out pairs that the implicit rewards of the round rank correctly.
- Win rate: share of prompts on which the judge gives the response a higher mean log-probability
  per token than the sample of `sft`.

**The judge is the fine-tuned teacher.** K = 3 was trained on the judge's own samples, and such a
judge prefers sharper samples: compare with `sft@0.7` and `sft@0.5`, which need no training. Win
rate alone is no evidence for self-play."""


ONLINE = """\
- `online_pl` ranks its own samples by how concrete their words are (data/pydocs/scorer.py), and
  never sees the data's responses."""


def report(demos: list[str]):
    """Write report.md and its figures into the demo's folder, or beside the folders of seeds."""
    tables = [demo_metrics(demo) for demo in demos]
    for name in os.listdir(demos[0]):
        check_same_settings([os.path.join(demo, name) for demo in demos])
    folder = demos[0] if len(demos) == 1 else os.path.dirname(os.path.normpath(demos[0]))
    path = os.path.join(folder, "report.md")
    check_report(path, REPORT_HEAD)
    plot_stages(os.path.join(folder, "stages.png"), demos)
    starts = []
    for stage in ("spin_k2", "spin_k3"):
        runs = [os.path.join(demo, stage) for demo in demos]
        plot_rounds(os.path.join(folder, f"{stage}.png"), runs)
        for run in runs:
            starts += read_metrics(run, "start")
    setups = {}  # each once, in the order of the seeds
    for demo in demos:
        setup = read_json(os.path.join(demo, "spin_k3", "config.json"), ["starts"])["starts"][0]
        threads = f"{setup['threads']} thread" + ("s" if setup["threads"] != 1 else "")
        text = f"torch {setup['torch']} on {setup['device']}, {threads}, commit {setup['git']}"
        setups[text] = demo
    several = len(demos) > 1

    rows = []
    for name in tables[0]:
        metrics = [table[name] for table in tables]
        rows.append([name, *(column.cell(metrics) for column in STAGE_COLUMNS)])
    stages = markdown_table(["stage", *(column.title for column in STAGE_COLUMNS)], rows)
    found = comparisons(tables)
    lines = [line for _, line in found]
    text = [
        REPORT_HEAD,
        "",
        summary([outcome for outcome, _ in found]),
        "",
        *stages,
        "",
        f"Values are mean ± standard deviation over {len(demos)} seeds."
        if several
        else "One seed.",
        f"Made by `make {'demo-seeds' if several else 'demo-text'}` with {'; '.join(setups)}.",
        "",
        DEFINITIONS,
        *([ONLINE] if "online_pl.round_1" in tables[0] else []),
        "",
        "## Self-play against its baselines",
        "",
        *lines,
        "",
        "Differences are paired by seed. The intervals are not corrected for multiple comparisons.",
        "",
        "![Validation loss](stages.png)",
        "",
        "## The rounds",
        "",
        "What each round sampled on the held-out prompts:",
        "",
        *collect_table(demos),
        "",
        f"All {len(starts)} rounds started at the loss of equal scores (ln 2 for K = 2, ln 6 for "
        "K = 3, less what absent responses take, plus the `nll_coef` term). The largest difference "
        f"was {max(r['off'] for r in starts):.1e}.",
        "",
        "K = 2 (data, self):",
        "",
        "![Rounds of K = 2](spin_k2.png)",
        "",
        "K = 3 (data, teacher, self):",
        "",
        "![Rounds of K = 3](spin_k3.png)",
        "",
    ]
    with atomic_write(path) as f:
        f.write("\n".join(text))
    print("\n".join([*stages, "", *lines, path]))


# ------------------------------------------------------------------------------ a table of runs


HEADLINE_METRICS = {  # of each stage; val_loss for the others
    "reward": ["acc", "pair_nll"],
    "preference": ["acc", "rank_nll", "val_loss"],
    "spin": ["acc", "rank_nll", "val_loss"],
    "ppo": ["reward", "kl", "length", "ended", "pretrain_loss"],
}


TABLE_HEAD = "# Held-out metrics at the first and the last evaluation of each run"


def table(out: str, runs: list[str]):
    """Write OUT/report.md, the first and last evaluation of each run, and copy the runs' logs."""
    report_path = os.path.join(out, "report.md")
    check_report(report_path, TABLE_HEAD)
    for run, name in zip(runs, run_names(runs)):
        check_log(os.path.join(out, name, "metrics.jsonl"), os.path.join(run, "metrics.jsonl"))
    lines = [
        "| run | stage | steps | minutes | metric | first | last | standard error |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for run, name in zip(runs, run_names(runs)):
        evals = read_metrics(run, "eval")
        if not evals:
            raise SystemExit(printable(f"{run}: no evaluation yet; train this run first"))
        stage = read_json(os.path.join(run, "config.json"), ["config"])["config"]["stage"]
        cells = [name, stage, str(len(read_metrics(run, "step"))), f"{minutes(run):.1f}"]
        first, last = evals[0], evals[-1]
        for metric in HEADLINE_METRICS.get(stage, ["val_loss"]):
            if metric not in first and metric not in last:
                continue
            cells.append(metric)
            for value in (first.get(metric), last.get(metric), last.get(metric + "_se")):
                cells.append("" if value is None else f"{value:.4f}")
            lines.append("| " + " | ".join(cells) + " |")
            cells = [""] * 4  # the run is named once
        os.makedirs(os.path.join(out, name), exist_ok=True)
        copy = os.path.join(out, name, "metrics.jsonl")
        check_output(copy, [os.path.join(run, "metrics.jsonl")])
        shutil.copy(os.path.join(run, "metrics.jsonl"), copy)
    with atomic_write(report_path) as f:
        f.write("\n".join([TABLE_HEAD, "", *lines, ""]))
    print("\n".join(lines))


def check_log(copy: str, log: str):
    """Exit with one line if a copy of a run's log would replace a file that is not its beginning:
    another run's log, or a file of the user."""
    if os.path.exists(copy) and not read_text(log).startswith(read_text(copy)):
        raise SystemExit(printable(f"{copy} is not an earlier copy of {log}: move it away"))


def check_report(path: str, head: str):
    """Exit with one line if a report would replace a file that does not begin with its head."""
    if os.path.exists(path) and not read_text(path).startswith(head):
        raise SystemExit(printable(f"{path} is not a report of this command: move it away"))


def run_names(runs: list[str]) -> list[str]:
    """What a table calls runs: their folders' names, or where two are alike, their paths from the
    folder that all are in. Exits with one line if a run is given twice."""
    paths = [os.path.abspath(run) for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise SystemExit(printable(f"{runs[i]} is given twice"))
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    return names


def different_names(named: list[tuple]) -> dict[str, list[str]]:
    """{name: runs} of `named_runs`. Exits with one line if a name is given twice."""
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise SystemExit(
                f"{name} is given twice; several seeds of one setting are {name}=RUN,RUN"
            )
    return dict(named)


def named_runs(text: str) -> tuple[str, list[str]]:
    """("T_0", ["out/a_1", "out/a_2"]) of "T_0=out/a_1,out/a_2"."""
    name, equals, runs = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=RUN or NAME=RUN,RUN,...")
    return printable(name), runs.split(",")


def main(argv: list[str] | None = None):
    parser = cli.ArgumentParser(prog="python -m tools.plot", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="validation loss of several settings")
    loss.add_argument("out", help="the figure, OUT.png; OUT.svg is written beside it")
    loss.add_argument("runs", nargs="+", type=named_runs, metavar="NAME=RUN,RUN", help="seeds")
    rounds = commands.add_parser("rounds", help="rewards, log-probabilities and accuracy by round")
    rounds.add_argument("out", help="the figure, OUT.png; OUT.svg is written beside it")
    rounds.add_argument("runs", nargs="+", metavar="RUN", help="a self-play run, one per seed")
    demo = commands.add_parser("report", help="report.md and figures of the demo")
    demo.add_argument("demos", nargs="+", metavar="DEMO", help="the demo's folder, one per seed")
    runs = commands.add_parser("table", help="report.md of the first and last evaluation of runs")
    runs.add_argument("out", help="folder of the report and of the copied logs")
    runs.add_argument("runs", nargs="+", metavar="RUN", help="the out_dir of a run")
    args = parser.parse_args(argv)
    if args.command in ("loss", "rounds"):
        stem = args.out.removesuffix(".png").removesuffix(".svg")
        for ending in (".png", ".svg"):
            require_regular(stem + ending)
    if args.command == "loss":
        plot_loss(args.out, different_names(args.runs))
    elif args.command == "rounds":
        plot_rounds(args.out, args.runs)
    elif args.command == "table":
        table(args.out, args.runs)
    else:  # "out/demo_seeds/*" has files beside the folders
        report([demo for demo in args.demos if os.path.isdir(demo)] or args.demos)


if __name__ == "__main__":
    sys.exit(cli.run(main))
