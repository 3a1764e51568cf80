"""Tables and figures of the T_n study, from the logs of its runs.

    python -m studies.taylor.analysis                          # the runs in studies/taylor/logs
    python -m studies.taylor.analysis out/tn studies/taylor    # new runs

A run's folder is RUNS/SETTING/SPLIT/METHOD/SEED. METHOD is T_0, T_0.5, ... or the name of a
baseline. Writes OUT/report.md, OUT/figures (PNG and SVG) and OUT/logs, the runs' evaluations.

All losses are plain cross-entropy on validation texts, whatever the training loss was. The
validation rows are in two halves: the step of early stopping and the temperature are chosen on one
half and measured on the other. `studies/taylor/calibration.py` describes the metrics.
"""

import glob
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass

import numpy as np

from data import cli
from data.files import atomic_write, printable
from nanospin import same_run
from tools.plot import (
    GREY,
    PALETTE,
    check_report,
    figure_legend,
    format_mean,
    markdown_table,
    plt,
    read_metrics,
    reference_line,
    save_figure,
    sequential_colors,
    style,
    t_interval,
)

HERE = os.path.dirname(os.path.abspath(__file__))

# nats by which the curves of the write-up's figure must rise or differ to count
CLEAR_DIFFERENCE = 0.005

SETTINGS = {
    ("later", "row"): "write-up's setting, split by row",
    ("later", "group"): "write-up's setting, split by post",
    ("clean", "group"): "GPT-2 block, split by post",
}
LOSS_LABEL = "validation loss (nats per token)"

# the write-up's size on a CPU, one seed; its runs may be unfinished
ORIGINAL = "original"
STEPS_PER_EPOCH = 400

# readings of the write-up's curves, later version, width 64, split by row: (epoch, loss).
# The epoch of T_2's minimum is not known. The ends are smoothed with 0.99, the minima are raw.
PUBLISHED_MINIMUM = {"T_0": (22, 0.34), "T_2": (None, 0.33)}
PUBLISHED_END = {"T_0": (100, 0.55), "T_2": (100, 0.35)}
PUBLISHED_CROSSING = 41  # epoch from which T_0 is above T_2


# --------------------------------------------------------------------------------- reading the runs


def run_folders(folder: str) -> list[str]:
    """Every RUNS/SETTING/SPLIT/METHOD/SEED that has metrics."""
    pattern = os.path.join(glob.escape(folder), "*", "*", "*", "*", "metrics.jsonl")
    return [os.path.dirname(path) for path in sorted(glob.glob(pattern))]


def read_study(folder: str) -> dict:
    """{(setting, split): {method: {seed: evaluations}}}; T_n by n, then the baselines by name.

    Exits if a setting lacks T_0, or if its runs do not have the same seeds and the same steps,
    which those of the original size need not have.
    """
    study = {}
    for run in run_folders(folder):
        setting, split, method, seed = os.path.relpath(run, folder).split(os.sep)
        methods = study.setdefault((setting, split), {})
        methods.setdefault(method, {})[seed] = read_metrics(run, "eval")
    if not study:
        raise SystemExit(
            f"{folder}: no runs SETTING/SPLIT/METHOD/SEED; `make figures-tn` trains them"
        )

    for (setting, split), methods in study.items():
        steps, seeds = set(), set()
        for method, runs in methods.items():
            same_run.check_same_settings(
                [f"{folder}/{setting}/{split}/{method}/{seed}" for seed in runs]
            )
            seeds.add(tuple(runs))
            for evals in runs.values():
                steps.add(tuple(record["step"] for record in evals))
        unequal = setting != ORIGINAL and (len(steps) > 1 or len(seeds) > 1)
        if "T_0" not in methods or unequal:
            raise SystemExit(
                f"{folder}/{setting}/{split}: a run is missing or unfinished; "
                "repeat the command that trains them"
            )
    return {key: dict(sorted(study[key].items(), key=method_order)) for key in sorted(study)}


