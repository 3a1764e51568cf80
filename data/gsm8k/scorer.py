"""Whether the answer to a problem is the data's: GSM8K's "#### number" (arXiv:2110.14168).

--reward=data.gsm8k.scorer:exact_match
"""

import re


def same_answer(text, reference):
    """Whether a text has the answer of the reference text.

    If the last line of the reference is "#### number", the last number after "####" of both is
    compared: "1 + 6 = 7\\n#### 1,234." has 1234. A text that is nothing but 1234 has it too.
    All other references, headings of Markdown among them, are compared as whole texts, without the
    white space around them.
    """
    last_line = reference.strip().split("\n")[-1]
    if re.fullmatch(r"####\s*-?[\d.,]*\d[\d.,]*", last_line):
        return last_number(text) == last_number(last_line)
    return text.strip() == reference.strip()


def last_number(text):
    """The last number after "####", or the whole text if there is none."""
    found = re.findall(r"####\s*(-?[\d.,]+)", text)
    if found:
        return found[-1].replace(",", "").rstrip(".")
    return text.strip()


def exact_match(row, text):
    """1.0 if a response (text) has the answer of row["responses"][0], else 0.0. See `same_answer`.

    ValueError if the row has no response.
    """
    responses = row.get("responses") or [None]
    if responses[0] is None:
        raise ValueError(f"a row without responses has no answer: {row['prompt'][:60]!r}")
    return float(same_answer(text, responses[0]))
