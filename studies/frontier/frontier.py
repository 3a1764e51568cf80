"""RLHF or DPO? True reward against KL to the reference, on a task whose reward is known.

    python -m studies.frontier.frontier                        all runs; 26 minutes on two cores
    python -m studies.frontier.frontier --seeds=1 --values=1   one point per method
    python -m studies.frontier.frontier --redraw               the figure again, without any run

The reference model samples three responses to each prompt. The true reward (data/pydocs/scorer.py)
ranks them. Every method learns from these rows: PPO through a reward model fitted to them, or from
the true reward itself; DPO on all pairs, Plackett-Luce, SimPO and Preferred-FT from the ranking.
Each method is swept over the strength of its KL control and over seeds. Then all policies answer
the same held-out prompts. An interrupted sweep continues where it stopped.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from operator import itemgetter

import numpy as np
import torch

import train
from data import cli, tokenizer
from data.batch import permutation
from data.files import atomic_write, read_json, sha256, write_json
from data.folder import read_meta, write_meta
from data.pydocs.scorer import concrete, kinds
from data.rows import encode_rows, ids_source, read_rows, sampled_row, write_rows
from eval import row_logps, row_scores, validation_rows
from model import GPT
from nanospin import checkpoint, distributed
from players import unique_prompts
from sample import respond
from tools.plot import (
    GREY,
    PALETTE,
    check_report,
    figure_legend,
    minutes,
    plt,
    reference_line,
    save_figure,
    style,
)

ROWS = 1536  # training prompts
VAL_ROWS = 256  # held-out prompts
K = 3  # responses to each prompt
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
EVAL_SEED = 7  # of the held-out samples, the same for every policy
KL_BUDGETS = (1, 2, 5, 10, 20, 40)  # nats per response
CONFIGS = "studies/frontier/config"


@dataclass(frozen=True)
class Method:
    config: str  # file in studies/frontier/config
    sweep: str = ""  # the setting that is swept; "": none
    values: tuple = (None,)  # its values, from close to the reference to greedy
    options: tuple = ()  # other settings


METHODS = {
    "PPO, learnt reward": Method("ppo", "kl_coef", (0.5, 0.15, 0.03), ("--reward={reward}",)),
    "PPO, true reward": Method(
        "ppo", "kl_coef", (0.5, 0.15, 0.03), ("--reward=data.pydocs.scorer:concrete",)
    ),
    "DPO": Method("dpo", "beta", (2.0, 0.7, 0.2)),
    "Plackett-Luce, K = 3": Method("dpo", "beta", (2.0, 0.7, 0.2), ("--loss_type=pl",)),
    # SimPO has no reference, so no setting of it controls the KL: its learning rate is swept
    "SimPO": Method(
        "dpo", "lr", (4e-5, 8e-5, 1.6e-4), ("--loss_type=simpo", "--beta=2", "--margin=0.5")
    ),
    "Preferred-FT": Method("preferred_ft"),
}


# ---------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """One policy of the sweep."""

    out_dir: str
    reward: str  # the reward model of the same seed, which also measures the policy
    args: list  # for train.py


def fit(args):
    """Run the trainer in this process; its output goes to OUT_DIR.log."""
    prefix = "--out_dir="
    out_dir = next(arg.removeprefix(prefix) for arg in args if arg.startswith(prefix))
    os.makedirs(os.path.dirname(out_dir), exist_ok=True)
    start = time.time()
    with (
        open(out_dir + ".log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        train.main(args)
    print(f"{time.time() - start:4.0f} s  train.py {' '.join(args)}", flush=True)


def sweep_runs(folder, rewards, num_values, inputs, small):
    """{(method, value): [Run of each seed]}. rewards: the reward model of each seed."""
    runs = {}
    for seed, reward in enumerate(rewards):
        for name, method in METHODS.items():
            for value in method.values[:num_values]:
                slug = re.sub("[^0-9A-Za-z]", "_", name)
                out_dir = f"{folder}/{slug}_{value}_{seed}"
                args = [f"{CONFIGS}/{method.config}.py", f"--out_dir={out_dir}", f"--seed={seed}"]
                args += inputs
                args += [option.format(reward=reward) for option in method.options]
                if method.sweep:
                    args.append(f"--{method.sweep}={value}")
                if small and method.config == "ppo":
                    args += ["--rounds=2", "--max_rows=16", "--batch_size=8"]
                runs.setdefault((name, value), []).append(Run(out_dir, reward, args))
    return runs


def model_limits(meta):
    """The settings of a checkpoint that say how prompts and responses are encoded."""
    return {name: meta["config"][name] for name in ("template", "max_prompt", "max_response")}


def rank(folder, reference, source="data/pydocs"):
    """Write the ranked data: K samples of the reference for each prompt, best true reward first.

    The split is the source's own. Exits with one line if the folder has samples of another
    reference.
    """
    policy_sha256 = checkpoint.weights_sha256(reference)
    if os.path.exists(os.path.join(folder, "meta.json")):
        if read_meta(folder, []).get("policy_sha256") != policy_sha256:
            raise SystemExit(
                f"{folder} has samples of another model than {reference} is now: "
                "use another --runs, or remove that one"
            )
        return
    model, enc, meta = GPT.from_checkpoint(reference)
    limits = model_limits(meta)
    os.makedirs(folder, exist_ok=True)
    splits = {
        # split -> (rows, how many of them, seed of the first sample)
        "train": (read_rows(f"{source}/train.jsonl"), ROWS, 0),
        "val": (validation_rows(source, VAL_ROWS), VAL_ROWS, K),
    }
    for split, (rows, n, first_seed) in splits.items():
        rows = unique_prompts(rows)
        rows = [rows[i] for i in permutation(len(rows), 0, 0)[:n]]
        samples = []
        for k in range(K):
            texts, ids = respond(model, enc, rows=rows, seed=first_seed + k, **limits)
            samples.append(list(zip(texts, ids)))
        ranked = []
        for row, *responses in zip(rows, *samples):
            ranked_row = rank_responses(row, responses)
            if ranked_row is not None:
                source = ids_source(enc, limits["template"])
                ranked.append(ranked_row | {"tokenizer": source})
        write_rows(os.path.join(folder, f"{split}.jsonl"), ranked)
    policy = checkpoint.resolve(reference)
    description = f"{K} samples a prompt of {policy}, ranked by data.pydocs.scorer:concrete"
    write_meta(folder, None, description, policy_sha256=policy_sha256)


def rank_responses(row, responses):
    """A data row with its sampled responses [(text, ids)] in the order of the true reward.

    None if there is no response, because the prompt left no room for one.
    """
    scored = [(concrete(row, text), text, ids) for text, ids in responses if ids is not None]
    if not scored:
        return None
    scored.sort(key=itemgetter(0), reverse=True)  # stable: equal scores keep their order
    ranked_row = {name: row[name] for name in ("prompt", "group") if name in row}
    ranked_row["responses"] = [text for _, text, _ in scored]
    ranked_row["ids"] = [ids for _, _, ids in scored]
    ranked_row["scores"] = [score for score, _, _ in scored]
    return ranked_row


# ------------------------------------------------------------------------------------ measurements


@dataclass
class Measurement:
    """What one policy does on the held-out prompts. All but true_at is at temperature 1."""

    true_at: dict  # temperature, as text -> the true reward of each prompt's sample
    true: float  # mean true reward
    kl: float  # nats per response: mean of log pi - log pi_ref over the policy's own samples
    kl_se: float  # its standard error over prompts
    learnt: float  # mean score by the reward model
    length: float  # tokens
    ended: float  # share that ended in end-of-text
    kinds: float  # different kinds of things named
    beyond: float  # share that names more than three, beyond which the true reward falls
    minutes: float  # training time of the run
    example: str  # the first sample


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and its standard error (0 with one seed)."""

    mean: float
    error: float = 0.0

    @classmethod
    def of(cls, values):
        if len(values) == 1:
            return cls(float(values[0]))
        return cls(float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5))

    def format(self, digits=3):
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"

    def format_percent(self):
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class Point:
    """One method at one value of its swept setting, over seeds."""

    value: float | None
    kl: Mean
    true: Mean
    learnt: Mean


