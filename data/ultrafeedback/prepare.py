"""UltraFeedback: an instruction with four models' answers, as GPT-4 rated them.

    python -m data.ultrafeedback.prepare
    python -m data.ultrafeedback.prepare --by=overall_score --out=data/ultrafeedback_overall

From openbmb/UltraFeedback, 63,967 instructions in one split. Writes train.jsonl and val.jsonl, K
up to 4; 2 % of the instructions, by a hash, are validation.

Traps of the schema:
- The ratings are strings of digits at annotations.ASPECT.Rating, and may be "N/A". Answers are
  compared by the mean over the aspects in which all of them have a number. They tie often; equal
  `scores` keep that.
- `overall_score` is another judgement, given with a critique. It has been 10 where 1 was meant,
  and disagrees with the ratings on the best answer of many instructions (the card of
  argilla/ultrafeedback-binarized-preferences counts them).
- Answers were written under system prompts (`custom_system_prompt`), which are not part of our
  rows.
- All questions of TruthfulQA and FalseQA are among the instructions. They are left out; see
  --without.
"""

import sys

from data import cli, hub

SOURCES = (
    "evol_instruct",
    "false_qa",
    "flan_v2_cot",
    "flan_v2_flan2021",
    "flan_v2_niv2",
    "flan_v2_p3",
    "sharegpt",
    "truthful_qa",
    "ultrachat",
)
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def parse_rating(text):
    """A rating as a number, None for "N/A"."""
    try:
        return float(text)
    except ValueError:
        return None


def mean_ratings(answers, dropped):
    """Each answer's mean rating over the aspects in which all are rated; None if there is none."""
    aspects = []  # per aspect the rating of each answer
    for aspect in ASPECTS:
        ratings = [parse_rating(answer["annotations"][aspect]["Rating"]) for answer in answers]
        if None not in ratings:
            aspects.append(ratings)
    if not aspects:
        return None
    num_unrated = len(ASPECTS) - len(aspects)
    if num_unrated:
        hub.drop(dropped, "aspects (not rows) that not all answers are rated in", num_unrated)
    return [sum(ratings) / len(ratings) for ratings in zip(*aspects)]


def main(argv=None):
    parser = hub.argument_parser(__doc__, "openbmb/UltraFeedback", __file__)
    parser.add_argument(
        "--by",
        choices=["ratings", "overall_score"],
        default="ratings",
        help="what answers are compared by",
    )
    parser.add_argument(
        "--without",
        default="truthful_qa,false_qa",
        help="sources to leave out, comma-separated (default %(default)s)",
    )
    hub.add_val_share(parser, 0.02)
    args = parser.parse_args(argv)
    without = [name.strip() for name in args.without.split(",")]
    unknown = set(without) - {"", *SOURCES}
    if unknown:
        raise SystemExit(f"--without: no source {min(unknown)!r}; there are {', '.join(SOURCES)}")

    def convert(row, dropped):
        if row["source"] in without:
            return hub.drop(dropped, f"rows of {row['source']}")
        answers = row["completions"]
        if args.by == "overall_score":
            scores = [answer["overall_score"] for answer in answers]
        else:
            scores = mean_ratings(answers, dropped)
            if scores is None:
                reason = "rows without an aspect that all answers are rated in"
                return hub.drop(dropped, reason)
        responses = [answer["response"] for answer in answers]
        instruction = row["instruction"]
        return hub.rank_responses(instruction, zip(responses, scores), instruction.strip(), dropped)

    hub.prepare_rows(args, [("train", None)], ("source", "instruction", "completions"), convert)


if __name__ == "__main__":
    sys.exit(cli.run(main))
