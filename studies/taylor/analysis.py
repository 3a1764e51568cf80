"""The T_n study: figures and tables of the runs that `make figures-tn` and `make figures-tn-play` leave.

    python taylor.py out/tn studies/taylor/results

Runs stand in FOLDER/SETTING/SPLIT/METHOD/SEED; METHOD is T_0, T_0.5 ... or what T_n is compared with. Everything is read from
metrics.jsonl, whose figures `calibration.calibration` explains: plain cross-entropy, whatever was trained; what is chosen (the step, a
temperature) is chosen on one half of the validation rows and measured on the other.
The evaluations are kept beside the report, so `python taylor.py studies/taylor/results/runs studies/taylor/results` makes it again.
"""

import glob
import json
import math
import os
import shutil
import sys

import numpy as np

from tools.plot import STUDENT, cell, plt, read_metrics, save


def study(folder):
    """{(setting, split): {method: [evaluations of each seed]}}, methods by name, T_n by n."""
    found = {}
    for run in sorted(
        glob.glob(os.path.join(glob.escape(folder), "*", "*", "*", "*", "metrics.jsonl"))
    ):
        setting, split, method, seed = os.path.relpath(os.path.dirname(run), folder).split(os.sep)
        found.setdefault((setting, split), {}).setdefault(method, {})[seed] = read_metrics(
            os.path.dirname(run), "eval"
        )
    if not found:
        raise SystemExit(
            f"{folder}: no runs SETTING/SPLIT/METHOD/SEED in it; `make figures-tn` makes them"
        )
    for (setting, split), methods in found.items():
        steps = {
            tuple(r["step"] for r in records)
            for runs in methods.values()
            for records in runs.values()
        }
        if (
            "T_0" not in methods
            or len(steps) > 1
            or len({tuple(runs) for runs in methods.values()}) > 1
        ):
            raise SystemExit(
                f"{folder}/{setting}/{split}: a run is missing or unfinished; the same `make` goes on with it"
            )

    def order(method):
        return (0, float(method[2:])) if method.startswith("T_") else (1, method)

    return {
        key: {method: list(methods[method].values()) for method in sorted(methods, key=order)}
        for key, methods in sorted(found.items())
    }


def interval(values):
    """(mean, half of its 95 % interval by Student's t) of one value a seed; no interval of one."""
    n = len(values)
    return float(np.mean(values)), STUDENT.get(n, 2.57) * float(np.std(values, ddof=1)) / math.sqrt(
        n
    ) if n > 1 else math.nan


def label(method):
    """T_0.5 as mathematics."""
    return f"$T_{{{method[2:]}}}$" if method.startswith("T_") else method


def band(ax, runs, key, **look):
    """A figure over the steps of each seed: the mean of the raw values, the band their least and greatest."""
    steps = [r["step"] for r in runs[0] if key in r]
    values = np.array([[r[key] for r in records if key in r] for records in runs])
    ax.plot(steps, values.mean(0), lw=1.3, **look)
    ax.fill_between(steps, values.min(0), values.max(0), color=look["color"], alpha=0.2, lw=0)


def chosen(records, after=False):
    """The evaluations at which half 0 and half 1 of the validation rows would have stopped, judged by their own temperature if `after`."""
    return [
        min(records, key=lambda r: r[("fitted_loss/" if after else "loss/") + str(h)])
        for h in (0, 1)
    ]


def held_out_loss(stops, after=False):
    """Cross-entropy a token: half 1 at half 0's stop (and temperature), half 0 at half 1's."""
    loss, tokens = zip(
        *(
            (r[("loss_t/" if after else "loss/") + str(1 - h)], r[f"tokens/{1 - h}"])
            for h, r in enumerate(stops)
        )
    )
    return float(np.average(loss, weights=tokens))


def mean_of(stops, name):
    return float(np.mean([r[name] for r in stops]))


def last(records):
    return [records[-1]] * 2


