"""Sums, generated: "What is 347 + 58?" -> "405". Exact match can be checked.

    python -m data.addition.prepare                      numbers below 1,000, 20,000 rows

a + b and b + a are one group. The tokenizer is bytes.
"""

import argparse
import os

import numpy as np

from data.folder import split_of, write_meta
from data.rows import write_rows

HERE = os.path.dirname(os.path.abspath(__file__))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=20000, help="problems drawn; the same one counts once"
    )
    parser.add_argument("--below", type=int, default=1000, help="both numbers are")
    parser.add_argument("--out", default=HERE, help="the data folder to write")
    args = parser.parse_args(argv)
    rng, rows = np.random.default_rng(0), {"train": {}, "val": {}}
    for a, b in rng.integers(args.below, size=(args.rows, 2)).tolist():
        group = f"{min(a, b)}+{max(a, b)}"
        rows[split_of(group)][a, b] = {
            "prompt": f"What is {a} + {b}?",
            "responses": [str(a + b)],
            "group": group,
        }
    os.makedirs(args.out, exist_ok=True)
    for split, some in rows.items():
        write_rows(os.path.join(args.out, f"{split}.jsonl"), some.values())
    write_meta(
        args.out,
        "bytes",
        f"a + b below {args.below}",
        **{f"{split}_rows": len(some) for split, some in rows.items()},
    )
    print(
        f"{args.out}: " + ", ".join(f"{len(some):,} {split} rows" for split, some in rows.items())
    )


if __name__ == "__main__":
    main()
