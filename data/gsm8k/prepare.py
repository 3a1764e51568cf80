"""GSM8K: grade-school mathematics, worked solutions that end in "#### number".

    python -m data.gsm8k.prepare

From openai/gsm8k (arXiv 2110.14168, MIT), its set "main": 7,473 training and 1,319 test problems.
The test split is val.jsonl, so never train on it. K = 1. data/gsm8k/scorer.py checks answers.

The calculator's notes, such as <<48/2=24>>, are removed: a model would have to run them.
"""

import re
import sys

from data import cli, hub


def convert(row, dropped):
    question = row["question"].strip()
    solution = re.sub(r"<<[^<>]*>>", "", row["answer"]).strip()
    if "####" not in solution:
        return hub.drop(dropped, "solutions without ####")
    return [{"prompt": question, "responses": [solution], "group": question}]


def main(argv=None):
    parser = hub.argument_parser(__doc__, "openai/gsm8k", __file__)
    args = parser.parse_args(argv)
    splits = [("train", "train"), ("test", "val")]
    hub.prepare_rows(args, splits, ("question", "answer"), convert, config="main")


if __name__ == "__main__":
    sys.exit(cli.run(main))
