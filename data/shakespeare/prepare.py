"""Any plain text file as a token stream, the last tenth for validation.

python -m data.shakespeare.prepare input.txt --tokenizer=gpt2
"""

import argparse
import os

from data import tokenizer
from data.folder import tokenizer_path, write_meta, write_stream

HERE = os.path.dirname(os.path.abspath(__file__))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="plain text in UTF-8")
    parser.add_argument(
        "--tokenizer", default="bytes", help="gpt2, bytes, or bpe: trained on this text"
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="of bpe")
    parser.add_argument("--out", default=HERE, help="the data folder to write")
    args = parser.parse_args(argv)
    try:
        with open(args.file, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{args.file}: {getattr(e, 'strerror', None) or e}")
    cut = len(text) * 9 // 10
    os.makedirs(args.out, exist_ok=True)
    if args.tokenizer == "bpe":
        tokenizer.save(
            tokenizer.train([text[:cut]], args.vocab_size), os.path.join(args.out, "bpe.tiktoken")
        )
        args.tokenizer = "bpe.tiktoken"
    enc = tokenizer.load(tokenizer_path(args.out, args.tokenizer))
    sizes = {
        f"{split}_tokens": write_stream(os.path.join(args.out, f"{split}.bin"), [part], enc)
        for split, part in (("train", text[:cut]), ("val", text[cut:]))
    }
    write_meta(args.out, args.tokenizer, os.path.basename(args.file), **sizes)
    print(f"{args.out}: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))


if __name__ == "__main__":
    main()