HOW = {
    "last step": lambda r: held_out_loss(last(r)),
    "stopped early": lambda r: held_out_loss(chosen(r)),
    "last step, one temperature": lambda r: held_out_loss(last(r), True),
    "stopped early, one temperature": lambda r: held_out_loss(chosen(r, True), True),
}
FIGURES = HOW | {
    "accuracy %, last step": lambda r: 100 * r[-1]["acc"],
    "accuracy %, stopped early": lambda r: 100 * mean_of(chosen(r), "acc"),
    "ECE %, last step": lambda r: 100 * r[-1]["ece"],
    "ECE %, stopped early": lambda r: 100 * mean_of(chosen(r), "ece"),
    "ECE %, last step, one temperature": lambda r: 100 * r[-1]["ece_t"],
    "ECE %, stopped early, one temperature": lambda r: 100 * mean_of(chosen(r, True), "ece_t"),
}
FORMS = ["{:.4f}"] * len(HOW) + ["{:.2f}"] * (len(FIGURES) - len(HOW))


PANELS = {
    ("later", "row"): "the write-up's setting, split by row",
    ("later", "group"): "the same, split by post",
    ("clean", "group"): "our block and initialisation, split by post",
}


def panels(found):
    """A figure with an axis for each of PANELS, and its methods T_n."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for ax, (key, title) in zip(axes, PANELS.items()):
        ax.set(title=title)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="validation cross-entropy (nats a token)")
    return fig, zip(
        axes, [{m: runs for m, runs in found[key].items() if m.startswith("T_")} for key in PANELS]
    )


def plot_validation(out, found):
    """(a), (b): the write-up's figure, validation cross-entropy of each T_n, on both splits."""
    fig, each = panels(found)
    for n, (ax, methods) in enumerate(each):
        for i, (method, runs) in enumerate(methods.items()):
            if n:
                band(ax, runs, "val_loss", color=f"C{i}", label=label(method))
            for seed, records in enumerate(
                runs if n == 0 else []
            ):  # whose levels differ with the share of new tokens
                ax.plot(
                    [r["step"] for r in records],
                    [r["val_loss"] for r in records],
                    lw=1.2,
                    color=f"C{i}",
                    ls=("-", "--", ":")[seed % 3],
                    label=None if seed else label(method),
                )
        ax.set(xlabel="step", ylim=None if n else (0, 1))
        ax.legend(
            title=f"mean, least, greatest of {len(runs)}"
            if n
            else f"{len(runs)} seeds: -, - -, ..."
        )
    save(fig, out)


def plot_long(out, found):
    """(f): the write-up's figure where it appears, after three times as many steps, a panel for each seed."""
    methods = found["map_long", "row"]
    fig, axes = plt.subplots(1, len(methods["T_0"]), figsize=(16, 4.6), squeeze=False)
    for n, ax in enumerate(axes[0]):
        for i, (method, runs) in enumerate(methods.items()):
            ax.plot(
                [r["step"] for r in runs[n]],
                [r["val_loss"] for r in runs[n]],
                lw=1.2,
                color=f"C{i}",
                label=label(method),
            )
        lowest = min(r["val_loss"] for runs in methods.values() for r in runs[n])
        ax.set(
            title=f"split by row, {100 - 100 * methods['T_0'][n][-1]['seen_share']:.1f} % new tokens",
            xlabel="step",
            ylim=(lowest - 0.05, lowest + 0.25),
        )
        ax.legend()
        ax.grid(alpha=0.3)
    axes[0, 0].set(ylabel="validation cross-entropy (nats a token)")
    save(fig, out)


def plot_stopping(out, found):
    """(c): at the end and stopped early, with and without a temperature."""
    fig, each = panels(found)
    for ax, methods in each:
        for i, (how, figure) in enumerate(HOW.items()):
            values = np.array([[figure(records) for records in runs] for runs in methods.values()])
            ax.errorbar(
                np.arange(len(methods)) + 0.12 * (i - 1.5),
                values.mean(1),
                values.std(1, ddof=1),
                fmt="o" if i % 2 else "s",
                ms=5,
                capsize=2,
                label=how,
            )
        ax.set(xticks=range(len(methods)), xticklabels=map(label, methods))
    fig.axes[0].set_ylim(top=1.5 * fig.axes[0].get_ylim()[1])
    fig.axes[0].legend(loc="upper left", title="mean ± standard deviation of the seeds")
    save(fig, out)


