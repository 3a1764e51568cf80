"""Two checkers of a sample, for --ranked_by and --reward.

--ranked_by=studies.smollm2.scorer:token_f1      F1 of all words with the data's command
--ranked_by=studies.smollm2.scorer:argument_f1   F1 of the words after the program's name
"""

from eval import f1_score


def token_f1(row, text):
    """F1 between the words of a sample (text) and of row["responses"][0], see `eval.f1_score`. The
    prompt says the program's name, which alone has about 0.5."""
    return f1_score(text, row["responses"][0])


def argument_f1(row, text):
    """The same of the words after the first. 0 if the first word, the program's name, differs. The
    name alone has 1 where the data's command is nothing else, and 0 elsewhere."""
    words, wanted = text.split(), row["responses"][0].split()
    if words[:1] != wanted[:1]:
        return 0.0
    return f1_score(" ".join(words[1:]), " ".join(wanted[1:]))
