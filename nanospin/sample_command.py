"""The command line of sample.py: its arguments, and the samples that a killed command keeps."""

import contextlib
import json
import os
import sys

from data import cli
from data.files import atomic_write, check_output, is_there, require_regular, write_line


def make_parser(description: str) -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=description)
    parser.add_argument("checkpoint", help="a run folder, or a checkpoint in it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="print a response to this prompt")
    source.add_argument(
        "--chat",
        action="store_true",
        help="read prompts from standard input, one per line, as a conversation",
    )
    source.add_argument(
        "--prompts",
        help="a .jsonl file of rows with a prompt, with or without responses; needs --out",
    )
    parser.add_argument(
        "--n", type=cli.number_type(int, 1, 1024), default=1, help="samples of each prompt"
    )
    parser.add_argument("--system", default="", help="a system message for --prompt and --chat")
    parser.add_argument(
        "--out",
        help="the .jsonl file to write the responses to; until it is done they are in OUT.partial, "
        "from where the same command continues",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, without a template")
    parser.add_argument(
        "--temperature",
        type=cli.temperature_type,
        default=1.0,
        help="divides the logits; 0 is greedy",
    )
    parser.add_argument(
        "--top_k",
        type=cli.number_type(int, 0),
        default=0,
        help="sample from the k most likely tokens; 0: from all",
    )
    parser.add_argument(
        "--top_p",
        type=cli.number_type(float, cli.MIN_TOP_P, 1),
        default=1.0,
        help="sample from the fewest tokens of this total probability; 1: from all",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=cli.number_type(int, 0),
        default=0,
        help="most tokens of a response; 0: max_response of the checkpoint",
    )
    parser.add_argument("--seed", type=cli.seed_type, default=0, help="of the samples")
    cli.add_dtype(parser)
    parser.add_argument(
        "--device",
        type=cli.device_type,
        default=cli.default_device(),
        help="cpu or cuda; default: cuda if torch sees a GPU",
    )
    return parser


def check_arguments(parser, args):
    """Exit with one line if the arguments do not go together, before the model is loaded."""
    if bool(args.prompts) != bool(args.out):
        parser.error("--prompts and --out go together")
    if args.chat and args.n > 1:
        parser.error("--n goes with --prompt and --prompts")
    if args.chat and sys.stdin is None:
        parser.error("--chat reads from standard input, and that is closed")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if args.system and (args.prompts or args.raw):
        parser.error("--system goes with --prompt and --chat; rows have their own, texts have none")
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out}: No such folder")
    if args.out:
        check_output(args.out, [args.prompts])
        check_output(f"{args.out}.partial", [args.prompts])


class PartialSamples:
    """OUT.partial: a line with `of`, a hash of what is sampled from, then a line for each finished
    sample, {"sample": number, "text": ..., "ids": [...]}, in the order in which they end.

    ids: {number: ids} of the samples that are there. Exits with one line if the file is of
    something else.
    """

    def __init__(self, out: str, of: str):
        self.path = f"{out}.partial"
        require_regular(self.path)
        self.ids = {}
        head = json.dumps({"of": of}) + "\n"
        if is_there(self.path):
            self.read(of)
        else:
            with atomic_write(self.path) as f:
                f.write(head)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def read(self, of: str):
        with open(self.path, "rb") as f:
            head, *lines = f.read().split(b"\n")
        samples = []
        try:
            is_same = json.loads(head) == {"of": of}
            for line in lines[:-1]:  # a kill can cut the last line short
                samples.append(json.loads(line))
            self.ids = {sample["sample"]: sample["ids"] for sample in samples}
        except (ValueError, KeyError, TypeError, RecursionError):
            is_same = False
        if not is_same:
            raise SystemExit(
                f"{self.path} is of other prompts or settings, or of another checkpoint: remove it,"
                " or give another --out"
            )
        with open(self.path, "rb+") as f:
            f.truncate(sum(len(line) + 1 for line in [head, *lines[:-1]]))

    def add(self, number: int, text: str, ids: list[int]):
        self.ids[number] = ids
        line = {"sample": number, "text": text, "ids": ids}
        write_line(self.file, json.dumps(line, ensure_ascii=False))

    def remove(self):
        self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