def average(seeds, quantity):
    """Mean of one field over the Measurements of several seeds."""
    return Mean.of([getattr(one, quantity) for one in seeds])


def measure(run, reference, judge, folder):
    """Sample a policy on the held-out prompts -> Measurement, which is kept in RUN.json with the
    sha256 of what it was measured with. If one of these is another, it is measured again.

    run, reference, judge: checkpoints of the policy, the reference and a reward model.
    """
    path = run + ".json"
    inputs = {
        "policy": checkpoint.weights_sha256(run),
        "reference": checkpoint.weights_sha256(reference),
        "judge": checkpoint.weights_sha256(judge),
        "prompts": sha256(f"{folder}/val.jsonl"),
    }
    kept = read_json(path) if os.path.exists(path) else {}
    if kept.get("inputs") == inputs:
        return Measurement(**kept["measurement"])
    rows = read_rows(f"{folder}/val.jsonl")
    model, enc, meta = GPT.from_checkpoint(run)
    ref_model = GPT.from_checkpoint(reference)[0]
    reward_model = GPT.from_checkpoint(judge)[0]
    limits = model_limits(meta)

    samples = {}
    true_at = {}
    for temperature in TEMPERATURES:
        texts, ids = respond(
            model, enc, rows=rows, seed=EVAL_SEED, temperature=temperature, **limits
        )
        samples[temperature] = texts, ids
        true_at[str(temperature)] = [concrete(row, text) for row, text in zip(rows, texts)]
    texts, ids = samples[1.0]

    sampled_rows = [
        sampled_row(row, text, tokens, enc, limits["template"])
        for row, text, tokens in zip(rows, texts, ids)
    ]
    encoded, _ = encode_rows(sampled_rows, enc, block_size=model.config.block_size, **limits)
    logps = row_logps(model, encoded, 4096, "cpu")[:, 0]
    ref_logps = row_logps(ref_model, encoded, 4096, "cpu")[:, 0]
    kl = logps - ref_logps
    num_kinds = [kinds(text) for text in texts]
    measurement = Measurement(
        true_at=true_at,
        true=float(np.mean(true_at["1.0"])),
        kl=float(kl.mean()),
        kl_se=float(kl.std() / len(kl) ** 0.5),
        learnt=float(row_scores(reward_model, encoded, 4096, "cpu").mean()),
        length=float(np.mean([len(tokens) for tokens in ids])),
        ended=float(np.mean([tokenizer.is_end(enc, tokens[-1]) for tokens in ids])),
        kinds=float(np.mean(num_kinds)),
        beyond=float(np.mean([n > 3 for n in num_kinds])),
        minutes=minutes(run),
        example=texts[0],
    )
    write_json(path, {"inputs": inputs, "measurement": asdict(measurement)})
    shown = ("true", "kl", "kl_se", "learnt", "length", "ended")
    text = ", ".join(f"{name} {getattr(measurement, name):.3f}" for name in shown)
    print(f"{run}: {text}", flush=True)
    return measurement


