"""Folders of a data set that a program makes, with a share of the answers left out: data.addition
and data.countdown."""

import os

from data import cli
from data.files import check_output
from data.folder import check_other_data, lock_folder, lock_folders
from data.rows import write_ranked_folder


def answer_folders(out: str, answers: int) -> list[str]:
    """The folders that a data set with that many answers is written to; 0: all answers, in one."""
    return [os.path.join(out, "answers"), os.path.join(out, "prompts")] if answers else [out]


def add_answer_arguments(parser):
    """--answers and --seed of a generated data set."""
    parser.add_argument(
        "--answers",
        type=cli.number_type(int, 0, 10**8),
        default=0,
        help="training rows that keep their answer; 0: all",
    )
    parser.add_argument(
        "--seed", type=cli.number_type(int, 0), default=0, help="of the draws; 1 gives other rows"
    )


def check_answer_folders(out: str, answers: int):
    """Exit with one line if the folders cannot be written."""
    for folder in answer_folders(out, answers):
        check_output(os.path.join(folder, "meta.json"), is_data=True)
        check_other_data(folder, (".jsonl",))


def write_answer_folders(out: str, answers: int, source: str, train: list, val: list):
    """Write rows for the tokenizer "bytes" to OUT, or, with `answers`, to two folders with the same
    val.jsonl: OUT/answers has that many training rows, and OUT/prompts the prompts of the others,
    without responses. A problem whose numbers are in another order is another row, so a few groups
    are in both."""
    folders = answer_folders(out, answers)
    if not answers:
        with lock_folder(out):
            write_ranked_folder(out, "bytes", source, train, val)
        return
    if answers >= len(train):
        raise SystemExit(
            f"--answers must be below the number of training rows, {len(train)}, not {answers}"
        )
    prompts = [{"prompt": row["prompt"], "group": row["group"]} for row in train[answers:]]
    with lock_folders(folders):
        for folder, rows in zip(folders, (train[:answers], prompts)):
            write_ranked_folder(folder, "bytes", source, rows, val)
