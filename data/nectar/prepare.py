"""Nectar: a prompt with seven answers, as GPT-4 ranked them.

    python -m data.nectar.prepare

From berkeley-nest/Nectar, 182,954 prompts in one split. Writes train.jsonl and val.jsonl, K up to
7; 2 % of the prompts, by a hash of the conversation's opening, are validation.

Traps of the schema:
- `rank` is a float, 1.0 is the best, and `answers` are in no order.
- `prompt` is a transcript, "\\n\\nHuman: ... \\n\\nAssistant: ", possibly of several turns; the
  earlier ones become history.
- Where there were fewer than seven answers, one was repeated or a refusal was put in. Of equal
  answers the better rank is kept.
- Some of the prompts come from HH-RLHF and UltraFeedback.
"""

import sys

from data import cli, hub


def convert(row, dropped):
    context, _, rest = row["prompt"].rpartition("\n\nAssistant:")
    turns = None if rest.strip() else hub.parse_transcript(context)
    if not turns:
        return hub.drop(dropped, "rows whose turns do not alternate or are empty")
    history, prompt = turns
    opening = history[0][0] if history else prompt
    answers = []
    for answer in row["answers"]:
        rank = answer["rank"]
        answers.append((answer["answer"], None if rank is None else -rank))
    return hub.rank_responses(prompt, answers, opening, dropped, history)


def main(argv=None):
    parser = hub.argument_parser(__doc__, "berkeley-nest/Nectar", __file__)
    hub.add_val_share(parser, 0.02)
    args = parser.parse_args(argv)
    hub.prepare_rows(args, [("train", None)], ("prompt", "answers"), convert)


if __name__ == "__main__":
    sys.exit(cli.run(main))
