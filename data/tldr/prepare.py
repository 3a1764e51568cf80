"""TL;DR: a Reddit post with two summaries that people compared, or with its author's own (--sft).

    python -m data.tldr.prepare
    python -m data.tldr.prepare --sft --out=data/tldr_sft

The comparisons of "Learning to summarize from human feedback" (arXiv 2009.01325) from
trl-lib/tldr-preference: 92,858 and 86,086 pairs. The authors' summaries from trl-lib/tldr:
116,722 and 6,447. Both have the published splits, train and validation. Writes train.jsonl and
val.jsonl, K = 2 or 1. A prompt ends in "TL;DR:", so no other template is needed than
--template='{prompt} '.

Traps:
- openai/summarize_from_feedback has a loading script, which `datasets` no longer runs; these
  copies are parquet.
- The validation pairs include CNN and Daily Mail articles ("TITLE: ...", no subreddit), which are
  dropped.
- A post is compared many times: the post is the group.
- The two sets print the same post differently: the comparisons have lost its empty lines.
- Some of the validation pairs were used to choose the paper's models (`valid1`); this copy does
  not say which.
"""

import sys

from data import cli, hub

PAIRS = "trl-lib/tldr-preference"
SUMMARIES = "trl-lib/tldr"


def convert_pair(row, dropped):
    if not row["prompt"].startswith("SUBREDDIT: "):
        return hub.drop(dropped, "rows that are no Reddit post")
    answers = [(row["chosen"], 1), (row["rejected"], 0)]
    return hub.rank_responses(row["prompt"], answers, row["prompt"], dropped)


def convert_summary(row, dropped):
    summary = row["completion"].strip()
    if not summary:
        return hub.drop(dropped, "empty responses")
    return [{"prompt": row["prompt"].strip(), "responses": [summary], "group": row["prompt"]}]


def main(argv=None):
    parser = hub.argument_parser(__doc__, PAIRS, __file__)
    parser.add_argument("--sft", action="store_true", help="posts with their authors' summaries")
    args = parser.parse_args(argv)
    fields, convert = ("prompt", "chosen", "rejected"), convert_pair
    if args.sft:
        fields, convert = ("prompt", "completion"), convert_summary
        if args.hub == PAIRS:
            args.hub = SUMMARIES
    hub.prepare_rows(args, [("train", "train"), ("validation", "val")], fields, convert)


if __name__ == "__main__":
    sys.exit(cli.run(main))
