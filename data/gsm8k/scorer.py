"""Whether the answer to a problem is the data's: GSM8K's "#### number" (arXiv:2110.14168).

--reward=data.gsm8k.scorer:exact_match
"""

import re


def extract_answer(text):
    """What exact match compares: the last number after "####", or the whole text if there is none.

    "1 + 6 = 7\\n#### 1,234." -> "1234". A whole text loses the white space around it.
    """
    found = re.findall(r"####\s*(-?[\d.,]+)", text)
    if found:
        return found[-1].replace(",", "").rstrip(".")
    return text.strip()


def exact_match(row, text):
    """1.0 if a response (text) has the answer of row["responses"][0], else 0.0.

    A response that is nothing but the number is right too. ValueError if the row has no response.
    """
    responses = row.get("responses") or [None]
    if responses[0] is None:
        raise ValueError(f"a row without responses has no answer: {row['prompt'][:60]!r}")
    return float(extract_answer(text) == extract_answer(responses[0]))