# -------------------------------------------------------------------------------------- the report


@dataclass
class Results:
    """What the figure and the text are made of, kept in frontier.json."""

    reference: float  # the reference's mean true reward
    points: dict[str, list[Point]]  # of each method, in the order of its sweep
    win_rates: dict[str, list[Mean]]  # of each method at its best value; one per temperature
    best: dict[str, float | None]  # the best value of each method

    @classmethod
    def of(cls, measured, base):
        """measured: {(method, value): [Measurement of each seed]}; base: the reference's."""
        points = {}
        for (name, value), seeds in measured.items():
            point = Point(
                value,
                kl=average(seeds, "kl"),
                true=average(seeds, "true"),
                learnt=average(seeds, "learnt"),
            )
            points.setdefault(name, []).append(point)
        best = {}
        win_rates = {}
        for name, of_method in points.items():
            best[name] = max(of_method, key=lambda point: point.true.mean).value
            win_rates[name] = win_rates_against(base, measured[name, best[name]])
        win_rates["reference"] = win_rates_against(base, [base])
        return cls(base.true, points, win_rates, best)

    def save(self, path):
        write_json(
            path,
            {
                "reference": self.reference,
                "points": {name: list(map(astuple, some)) for name, some in self.points.items()},
                "win_rates": {n: list(map(astuple, some)) for n, some in self.win_rates.items()},
                "best": self.best,
            },
        )

    @classmethod
    def load(cls, path):
        saved = read_json(path, ("reference", "points", "win_rates", "best"))
        points = {}
        for name, of_method in saved["points"].items():
            points[name] = [
                Point(value, Mean(*kl), Mean(*true), Mean(*learnt))
                for value, kl, true, learnt in of_method
            ]
        win_rates = {}
        for name, row in saved["win_rates"].items():
            win_rates[name] = [Mean(*rate) for rate in row]
        return cls(saved["reference"], points, win_rates, saved["best"])