def method_order(item):
    """Sort key of (method, runs): T_n by n, then the others by name."""
    method, _ = item
    return (0, float(method[2:])) if method.startswith("T_") else (1, method)


def taylor_methods(methods: dict) -> dict:
    return {method: runs for method, runs in methods.items() if method.startswith("T_")}


def first_run(methods: dict) -> list[dict]:
    """The evaluations of T_0's first seed."""
    return next(iter(methods["T_0"].values()))


def evaluations_of(run: str) -> str:
    """The evaluations of a run, as its copy has them."""
    return "".join(json.dumps(record) + "\n" for record in read_metrics(run, "eval"))


def check_logs(folder: str, out: str):
    """Exit with one line if `out` has a run that `folder` lacks, or another run of a name: then the
    logs would not be those of the report."""
    for copy in run_folders(out):
        run = os.path.join(folder, os.path.relpath(copy, out))
        is_earlier = os.path.isdir(run) and evaluations_of(run).startswith(evaluations_of(copy))
        if not is_earlier:
            raise SystemExit(printable(f"{copy} is not an earlier copy of {run}: move it away"))


def copy_logs(folder: str, out: str):
    """Copy the config and the evaluations of every run: enough to repeat the report."""
    for run in run_folders(folder):
        target = os.path.join(out, os.path.relpath(run, folder))
        if os.path.abspath(target) == os.path.abspath(run):
            continue
        os.makedirs(target, exist_ok=True)
        shutil.copy(os.path.join(run, "config.json"), target)
        with atomic_write(os.path.join(target, "metrics.jsonl")) as f:
            f.write(evaluations_of(run))


def data_sources(folder: str) -> list[str]:
    """What the runs' data was made of, from each config.json."""
    found = set()
    for run in run_folders(folder):
        with open(os.path.join(run, "config.json"), encoding="utf-8") as f:
            source = json.load(f)["config"].get("data_source")
        if isinstance(source, dict):
            packages = ", ".join(f"{name} {version}" for name, version in source.items())
            found.add(f"the documentation of {packages}")
        elif source:
            found.add(str(source))
    return sorted(found, key=lambda text: (text.startswith("the documentation"), text))


# --------------------------------------------------------------------------------- what is measured


def early_stops(evals: list[dict], temperature: bool) -> list[dict]:
    """The evaluations with the lowest loss on half 0 and on half 1 of the validation rows.

    temperature: compare losses at each half's own fitted temperature.
    """
    name = "fitted_loss" if temperature else "loss"
    return [min(evals, key=lambda record: record[f"{name}/{half}"]) for half in (0, 1)]


def measured_at(evals, early_stop, temperature):
    """The two evaluations at which the halves 0 and 1 stop."""
    return early_stops(evals, temperature) if early_stop else [evals[-1], evals[-1]]


@dataclass(frozen=True)
class Measure:
    """One number of a run: a metric at the last step or at early stopping.

    temperature: after dividing the logits by one fitted temperature.
    """

    metric: str  # loss | acc | ece | step | temperature
    title: str
    form: str
    early_stop: bool = False
    temperature: bool = False
    scale: float = 1.0

    def __call__(self, evals: list[dict]) -> float:
        stops = measured_at(evals, self.early_stop, self.temperature)
        if self.metric == "loss":
            return self.held_out_loss(stops)
        if self.metric == "temperature":
            return float(np.mean([evals[-1]["temperature/0"], evals[-1]["temperature/1"]]))
        name = "ece_t" if self.metric == "ece" and self.temperature else self.metric
        return self.scale * float(np.mean([record[name] for record in stops]))

    def held_out_loss(self, stops) -> float:
        """Mean loss per token; each half is measured at the other half's stop and temperature."""
        name = "loss_t" if self.temperature else "loss"
        losses = [record[f"{name}/{1 - half}"] for half, record in enumerate(stops)]
        tokens = [record[f"tokens/{1 - half}"] for half, record in enumerate(stops)]
        return float(np.average(losses, weights=tokens))


