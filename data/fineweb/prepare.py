"""Text of the web as a token stream: FineWeb-Edu's sample of 10B tokens, or another set of {"text"}.

    python -m data.fineweb.prepare                          # 9.7M documents, 28.5 GB to read, 20 GB to write
    python -m data.fineweb.prepare --tokens=100_000_000     # its first 100M
    python -m data.fineweb.prepare --hub=HuggingFaceFW/fineweb --out=data/fineweb_all           # unfiltered: llm.c's figures are on this
    python -m data.fineweb.prepare --hub=Skylion007/openwebtext --out=data/openwebtext          # nanoGPT's

Nothing is kept of what is read but the tokens. Killed, it goes on at the row it was at; of the file it was in, the part before
that is read once more. Documents are put on a side by a hash of their text, so a text that comes twice stands on one side.

Traps: without a config FineWeb is all of its 15T tokens (Edu: 1.3T); `token_count` is GPT-2's, without end-of-text. OpenWebText had
a loading script, which `datasets` no longer runs; the commit in data/hub.py holds parquet (config plain_text, 8M documents), and
its documents have no id, only `text`.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import hub, tokenizer
from data.folder import split_of

CONFIGS = {
    "HuggingFaceFW/fineweb-edu": "sample-10BT",
    "HuggingFaceFW/fineweb": "sample-10BT",
    "Skylion007/openwebtext": "plain_text",
}


def main(argv=None):
    parser = hub.arguments(
        __doc__, "HuggingFaceFW/fineweb-edu", os.path.dirname(os.path.abspath(__file__))
    )
    parser.add_argument("--config", help="of the hub's set (default: sample-10BT, plain_text)")
    parser.add_argument(
        "--tokens",
        type=hub.count,
        default=0,
        help="stop at the document that reaches so many (default: all)",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, bytes, or a file: another model's tokenizer.json, a .tiktoken",
    )
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.002,
        help="share of the validation side, by the hash of a group",
    )
    args = parser.parse_args(argv)
    enc, name = tokenizer.adopt(args.tokenizer, args.out)
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 2**16 else np.uint32)

    def convert(rows, side, dropped):
        texts = [
            row["text"] for row in rows if isinstance(row["text"], str) and row["text"].strip()
        ]
        if len(texts) < len(rows):
            hub.drop(dropped, "documents without a text", len(rows) - len(texts))
        for text, ids in zip(texts, pool.map(enc.encode_ordinary, texts)):
            yield (
                f"{split_of(text, args.val_share)}.bin",
                np.array(ids + [enc.eot_token], dtype).tobytes(),
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the tokenizer lets other threads run
        state = hub.collect(
            args,
            [("train", None)],
            ("text",),
            convert,
            args.config or CONFIGS.get(args.hub),
            args.tokens * dtype.itemsize,
        )
    hub.finish(args, state, None, name, dtype.itemsize)


if __name__ == "__main__":
    main()
