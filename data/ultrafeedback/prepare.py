"""UltraFeedback: an instruction, and four models' answers as GPT-4 rated them.

    python -m data.ultrafeedback.prepare
    python -m data.ultrafeedback.prepare --by=overall_score --out=data/ultrafeedback_overall

From openbmb/UltraFeedback, 63,967 instructions in one split; 2 % of them, by a hash of the instruction, are validation.

Traps of its schema: the ratings are strings of digits under annotations.ASPECT.Rating, and may be "N/A": answers are compared
by the mean over the aspects in which all of them have a number. They tie often, which equal `scores` keep. `overall_score` is another
judgement, given with a critique: it has been a 10 where a 1 was meant, and disagrees with the ratings on the best answer of many
instructions (the card of argilla/ultrafeedback-binarized-preferences counts them). Answers were written under system prompts
(`custom_system_prompt`) that are no part of the row here. All questions of TruthfulQA and FalseQA are among the instructions: left
out unless --without= says otherwise.
"""

import os

from data import hub

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def number(text):
    """A rating, None for "N/A"."""
    try:
        return float(text)
    except ValueError:
        return None


def main(argv=None):
    parser = hub.arguments(
        __doc__, "openbmb/UltraFeedback", os.path.dirname(os.path.abspath(__file__))
    )
    parser.add_argument(
        "--by",
        choices=["ratings", "overall_score"],
        default="ratings",
        help="what answers are compared by",
    )
    parser.add_argument(
        "--without",
        default="truthful_qa,false_qa",
        help="comma-separated sources (default %(default)s)",
    )
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.02,
        help="share of the validation side, by the hash of a group",
    )
    args = parser.parse_args(argv)

    def convert(row, dropped):
        if row["source"] in args.without.split(","):
            return hub.drop(dropped, f"rows of {row['source']}")
        answers = row["completions"]
        if args.by == "overall_score":
            scores = [answer["overall_score"] for answer in answers]
        else:
            ratings = [
                [number(answer["annotations"][aspect]["Rating"]) for answer in answers]
                for aspect in ASPECTS
            ]
            rated = [of for of in ratings if None not in of]
            if not rated:
                return hub.drop(dropped, "rows without an aspect that all answers are rated in")
            if len(rated) < len(ratings):
                hub.drop(
                    dropped,
                    "aspects (not rows) that not all answers are rated in",
                    len(ratings) - len(rated),
                )
            scores = [sum(of) / len(of) for of in zip(*rated)]
        return hub.ranked(
            row["instruction"],
            [(answer["response"], score) for answer, score in zip(answers, scores)],
            row["instruction"].strip(),
            dropped,
        )

    hub.prepare_rows(args, [("train", None)], ("source", "instruction", "completions"), convert)


if __name__ == "__main__":
    main()
