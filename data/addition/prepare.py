"""Sums, generated: "What is 347 + 58?" -> "405". Exact match can be checked.

    python -m data.addition.prepare                      # 20,000 draws of numbers below 1,000
    python -m data.addition.prepare --answers=1500 --out=data/sums

Writes train.jsonl and val.jsonl, K = 1, for the tokenizer "bytes". a + b and b + a are one group.
With --answers there are two folders with the same val.jsonl: OUT/answers has that many training
rows, and OUT/prompts the prompts of the others, without responses.
"""

import os
import sys

import numpy as np

from data import cli
from data.folder import split_of
from data.generated import add_answer_arguments, check_answer_folders, write_answer_folders

HERE = os.path.dirname(os.path.abspath(__file__))


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=cli.number_type(int, 1, 10**8),
        default=20000,
        help="number of draws; a repeated problem is one row",
    )
    parser.add_argument(
        "--below",
        type=cli.number_type(int, 1, 2**62),
        default=1000,
        help="both numbers are below this",
    )
    add_answer_arguments(parser)
    parser.add_argument("--out", default=HERE, help="data folder to write")
    args = parser.parse_args(argv)
    check_answer_folders(args.out, args.answers)

    rng = np.random.default_rng(args.seed)
    rows = {"train": {}, "val": {}}  # side -> {(a, b): row}
    for a, b in rng.integers(args.below, size=(args.rows, 2)).tolist():
        group = f"{min(a, b)}+{max(a, b)}"
        rows[split_of(group)][a, b] = {
            "prompt": f"What is {a} + {b}?",
            "responses": [str(a + b)],
            "group": group,
        }

    train, val = list(rows["train"].values()), list(rows["val"].values())
    source = f"a + b below {args.below}"
    write_answer_folders(args.out, args.answers, source, train, val)


if __name__ == "__main__":
    sys.exit(cli.run(main))