def measures_of(metric, label, form, scale=1.0):
    """A metric at the last step and stopped early, then both with one fitted temperature."""
    return [
        Measure(metric, f"{label}last step", form, scale=scale),
        Measure(metric, f"{label}early stopping", form, early_stop=True, scale=scale),
        Measure(metric, f"{label}last step, temperature", form, temperature=True, scale=scale),
        Measure(
            metric,
            f"{label}early stopping, temperature",
            form,
            early_stop=True,
            temperature=True,
            scale=scale,
        ),
    ]


LOSSES = measures_of("loss", "loss, ", "{:.4f}")
ACCURACY = measures_of("acc", "accuracy %, ", "{:.2f}", 100)[:2]  # a temperature does not change it
ECE = measures_of("ece", "ECE %, ", "{:.2f}", 100)
MEASURES = [*LOSSES, *ACCURACY, *ECE]
DETAILS = [
    Measure("step", "step of early stopping", "{:.0f}", early_stop=True),
    Measure("temperature", "temperature, last step", "{:.2f}"),
]


def paired_differences(runs: dict, baseline: dict, value) -> list[float]:
    """value(evaluations) minus that of the baseline's run of the same seed, for every seed."""
    return [value(runs[seed]) - value(baseline[seed]) for seed in baseline]


def confidence_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t); NaN for a single value."""
    return t_interval(values) if len(values) > 1 else (float(values[0]), math.nan)


def lowest(evals: list[dict]) -> dict:
    return min(evals, key=lambda record: record["val_loss"])


# ------------------------------------------------------------------------------------------- tables


def method_table(methods: dict) -> list[str]:
    """Every measure of every method: mean and standard deviation over seeds."""
    measures = MEASURES + DETAILS
    rows = []
    for method, runs in methods.items():
        cells = []
        for measure in measures:
            cells.append(format_mean([measure(evals) for evals in runs.values()], measure.form))
        rows.append([method, *cells])
    return markdown_table(["method", *(m.title for m in measures)], rows)


def difference_table(methods: dict) -> list[str]:
    """Paired differences from T_0 with their 95 % intervals; bold where the interval excludes 0."""
    rows = []
    for method, runs in methods.items():
        if method == "T_0":
            continue
        cells = []
        for measure in MEASURES:
            mean, error = confidence_interval(paired_differences(runs, methods["T_0"], measure))
            text = measure.form.replace(":", ":+").format(mean)
            if not math.isnan(error):
                text += f" ± {measure.form.format(error)}"
            cells.append(f"**{text}**" if abs(mean) > error else text)
        rows.append([method, *cells])
    return markdown_table(["minus T_0, same seed", *(m.title for m in MEASURES)], rows)


def self_play_table(methods: dict, round_id: int) -> list[str]:
    """Metrics at a round's last step; in parentheses the paired difference from T_0 ± 95 %."""
    last = {}
    for method, runs in methods.items():
        last[method] = {}
        for seed, evals in runs.items():
            of_round = [record for record in evals if record["round"] == round_id]
            last[method][seed] = of_round[-1]
    metrics = ["val_loss", "acc", "rank_nll", "kl_from_ref"]
    example = next(iter(last["T_0"].values()))
    metrics += [name for name in example if name.startswith("reward/")]

    rows = []
    for method, runs in last.items():
        cells = []
        for metric in metrics:
            scale = 100 if metric == "acc" else 1
            values = {seed: scale * record[metric] for seed, record in runs.items()}
            text = f"{np.mean(list(values.values())):.4f}"
            if method != "T_0" and len(values) > 1:
                differences = [
                    scale * (record[metric] - last["T_0"][seed][metric])
                    for seed, record in runs.items()
                ]
                mean, error = confidence_interval(differences)
                text += f" ({mean:+.4f} ± {error:.4f})"
            cells.append(text)
        rows.append([method, *cells])
    return markdown_table(
        ["method", *("acc %" if name == "acc" else name for name in metrics)], rows
    )