def plot_seen(out, found):
    """(d): the row split's validation tokens apart, those that training had, with all that stands before them, and new ones."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    methods = found["later", "row"]
    share, new = (
        np.mean([r[-1]["seen_share"] for r in methods["T_0"]]),
        np.mean([r[-1]["new_tokens"] for r in methods["T_0"]]),
    )
    for i, (method, runs) in enumerate(methods.items()):
        for ax, key in zip(axes, ("seen_loss", "new_loss")):
            band(ax, runs, key, color=f"C{i}", label=label(method))
    axes[0].set(
        title=f"tokens seen in training, {100 * share:.1f} %",
        yscale="log",
        ylabel="validation cross-entropy (nats a token)",
    )
    axes[1].set(title=f"new tokens, {100 - 100 * share:.1f} %, {new:.0f} a seed")
    for ax in axes:
        ax.set(xlabel="step")
        ax.legend()
        ax.grid(alpha=0.3)
    save(fig, out)


def plot_calibration(out, found):
    """(e): split by post, expected calibration error, the reliability curve at the last step, entropy where the model is wrong."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for i, (method, runs) in enumerate(
        m for m in found["clean", "group"].items() if m[0].startswith("T_")
    ):
        look = dict(color=f"C{i}", label=label(method))
        band(axes[0], runs, "ece", **look)
        band(axes[2], runs, "entropy_wrong", **look)
        axes[1].plot(
            *zip(*pooled([records[-1]["reliability"] for records in runs])), ".-", lw=1, **look
        )
    axes[1].plot([0, 1], [0, 1], "k--", lw=1)
    axes[0].set(title="expected calibration error", xlabel="step")
    axes[1].set(
        title="reliability at the last step",
        xlabel="probability of the most likely token",
        ylabel="share right",
    )
    axes[2].set(title="entropy where the most likely token is wrong", xlabel="step", ylabel="nats")
    for ax in axes:
        ax.legend()
        ax.grid(alpha=0.3)
    save(fig, out)


def pooled(curves, bins=15, least=30):
    """Reliability curves of some runs as one, [(probability, share right)] of the bins with at least so many tokens."""
    points = []
    for b in range(bins):
        some = [
            point for curve in curves for point in curve if min(int(point[0] * bins), bins - 1) == b
        ]
        count = sum(n for _, _, n in some)
        if count >= least:
            points.append(
                (
                    sum(top * n for top, _, n in some) / count,
                    sum(right * n for _, right, n in some) / count,
                )
            )
    return points


def study_table(methods):
    """Lines of a table: each method's figures, mean and standard deviation over seeds."""
    figures = FIGURES | {
        "step of the stop": lambda r: mean_of(chosen(r), "step"),
        "temperature, last step": lambda r: np.mean(
            [r[-1]["temperature/0"], r[-1]["temperature/1"]]
        ),
    }
    lines = ["| method | " + " | ".join(figures) + " |", "|---|" + "---:|" * len(figures)]
    for method, runs in methods.items():
        lines.append(
            f"| {method} | "
            + " | ".join(
                cell([figure(r) for r in runs], form, 1)
                for figure, form in zip(figures.values(), FORMS + ["{:.0f}", "{:.2f}"])
            )
            + " |"
        )
    return lines


