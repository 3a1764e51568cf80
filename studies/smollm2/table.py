"""The table of studies/smollm2, from the evaluations of run.sh.

    python -m studies.smollm2.table out/commands/1 out/commands/2

± is a 95 % interval of the paired difference from SFT continued over the held-out prompts of one
seed. It says nothing about another seed.
"""

import sys

import numpy as np

from data import cli
from data.files import read_json
from data.rows import prompt_key, read_rows
from eval import f1_score
from tools.plot import markdown_table

TITLES = {
    "start": "SmolLM2-135M-Instruct",
    "sft": "SFT, where all start",
    "sft_more": "SFT continued",
    "spin": "SPIN, K = 2",
    "online_pl": "online Plackett-Luce, K = 4",
    "grpo": "GRPO, K = 4",
}
BASELINE = "sft_more"


def scores(folder: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(exact match, F1, whether it is one word) of a method's greedy sample for each held-out
    prompt, in percent."""
    answers = {}
    for row in read_rows(f"{folder}/eval/data.jsonl"):
        answers[prompt_key(row)] = row["responses"][0]
    right, f1, one_word = [], [], []
    for row in read_rows(f"{folder}/eval/{name}.jsonl"):
        text, answer = row["responses"][0], answers[prompt_key(row)]
        right.append(text.strip() == answer.strip())
        f1.append(f1_score(text, answer))
        one_word.append(len(text.split()) == 1)
    return 100.0 * np.array(right), 100.0 * np.array(f1), 100.0 * np.array(one_word)


def with_difference(values: np.ndarray, baseline: np.ndarray) -> str:
    """The mean, and behind it the mean paired difference with its interval."""
    difference = values - baseline
    if not difference.any():
        return f"{values.mean():.1f} %"
    half_width = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return f"{values.mean():.1f} % ({difference.mean():+.1f} ± {half_width:.1f})"


def make_table(folder: str) -> list[str]:
    """Markdown. folder: the runs of one seed."""
    table = read_json(f"{folder}/eval/eval.json")
    baseline = scores(folder, BASELINE)
    rows = []
    for name, title in TITLES.items():
        right, f1, one_word = scores(folder, name)
        of_name = table[name]
        cells = [title, with_difference(right, baseline[0]), with_difference(f1, baseline[1])]
        length, val_loss = f"{of_name['length']:.1f}", f"{of_name['val_loss']:.2f}"
        rows.append([*cells, length, f"{one_word.mean():.0f} %", val_loss])
    head = ["", "exact match", "F1", "tokens", "one word", "validation loss"]
    return markdown_table(head, rows)


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="out/commands/SEED")
    for folder in parser.parse_args(argv).folders:
        print(f"{folder}\n")
        print("\n".join(make_table(folder)) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
