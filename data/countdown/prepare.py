"""Countdown, generated: "Reach 35 with 3, 4, 5." -> "(3 + 4) * 5". Many answers can be right.

    python -m data.countdown.prepare                 # 40,000 draws of three numbers below 20
    python -m data.countdown.prepare --answers=3000 --out=data/games

A problem asks for an expression with + - * / and parentheses that uses each given number exactly
once. Targets are whole numbers from 1. Writes train.jsonl and val.jsonl, K = 1, for the tokenizer
"bytes". The response is one random solution, in which every partial result is a whole number from
1. data/countdown/scorer.py accepts all solutions.

The numbers in any order and the target are one group. --answers as in data/addition: OUT/answers
has that many training rows, OUT/prompts the prompts of the others.
"""

import os
import random
import sys

from data import cli
from data.folder import split_of
from data.generated import add_answer_arguments, check_answer_folders, write_answer_folders

HERE = os.path.dirname(os.path.abspath(__file__))


def combine(a, b, rng):
    """A random operation on two (value, text, operator) -> a third one.

    operator: the last one applied, "" for a number. The result is a whole number from 1.
    """
    if a[0] < b[0]:
        a, b = b, a
    (x, left, left_op), (y, right, right_op) = a, b
    values = {"+": x + y, "*": x * y}
    if x > y:
        values["-"] = x - y
    if x % y == 0:
        values["/"] = x // y
    op = rng.choice(list(values))
    if op in "+*" and rng.random() < 0.5:
        left, left_op, right, right_op = right, right_op, left, left_op
    # only the parentheses that the value needs
    if op in "*/" and left_op in ("+", "-"):
        left = f"({left})"
    is_lower = op in "*/" and right_op in ("+", "-")
    is_undone = op == "-" and right_op in ("+", "-") or op == "/" and right_op in ("*", "/")
    if is_lower or is_undone:
        right = f"({right})"
    return values[op], f"{left} {op} {right}", op


def draw_problem(rng, numbers, below):
    """A random problem and its solution: (numbers, target, text)."""
    given = [rng.randrange(1, below) for _ in range(numbers)]
    terms = [(number, str(number), "") for number in given]
    while len(terms) > 1:
        rng.shuffle(terms)
        terms.append(combine(terms.pop(), terms.pop(), rng))
    target, text, _ = terms[0]
    return given, target, text


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=cli.number_type(int, 1, 10**8),
        default=40000,
        help="number of draws; one above max_target is no row, a repeated problem is one row",
    )
    parser.add_argument(
        "--numbers",
        type=cli.number_type(int, 2, 8),
        default=3,
        help="how many numbers are given",
    )
    parser.add_argument(
        "--below",
        type=cli.number_type(int, 2, 10**6),
        default=20,
        help="the given numbers are from 1 and below this",
    )
    parser.add_argument(
        "--max_target",
        type=cli.number_type(int, 1),
        default=100,
        help="targets are from 1 to this",
    )
    add_answer_arguments(parser)
    parser.add_argument("--out", default=HERE, help="data folder to write")
    args = parser.parse_args(argv)
    check_answer_folders(args.out, args.answers)

    rng = random.Random(args.seed)
    rows = {"train": {}, "val": {}}  # side -> {prompt: row}
    for _ in range(args.rows):
        given, target, text = draw_problem(rng, args.numbers, args.below)
        if target > args.max_target:
            continue
        prompt = f"Reach {target} with {', '.join(map(str, given))}."
        group = f"{target}: {sorted(given)}"
        rows[split_of(group)][prompt] = {"prompt": prompt, "responses": [text], "group": group}

    source = f"{args.numbers} numbers below {args.below}, targets to {args.max_target}"
    train, val = list(rows["train"].values()), list(rows["val"].values())
    write_answer_folders(args.out, args.answers, source, train, val)


if __name__ == "__main__":
    sys.exit(cli.run(main))
