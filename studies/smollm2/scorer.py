"""How much of the data's command is in a sample: --ranked_by=studies.smollm2.scorer:token_f1"""

from eval import f1_score


def token_f1(row, text):
    """F1 between the words of a sample (text) and of row["responses"][0], see `eval.f1_score`."""
    return f1_score(text, row["responses"][0])
