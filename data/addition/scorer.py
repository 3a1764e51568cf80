"""Whether a sum is right. The answer is computed from the prompt: rows need no responses.

--reward=data.addition.scorer:exact_match
"""

import re

PROMPT = re.compile(r"What is ([0-9]+) \+ ([0-9]+)\?")


def exact_match(row, text):
    """1.0 if a response (text) is the sum that row["prompt"] asks for, else 0.0.

    White space around the number is ignored. All else counts: "405.", "+405" and "0405" are wrong.
    ValueError if the prompt is not one of data/addition.
    """
    problem = PROMPT.fullmatch(row["prompt"])
    if not problem:
        raise ValueError(f"not a prompt of data/addition: {row['prompt'][:60]!r}")
    a, b = problem.groups()
    return float(text.strip() == str(int(a) + int(b)))
