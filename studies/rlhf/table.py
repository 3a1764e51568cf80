"""The tables of studies/rlhf, from the runs of run.sh, and which methods differ in accuracy.

    python -m studies.rlhf.table out/rlhf/1 out/rlhf/2 out/rlhf/3
    python -m studies.rlhf.table studies/rlhf/logs/1 studies/rlhf/logs/2 studies/rlhf/logs/3

An argument is the folder of a seed, with its runs or their logs. ± is Student's 95 % interval over
the seeds; differences are paired by seed.
"""

import itertools
import sys

from data import cli
from tools.plot import markdown_table, read_metrics, t_interval

TITLES = {
    "reward": "reward model",
    "dpo_pairs": "DPO, all pairs",
    "pl": "Plackett-Luce",
    "pl_depth_1": "Plackett-Luce, first term only (`rank_depth = 1`)",
    "pl_taylor_1": "Plackett-Luce, T_1 (`taylor_order = 1`)",
    "ipo": "IPO",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "dpo_of_preferred_ft": "DPO on Preferred-FT",
}
PPO_METRICS = {
    "reward": "learned reward",
    "kl": "KL to the reference (nats per response)",
    "length": "length (tokens)",
    "ended": "share that ends within 64 tokens",
    "pretrain_loss": "pretraining loss",
}


def evaluation(seed: str, run: str, which: int) -> dict:
    """The first (0) or the last (-1) evaluation of a run."""
    return read_metrics(f"{seed}/{run}", "eval")[which]


def format_mean(values: list[float], digits: int, sign: str = "") -> str:
    """The mean, with its interval if there are several values. sign: "+" for a difference."""
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f}"
    mean, half_width = t_interval(values)
    return f"{mean:{sign}.{digits}f} ± {half_width:.{digits}f}"


def ranking_table(seeds: list[str]) -> list[str]:
    """Share of held-out pairs that each objective ranks correctly, and its validation loss."""
    by_length = [100 * evaluation(seed, "reward", -1)["length_acc"] for seed in seeds]
    rows = [["length alone", format_mean(by_length, 1), "", "", ""]]
    for run, title in TITLES.items():
        first = [evaluation(seed, run, 0) for seed in seeds]
        last = [evaluation(seed, run, -1) for seed in seeds]
        right = [100 * metrics["acc"] for metrics in last]
        above_length = [acc - length for acc, length in zip(right, by_length)]
        losses = ["", ""]
        if run != "reward":
            before = [metrics["val_loss"] for metrics in first]
            after = [metrics["val_loss"] for metrics in last]
            change = [new - old for new, old in zip(after, before)]
            losses = [format_mean(after, 3), format_mean(change, 3, "+")]
        rows.append([title, format_mean(right, 1), format_mean(above_length, 1, "+"), *losses])
    head = ["", "pairs ranked correctly (%)", "above length alone", "validation loss", "change"]
    return markdown_table(head, rows)


def ppo_table(seeds: list[str]) -> list[str]:
    """The policy of PPO before the first and after the last round, on held-out prompts."""
    rows = []
    for name, title in PPO_METRICS.items():
        before = [evaluation(seed, "ppo", 0)[name] for seed in seeds]
        after = [evaluation(seed, "ppo", -1)[name] for seed in seeds]
        change = [new - old for new, old in zip(after, before)]
        means = [format_mean(before, 3), format_mean(after, 3), format_mean(change, 3, "+")]
        rows.append([title, *means])
    return markdown_table(["PPO", "before", "after 20 rounds", "change"], rows)


def pairs_that_differ(seeds: list[str]) -> list[str]:
    """A line for each two methods whose difference in accuracy has an interval without 0."""
    accuracy = {}
    for run in TITLES:
        accuracy[run] = [100 * evaluation(seed, run, -1)["acc"] for seed in seeds]
    lines = []
    for one, other in itertools.combinations(TITLES, 2):
        differences = [a - b for a, b in zip(accuracy[one], accuracy[other])]
        mean, half_width = t_interval(differences)
        if abs(mean) > half_width:
            lines.append(f"{TITLES[one]} over {TITLES[other]}: {format_mean(differences, 1, '+')}")
    return lines


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", metavar="SEED", help="the folder of a seed")
    args = parser.parse_args(argv)
    lines = [*ranking_table(args.seeds), "", *ppo_table(args.seeds)]
    if len(args.seeds) > 1:
        lines += ["", "pairs that differ in accuracy:", *pairs_that_differ(args.seeds)]
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(cli.run(main))
