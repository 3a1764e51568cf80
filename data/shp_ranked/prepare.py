"""Stanford Human Preferences: a post, and all its comments ranked by their score.

    python -m data.shp_ranked.prepare
    python -m data.shp_ranked.prepare --min_ratio=2         # a comment ranks below another if that has twice its score; those between are left out
    python -m data.shp_ranked.prepare --pairs --out=data/shp_pairs          # the pairs as published

From stanfordnlp/SHP, train and validation, the published split, which is by post: 348,718 and 18,436 pairs.
(The T_n study reads the same set as plain texts: data/shp.)

Traps of its schema: a row is a pair of a post's comments, so the same comment stands in several rows, and a post has a
hundred: counted by pairs, few posts outweigh the rest; `labels` 1 means that A is preferred, at random A or B; `history`
is the post. A pair was published only if the preferred comment is the later one: earlier ones gather more votes. Ranking all
comments brings those pairs back that this had left out; --pairs does not. Scores tie, and 12 against 11 says little: --min_ratio.
"""

import os

from data import hub

NEED = (
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


def main(argv=None):
    parser = hub.arguments(__doc__, "stanfordnlp/SHP", os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--pairs", action="store_true", help="the pairs as published")
    parser.add_argument(
        "--min_ratio", type=float, default=1.0, help="of a response's score to the next one's"
    )
    args = parser.parse_args(argv)

    def convert(row, dropped):
        better, worse = (
            (row[f"human_ref_{c}"], row[f"score_{c}"], row[f"c_root_id_{c}"])
            for c in ("AB" if row["labels"] == 1 else "BA")
        )
        if better[1] < worse[1]:
            return hub.drop(dropped, "pairs whose label and scores disagree")
        if not args.pairs:  # as they are: by_post ranks them
            return [
                {
                    "prompt": row["history"],
                    "responses": [better[0], worse[0]],
                    "scores": [better[1], worse[1]],
                    "group": row["post_id"],
                    "comments": [better[2], worse[2]],
                }
            ]
        if better[1] < args.min_ratio * worse[1]:
            return hub.drop(dropped, "pairs below --min_ratio")
        return hub.ranked(row["history"], [better[:2], worse[:2]], row["post_id"], dropped)

    def by_post(rows, side, dropped):
        posts = {}
        for row in rows():
            _, comments = posts.setdefault(row["group"], (row["prompt"], {}))
            comments.update(zip(row["comments"], zip(row["responses"], row["scores"])))
        for post, (prompt, comments) in posts.items():
            answers = []
            for answer in sorted(comments.values(), key=lambda answer: -answer[1]):
                if not answers or answers[-1][1] >= args.min_ratio * answer[1]:
                    answers.append(answer)
                else:
                    hub.drop(dropped, "comments below --min_ratio")
            yield from hub.ranked(prompt, answers, post, dropped)

    hub.prepare_rows(
        args,
        [("train", "train"), ("validation", "val")],
        NEED,
        convert,
        None if args.pairs else by_post,
    )


if __name__ == "__main__":
    main()
