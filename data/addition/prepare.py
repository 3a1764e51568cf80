"""Sums, generated: "What is 347 + 58?" -> "405". Exact match can be checked.

    python -m data.addition.prepare                      # 20,000 draws of numbers below 1,000

Writes train.jsonl and val.jsonl, K = 1, for the tokenizer "bytes". a + b and b + a are one group.
"""

import os
import sys

import numpy as np

from data import cli
from data.files import check_output
from data.folder import check_other_data, lock_folder, split_of, write_meta
from data.rows import write_rows

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
    parser.add_argument("--out", default=HERE, help="data folder to write")
    args = parser.parse_args(argv)
    check_output(os.path.join(args.out, "meta.json"), is_data=True)
    check_other_data(args.out, (".jsonl",))

    rng = np.random.default_rng(0)
    rows = {"train": {}, "val": {}}  # side -> {(a, b): row}
    for a, b in rng.integers(args.below, size=(args.rows, 2)).tolist():
        group = f"{min(a, b)}+{max(a, b)}"
        rows[split_of(group)][a, b] = {
            "prompt": f"What is {a} + {b}?",
            "responses": [str(a + b)],
            "group": group,
        }

    with lock_folder(args.out):
        sizes = {}
        for side in ("train", "val"):
            write_rows(os.path.join(args.out, f"{side}.jsonl"), rows[side].values())
            sizes[f"{side}_rows"] = len(rows[side])
        write_meta(args.out, "bytes", f"a + b below {args.below}", **sizes)
    print(f"{args.out}: {sizes['train_rows']:,} train rows, {sizes['val_rows']:,} val rows")


if __name__ == "__main__":
    sys.exit(cli.run(main))