def pattern_table(study: dict) -> list[str]:
    """Where the write-up's pattern appears on the row split.

    The pattern: T_0 rises after its minimum, and T_2 < T_1 < T_0 at the last step.

    The last columns count the seeds in which the difference exceeds CLEAR_DIFFERENCE.
    """
    columns = ["setting, split by row", "steps", "T_0: minimum", "at step", "last"]
    columns += ["T_1: last", "T_2: last"]
    columns += ["T_0 rises", "T_1 < T_0", "T_2 < T_0", "T_2 < T_1", "seeds"]
    rows = []
    for (setting, split), methods in study.items():
        if split != "row" or not {"T_0", "T_1", "T_2"} <= set(methods):
            continue
        minima = [lowest(evals) for evals in methods["T_0"].values()]
        minimum = [record["val_loss"] for record in minima]
        last = {}
        for method in ("T_0", "T_1", "T_2"):
            last[method] = [evals[-1]["val_loss"] for evals in methods[method].values()]
        rows.append(
            [
                setting,
                str(first_run(methods)[-1]["step"]),
                format_mean(minimum, "{:.3f}"),
                format_mean([record["step"] for record in minima], "{:.0f}"),
                *(format_mean(values, "{:.3f}") for values in last.values()),
                count_below(minimum, last["T_0"]),
                count_below(last["T_1"], last["T_0"]),
                count_below(last["T_2"], last["T_0"]),
                count_below(last["T_2"], last["T_1"]),
                str(len(minima)),
            ]
        )
    return markdown_table(columns, rows)


def count_below(lower, upper) -> str:
    """In how many seeds the first is clearly below the second."""
    return str(sum(a + CLEAR_DIFFERENCE < b for a, b in zip(lower, upper, strict=True)))


def new_token_table(study: dict) -> list[str]:
    """The loss of seen and of new tokens with T_0 and T_2, at the last step of every row-split run.

    T_2 costs more than T_0 on each seen token and less on each new one. `break-even` is the share
    of new tokens at which both would have the same mean loss: with more of them T_2 ends lower.
    """
    columns = ["setting, split by row", "seed", "new tokens %", "seen: T_0", "T_2", "new: T_0"]
    columns += ["T_2", "break-even %", "all tokens, T_2 - T_0"]
    rows = []
    for (setting, split), methods in study.items():
        if split != "row" or setting == ORIGINAL or "T_2" not in methods:
            continue
        for seed, evals in methods["T_0"].items():
            zero, two = evals[-1], methods["T_2"][seed][-1]
            cost_on_seen = two["seen_loss"] - zero["seen_loss"]
            gain_on_new = zero["new_loss"] - two["new_loss"]
            numbers = [
                100 - 100 * zero["seen_share"],
                zero["seen_loss"],
                two["seen_loss"],
                zero["new_loss"],
                two["new_loss"],
                100 * cost_on_seen / (cost_on_seen + gain_on_new),
            ]
            cells = [f"{number:.2f}" for number in numbers]
            rows.append([setting, seed, *cells, f"{two['val_loss'] - zero['val_loss']:+.3f}"])
    return markdown_table(columns, rows)


# ------------------------------------------------------------------------------------------ figures


def math_label(method: str) -> str:
    """T_0.5 as mathematics; the name of a baseline in words."""
    return f"$T_{{{method[2:]}}}$" if method.startswith("T_") else method.replace("_", " ")


def order_colors(study: dict) -> dict:
    """A colour for each T_n of the study, in the order of n: the same in every figure."""
    found = {}
    for methods in study.values():
        found |= taylor_methods(methods)
    names = [method for method, _ in sorted(found.items(), key=method_order)]
    return dict(zip(names, sequential_colors(len(names)), strict=True))


def legend_below(fig, title, ncols=None):
    """The figure's legend, with what the marks mean as its title."""
    figure_legend(fig, ncols=ncols).set_title(title, prop={"size": 8})


def curve(evals, name, scale=1.0):
    """(steps, values) of a metric."""
    records = [record for record in evals if name in record]
    steps = [r["step"] for r in records]
    values = [scale * r[name] for r in records]
    return steps, values


