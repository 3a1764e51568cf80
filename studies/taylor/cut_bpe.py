"""GPT-2's BPE, cut to the tokens that the texts of a data folder use.

    python -m studies.taylor.cut_bpe data/shp/ranked/uncut/row OUT.tiktoken

The first NUM_TOKENS tokens of every text stay the same; only their ids change. A training step
over a third of the vocabulary takes a third of the time.
"""

import os
import sys

from data import cli, tokenizer
from data.files import check_output
from data.rows import read_rows

NUM_TOKENS = 144  # of each text: block_size, and the rest of the word at the cut


def used_tokens(enc, texts) -> set[bytes]:
    """The tokens at the beginning of the texts."""
    ids = set()
    for text in texts:
        ids.update(tokenizer.encode(enc, text)[:NUM_TOKENS])
    return {enc.decode_single_token_bytes(i) for i in ids}


def parts_of(token: bytes, ranks: dict[bytes, int]) -> set[bytes]:
    """The token, and all tokens that byte-level BPE makes on the way to it."""
    parts = [bytes([byte]) for byte in token]
    made = {token}
    while len(parts) > 1:
        merges = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = merges.index(min(merges))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        made.add(parts[i])
    return made


def cut(enc, texts):
    """The tokenizer with the bytes and what the texts need, in the order of the old ids.

    No merge that the texts use is missing, so each merge is still the first one that applies.
    """
    ranks = enc._mergeable_ranks
    kept = {bytes([byte]) for byte in range(256)}
    for token in used_tokens(enc, texts):
        kept |= parts_of(token, ranks)
    in_order = sorted(kept, key=ranks.get)
    return tokenizer.make_encoding("cut", {token: rank for rank, token in enumerate(in_order)})


def main(argv: list[str]):
    parser = cli.ArgumentParser(prog="python -m studies.taylor.cut_bpe", description=__doc__)
    parser.add_argument("folder", help="data folder of whole texts")
    parser.add_argument("out", help="the .tiktoken file to write")
    args = parser.parse_args(argv)
    check_output(args.out, [args.folder])
    rows = []
    for split in ("train", "val"):
        rows += read_rows(os.path.join(args.folder, f"{split}.jsonl"))
    enc = cut(tokenizer.load("gpt2"), [row["responses"][0] for row in rows])
    tokenizer.save(enc, args.out)
    print(f"{args.out}: {enc.n_vocab:,} of GPT-2's 50,257 tokens")


if __name__ == "__main__":
    sys.exit(cli.run(main))
