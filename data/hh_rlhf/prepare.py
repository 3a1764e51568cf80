"""Anthropic's Helpful and Harmless: a conversation, the better and the worse last answer.

    python -m data.hh_rlhf.prepare

From Anthropic/hh-rlhf, train and test, the published split: 160,800 and 8,552 pairs of four parts (helpful-base, -online,
-rejection-sampled, harmless-base). For reward models and preferences; its authors warn against fine-tuning on it.

Traps of its schema: `chosen` and `rejected` are whole transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ...", without a separate prompt:
it is what stands before the last "\\n\\nAssistant:", and where that differs between the two the row compares two conversations and
is dropped; some answers are empty, or go on as the human themselves. The same opening comes with
other continuations: the opening is the group, and test rows that open as a training row does are dropped and counted.
"""

import os

from data import hub


def convert(row, dropped):
    (context, _, chosen), (other, _, rejected) = (
        row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected")
    )
    turns = hub.transcript(context)
    if context != other:
        return hub.drop(dropped, "rows whose two prompts differ")
    if "\n\nHuman:" in chosen + rejected:
        return hub.drop(dropped, "rows that end with a human's turn")
    if not turns:
        return hub.drop(dropped, "rows whose turns do not alternate or are empty")
    history, prompt = turns
    return hub.ranked(
        prompt, [(chosen, 1), (rejected, 0)], history[0][0] if history else prompt, dropped, history
    )


def main(argv=None):
    args = hub.arguments(
        __doc__, "Anthropic/hh-rlhf", os.path.dirname(os.path.abspath(__file__))
    ).parse_args(argv)
    hub.prepare_rows(args, [("train", "train"), ("test", "val")], ("chosen", "rejected"), convert)


if __name__ == "__main__":
    main()