def plot_band(ax, runs, name, color, label, scale=1.0):
    """Mean over seeds, and the range from the lowest to the highest seed as a band."""
    curves = [curve(evals, name, scale) for evals in runs.values()]
    steps = curves[0][0]
    values = np.array([values for _, values in curves])
    ax.plot(steps, values.mean(0), color=color, label=label)
    ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)


def new_token_title(seed, evals) -> str:
    share = 100 - 100 * evals[-1]["seen_share"]
    return f"seed {seed}: {share:.1f} % new ({evals[-1]['new_tokens']:.0f} tokens)"


def plot_row_split(path, study):
    """The write-up's setting, split by row: a column for each seed; all, seen and new tokens."""
    methods = taylor_methods(study["later", "row"])
    colors = order_colors(study)
    seeds = methods["T_0"]
    rows = {
        "val_loss": "all tokens",
        "seen_loss": "tokens seen in training",
        "new_loss": "new tokens",
    }
    with style():
        fig, axes = plt.subplots(
            3,
            len(seeds),
            figsize=(max(5.2, 2.9 * len(seeds)), 7.0),
            sharex=True,
            sharey="row",
            squeeze=False,
        )
        for column, (seed, evals) in enumerate(seeds.items()):
            for ax, name in zip(axes[:, column], rows, strict=True):
                for method, runs in methods.items():
                    ax.plot(
                        *curve(runs[seed], name), color=colors[method], label=math_label(method)
                    )
            axes[0, column].set(title=new_token_title(seed, evals), ylim=(0, 1))
            axes[1, column].set(yscale="log")
            axes[2, column].set(xlabel="step")
        for ax, title in zip(axes[:, 0], rows.values(), strict=True):
            ax.set(ylabel=f"loss: {title}\n(nats per token)")
        legend_below(fig, "one run per curve")
        save_figure(fig, path)


def plot_original(path, study):
    """The write-up's size: T_0 and T_2 on both splits, beside readings of the write-up's curves."""
    colors = {"T_0": PALETTE[0], "T_2": PALETTE[1]}
    with style():
        fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6))
        for ax, (split, title) in zip(axes, (("row", "by row"), ("group", "by post")), strict=True):
            for method, runs in study.get((ORIGINAL, split), {}).items():
                for evals in runs.values():
                    steps, losses = curve(evals, "padded_loss")
                    epochs = [step / STEPS_PER_EPOCH for step in steps]
                    label = f"ours, {math_label(method)}"
                    ax.plot(epochs[1:], losses[1:], ".-", color=colors[method], label=label)
            ax.set(title=f"split {title}", xlabel="epoch", xscale="log")
            ax.xaxis.set_major_formatter("{x:g}")
        draw_published(axes[0], colors)
        axes[0].set(ylabel=f"{LOSS_LABEL[:-1]},\npadding included)", ylim=(0, 2), xlim=(0.9, 120))
        legend_below(fig, "raw values, one run per curve; write-up: readings of its row split")
        save_figure(fig, path)


def draw_published(ax, colors):
    """Readings of the write-up's curves."""
    for method, color in colors.items():
        name = f"write-up, {math_label(method)}"
        epoch, loss = PUBLISHED_MINIMUM[method]
        if epoch is None:
            ax.axhline(loss, color=color, ls=":", lw=1, label=f"{name}: lowest, epoch not known")
        else:
            ax.plot(epoch, loss, "v", ms=6, color=color, label=f"{name}: lowest")
        ax.plot(*PUBLISHED_END[method], "s", ms=5, color=color, label=f"{name}: end, smoothed")
    ax.axvline(PUBLISHED_CROSSING, color=GREY, ls=":", lw=1, label="write-up: the curves cross")


