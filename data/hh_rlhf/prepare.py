"""Anthropic's Helpful and Harmless: a conversation with a better and a worse last answer.

    python -m data.hh_rlhf.prepare

From Anthropic/hh-rlhf, its train and test splits: 160,800 and 8,552 pairs in four parts
(helpful-base, helpful-online, helpful-rejection-sampled, harmless-base). For reward models and
preference learning; the authors warn against fine-tuning on it.

Writes train.jsonl and val.jsonl: K = 2, with the earlier turns as history. The group is the
opening of the conversation; test rows that open as a training row does are dropped and counted.

Traps of the schema:
- `chosen` and `rejected` are whole transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ...". There is
  no separate prompt; it is the text before the last "\\n\\nAssistant:".
- Where the two prompts differ, the row compares two conversations and is dropped.
- Some answers are empty, or continue as the human.
- The same opening comes with different continuations.
"""

import sys

from data import cli, hub


def convert(row, dropped):
    context, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
    rejected_context, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
    if context != rejected_context:
        return hub.drop(dropped, "rows whose two prompts differ")
    if "\n\nHuman:" in chosen + rejected:
        return hub.drop(dropped, "rows that end with a human's turn")
    turns = hub.parse_transcript(context)
    if not turns:
        return hub.drop(dropped, "rows whose turns do not alternate or are empty")
    history, prompt = turns
    opening = history[0][0] if history else prompt
    return hub.rank_responses(prompt, [(chosen, 1), (rejected, 0)], opening, dropped, history)


def main(argv=None):
    args = hub.argument_parser(__doc__, "Anthropic/hh-rlhf", __file__).parse_args(argv)
    splits = [("train", "train"), ("test", "val")]
    hub.prepare_rows(args, splits, ("chosen", "rejected"), convert)


if __name__ == "__main__":
    sys.exit(cli.run(main))
