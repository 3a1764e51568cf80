"""Whether an expression reaches the number: "Reach 35 with 3, 4, 5." -> "(3 + 4) * 5".

    --reward=data.countdown.scorer:reaches

The text is parsed and computed in exact fractions. It is never evaluated as code. The grammar:

    sum      product (("+" | "-") product)*
    product  atom (("*" | "/") atom)*
    atom     number | "(" sum ")"
"""

import re
from fractions import Fraction

PROMPT = re.compile(r"Reach ([1-9][0-9]*) with ([1-9][0-9]*(?:, [1-9][0-9]*)*)\.")
MAX_LENGTH = 200  # characters of a response
MAX_DEPTH = 20  # nested parentheses


def reaches(row, text):
    """1.0 if a response (text) is an expression whose value is the target of row["prompt"] and
    which uses each given number exactly once, else 0.0.

    Partial results may be negative or fractions. There is no unary minus. ValueError if the prompt
    is not one of data/countdown.
    """
    problem = PROMPT.fullmatch(row["prompt"])
    if not problem:
        raise ValueError(f"not a prompt of data/countdown: {row['prompt'][:60]!r}")
    target, given = problem.groups()
    tokens = tokenize(text)
    used = [token for token in tokens if token.isdigit()]
    if sorted(used) != sorted(given.split(", ")):
        return 0.0
    try:
        return float(evaluate(tokens) == int(target))
    except (ValueError, ZeroDivisionError):
        return 0.0


def tokenize(text):
    """The numbers, operators and parentheses of a text, as strings. [] if there is anything else
    in it but spaces, or it is too long."""
    if len(text) > MAX_LENGTH or not re.fullmatch(r"[0-9+\-*/() ]*", text.strip()):
        return []
    return re.findall(r"[0-9]+|[+\-*/()]", text)


def evaluate(tokens):
    """The value of an expression, a Fraction. ValueError if it is none, ZeroDivisionError."""
    rest = [*reversed(tokens)]  # the next token is the last one
    value = parse_sum(rest, 0)
    if rest:
        raise ValueError(f"{rest[-1]} after the expression")
    return value


def parse_sum(rest, depth):
    value = parse_product(rest, depth)
    while rest and rest[-1] in "+-":
        if rest.pop() == "+":
            value += parse_product(rest, depth)
        else:
            value -= parse_product(rest, depth)
    return value


def parse_product(rest, depth):
    value = parse_atom(rest, depth)
    while rest and rest[-1] in "*/":
        if rest.pop() == "*":
            value *= parse_atom(rest, depth)
        else:
            value /= parse_atom(rest, depth)
    return value


def parse_atom(rest, depth):
    token = rest.pop() if rest else "the end"
    if token.isdigit():
        return Fraction(token)
    if token != "(" or depth == MAX_DEPTH:
        raise ValueError(f"{token} instead of a number")
    value = parse_sum(rest, depth + 1)
    if not rest or rest.pop() != ")":
        raise ValueError("a parenthesis is not closed")
    return value
