"""RLHF or DPO: true reward against KL to the reference, on a task whose reward is known.

    python frontier.py                       everything, to studies/frontier/results; 40 minutes on two cores
    python frontier.py --seeds=1 --values=1  one point a method

The reference samples three responses to each prompt, the true reward (data/pydocs/scorer.py) ranks them, and every method
learns from these same rows: PPO through a reward model fitted to them, or from the true reward itself; DPO (all pairs),
K = 3 Plackett-Luce, SimPO and Preferred-FT straight from the ranking. Each is swept over the price of KL and seeds; then
everyone answers the same held-out prompts. Interrupted, it goes on where it stopped.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from nanospin import checkpoint
from nanospin import distributed
import train
from data.rows import encode_rows, read_rows, write_rows
from data.batch import permutation
from data.files import write_json
from data.folder import write_meta
from data.pydocs.scorer import concrete, kinds
from eval import validation_rows, reward_scores, response_logprobs
from tools.plot import minutes
from sample import number_type, respond

ROWS, VAL_ROWS, K = 1536, 256, 3
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = {  # name -> (config, its further settings, the swept setting, its values from cautious to greedy)
    "PPO, learnt reward": ("ppo", ["--reward={reward}"], "kl_coef", (0.5, 0.15, 0.03)),
    "PPO, true reward": (
        "ppo",
        ["--reward=data.pydocs.scorer:concrete"],
        "kl_coef",
        (0.5, 0.15, 0.03),
    ),
    "DPO": ("dpo", [], "beta", (2.0, 0.7, 0.2)),
    "Plackett-Luce, K = 3": ("dpo", ["--loss_type=pl"], "beta", (2.0, 0.7, 0.2)),
    "SimPO": (
        "dpo",
        ["--loss_type=simpo", "--beta=2", "--margin=0.5"],
        "lr",
        (4e-5, 8e-5, 1.6e-4),
    ),  # it has no price of KL
    "Preferred-FT": ("preferred_ft", [], None, (None,)),
}


def fit(args):
    """One run of the trainer in this process; what it says goes beside its folder."""
    out = next(a[len("--out_dir=") :] for a in args if a.startswith("--out_dir="))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    began = time.time()
    with (
        open(out + ".log", "a", encoding="utf-8") as f,
        contextlib.redirect_stdout(f),
        contextlib.redirect_stderr(f),
    ):
        train.main(args)
    print(f"{time.time() - began:4.0f} s  train.py {' '.join(args)}", flush=True)


def rank(folder, reference, source="data/pydocs"):
    """Three responses of the reference to each prompt, ranked by the true reward; the source's own split."""
    if os.path.exists(os.path.join(folder, "meta.json")):
        return
    model, enc, meta = checkpoint.load_model(reference)
    settings = {name: meta["config"][name] for name in ("template", "max_prompt", "max_response")}
    os.makedirs(folder, exist_ok=True)
    for split, n in (("train", ROWS), ("val", VAL_ROWS)):
        rows = validation_rows(source, n) if split == "val" else read_rows(f"{source}/train.jsonl")
        rows = list({row["prompt"]: row for row in rows}.values())
        rows = [rows[i] for i in permutation(len(rows), 0, 0)[:n]]
        drawn = [
            respond(model, enc, rows=rows, seed=k + K * (split == "val"), **settings)
            for k in range(K)
        ]
        ranked = []
        for i, row in enumerate(rows):
            answers = sorted(
                [
                    (concrete(row, texts[i]), texts[i], ids[i])
                    for texts, ids in drawn
                    if ids[i] is not None
                ],
                key=lambda a: -a[0],
            )
            if answers:
                ranked.append(
                    {name: row[name] for name in ("prompt", "group") if name in row}
                    | {
                        "responses": [a[1] for a in answers],
                        "ids": [a[2] for a in answers],
                        "scores": [a[0] for a in answers],
                    }
                )
        write_rows(os.path.join(folder, f"{split}.jsonl"), ranked)
    write_meta(
        folder,
        None,
        f"{K} samples a prompt of {checkpoint.resolve(reference)}, ranked by data.pydocs.scorer:concrete",
    )


