"""UltraChat's conversations: the first turn of 50,000 of them (as SPIN, whose own 50,000 are others), or every turn of all.

    python -m data.ultrachat.prepare
    python -m data.ultrachat.prepare --full --sample=0 --out=data/ultrachat_full        # a row a turn, with what was said before as history

From HuggingFaceH4/ultrachat_200k: 207,865 conversations (train_sft) and 23,110 (test_sft), the published split. A sample is
the conversations with the smallest hashes of seed and prompt, so it does not depend on their order.

Traps of its schema: `prompt` is messages[0] once more, and `prompt_id` its hash, so equal prompts are one group; train_gen and
test_gen are other splits. SPIN keeps messages[0:2]. A conversation whose roles do not alternate from the user's is dropped, one with
an empty turn ends before it, and a last turn of the user's has no answer and makes no row: each is counted, not assumed away.
"""

import hashlib
import heapq
import os

from data import hub


def main(argv=None):
    parser = hub.arguments(
        __doc__, "HuggingFaceH4/ultrachat_200k", os.path.dirname(os.path.abspath(__file__))
    )
    parser.add_argument("--full", action="store_true", help="every turn, not the first alone")
    parser.add_argument(
        "--sample", type=hub.count, default=50_000, help="so many training conversations; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args(argv)

    def convert(row, dropped):
        messages = row["messages"] if args.full else row["messages"][:2]
        if len(messages) < 2 or any(
            m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(messages)
        ):
            return hub.drop(dropped, "conversations whose turns do not alternate")
        said, made = [m["content"].strip() for m in messages], []
        turns = [list(pair) for pair in zip(said[::2], said[1::2])]
        for i, (prompt, response) in enumerate(turns):
            if not prompt or not response:
                hub.drop(dropped, "turns from an empty one on", len(turns) - i)
                break
            made.append(
                {"prompt": prompt, "responses": [response], "group": row["prompt_id"]}
                | ({"history": turns[:i]} if i else {})
            )
        return made

    def sample(rows, side, dropped):
        if side == "val" or not args.sample:
            return rows()
        kept = set(
            heapq.nsmallest(
                args.sample,
                {row["group"] for row in rows()},
                key=lambda group: hashlib.sha256(f"{args.seed} {group}".encode()).digest(),
            )
        )
        return (row for row in rows() if row["group"] in kept)

    hub.prepare_rows(
        args,
        [("train_sft", "train"), ("test_sft", "val")],
        ("prompt_id", "messages"),
        convert,
        sample,
    )


if __name__ == "__main__":
    main()