def win_rates_against(base, seeds):
    """Win rate at each temperature against the reference's samples at temperature 1 -> [Mean].

    A win is a higher true reward on the same held-out prompt; an equal one counts half.
    """
    theirs = np.array(base.true_at["1.0"])
    win_rates = []
    for temperature in TEMPERATURES:
        rates = []
        for measurement in seeds:
            ours = np.array(measurement.true_at[str(temperature)])
            wins = (ours > theirs) + 0.5 * (ours == theirs)
            rates.append(float(wins.mean()))
        win_rates.append(Mean.of(rates))
    return win_rates


def differ(a, b):
    """Whether two means are more than two standard errors of their difference apart."""
    return abs(a.mean - b.mean) > 2 * math.hypot(a.error, b.error)


def is_one_seed(points) -> bool:
    """One seed has no standard errors."""
    for point in itertools.chain(*points.values()):
        if point.kl.error or point.true.error or point.learnt.error:
            return False
    return True


def best_within(points, budget):
    """{method: the highest true reward among its points with at most this KL}, highest first."""
    best = {}
    for name, of_method in points.items():
        within = [point.true for point in of_method if point.kl.mean <= budget]
        if within:
            best[name] = max(within, key=lambda true: true.mean)
    return dict(sorted(best.items(), key=lambda item: -item[1].mean))


def describe_budgets(points):
    """Who has the highest true reward within each KL budget, beside the DPO paper's claim."""
    lines = []
    leaders = {}
    largest = max(point.kl.mean for point in itertools.chain(*points.values()))
    for budget in KL_BUDGETS:
        best = best_within(points, budget)
        if budget > 1.5 * largest or not best:
            continue
        top = next(iter(best.values()))
        leaders[budget] = [name for name, true in best.items() if not differ(top, true)]
        line = f"- KL ≤ {budget}: "
        line += "; ".join(f"{name} {true.format()}" for name, true in best.items()) + "."
        further = [name for name in points if name not in best]
        if further:
            line += f" No setting of {' or '.join(further)} is this close to the reference."
        lines.append(line)
    untested = "**The DPO paper's order, DPO alone best at every KL, is not tested here: "
    if not leaders:
        return [untested + "no KL budget can be compared.**"]
    if is_one_seed(points):
        return [*lines, "", untested + "there is one seed.**"]
    lines += [
        "",
        "Highest true reward, with all methods within two standard errors of the best, "
        "which for three seeds is less than a 95 % interval:",
        "",
    ]
    lines += [f"- KL ≤ {x}: {' and '.join(names)}" for x, names in leaders.items()]
    lines.append("")
    if all(names == ["DPO"] for names in leaders.values()):
        lines.append("**This agrees with the DPO paper: DPO alone is best at every KL.**")
    else:
        lines.append("**The DPO paper's order, DPO alone best at every KL, is not found here.**")
    return lines


def describe_over_optimisation(name, of_method):
    """From a method's best setting to its greediest: do learnt and true reward part?"""
    best = max(of_method, key=lambda point: point.true.mean)
    greediest = of_method[-1]
    if greediest is best:
        return f"- {name}: none in this sweep, the greediest setting is the best."
    learnt_change = greediest.learnt.mean - best.learnt.mean
    true_change = greediest.true.mean - best.true.mean
    if learnt_change <= 0:
        result = "worse by both"
    elif differ(best.true, greediest.true):
        result = "over-optimised"
    else:
        result = "not clear, within two standard errors"
    return (
        f"- {name}: from {best.value} to {greediest.value} the learnt reward changes by "
        f"{learnt_change:+.2f}, the true reward by {true_change:+.3f}: {result}."
    )


