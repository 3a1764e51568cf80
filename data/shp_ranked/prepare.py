"""Stanford Human Preferences (SHP): a post with all its comments, ranked by their score.

    python -m data.shp_ranked.prepare
    python -m data.shp_ranked.prepare --min_ratio=2
    python -m data.shp_ranked.prepare --pairs --out=data/shp_pairs

From stanfordnlp/SHP, its train and validation splits, which are by post: 348,718 and 18,436
pairs. Writes train.jsonl and val.jsonl; K is the number of a post's comments. With --min_ratio=2
a comment ranks below another if the other has twice its score; comments in between are left out.
--pairs writes the pairs as published, K = 2. (data/shp has the same set as plain texts, for the
Taylor loss study.)

Traps of the schema:
- A row is a pair of a post's comments, so the same comment is in several rows. A post can have a
  hundred rows: counted by pairs, a few posts outweigh the rest.
- `labels` 1 means that A is preferred; A and B are in random order. `history` is the post.
- A pair was published only if the preferred comment is the later one, because earlier ones gather
  more votes. Ranking all comments brings back the pairs that were left out for that; --pairs does
  not.
- Scores tie, and 12 against 11 says little: see --min_ratio.
"""

import sys

from data import cli, hub

FIELDS = (
    "post_id",
    "history",
    "c_root_id_A",
    "c_root_id_B",
    "human_ref_A",
    "human_ref_B",
    "score_A",
    "score_B",
    "labels",
)


def is_close(better: float, worse: float, min_ratio: float) -> bool:
    """Whether a score is below min_ratio times the next one. Scores that are 0 or less have no
    ratio; equal ones are close."""
    return better < min_ratio * worse or better == worse and min_ratio > 1


def main(argv=None):
    parser = hub.argument_parser(__doc__, "stanfordnlp/SHP", __file__)
    parser.add_argument("--pairs", action="store_true", help="the pairs as published")
    parser.add_argument(
        "--min_ratio",
        type=cli.number_type(float, 0, 1e9),
        default=1.0,
        help="smallest ratio of a response's score to that of the next one",
    )
    args = parser.parse_args(argv)

    def convert(row, dropped):
        better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
        responses = [row[f"human_ref_{better}"], row[f"human_ref_{worse}"]]
        scores = [row[f"score_{better}"], row[f"score_{worse}"]]
        if scores[0] < scores[1]:
            return hub.drop(dropped, "pairs whose label and scores disagree")
        if args.pairs:
            if is_close(*scores, args.min_ratio):
                return hub.drop(dropped, "pairs below --min_ratio")
            answers = zip(responses, scores)
            return hub.rank_responses(row["history"], answers, row["post_id"], dropped)
        return [  # rank_posts merges these
            {
                "prompt": row["history"],
                "responses": responses,
                "scores": scores,
                "group": row["post_id"],
                "comments": [row[f"c_root_id_{better}"], row[f"c_root_id_{worse}"]],
            }
        ]

    def rank_posts(rows, side, dropped):
        """One row for each post, from the pairs of its comments."""
        prompts = {}  # post -> text
        comments = {}  # post -> {comment id: (response, score)}
        for row in rows():
            post = row["group"]
            prompts.setdefault(post, row["prompt"])
            answers = zip(row["responses"], row["scores"])
            comments.setdefault(post, {}).update(zip(row["comments"], answers))
        for post, prompt in prompts.items():
            kept = []
            by_score = sorted(comments[post].values(), key=lambda answer: -answer[1])
            for response, score in by_score:
                if kept and is_close(kept[-1][1], score, args.min_ratio):
                    hub.drop(dropped, "comments below --min_ratio")
                else:
                    kept.append((response, score))
            yield from hub.rank_responses(prompt, kept, post, dropped)

    splits = [("train", "train"), ("validation", "val")]
    hub.prepare_rows(args, splits, FIELDS, convert, None if args.pairs else rank_posts)


if __name__ == "__main__":
    sys.exit(cli.run(main))