def measure(run, reference, judge, folder):
    """What a policy says to the held-out prompts, at temperature 1 and at the others -> figures, kept in RUN.json."""
    path = run + ".json"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    rows = read_rows(f"{folder}/val.jsonl")
    model, enc, meta = checkpoint.load_model(run)
    ref, judge = checkpoint.load_model(reference)[0], checkpoint.load_model(judge)[0]
    settings = {name: meta["config"][name] for name in ("template", "max_prompt", "max_response")}
    figures = {"true_at": {}}
    for temperature in TEMPERATURES:
        texts, ids = respond(model, enc, rows=rows, seed=7, temperature=temperature, **settings)
        true = [concrete(row, text) for row, text in zip(rows, texts)]
        figures["true_at"][str(temperature)] = true
    said = [
        {"prompt": row["prompt"], "responses": [text], "ids": [y]}
        for row, text, y in zip(rows, texts, ids)
    ]  # at temperature 1, the last
    encoded, _ = encode_rows(
        said,
        enc,
        settings["template"],
        model.config.block_size,
        settings["max_prompt"],
        settings["max_response"],
    )
    kl = (
        response_logprobs(model, encoded, 4096, "cpu")
        - response_logprobs(ref, encoded, 4096, "cpu")
    )[:, 0]
    figures |= {
        "true": float(np.mean(true)),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "learnt": float(reward_scores(judge, encoded, 4096, "cpu").mean()),
        "length": float(np.mean([len(y) for y in ids])),
        "ended": float(np.mean([y[-1] == enc.eot_token for y in ids])),
        "kinds": float(np.mean([kinds(text) for text in texts])),
        "beyond": float(np.mean([kinds(text) > 3 for text in texts])),
        "minutes": minutes(run),
        "example": texts[0],
    }
    write_json(path, figures)
    print(
        f"{run}: "
        + ", ".join(
            f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float)
        ),
        flush=True,
    )
    return figures