def plot_post_split(path, study):
    """Validation loss when the split is by post, in both settings."""
    keys = [key for key in SETTINGS if key[1] == "group"]
    colors = order_colors(study)
    with style():
        fig, axes = plt.subplots(1, len(keys), figsize=(7.4, 3.3))
        for ax, key in zip(axes, keys, strict=True):
            methods = taylor_methods(study[key])
            for method, runs in methods.items():
                plot_band(ax, runs, "val_loss", colors[method], math_label(method))
            ax.set(title=SETTINGS[key], xlabel="step")
        axes[0].set(ylabel=LOSS_LABEL)
        legend_below(fig, f"line: mean of {len(runs)} seeds; band: lowest to highest seed")
        save_figure(fig, path)


DIFFERENCE_MARKS = "large: mean of the seeds with its 95 % interval; small: single seeds"


def plot_difference(ax, position, differences, color, filled, label=None, horizontal=False):
    """Mean paired difference with its 95 % interval, and every seed as a small dot beside it."""
    mean, error = confidence_interval(differences)
    look = {
        "fmt": "o",
        "ms": 5,
        "color": color,
        "mfc": color if filled else "white",
        "label": label,
        "zorder": 3,
    }
    dots = {"s": 7, "color": color, "alpha": 0.7, "lw": 0, "zorder": 2}
    beside = [position + 0.14] * len(differences)
    if horizontal:
        ax.errorbar(mean, position, xerr=error, **look)
        ax.scatter(differences, beside, **dots)
    else:
        ax.errorbar(position, mean, yerr=error, **look)
        ax.scatter(beside, differences, **dots)


def plot_paired_differences(path, study):
    """Loss of T_n minus that of T_0 of the same seed, at the last step and at early stopping."""
    with style():
        fig, axes = plt.subplots(2, len(SETTINGS), figsize=(9.2, 5.4), sharex="col")
        for column, (key, title) in enumerate(SETTINGS.items()):
            methods = taylor_methods(study[key])
            others = [method for method in methods if method != "T_0"]
            for row, early_stop in enumerate((False, True)):
                ax = axes[row, column]
                reference_line(ax, 0.0, "$T_0$")
                for measure in LOSSES:
                    if measure.early_stop != early_stop:
                        continue
                    for x, method in enumerate(others):
                        plot_difference(
                            ax,
                            x + (0.13 if measure.temperature else -0.22),
                            paired_differences(methods[method], methods["T_0"], measure),
                            PALETTE[1] if measure.temperature else PALETTE[0],
                            not measure.temperature,
                            "after one fitted temperature" if measure.temperature else "as trained",
                        )
                ax.set_xticks(range(len(others)), [math_label(method) for method in others])
                ax.set_xlim(-0.6, len(others) - 0.4)
                ax.grid(axis="x", visible=False)
            axes[0, column].set(title=title)
        for ax, when in zip(axes[:, 0], ("last step", "early stopping"), strict=True):
            ax.set(ylabel=f"{when}: loss minus $T_0$'s\n(nats per token)")
        legend_below(fig, DIFFERENCE_MARKS)
        save_figure(fig, path)


def plot_baselines(path, study):
    """The GPT-2 block, split by post: T_n and the baselines, minus T_0 of the same seed."""
    methods = study["clean", "group"]
    others = [method for method in methods if method != "T_0"]
    with style():
        fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.6), sharey=True)
        for ax, early_stop in zip(axes, (False, True), strict=True):
            ax.axvline(0.0, color=GREY, ls=(0, (4, 3)), lw=1.1, zorder=1.5, label="$T_0$")
            for measure in LOSSES:
                if measure.early_stop != early_stop:
                    continue
                for y, method in enumerate(others):
                    plot_difference(
                        ax,
                        y + (0.12 if measure.temperature else -0.3),
                        paired_differences(methods[method], methods["T_0"], measure),
                        PALETTE[1] if measure.temperature else PALETTE[0],
                        not measure.temperature,
                        "after one fitted temperature" if measure.temperature else "as trained",
                        horizontal=True,
                    )
            ax.set_yticks(range(len(others)), [math_label(method) for method in others])
            ax.set(
                title="early stopping" if early_stop else "last step",
                xlabel="loss minus $T_0$'s (nats per token)",
            )
            ax.locator_params(axis="x", nbins=5)
            ax.grid(axis="y", visible=False)
        axes[0].invert_yaxis()
        legend_below(fig, DIFFERENCE_MARKS)
        save_figure(fig, path)