def findings(results):
    """The results in words."""
    lines = [
        "The DPO paper (arXiv 2305.18290, section 6.1 and figure 2) found on controlled sentiment "
        "that DPO has the highest reward at every KL, above PPO even with the true reward. "
        "In summarisation, DPO kept its win rate over temperatures while PPO's fell to the "
        "base model's. Here:",
        "",
        *describe_budgets(results.points),
        "",
    ]
    if not is_one_seed(results.points):
        lines += ["Over-optimisation, from each method's best setting to its greediest:", ""]
        for name, of_method in results.points.items():
            if len(of_method) > 1:
                lines.append(describe_over_optimisation(name, of_method))
        lines.append("")
    for name in ("DPO", "PPO, learnt reward"):
        if name in results.win_rates:
            rates = ", ".join(f"{100 * rate.mean:.0f} %" for rate in results.win_rates[name])
            lines.append(f"Win rate of {name} from temperature 0 to 1: {rates}.")
    return lines


def method_table(measured, base):
    """One line per method and value, means over seeds."""
    lines = [
        "| method | setting | KL | true reward | learnt reward | length | ended | kinds named "
        "| more than 3 | minutes per run |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, value), seeds in {("reference", None): [base], **measured}.items():
        cells = [
            name,
            "-" if value is None else f"{METHODS[name].sweep} {value}",
            average(seeds, "kl").format(2),
            average(seeds, "true").format(3),
            average(seeds, "learnt").format(2),
            f"{average(seeds, 'length').mean:.1f}",
            f"{100 * average(seeds, 'ended').mean:.0f} %",
            f"{average(seeds, 'kinds').mean:.1f}",
            f"{100 * average(seeds, 'beyond').mean:.0f} %",
            f"{average(seeds, 'minutes').mean:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def win_rate_table(results):
    """One line per method at its best value, one column per temperature."""
    header = " | ".join(f"T = {temperature}" for temperature in TEMPERATURES)
    lines = [f"| method | setting | {header} |", "|---|---|" + "---:|" * len(TEMPERATURES)]
    for name, row in results.win_rates.items():
        value = results.best.get(name)
        setting = "-" if value is None else f"{METHODS[name].sweep} {value}"
        rates = " | ".join(rate.format_percent() for rate in row)
        lines.append(f"| {name} | {setting} | {rates} |")
    return lines


HEAD = "# True reward against KL to the reference"


def report(args, measured, base):
    """Write report.md, logs/frontier.json and figures/frontier.png and .svg in args.out."""
    path = os.path.join(args.out, "report.md")
    check_report(path, HEAD)
    results = Results.of(measured, base)
    base_true = np.array(base.true_at["1.0"])
    base_error = np.std(base_true) / len(base_true) ** 0.5
    command = f"python -m studies.frontier.frontier --seeds={args.seeds} --values={args.values}"
    if args.small:
        command += " --small"
    lines = [
        HEAD,
        "",
        f"{args.seeds} seeds, mean ± standard error over them; {VAL_ROWS} held-out prompts. "
        "KL is in nats per response, on the policy's own samples. The reference's true reward is "
        f"{base.true:.3f} ± {base_error:.3f}; this is the error of one sample per prompt, and "
        f"that of any single policy is as large. Made by `{command}`.",
        "",
        *findings(results),
        "",
        "## All settings",
        "",
        *method_table(measured, base),
        "",
        "## Win rate against the reference's sample at temperature 1",
        "",
        "By the true reward. Each method has its best setting, chosen on these same prompts.",
        "",
        *win_rate_table(results),
        "",
        "## One sample of each method, at its greediest setting",
        "",
    ]
    for name, of_method in results.points.items():
        example = measured[name, of_method[-1].value][0].example
        lines.append(f"- {name}: {example!r}")
    lines += ["", "![True reward, learnt reward and win rate](figures/frontier.png)", ""]
    for folder in ("figures", "logs"):
        os.makedirs(os.path.join(args.out, folder), exist_ok=True)
    with atomic_write(path) as f:
        f.write("\n".join(lines))
    results.save(os.path.join(args.out, "logs", "frontier.json"))
    draw(os.path.join(args.out, "figures", "frontier.png"), results)
    print("\n".join(lines))


def draw(path, results):
    """Three panels: true reward against KL, learnt reward against KL, win rate by temperature."""
    markers = ("o", "s", "^", "v", "D", "P")
    with style():
        fig, (true_ax, learnt_ax, win_ax) = plt.subplots(1, 3, figsize=(10, 3.6))
        for i, (name, of_method) in enumerate(results.points.items()):
            look = {"color": PALETTE[i], "marker": markers[i], "label": name}
            of_method = sorted(of_method, key=lambda point: point.kl.mean)
            kl = [point.kl for point in of_method]
            plot_means(true_ax, kl, [point.true for point in of_method], **look)
            plot_means(learnt_ax, kl, [point.learnt for point in of_method], **look)
            plot_means(win_ax, list(map(Mean, TEMPERATURES)), results.win_rates[name], **look)
        reference_line(true_ax, results.reference, "reference")
        base_rates = results.win_rates["reference"]
        look = {"color": GREY, "linestyle": (0, (4, 3)), "label": "reference"}
        plot_means(win_ax, list(map(Mean, TEMPERATURES)), base_rates, **look)
        true_ax.plot([], [], " ", label="bars: standard error over seeds")
        kl_label = "KL to the reference (nats per response)"
        true_ax.set(title="True reward", xlabel=kl_label, ylabel="true reward")
        learnt_ax.set(
            title="Learnt reward", xlabel=kl_label, ylabel="reward model's score", ylim=(0, None)
        )
        win_ax.set(
            title="Best setting of each method",
            xlabel="sampling temperature",
            ylabel="win rate against the reference",
        )
        figure_legend(fig, ncols=4)
        save_figure(fig, path)


def plot_means(ax, x, y, **look):
    """A line through means, with the standard errors of both coordinates."""
    ax.errorbar(
        [mean.mean for mean in x],
        [mean.mean for mean in y],
        xerr=[mean.error for mean in x],
        yerr=[mean.error for mean in y],
        elinewidth=0.9,
        **look,
    )


# ---------------------------------------------------------------------------------- the whole sweep


def use_one_thread():
    """For each worker process."""
    distributed.configure_torch("cpu")
    torch.set_num_threads(1)


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    count = cli.number_type(int, 1)
    parser.add_argument("--seeds", type=count, default=3, help="seeds of each method, from 0 on")
    parser.add_argument("--values", type=count, default=3, help="values of each sweep, from first")
    parser.add_argument("--workers", type=count, default=2, help="parallel runs, one thread each")
    parser.add_argument(
        "--runs", default="out/frontier", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument(
        "--out", default="studies/frontier", help="folder of report.md, figures/ and logs/"
    )
    parser.add_argument(
        "--small", action="store_true", help="two steps per run, to test the code only"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw the figure from logs/frontier.json, no runs"
    )
    args = parser.parse_args(argv)
    if args.redraw:
        results = Results.load(os.path.join(args.out, "logs", "frontier.json"))
        return draw(os.path.join(args.out, "figures", "frontier.png"), results)

    distributed.configure_torch("cpu")
    pretrained, reference, ranked = (f"{args.runs}/{n}" for n in ("pretrain", "sft", "ranked"))
    small = ["--max_steps=2", "--eval_batches=1"] if args.small else []
    fit([f"{CONFIGS}/pretrain.py", f"--out_dir={pretrained}", *small])
    fit([f"{CONFIGS}/sft.py", f"--out_dir={reference}", f"--init={pretrained}", *small])
    rank(ranked, reference)

    inputs = [f"--init={reference}", f"--data={ranked}", *small]
    rewards = [f"{args.runs}/reward_{seed}" for seed in range(args.seeds)]
    reward_args = [
        [f"{CONFIGS}/reward.py", f"--out_dir={out_dir}", f"--seed={seed}", *inputs]
        for seed, out_dir in enumerate(rewards)
    ]
    runs = sweep_runs(args.runs, rewards, args.values, inputs, args.small)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, use_one_thread) as pool:
        list(pool.map(fit, reward_args))
        list(pool.map(fit, [run.args for run in itertools.chain(*runs.values())]))
        base = pool.submit(measure, reference, reference, rewards[0], ranked)
        pending = {}
        for key, seeds in runs.items():
            pending[key] = [
                pool.submit(measure, run.out_dir, reference, run.reward, ranked) for run in seeds
            ]
        measured = {}
        for key, seeds in pending.items():
            measured[key] = [future.result() for future in seeds]
        base = base.result()
    report(args, measured, base)


if __name__ == "__main__":
    sys.exit(cli.run(main))
