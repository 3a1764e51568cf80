"""TL;DR: a Reddit post and its summaries, pairs that people compared or, with --sft, the one its author wrote.

    python -m data.tldr.prepare
    python -m data.tldr.prepare --sft --out=data/tldr_sft

The comparisons of "Learning to summarize from human feedback" (arXiv 2009.01325) from trl-lib/tldr-preference, 92,858 and 86,086
pairs; the summaries from trl-lib/tldr, 116,722 and 6,447; the published splits, train and validation. A prompt ends in "TL;DR:",
so it needs no other template than --template='{prompt} '.

Traps: openai/summarize_from_feedback itself has a loading script, which `datasets` no longer runs; these are parquet. The validation
pairs hold CNN and Daily Mail articles ("TITLE: ...", no subreddit), which are dropped here. A post is compared many times:
the post is the group. The two sets print the same post differently: the comparisons have lost its empty lines. Of the
validation pairs a part chose the paper's models (`valid1`); which, this copy no longer says.
"""

import os

from data import hub

PAIRS = "trl-lib/tldr-preference"


def pair(row, dropped):
    if not row["prompt"].startswith("SUBREDDIT: "):
        return hub.drop(dropped, "rows that are no Reddit post")
    return hub.ranked(
        row["prompt"], [(row["chosen"], 1), (row["rejected"], 0)], row["prompt"], dropped
    )


def summary(row, dropped):
    if not row["completion"].strip():
        return hub.drop(dropped, "empty responses")
    return [
        {
            "prompt": row["prompt"].strip(),
            "responses": [row["completion"].strip()],
            "group": row["prompt"],
        }
    ]


def main(argv=None):
    parser = hub.arguments(__doc__, PAIRS, os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--sft", action="store_true", help="posts with their authors' summaries")
    args = parser.parse_args(argv)
    if args.sft and args.hub == PAIRS:
        args.hub = "trl-lib/tldr"
    need, convert = (
        (("prompt", "completion"), summary)
        if args.sft
        else (("prompt", "chosen", "rejected"), pair)
    )
    hub.prepare_rows(args, [("train", "train"), ("validation", "val")], need, convert)


if __name__ == "__main__":
    main()
