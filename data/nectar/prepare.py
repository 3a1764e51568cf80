"""Nectar: a prompt, and seven answers as GPT-4 ranked them.

    python -m data.nectar.prepare

From berkeley-nest/Nectar, 182,954 prompts in one split; 2 % of them, by a hash of how the conversation opens, are validation.

Traps of its schema: `rank` is a float, 1.0 the best, and `answers` are in no order; `prompt` is a transcript,
"\\n\\nHuman: ... \\n\\nAssistant: ", possibly of several turns (then what comes before the last is history). Where fewer than seven
answers were at hand, one was repeated or a refusal put in: of equal answers the better rank stays. A part of the prompts comes
from HH-RLHF and UltraFeedback.
"""

import os

from data import hub


def convert(row, dropped):
    context, _, rest = row["prompt"].rpartition("\n\nAssistant:")
    turns = None if rest.strip() else hub.transcript(context)
    if not turns:
        return hub.drop(dropped, "rows whose turns do not alternate or are empty")
    history, prompt = turns
    answers = [
        (answer["answer"], None if answer["rank"] is None else -answer["rank"])
        for answer in row["answers"]
    ]
    return hub.ranked(prompt, answers, history[0][0] if history else prompt, dropped, history)


def main(argv=None):
    parser = hub.arguments(
        __doc__, "berkeley-nest/Nectar", os.path.dirname(os.path.abspath(__file__))
    )
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.02,
        help="share of the validation side, by the hash of a group",
    )
    hub.prepare_rows(parser.parse_args(argv), [("train", None)], ("prompt", "answers"), convert)


if __name__ == "__main__":
    main()