def spread(values):
    """(mean, standard error over seeds; 0 of one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(
        values
    ) > 1 else 0.0


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=number_type(int, 1), default=3, help="of each method, from 0 on"
    )
    parser.add_argument(
        "--values", type=number_type(int, 1), default=3, help="of each sweep, the first ones"
    )
    parser.add_argument(
        "--workers", type=number_type(int, 1), default=2, help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--runs",
        default="out/frontier",
        help="the folder of the runs; those that are finished stay",
    )
    parser.add_argument(
        "--out",
        default="studies/frontier/results",
        help="the folder of the report, the figure and the figures' JSON",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="two steps a run, to try the machinery: its figures say nothing",
    )
    args = parser.parse_args(argv)
    distributed.configure_torch("cpu")
    at, less = (
        (lambda name: f"{args.runs}/{name}"),
        (["--max_steps=2", "--eval_batches=1"] if args.small else []),
    )
    fit(["studies/frontier/config/pretrain.py", f"--out_dir={at('pretrain')}", *less])
    fit(["studies/frontier/config/sft.py", f"--out_dir={at('sft')}", f"--init={at('pretrain')}", *less])
    rank(at("ranked"), at("sft"))
    inputs = [f"--init={at('sft')}", f"--data={at('ranked')}", *less]
    rewards = [f"{at('reward')}_{seed}" for seed in range(args.seeds)]
    jobs = [
        ["studies/frontier/config/reward.py", f"--out_dir={rewards[seed]}", f"--seed={seed}", *inputs]
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), one_thread
    ) as pool:
        list(pool.map(fit, jobs))
        jobs, runs = [], {}
        for seed in range(args.seeds):
            for name, (file, more, swept, values) in METHODS.items():
                for value in values[: args.values]:
                    out = at(f"{''.join(c if c.isalnum() else '_' for c in name)}_{value}_{seed}")
                    runs.setdefault((name, value), []).append((out, rewards[seed]))
                    jobs.append(
                        [
                            f"config/frontier_{file}.py",
                            f"--out_dir={out}",
                            f"--seed={seed}",
                            *inputs,
                            *(a.format(reward=rewards[seed]) for a in more),
                        ]
                        + [f"--{swept}={value}"] * bool(swept)
                        + ["--rounds=2", "--max_rows=16", "--batch_size=8"]
                        * (args.small and file == "ppo")
                    )
        list(pool.map(fit, jobs))
        of_base = pool.submit(measure, at("sft"), at("sft"), rewards[0], at("ranked"))
        measured = {
            key: [pool.submit(measure, run, at("sft"), judge, at("ranked")) for run, judge in some]
            for key, some in runs.items()
        }
        measured = {key: [f.result() for f in some] for key, some in measured.items()}
        base = of_base.result()
    report(args, measured, base)


def one_thread():
    distributed.configure_torch("cpu")
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ the report


def points(measured):
    """{method: [(value, (KL, its error), (true reward, its error), (learnt reward, its error))]}, errors over seeds."""
    found = {}
    for (name, value), some in measured.items():
        found.setdefault(name, []).append(
            (value, *(spread([f[key] for f in some]) for key in ("kl", "true", "learnt")))
        )
    return found


def win_rates(some, base):
    """[(mean, error) at each temperature]: share of held-out prompts on which the true reward is above that of the reference's sample
    at temperature 1, equal ones half."""
    against, rates = np.array(base["true_at"]["1.0"]), []
    for t in TEMPERATURES:
        ours = [np.array(f["true_at"][str(t)]) for f in some]
        rates.append(spread([float(((o > against) + 0.5 * (o == against)).mean()) for o in ours]))
    return rates


def verdict(found, base, rates):
    """What the figures say, in words, beside what the DPO paper found."""
    said = [
        "DPO's paper (arXiv 2305.18290, section 6.1 and figure 2) found on controlled sentiment that DPO has the highest reward at every KL, above PPO even with "
        "the true reward, and in summarisation that DPO keeps its win rate over temperatures where PPO falls to the base model's. Here:",
        "",
    ]
    largest = max(p[1][0] for some in found.values() for p in some)
    led = {}  # budget -> the methods that have the highest true reward within it, or are not told apart from that one
    for x in [x for x in (1, 2, 5, 10, 20, 40) if x <= largest * 1.5]:
        best = {
            name: max(p[2] for p in some if p[1][0] <= x)
            for name, some in found.items()
            if any(p[1][0] <= x for p in some)
        }
        if best:
            ranked = sorted(best.items(), key=lambda kv: -kv[1][0])
            top, error = ranked[0][1]
            led[x] = [name for name, (m, e) in ranked if top - m <= 2 * (error**2 + e**2) ** 0.5]
            said.append(
                f"- KL of at most {x} nats: "
                + ", ".join(f"{name} {m:.3f} +- {e:.3f}" for name, (m, e) in ranked)
                + "".join(
                    f"; no setting of {name} is so near" for name in found if name not in best
                )
            )
    said += [
        "",
        "**Highest true reward within "
        + "; within ".join(f"{x}: {' and '.join(names)}" for x, names in led.items())
        + " (those within two standard errors of the first).** "
        + (
            "This agrees with the paper's figure."
            if all(names == ["DPO"] for names in led.values())
            else "The paper's ordering, DPO alone above all at every KL, is not found here."
        ),
    ]
    said += ["", "Over-optimisation, from each method's best setting to its greediest:", ""]
    for name, some in found.items():
        best, last = max(some, key=lambda p: p[2][0]), some[-1]
        if len(some) > 1:
            fell, rose = best[2][0] - last[2][0], last[3][0] - best[3][0]
            clear = fell > 2 * (best[2][1] ** 2 + last[2][1] ** 2) ** 0.5
            said.append(
                f"- {name}: "
                + (
                    "none in this sweep, the greediest is the best."
                    if last is best
                    else f"from {best[0]} to {last[0]} the learnt reward changes by {rose:+.2f}, the true one by {-fell:+.3f}: "
                    + (
                        "over-optimised."
                        if clear and rose > 0
                        else "not clear, within two standard errors."
                        if rose > 0
                        else "worse by both."
                    )
                )
            )
    said.append("")
    for name in ("DPO", "PPO, learnt reward"):
        if name in rates:
            said.append(
                f"Win rate of {name} against the reference's sample from temperature 0 to 1: "
                + ", ".join(f"{100 * m:.0f} %" for m, _ in rates[name])
                + "."
            )
    return said


def report(args, measured, base):
    """report.md, frontier.png and frontier.json in args.out."""
    found = points(measured)
    best = {
        name: max(
            (v for n, v in measured if n == name),
            key=lambda v: np.mean([f["true"] for f in measured[name, v]]),
        )
        for name in found
    }
    rates = {name: win_rates(measured[name, value], base) for name, value in best.items()}
    rates["reference"] = win_rates([base], base)
    said = verdict(found, base, rates)
    os.makedirs(args.out, exist_ok=True)
    lines = [
        "# True reward against KL to the reference",
        "",
        *said,
        "",
        f"The reference's true reward is {base['true']:.3f} +- {np.std(base['true_at']['1.0']) / len(base['true_at']['1.0']) ** 0.5:.3f}, the error that of one sample a prompt, as every "
        f"single policy's has. {args.seeds} seeds, mean +- standard error over them; KL in nats a response, of the policy's own samples; {VAL_ROWS} held-out prompts. "
        f"Made by `python frontier.py --seeds={args.seeds} --values={args.values}{' --small' * args.small}`.",
        "",
        "| method | setting | KL | true reward | learnt reward | length | ended by eot | kinds named | more than 3 | minutes a run |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, value), runs in {("reference", None): [base], **measured}.items():
        setting = f"{METHODS[name][2]} {value}" if value is not None else "-"
        kl, true, learnt, length, ended, named, beyond, took = (
            [f[key] for f in runs]
            for key in ("kl", "true", "learnt", "length", "ended", "kinds", "beyond", "minutes")
        )
        cells = [
            "{:.2f} +- {:.2f}".format(*spread(kl)),
            "{:.3f} +- {:.3f}".format(*spread(true)),
            "{:.2f} +- {:.2f}".format(*spread(learnt)),
            f"{np.mean(length):.1f}",
            f"{100 * np.mean(ended):.0f} %",
            f"{np.mean(named):.1f}",
            f"{100 * np.mean(beyond):.0f} %",
            f"{np.mean(took):.1f}",
        ]
        lines.append(f"| {name} | {setting} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Win rate against the reference's sample at temperature 1, by the true reward, of each method's best setting (chosen on these same prompts):",
        "",
        "| method | setting | " + " | ".join(f"T = {t}" for t in TEMPERATURES) + " |",
        "|---|---|" + "---:|" * len(TEMPERATURES),
    ]
    for name, row in rates.items():
        lines.append(
            f"| {name} | {best.get(name) if best.get(name) is not None else '-'} | "
            + " | ".join(f"{100 * m:.1f} +- {100 * e:.1f} %" for m, e in row)
            + " |"
        )
    lines += (
        ["", "A sample of each at its greediest setting:", ""]
        + [
            f"- {name}: {measured[name, some[-1][0]][0]['example']!r}"
            for name, some in found.items()
        ]
        + ["", "![](frontier.png)", ""]
    )
    with open(os.path.join(args.out, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    write_json(
        os.path.join(args.out, "frontier.json"),
        {"reference": base["true"], "points": found, "win_rates": rates, "best": best},
    )
    draw(os.path.join(args.out, "frontier.png"), found, rates, base)
    print("\n".join(lines))


def draw(path, found, rates, base):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    for name, some in found.items():
        some = sorted(some, key=lambda p: p[1][0])
        left.errorbar(
            [p[1][0] for p in some],
            [p[2][0] for p in some],
            xerr=[p[1][1] for p in some],
            yerr=[p[2][1] for p in some],
            marker="o",
            capsize=2,
            label=name,
        )
    left.plot([0], [base["true"]], "k*", markersize=10, label="reference")
    left.set(xlabel="KL to the reference, nats a response", ylabel="true reward")
    for name, row in rates.items():
        right.errorbar(
            TEMPERATURES,
            [m for m, _ in row],
            yerr=[e for _, e in row],
            marker="o",
            capsize=2,
            label=name,
            color="k" if name == "reference" else None,
        )
    right.axhline(0.5, color="grey", linewidth=0.5)
    right.set(xlabel="sampling temperature", ylabel="win rate against the reference's sample")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
