"""Posts with comments, as the T_n figure reads them: history + preferred comment, one text for each pair of comments.

    python -m data.shp.prepare                                         # the hub's stanfordnlp/SHP, first 10,000 rows, GPT-2's BPE
    python -m data.shp.prepare ranked.jsonl.gz --rows=1200 --tokenizer=bpe    # the same construction from local ranked rows
    python -m data.shp.prepare --surrogate --rows=1200 --tokenizer=bpe        # from installed packages' docstrings: needs nothing

--sets=3 writes OUT/1, OUT/2, OUT/3, each of the next so many rows: other posts for other seeds.

Writes OUT/row and OUT/group, the same texts split twice: by row, as the write-up did, and by post. SHP has many rows a post
and every one of them begins with the post's `history`, so a split by row puts nearly every validation post into the training
set; it says so when it is done. Both have the tokenizer of the group split's training texts.

Traps of SHP's schema: `labels` 1 means that A is preferred; a post's rows are pairs of its comments, so the same comment is
preferred in several; `post_id` is the group; the published splits are by post, only the write-up's own is not.
"""

import argparse
import itertools
import os

import numpy as np
from tqdm import tqdm

from data import hub, tokenizer
from data.rows import longest_shared_prefix, write_rows
from data.folder import split_of, write_meta

HERE = os.path.dirname(os.path.abspath(__file__))


def hub_pairs(path, commit):
    """(history, preferred comment, post) of each row of SHP's train split, in its order. path: a hub id, or a folder with its files."""
    for row in hub.stream(
        path, "train", commit, ("history", "human_ref_A", "human_ref_B", "labels", "post_id")
    )[1]:
        yield (
            row["history"],
            row["human_ref_A"] if row["labels"] == 1 else row["human_ref_B"],
            row["post_id"],
        )


def ranked_pairs(paths):
    """The same of each pair of a ranked row's responses that differ in score, as SHP was made of threads."""
    from data.jsonl.prepare import ranked, read

    for where, value in itertools.chain.from_iterable(map(read, paths)):
        row = ranked(value, where)
        scores = row.get("scores") or range(len(row["responses"]), 0, -1)
        if not str(value.get("source", "")).startswith("gsm8k"):  # whose rows are no threads
            for i, j in itertools.combinations(range(len(scores)), 2):
                if scores[i] > scores[j]:
                    yield (
                        row["prompt"],
                        row["responses"][i],
                        str(value.get("group") or row["prompt"]),
                    )


def surrogate_pairs():
    """The same of a class's docstring and its methods', the longer one preferred."""
    from data.pydocs.prepare import documented, sources

    for module, path in sources():
        names = dict((name, doc) for name, _, doc in documented(module, path))
        for name, doc in names.items():
            methods = sorted(
                {
                    d
                    for n, d in names.items()
                    if n.rpartition(".")[0] == name and n != name and d != doc
                },
                key=lambda d: (-len(d), d),
            )
            if name != module:
                for i, j in itertools.combinations(range(min(len(methods), 6)), 2):
                    yield f"{name}\n\n{doc}", methods[i], name


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", help="local ranked rows, .jsonl or .jsonl.gz; none: the hub's"
    )
    parser.add_argument(
        "--surrogate", action="store_true", help="docstrings of the installed packages"
    )
    parser.add_argument(
        "--hub",
        default="stanfordnlp/SHP",
        help="a data set of SHP's schema, or a folder that holds one",
    )
    parser.add_argument(
        "--revision", help="of the hub's data set (default: the commit in data/hub.py)"
    )
    parser.add_argument("--rows", type=int, default=10_000, help="the first so many")
    parser.add_argument(
        "--sets", type=int, default=0, help="so many times, in folders of their own"
    )
    parser.add_argument(
        "--split",
        choices=["row", "group", "both"],
        default="both",
        help="by row, by post, or a folder of each",
    )
    parser.add_argument(
        "--tokenizer", default="gpt2", help="gpt2, bytes, or bpe, trained on the texts"
    )
    parser.add_argument("--vocab_size", type=int, default=2048, help="of bpe")
    parser.add_argument(
        "--out", default=HERE, help="the data folder to write, or the one that they stand in"
    )
    args = parser.parse_args(argv)
    if args.surrogate and args.files:
        parser.error("either files or --surrogate")
    if args.rows < 1 or args.sets < 0 or args.vocab_size < 257:
        parser.error(
            "--rows must be at least 1, --sets at least 0, --vocab_size at least 257: the bytes and end-of-text"
        )
    if args.tokenizer != "bpe":
        tokenizer.load(args.tokenizer)
    commit = None if args.surrogate or args.files else hub.commit_of(args.hub, args.revision)
    pairs = (
        surrogate_pairs()
        if args.surrogate
        else ranked_pairs(args.files)
        if args.files
        else hub_pairs(args.hub, commit)
    )
    source = (
        "docstrings"
        if args.surrogate
        else ", ".join(map(os.path.basename, args.files)) or hub.name_of(args.hub, commit)
    )
    pairs = iter(tqdm(pairs, total=args.rows * max(1, args.sets), desc="pairs", disable=None))
    for out in [os.path.join(args.out, str(n + 1)) for n in range(args.sets)] or [args.out]:
        texts = [
            {"text": f"{history}\n\n{comment}", "group": post}
            for history, comment, post in itertools.islice(pairs, args.rows)
            if f"{history}{comment}".strip()
        ]
        write(out, texts, source, ("row", "group") if args.split == "both" else (args.split,), args)


def write(out, texts, source, splits, args):
    """The folders out/SPLIT of some texts."""
    sides = {
        "row": [split_of(f"row {i}", 0.2) for i in range(len(texts))],
        "group": [split_of(row["group"], 0.2) for row in texts],
    }
    if any(set(side) != {"train", "val"} for side in sides.values()):
        raise SystemExit(f"{source}: {len(texts)} texts are too few for a split")
    enc = (
        None
        if args.tokenizer != "bpe"
        else tokenizer.train(
            [row["text"] for row, side in zip(texts, sides["group"]) if side == "train"],
            args.vocab_size,
        )
    )
    for split in splits:
        folder, name = os.path.join(out, split), "bpe.tiktoken" if enc else args.tokenizer
        os.makedirs(folder, exist_ok=True)
        if enc:
            tokenizer.save(enc, os.path.join(folder, name))
        rows = {
            side: [row for row, s in zip(texts, sides[split]) if s == side]
            for side in ("train", "val")
        }
        for side in rows:
            write_rows(os.path.join(folder, f"{side}.jsonl"), rows[side])
        ids = {
            side: [(enc or tokenizer.load(name)).encode_ordinary(row["text"]) for row in rows[side]]
            for side in rows
        }
        shared = longest_shared_prefix(ids["val"], ids["train"])
        leaks = float(np.mean([s >= min(64, len(v)) for s, v in zip(shared, ids["val"])]))
        posts = len({row["group"] for row in texts})
        write_meta(
            folder,
            name,
            source,
            **{f"{side}_rows": len(rows[side]) for side in rows},
            posts=posts,
            leaks=leaks,
        )
        print(
            f"{folder}: {len(rows['train']):,} train rows, {len(rows['val']):,} val rows of {posts:,} posts; "
            f"the first 64 tokens of {100 * leaks:.1f} % of the validation rows begin a training row too"
        )


if __name__ == "__main__":
    main()