def plot_calibration(path, study):
    """The GPT-2 block, split by post: calibration error, reliability, entropy where it is wrong."""
    methods = taylor_methods(study["clean", "group"])
    colors = order_colors(study)
    with style():
        fig, axes = plt.subplots(1, 3, figsize=(9.2, 3.2))
        for method, runs in methods.items():
            label = math_label(method)
            plot_band(axes[0], runs, "ece", colors[method], label, scale=100)
            plot_band(axes[2], runs, "entropy_wrong", colors[method], label)
            points = pool_reliability([evals[-1]["reliability"] for evals in runs.values()])
            confidence = [x for x, _ in points]
            correct = [y for _, y in points]
            axes[1].plot(confidence, correct, ".-", lw=1, color=colors[method], label=label)
        axes[1].plot([0, 1], [0, 1], ls=(0, (4, 3)), lw=1.1, color=GREY, label="calibrated")
        axes[0].set(
            title="calibration error", xlabel="step", ylabel="expected calibration error (%)"
        )
        axes[1].set(
            title="reliability, last step",
            xlabel="probability of the most likely token",
            ylabel="share correct",
        )
        axes[2].set(
            title="entropy of wrong predictions",
            xlabel="step",
            ylabel="entropy (nats)",
        )
        legend_below(
            fig,
            "line: mean of the seeds; band: lowest to highest; reliability: all seeds pooled",
            ncols=6,
        )
        save_figure(fig, path)


def pool_reliability(curves, bins=15, min_tokens=30) -> list[tuple[float, float]]:
    """Reliability curves of several runs as one, without the bins that have few tokens.

    curves: of each run [[mean probability, share correct, tokens]]. Returns
    [(mean probability, share correct)].
    """
    pooled = []
    for b in range(bins):
        points = []
        for run in curves:
            points += [p for p in run if min(int(p[0] * bins), bins - 1) == b]
        count = sum(n for _, _, n in points)
        if count >= min_tokens:
            confidence = sum(p * n for p, _, n in points) / count
            correct = sum(share * n for _, share, n in points) / count
            pooled.append((confidence, correct))
    return pooled


FIGURES = {
    "row_split": plot_row_split,
    "post_split": plot_post_split,
    "paired_differences": plot_paired_differences,
    "baselines": plot_baselines,
    "calibration": plot_calibration,
}


def draw_figures(study: dict, folder: str):
    """The figures whose runs exist."""
    os.makedirs(folder, exist_ok=True)
    if all(key in study for key in SETTINGS):
        for name, draw in FIGURES.items():
            draw(os.path.join(folder, name), study)
    if (ORIGINAL, "row") in study:
        plot_original(os.path.join(folder, "original"), study)


# --------------------------------------------------------------------------------------- the report

INTRODUCTION = """\
# T_n: validation loss

All losses are plain cross-entropy in nats per token on validation texts, whatever the training
loss was.

Data: {sources}.

- In the first table of a setting, ± is the standard deviation over seeds. In a table of
  differences, ± is half of Student's 95 % interval of the paired differences (same seed). Bold:
  the interval excludes 0. There is no correction for multiple comparisons.
- Texts are split by row, or by group: then all texts of a post are on one side of the split.
- Each seed has its own posts, split, vocabulary, initialization and data order (sft and spin: data
  order and samples only).
- The step of early stopping and the temperature are chosen on one half of the validation rows and
  measured on the other half; both directions are averaged.

In how many seeds the write-up's pattern appears, by more than {clear} nats:

{pattern}

Why: the share of new tokens among the validation tokens, the loss of seen and of new tokens at the
last step, and the share of new tokens at which T_0 and T_2 would break even:

{new_tokens}
"""


