"""UltraChat: the first turn of 50,000 conversations, as in SPIN, or every turn of all of them.

    python -m data.ultrachat.prepare
    python -m data.ultrachat.prepare --full --sample=0 --out=data/ultrachat_full

From HuggingFaceH4/ultrachat_200k, its train_sft and test_sft splits: 207,865 and 23,110
conversations. Writes train.jsonl and val.jsonl, K = 1. With --full every turn is a row, with the
earlier turns as history. A sample is the conversations with the smallest hashes of seed and
prompt, so it does not depend on their order.

Traps of the schema:
- `prompt` repeats messages[0], and `prompt_id` is its hash, so equal prompts are one group.
- train_gen and test_gen are other splits.
- SPIN keeps messages[0:2] of 50,000 conversations; they are other ones.
- A conversation whose roles do not alternate from the user's is dropped. One with an empty turn
  ends before it. A last turn of the user has no answer and makes no row. The first two are
  counted.
"""

import hashlib
import heapq
import sys

from data import cli, hub


def roles_alternate(messages) -> bool:
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            return False
    return True


def main(argv=None):
    parser = hub.argument_parser(__doc__, "HuggingFaceH4/ultrachat_200k", __file__)
    parser.add_argument("--full", action="store_true", help="every turn, not only the first")
    parser.add_argument(
        "--sample",
        type=hub.nonnegative_int,
        default=50_000,
        help="number of training conversations; 0: all",
    )
    parser.add_argument("--seed", type=cli.seed_type, default=0, help="seed of the sample")
    args = parser.parse_args(argv)

    def convert(row, dropped):
        messages = row["messages"] if args.full else row["messages"][:2]
        if len(messages) < 2 or not roles_alternate(messages):
            return hub.drop(dropped, "conversations whose turns do not alternate")
        texts = [message["content"].strip() for message in messages]
        turns = [list(pair) for pair in zip(texts[::2], texts[1::2])]
        rows = []
        for i, (prompt, response) in enumerate(turns):
            if not prompt or not response:
                hub.drop(dropped, "turns from an empty one on", len(turns) - i)
                break
            turn_row = {"prompt": prompt, "responses": [response], "group": row["prompt_id"]}
            if i > 0:
                turn_row["history"] = turns[:i]
            rows.append(turn_row)
        return rows

    def hash_of(group):
        return hashlib.sha256(f"{args.seed} {group}".encode()).digest()

    def sample(rows, side, dropped):
        if side == "val" or not args.sample:
            return rows()
        groups = {row["group"] for row in rows()}
        kept = set(heapq.nsmallest(args.sample, groups, key=hash_of))
        return (row for row in rows() if row["group"] in kept)

    splits = [("train_sft", "train"), ("test_sft", "val")]
    hub.prepare_rows(args, splits, ("prompt_id", "messages"), convert, sample)


if __name__ == "__main__":
    sys.exit(cli.run(main))
