"""The table of studies/smollm2, from the evaluation of run.sh or from its scores.

    python -m studies.smollm2.table out/commands/1 out/commands/2
    python -m studies.smollm2.table studies/smollm2/logs/*.scores.jsonl

Prints a table for each seed, and one of their mean. ± is a 95 % interval of the paired difference
from SFT continued over the held-out prompts. It says nothing about another seed. Writes the scores
of every prompt to SEED/scores.jsonl, a line for each method.
"""

import json
import re
import sys

import numpy as np

from data import cli
from data.files import atomic_write, read_json, read_text
from data.rows import prompt_key, read_rows
from eval import f1_score
from nanospin.same_run import check_same_settings
from studies.smollm2.scorer import argument_f1
from tools.plot import markdown_table

TITLES = {
    "copied": "the program's name, copied from the prompt",
    "start": "SmolLM2-135M-Instruct",
    "sft": "SFT, where all start",
    "sft_more": "SFT continued",
    "spin": "SPIN, K = 2",
    "online_pl": "online Plackett-Luce, K = 4",
    "grpo": "GRPO, K = 4",
    "online_pl_args": "online Plackett-Luce, by the arguments",
    "grpo_args": "GRPO, by the arguments",
}
METRICS = {"exact_match": "exact match", "f1": "F1", "argument_f1": "F1 of the arguments"}
BASELINE = "sft_more"


def program(prompt: str) -> str:
    """The program that a prompt names, between its first backticks."""
    return re.search("`(.*?)`", prompt)[1]


def score_all(folder: str) -> dict[str, dict]:
    """The scores of each method's greedy samples, in the order of the held-out prompts: {method:
    {"exact_match": 0 or 1 each, "f1": ..., "argument_f1": ..., "only_name": whether it is the
    program's name, "tokens" and "val_loss": means}}. "copied" answers with the program's name."""
    table = read_json(f"{folder}/eval/eval.json")
    data = read_rows(f"{folder}/eval/data.jsonl")
    scored = {}
    for name in TITLES:
        if name == "copied":
            texts = {prompt_key(row): program(row["prompt"]) for row in data}
        else:
            rows = read_rows(f"{folder}/eval/{name}.jsonl")
            texts = {prompt_key(row): row["responses"][0] for row in rows}
        scores = {"exact_match": [], "f1": [], "argument_f1": [], "only_name": []}
        for row in data:
            if prompt_key(row) not in texts:
                raise SystemExit(f"{folder}: {name} has not answered {row['prompt']!r}")
            text, answer = texts[prompt_key(row)], row["responses"][0]
            scores["exact_match"].append(int(text.strip() == answer.strip()))
            scores["f1"].append(round(f1_score(text, answer), 6))
            scores["argument_f1"].append(round(argument_f1(row, text), 6))
            scores["only_name"].append(int(text.strip() == program(row["prompt"])))
        if name != "copied":
            scores |= {"tokens": table[name]["length"], "val_loss": table[name]["val_loss"]}
        scored[name] = scores
    with atomic_write(f"{folder}/scores.jsonl") as f:
        for name, scores in scored.items():
            f.write(json.dumps({"method": name} | scores) + "\n")
    return scored


def read_scores(path: str) -> dict[str, dict]:
    """What `score_all` has written."""
    scored = {}
    for line in read_text(path).splitlines():
        scores = json.loads(line)
        scored[scores.pop("method")] = scores
    return scored


def mean_over_seeds(all_scored: list[dict]) -> dict[str, dict]:
    """The scores of each method and prompt, averaged over seeds. Exits with one line if they do not
    have the same prompts: the copied names, which no model writes, then have other scores."""
    if any(scored["copied"] != all_scored[0]["copied"] for scored in all_scored):
        raise SystemExit("the seeds were not measured on the same prompts")
    means = {}
    for name in TITLES:
        means[name] = {}
        for metric in all_scored[0][name]:
            means[name][metric] = np.mean([scored[name][metric] for scored in all_scored], axis=0)
    return means


def with_difference(scored: dict, name: str, metric: str) -> str:
    """The mean in percent, and behind it the mean paired difference with its interval."""
    values = 100 * np.array(scored[name][metric])
    if name == BASELINE:
        return f"{values.mean():.1f} %"
    difference = values - 100 * np.array(scored[BASELINE][metric])
    half_width = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return f"{values.mean():.1f} % ({difference.mean():+.1f} ± {half_width:.1f})"


def make_table(scored: dict[str, dict]) -> list[str]:
    """Markdown."""
    rows = []
    for name, title in TITLES.items():
        scores = scored[name]
        row = [title, *(with_difference(scored, name, metric) for metric in METRICS)]
        row.append(f"{100 * np.mean(scores['only_name']):.0f} %")
        row.append(f"{scores['tokens']:.1f}" if "tokens" in scores else "")
        row.append(f"{scores['val_loss']:.2f}" if "val_loss" in scores else "")
        rows.append(row)
    head = ["", *METRICS.values(), "only the name", "tokens", "validation loss"]
    return markdown_table(head, rows)


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="out/commands/SEED, or its scores.jsonl")
    paths = parser.parse_args(argv).paths
    for name in TITLES:
        check_same_settings([f"{path}/{name}" for path in paths])
    by_title = {}
    for path in paths:
        by_title[path] = read_scores(path) if path.endswith(".jsonl") else score_all(path)
    if len(by_title) > 1:
        by_title["mean"] = mean_over_seeds(list(by_title.values()))
    for title, scored in by_title.items():
        print(f"{title}\n")
        print("\n".join(make_table(scored)) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
