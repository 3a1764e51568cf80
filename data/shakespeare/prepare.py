"""A plain text file as a token stream; the last tenth is validation.

    python -m data.shakespeare.prepare input.txt --tokenizer=gpt2

Writes train.bin and val.bin, and the tokenizer unless it is gpt2 or bytes.
"""

import os
import sys

from data import cli, tokenizer
from data.files import check_output
from data.folder import check_other_data, lock_folder, write_meta, write_stream

HERE = os.path.dirname(os.path.abspath(__file__))
OUTPUTS = ("train.bin", "val.bin", "meta.json", "bpe.tiktoken", "tokenizer.tiktoken")


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="plain text in UTF-8")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="gpt2, bytes (default), bpe (trained on the training part), or a file (a .tiktoken,"
        " another model's tokenizer.json)",
    )
    parser.add_argument(
        "--vocab_size", type=cli.vocab_size_type, default=4096, help="vocabulary size of bpe"
    )
    parser.add_argument("--out", default=HERE, help="data folder to write")
    args = parser.parse_args(argv)
    for name in OUTPUTS:
        check_output(os.path.join(args.out, name), [args.file], is_data=True)
    check_other_data(args.out, (".bin",))
    if args.tokenizer != "bpe":
        tokenizer.load_for_data(args.tokenizer)  # exits before any work if it cannot
    try:
        with open(args.file, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{args.file}: {getattr(e, 'strerror', None) or e}")
    cut = len(text) * 9 // 10
    train_text, val_text = text[:cut], text[cut:]

    with lock_folder(args.out):
        if args.tokenizer == "bpe":
            name = "bpe.tiktoken"
            enc = tokenizer.train([train_text], args.vocab_size)
            tokenizer.save_into(args.out, enc, name)
        else:
            enc, name = tokenizer.load_into(args.out, args.tokenizer)
        sizes = {
            "train_tokens": write_stream(os.path.join(args.out, "train.bin"), [train_text], enc),
            "val_tokens": write_stream(os.path.join(args.out, "val.bin"), [val_text], enc),
        }
        write_meta(args.out, name, os.path.basename(args.file), **sizes)
    print(f"{args.out}: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))


if __name__ == "__main__":
    sys.exit(cli.run(main))
