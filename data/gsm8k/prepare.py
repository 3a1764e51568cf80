"""GSM8K: grade-school mathematics, worked solutions that end in "#### number".

    python -m data.gsm8k.prepare
    python -m data.gsm8k.prepare --val_share=0.1 --out=data/gsm8k_sft
    python -m data.gsm8k.prepare --solutions=all --out=data/gsm8k_solutions
    python -m data.gsm8k.prepare --solutions=175b_verification --out=data/gsm8k_ranked

From openai/gsm8k (arXiv 2110.14168, MIT), its set "main": 7,473 training and 1,319 test problems.
The test split is val.jsonl, so never train on it. K = 1. With --val_share=0.1 the test split is
left out, and a tenth of the training problems is val.jsonl. data/gsm8k/scorer.py checks answers.

--solutions adds the solutions of four models to the *test* problems, as published with the paper in
github.com/openai/grade-school-math (MIT): 175b_verification (56 % right), 175b_finetuning,
6b_verification and 6b_finetuning. `all` is K = 5: the person's solution, the models' right ones,
the models' wrong ones; those tie. Otherwise name models, best first: they rank below the person in
that order, right or wrong. A tenth is val.jsonl. Never report GSM8K of a model trained on these.

The calculator's notes, such as <<48/2=24>>, are removed: a model would have to run them. In the
models' solutions "A: 24" becomes "#### 24"; some of them never end.
"""

import json
import re
import sys

from data import cli, github, hub

MODELS = ("175b_verification", "175b_finetuning", "6b_verification", "6b_finetuning")
REPOSITORY = github.Repository(
    "openai/grade-school-math",
    "3101c7d5072418e28b9008a6636bde82a006892c",
    r"grade_school_math/data/example_model_solutions\.jsonl",
    "adad0b9294d8cd370ecbd3636a2b0c63",
)


def without_notes(solution: str) -> str:
    return re.sub(r"<<[^<>]*>>", "", solution).strip()


def convert(row, dropped):
    question = row["question"].strip()
    solution = without_notes(row["answer"])
    if "####" not in solution:
        return hub.drop(dropped, "solutions without ####")
    group = github.group_name("gsm", question)
    return [{"prompt": question, "responses": [solution], "group": group}]


def solutions_row(value: dict, models: list[str]) -> dict:
    """A ranked row of a line of example_model_solutions.jsonl. models: [] ranks all by whether they
    are right; otherwise those named, in this order."""
    solutions = [value["ground_truth"]]
    scores = [2]
    by_correctness = sorted(MODELS, key=lambda model: not value[model]["is_correct"])
    for model in models or by_correctness:
        solutions.append(value[model]["solution"])
        scores.append(int(value[model]["is_correct"]))
    question = value["question"].strip()
    row = {"prompt": question, "responses": [], "group": github.group_name("gsm", question)}
    for solution in solutions:
        row["responses"].append(re.sub("(?m)^A:", "####", without_notes(solution)))
    if not models:
        row["scores"] = scores
    return row


def write_solutions(args):
    """The data folder of --solutions."""
    models = [] if args.solutions == "all" else args.solutions.split(",")
    unknown = set(models) - set(MODELS)
    if unknown:
        raise SystemExit(f"--solutions is all, or some of {', '.join(MODELS)}, separated by commas")
    github.check_folder(args.out)
    files, source = github.read_files(REPOSITORY, args)
    rows = []
    for text in files.values():
        for line in text.strip().split("\n"):
            try:
                rows.append(solutions_row(json.loads(line), models))
            except (ValueError, KeyError, TypeError) as e:
                raise SystemExit(
                    f"{REPOSITORY.name}: no problem with solutions: {line[:60]!r} ({e!r})"
                )
    github.write_split(args.out, rows, source, args.val_share or 0.1)


def main(argv=None):
    parser = hub.argument_parser(__doc__, "openai/gsm8k", __file__)
    hub.add_val_share(parser, 0.0)
    parser.add_argument("--solutions", help="all, or models in their order: rows with K > 1")
    github.add_source(parser)
    args = parser.parse_args(argv)
    if args.solutions:
        if args.rows or args.revision:
            parser.error("--rows and --revision are of the hub's set, not of --solutions")
        return write_solutions(args)
    splits = [("train", None)] if args.val_share else [("train", "train"), ("test", "val")]
    hub.prepare_rows(args, splits, ("question", "answer"), convert, config="main")


if __name__ == "__main__":
    sys.exit(cli.run(main))