def against_cross_entropy(methods):
    """Lines of a table: difference to T_0 of the same seed, with its interval, bold where that leaves out 0."""
    lines = [
        "| less T_0 of the same seed | " + " | ".join(FIGURES) + " |",
        "|---|" + "---:|" * len(FIGURES),
    ]
    for method in list(methods)[1:]:
        cells = []
        for figure, form in zip(FIGURES.values(), FORMS):
            mean, error = interval(
                [
                    figure(r) - figure(base)
                    for r, base in zip(methods[method], methods["T_0"], strict=True)
                ]
            )
            text = form.replace(":", ":+").format(mean) + (
                f" ± {form.format(error)}" if len(methods["T_0"]) > 1 else ""
            )
            cells.append(f"**{text}**" if abs(mean) > error else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def play_table(methods, round_id):
    """Lines of a table for runs of a ranking: figures of a round's last step, and in brackets the difference to T_0 of the same seed
    with its 95 % interval."""
    methods = {
        method: [[r for r in records if r["round"] == round_id] for records in runs]
        for method, runs in methods.items()
    }
    figures = {
        "val_loss": 1,
        "acc": 100,
        "rank_nll": 1,
        "kl_from_ref": 1,
        **{k: 1 for k in methods["T_0"][0][-1] if k.startswith("reward/")},
    }
    lines = ["| method | " + " | ".join(figures) + " |", "|---|" + "---:|" * len(figures)]
    for method, runs in methods.items():
        cells = []
        for name, scale in figures.items():
            mean, error = interval(
                [
                    scale * (r[-1][name] - base[-1][name])
                    for r, base in zip(runs, methods["T_0"], strict=True)
                ]
            )
            cells.append(
                f"{np.mean([scale * r[-1][name] for r in runs]):.4f}"
                + (f" ({mean:+.4f} ± {error:.4f})" if method != "T_0" and len(runs) > 1 else "")
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


CLEAR = 0.005  # nats that the picture's rise and gaps must have


def picture(found):
    """Lines of a table of every setting on the row split: where the write-up's picture appears, T_0 rising after its minimum and
    T_2 < T_1 < T_0 at the end, each by more than CLEAR."""
    lines = [
        "| setting, split by row | steps | T_0: minimum | at step | last | T_1: last | T_2: last | T_0 rises | T_1 < T_0 | T_2 < T_0 | T_2 < T_1 | seeds |",
        "|---|" + "---:|" * 11,
    ]
    for (setting, split), methods in found.items():
        if split == "row" and {"T_0", "T_1", "T_2"} <= set(methods):
            lowest = [min(r, key=lambda e: e["val_loss"]) for r in methods["T_0"]]
            ends = {
                method: [r[-1]["val_loss"] for r in methods[method]]
                for method in ("T_0", "T_1", "T_2")
            }
            pairs = [
                ([low["val_loss"] for low in lowest], ends["T_0"]),
                (ends["T_1"], ends["T_0"]),
                (ends["T_2"], ends["T_0"]),
                (ends["T_2"], ends["T_1"]),
            ]
            cells = [
                cell([low["val_loss"] for low in lowest], "{:.3f}", 1),
                cell([low["step"] for low in lowest], "{:.0f}", 1),
                *(cell(values, "{:.3f}", 1) for values in ends.values()),
                *(str(sum(a + CLEAR < b for a, b in zip(*pair))) for pair in pairs),
                str(len(lowest)),
            ]
            lines.append(
                f"| {setting} | {methods['T_0'][0][-1]['step']} | " + " | ".join(cells) + " |"
            )
    return lines


def shares(found):
    """Lines of a table of every run on the row split: at the last step T_2 costs more than T_0 on each token that training had, and less
    on each new one, so it ends lower where the share of new tokens is above the share at which the two would be equal."""
    lines = [
        "| setting, split by row | seed's place | new tokens % | seen: T_0 | T_2 | new: T_0 | T_2 | equal at % | all, T_2 less T_0 |",
        "|---|" + "---:|" * 8,
    ]
    for (setting, split), methods in found.items():
        for n, (zero, two) in enumerate(
            zip(methods["T_0"], methods.get("T_2", [])) if split == "row" else ()
        ):
            zero, two = zero[-1], two[-1]
            dearer, cheaper = (
                two["seen_loss"] - zero["seen_loss"],
                zero["new_loss"] - two["new_loss"],
            )
            cells = [
                100 - 100 * zero["seen_share"],
                *(r[key] for key in ("seen_loss", "new_loss") for r in (zero, two)),
                100 * dearer / (dearer + cheaper),
            ]
            lines.append(
                f"| {setting} | {n + 1} | "
                + " | ".join(f"{c:.2f}" for c in cells)
                + f" | {two['val_loss'] - zero['val_loss']:+.3f} |"
            )
    return lines


def keep(folder, out):
    """Settings and evaluations of every run, without its steps: what the report can be made from again."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*", "*", "*", "*", "config.json")):
        run = os.path.dirname(path)
        into = os.path.join(out, os.path.relpath(run, folder))
        if os.path.abspath(into) != os.path.abspath(run):
            os.makedirs(into, exist_ok=True)
            shutil.copy(path, into)
            with open(os.path.join(into, "metrics.jsonl"), "w", encoding="utf-8") as f:
                f.writelines(json.dumps(record) + "\n" for record in read_metrics(run, "eval"))


def sources(folder):
    """What the runs' data was made of, as their config.json says."""
    found = set()
    for path in glob.glob(os.path.join(glob.escape(folder), "*", "*", "*", "*", "config.json")):
        with open(path, encoding="utf-8") as f:
            source = json.load(f)["config"].get("data_source")
        found |= {str(source)} if source else set()
    return sorted(found)


def report(folder, out):
    """Figures (a) to (f) and report.md of the runs under a folder, into another."""
    found = study(folder)
    os.makedirs(out, exist_ok=True)
    keep(folder, os.path.join(out, "runs"))
    if all(key in found for key in PANELS):
        for name, draw in (
            ("a_b_validation", plot_validation),
            ("c_stopping", plot_stopping),
            ("d_seen", plot_seen),
            ("e_calibration", plot_calibration),
        ):
            draw(os.path.join(out, f"{name}.png"), found)
    if ("map_long", "row") in found:
        plot_long(os.path.join(out, "f_long.png"), found)
    lines = [
        "# T_n: plain cross-entropy a token on validation texts, whatever was trained",
        "",
        f"Data: {' and '.join(sources(folder))}. ± in the first tables is the standard deviation over seeds; in those of differences it is half of Student's 95 % interval of the seeds' paired "
        "differences, bold where that leaves out 0, none widened for there being many. A seed has posts, a split, a vocabulary, an initialisation and an order of its own (sft and spin: only an order and samples). "
        "What is chosen, the step of an early stop or one temperature, is chosen on one half of the validation rows and measured on the other, both ways averaged.",
        "",
        f"Where the write-up's picture appears (in how many seeds, by more than {CLEAR} nats):",
        "",
        *picture(found),
        "",
        "Why there: the share of new tokens among the validation tokens, what seen and new tokens cost at the last step, and the share at which T_0 and T_2 would cost the same:",
        "",
        *shares(found),
        "",
    ]
    for (setting, split), methods in found.items():
        ends = [records[-1] for records in methods["T_0"]]
        seeds = f"{len(ends)} seed" + "s" * (len(ends) > 1)
        if setting.startswith("map_"):
            continue
        if "loss/0" not in ends[0]:
            for round_id in sorted({r["round"] for r in methods["T_0"][0]}):
                lines += [
                    f"## {setting}: round {round_id}, {ends[0]['step']} steps, {seeds}",
                    "",
                    *play_table(methods, round_id),
                    "",
                ]
            continue
        tokens = [int(r["tokens/0"] + r["tokens/1"]) for r in ends]
        lines += [
            f"## {setting}, split by {split}: {ends[0]['step']} steps, {seeds}; of {' / '.join(f'{n:,}' for n in tokens)} validation tokens "
            f"{' / '.join(str(int(r['new_tokens'])) for r in ends)} are new to training",
            "",
            *study_table(methods),
            "",
        ]
        lines += [*against_cross_entropy(methods), ""]
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    print(os.path.join(out, "report.md"))


def main(args):
    if args in (["-h"], ["--help"]):
        return print(__doc__)
    if len(args) != 2:
        raise SystemExit(__doc__)
    report(*args)


if __name__ == "__main__":
    main(sys.argv[1:])