def write_report(folder: str, out: str):
    """Write the figures and report.md of the runs under `folder` into `out`."""
    path = os.path.join(out, "report.md")
    logs = os.path.join(out, "logs")
    check_report(path, INTRODUCTION.split("\n")[0])
    check_logs(folder, logs)
    study = read_study(folder)
    os.makedirs(out, exist_ok=True)
    copy_logs(folder, logs)
    draw_figures(study, os.path.join(out, "figures"))
    with atomic_write(path) as f:
        f.write(report_text(study, data_sources(folder)))
    print(path)


def report_text(study: dict, sources: list[str]) -> str:
    introduction = INTRODUCTION.format(
        sources=" and ".join(sources),
        clear=CLEAR_DIFFERENCE,
        pattern="\n".join(pattern_table(study)),
        new_tokens="\n".join(new_token_table(study)),
    )
    sections = [introduction]
    for (setting, split), methods in study.items():
        if setting == ORIGINAL:
            continue
        if not setting.startswith("map_"):
            sections += setting_sections(setting, split, methods)
    if any(setting == ORIGINAL for setting, _ in study):
        sections.append(original_section(study))
    return "\n".join(sections)


def setting_sections(setting: str, split: str, methods: dict) -> list[str]:
    """The tables of a setting; of self-play one for each round."""
    last = [evals[-1] for evals in methods["T_0"].values()]
    seeds = f"{len(last)} seed" if len(last) == 1 else f"{len(last)} seeds"
    if "loss/0" not in last[0]:
        sections = []
        rounds = {record["round"] for record in first_run(methods)}
        for round_id in sorted(rounds):
            title = f"## {setting}: round {round_id}, {last[0]['step']} steps, {seeds}"
            sections.append("\n".join([title, "", *self_play_table(methods, round_id), ""]))
        return sections

    tokens = " / ".join(f"{int(r['tokens/0'] + r['tokens/1']):,}" for r in last)
    new_tokens = " / ".join(str(int(r["new_tokens"])) for r in last)
    title = (
        f"## {setting}, split by {split}: {last[0]['step']} steps, {seeds}; "
        f"of {tokens} validation tokens {new_tokens} are new"
    )
    tables = [*method_table(methods), "", *difference_table(methods)]
    if "padded_loss" in last[0]:
        factors = ", ".join(f"{r['padded_loss'] / r['val_loss']:.4f}" for r in last)
        tables += [
            "",
            f"The write-up's mean over all positions, padding too, is {factors} of this.",
        ]
    return ["\n".join([title, "", *tables, ""])]


def original_section(study: dict) -> str:
    """How far each run of the original size came, and its losses."""
    columns = ["split by", "method", "epochs", "lowest, padding included", "at epoch", "last"]
    columns += ["plain: last", "seen tokens", "new tokens", "new tokens %"]
    rows = []
    for (setting, split), methods in study.items():
        if setting != ORIGINAL:
            continue
        for method, runs in methods.items():
            for evals in runs.values():
                best = min(evals, key=lambda record: record["padded_loss"])
                last = evals[-1]
                cells = [split, method, f"{last['step'] / STEPS_PER_EPOCH:.1f}"]
                cells += [f"{best['padded_loss']:.3f}", f"{best['step'] / STEPS_PER_EPOCH:.1f}"]
                cells += [f"{last['padded_loss']:.3f}", f"{last['val_loss']:.3f}"]
                for name in ("seen_loss", "new_loss"):
                    cells.append(f"{last[name]:.3f}" if name in last else "-")
                rows.append([*cells, f"{100 - 100 * last['seen_share']:.2f}"])
    title = "## original: the write-up's size, one seed; the runs are unfinished"
    return "\n".join([title, "", *markdown_table(columns, rows), ""])


def main(argv: list[str]):
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) not in (0, 2):
        raise SystemExit("usage: python -m studies.taylor.analysis [RUNS OUT]")
    folder, out = argv or (os.path.join(HERE, "logs"), HERE)
    write_report(folder, out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
