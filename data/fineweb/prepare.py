"""Web text as a token stream: FineWeb-Edu's sample of 10B tokens, or another data set of {"text"}.

    python -m data.fineweb.prepare                          # 28.5 GB to read, 20 GB to write
    python -m data.fineweb.prepare --tokens=100_000_000     # the first 100M tokens
    python -m data.fineweb.prepare --hub=HuggingFaceFW/fineweb --out=data/fineweb_all
    python -m data.fineweb.prepare --hub=Skylion007/openwebtext --out=data/openwebtext

FineWeb-Edu's sample has 9.7M documents. llm.c's published losses are on FineWeb, nanoGPT's on
OpenWebText.

Writes train.bin and val.bin. Only the tokens are kept. A killed preparation continues at its row;
the part of the source file before that row is read again. A document's side is a hash of its
text, so a text that occurs twice is on one side.

Traps:
- Without a config FineWeb is all of its 15T tokens (Edu: 1.3T).
- `token_count` counts GPT-2 tokens without end-of-text.
- OpenWebText had a loading script, which `datasets` no longer runs. The commit in data/hub
  holds parquet (config plain_text, 8M documents). Its documents have only `text`, no id.
"""

import contextlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import cli, hub, tokenizer
from data.folder import check_other_data, split_of, token_dtype
from data.hub.read import find_part, path_or_id

CONFIGS = {
    "HuggingFaceFW/fineweb-edu": "sample-10BT",
    "HuggingFaceFW/fineweb": "sample-10BT",
    "Skylion007/openwebtext": "plain_text",
}


def main(argv=None):
    parser = hub.argument_parser(__doc__, "HuggingFaceFW/fineweb-edu", __file__)
    parser.add_argument(
        "--config", help="config of the data set (default: sample-10BT, or plain_text)"
    )
    parser.add_argument(
        "--tokens",
        type=hub.nonnegative_int,
        default=0,
        help="stop at the document that reaches this number; 0: read all",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, bytes, or a file: a .tiktoken, or another model's tokenizer.json",
    )
    hub.add_val_share(parser, 0.002)
    args = parser.parse_args(argv)
    if args.config and os.path.isdir(args.hub):
        if find_part(args.hub, args.config) == (path_or_id(args.hub), None):
            raise SystemExit(
                f"{args.hub} has neither a folder {args.config} nor a README.md that defines it"
            )
    enc = tokenizer.load_for_data(args.tokenizer)
    args.tokenizer_sha256 = tokenizer.fingerprint(enc)  # an option like the others: see load_state
    if tokenizer.begin(enc):
        args.document_begin = tokenizer.begin(enc)  # older versions left it out
    dtype = token_dtype(enc.n_vocab)

    def encode_or_none(text):
        with contextlib.suppress(SystemExit):  # the tokenizer fails on this text
            return tokenizer.document_ids(enc, text)

    def convert(rows, side, dropped):
        texts = [row["text"] for row in rows if is_text(row["text"])]
        if len(texts) < len(rows):
            hub.drop(dropped, "documents without a text", len(rows) - len(texts))
        for text, ids in zip(texts, pool.map(encode_or_none, texts)):
            if ids is None:
                hub.drop(dropped, "documents that the tokenizer cannot encode")
                continue
            name = f"{split_of(text, args.val_share)}.bin"
            yield name, np.array(ids, dtype).tobytes()

    check_other_data(args.out, (".bin",))
    with hub.lock_output(args):
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the tokenizer releases the GIL
            state = hub.collect(
                args,
                splits=[("train", None)],
                fields=("text",),
                convert=convert,
                config=args.config or CONFIGS.get(args.hub),
                max_bytes=args.tokens * dtype.itemsize,
            )
        _, tokenizer_name = tokenizer.load_into(args.out, args.tokenizer)
        hub.finish_streams(args, state, tokenizer_name, dtype.itemsize)


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


if __name__ == "__main__":
    sys.exit(cli.run(main))
