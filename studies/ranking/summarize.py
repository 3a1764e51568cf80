"""The table of studies/ranking: exact match on held-out sums, mean over seeds, and differences.

    python -m studies.ranking.summarize out/ranking 1 2 3

A difference is paired: both methods start from the same SFT model of a seed and are measured on the
same rows. Its standard error is that of the mean over seeds, from the seeds' differences; with few
seeds it is itself rough, so the error from the rows alone stands beside it.
"""

import argparse
import json
import sys

import numpy as np

from data import cli
from data.addition.scorer import exact_match
from data.rows import read_rows

METHODS = ("sft", "sft_more", "online_pl", "grpo")


def right_answers(folder: str, name: str) -> np.ndarray:
    """Whether each held-out sum was answered right (rows,), in the order of the rows."""
    rows = read_rows(f"{folder}/{name}.jsonl")
    return np.array([exact_match(row, row["responses"][0]) for row in rows])


def seconds_of(run: str) -> float:
    """Wall-clock seconds that a run has logged."""
    total = 0.0
    with open(f"{run}/metrics.jsonl", encoding="utf-8") as f:
        for line in f:
            total += json.loads(line)["seconds"]
    return total


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", help="folder that run.sh has written")
    parser.add_argument("seeds", nargs="+", help="the seeds that it was run with")
    args = parser.parse_args(argv)

    print("| method | greedy | sampled | greedy against SFT continued | minutes |")
    print("|---|---:|---:|---:|---:|")
    for method in METHODS:
        greedy, sampled, differences, row_errors, minutes = [], [], [], [], []
        for seed in args.seeds:
            folder = f"{args.out}/{seed}/eval"
            right = right_answers(folder, f"{method}_greedy")
            baseline = right_answers(folder, "sft_more_greedy")
            greedy.append(right.mean())
            sampled.append(right_answers(folder, method).mean())
            differences.append((right - baseline).mean())
            row_errors.append((right - baseline).std() / len(right) ** 0.5)
            minutes.append(seconds_of(f"{args.out}/{seed}/{method}") / 60)
        n = len(args.seeds)
        across_seeds = np.std(differences, ddof=1) / n**0.5 if n > 1 else np.nan
        from_rows = np.linalg.norm(row_errors) / n
        print(
            f"| {method} | {100 * np.mean(greedy):.1f} % | {100 * np.mean(sampled):.1f} % "
            f"| {100 * np.mean(differences):+.1f} (SE over seeds {100 * across_seeds:.1f}, "
            f"over rows {100 * from_rows:.1f}) | {np.mean(minutes):.1f} |"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
