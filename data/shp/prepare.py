"""SHP as plain texts, a post and its preferred comment for each pair; for the Taylor loss study.

    python -m data.shp.prepare
    python -m data.shp.prepare ranked.jsonl.gz --rows=1200 --tokenizer=bpe
    python -m data.shp.prepare --surrogate --rows=1200 --tokenizer=bpe

The first reads stanfordnlp/SHP, the first 10,000 rows, with GPT-2's BPE. The second makes the
same from local ranked rows. The third makes it from the docstrings of installed packages,
offline. A text is the post (`history`), an empty line, and the preferred comment.

Writes OUT/row and OUT/group, the same texts split in two ways: by row, as the write-up did, and
by post. SHP has many rows for a post, and each begins with the post's `history`. A split by row
therefore puts nearly every validation post into training; the command prints how many. With
--tokenizer=bpe both folders have the one trained on the group split's training texts.

--sets=3 writes OUT/1, OUT/2 and OUT/3, each from the next N rows: other posts for other seeds.

Traps of the schema:
- `labels` 1 means that A is preferred.
- A post's rows are pairs of its comments, so the same comment is preferred in several of them.
- `post_id` is the group. The published splits are by post; only the write-up's own split is not.
"""

import itertools
import os
import sys

from data import cli, tokenizer
from data.files import check_output
from data.folder import check_other_data, lock_folders, split_of, write_meta
from data.hub.read import describe_folder, open_split, resolve_commit, source_name
from data.progress import ProgressBar
from data.rows import longest_shared_prefix, write_rows

HERE = os.path.dirname(os.path.abspath(__file__))


def hub_pairs(source, commit):
    """Yield (history, preferred comment, post) of each row of SHP's train split, in its order.

    source: a hub id, or a folder with the files.
    """
    if os.path.isdir(source):
        describe_folder(source)
    fields = ("history", "human_ref_A", "human_ref_B", "labels", "post_id")
    _, rows = open_split(source, "train", commit, fields)
    for row in rows:
        preferred = row["human_ref_A"] if row["labels"] == 1 else row["human_ref_B"]
        yield row["history"], preferred, row["post_id"]


def ranked_pairs(paths):
    """The same for each pair of a ranked row's responses that differ in score, as SHP was made."""
    from data.jsonl.prepare import read_lines, to_row

    for path in paths:
        for where, value in read_lines(path):
            row = to_row(value, where)
            if str(value.get("source", "")).startswith("gsm8k"):  # not threads
                continue
            for name in ("history", "system"):
                if row.get(name):
                    raise SystemExit(f"{where}: a thread has no {name}; drop it")
            num_responses = len(row["responses"])
            scores = row.get("scores") or range(num_responses, 0, -1)
            group = value.get("group")
            post = row["prompt"] if group is None else str(group)
            for i, j in itertools.combinations(range(num_responses), 2):
                if scores[i] > scores[j]:
                    yield row["prompt"], row["responses"][i], post


def surrogate_pairs():
    """The same for a class and pairs of its methods: docstrings, the longer one preferred."""
    from data.pydocs.prepare import documented, sources

    for module, path in sources():
        docs = {name: doc for name, _, doc in documented(module, path)}
        for name, doc in docs.items():
            if name == module:
                continue
            methods = set()
            for other_name, other_doc in docs.items():
                parent = other_name.rpartition(".")[0]
                if parent == name and other_name != name and other_doc != doc:
                    methods.add(other_doc)
            longest_first = sorted(methods, key=lambda text: (-len(text), text))
            for preferred, _ in itertools.combinations(longest_first[:6], 2):
                yield f"{name}\n\n{doc}", preferred, name


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", nargs="*", help="local ranked rows, .jsonl or .jsonl.gz; none: the hub's"
    )
    parser.add_argument(
        "--surrogate", action="store_true", help="docstrings of the installed packages"
    )
    parser.add_argument(
        "--hub",
        default="stanfordnlp/SHP",
        help="id of a data set of SHP's schema, or a folder with its files",
    )
    parser.add_argument(
        "--revision", help="commit or branch on the hub (default: the commit in data/hub)"
    )
    parser.add_argument(
        "--rows", type=cli.number_type(int, 1), default=10_000, help="number of pairs"
    )
    parser.add_argument(
        "--sets",
        type=cli.number_type(int, 0, 1000),
        default=0,
        help="number of sets, each in a folder of OUT; 0: one, in OUT",
    )
    parser.add_argument(
        "--split",
        choices=["row", "group", "both"],
        default="both",
        help="split by row, by post, or a folder of each",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, bytes, bpe (trained on the texts), or a file (a .tiktoken, another model's"
        " tokenizer.json)",
    )
    parser.add_argument(
        "--vocab_size", type=cli.vocab_size_type, default=2048, help="vocabulary size of bpe"
    )
    parser.add_argument("--out", default=HERE, help="folder to write row/ and group/ to")
    args = parser.parse_args(argv)
    if args.surrogate and args.files:
        parser.error("either files or --surrogate")
    if args.tokenizer != "bpe":
        tokenizer.load_for_data(args.tokenizer)  # exits before any work if it cannot

    if args.surrogate:
        pairs, source = surrogate_pairs(), "docstrings"
    elif args.files:
        pairs, source = ranked_pairs(args.files), ", ".join(map(os.path.basename, args.files))
    else:
        commit = resolve_commit(args.hub, args.revision)
        pairs, source = hub_pairs(args.hub, commit), source_name(args.hub, commit)
    total = args.rows * max(1, args.sets)
    pairs = iter(ProgressBar(pairs, total=total, desc="pairs"))
    outs = [os.path.join(args.out, str(n + 1)) for n in range(args.sets)] or [args.out]
    splits = ("row", "group") if args.split == "both" else (args.split,)
    for out in outs:
        for split, name in itertools.product(splits, ("train.jsonl", "val.jsonl", "meta.json")):
            check_output(os.path.join(out, split, name), args.files, is_data=True)
            check_other_data(os.path.join(out, split), (".jsonl",))
    for out in outs:
        texts, num_empty = [], 0
        for history, comment, post in itertools.islice(pairs, args.rows):
            is_missing = history is None or comment is None
            if is_missing or not f"{history}{comment}".strip():
                num_empty += 1
            else:
                texts.append({"text": f"{history}\n\n{comment}", "group": post})
        if num_empty:
            print(f"{out}: left out {num_empty} pairs without a post or a comment")
        write_splits(out, texts, source, splits, args)


def write_splits(out, texts, source, splits, args):
    """Write the data folders OUT/row and OUT/group of some texts."""
    sides = {
        "row": [split_of(f"row {i}", 0.2) for i in range(len(texts))],
        "group": [split_of(row["group"], 0.2) for row in texts],
    }
    if any(set(side) != {"train", "val"} for side in sides.values()):
        raise SystemExit(f"{source}: {len(texts)} texts are too few for a split")
    if args.tokenizer == "bpe":
        enc = tokenizer.train(
            [row["text"] for row in on_side(texts, sides["group"], "train")], args.vocab_size
        )
    else:
        enc = tokenizer.load(args.tokenizer)
    folders = [os.path.join(out, split) for split in splits]
    with lock_folders(folders):
        for split, folder in zip(splits, folders):
            if args.tokenizer == "bpe":
                name = "bpe.tiktoken"
                tokenizer.save_into(folder, enc, name)
            else:
                _, name = tokenizer.load_into(folder, args.tokenizer)
            train = on_side(texts, sides[split], "train")
            val = on_side(texts, sides[split], "val")
            write_rows(os.path.join(folder, "train.jsonl"), train)
            write_rows(os.path.join(folder, "val.jsonl"), val)
            leaks = share_of_leaks(train, val, enc)
            posts = len({row["group"] for row in texts})
            write_meta(
                folder,
                name,
                source,
                train_rows=len(train),
                val_rows=len(val),
                posts=posts,
                leaks=leaks,
            )
        print(
            f"{folder}: {len(train):,} train rows, {len(val):,} val rows of {posts:,} posts;"
            f" {100 * leaks:.1f} % of the validation rows share their first 64 tokens with a"
            " training row"
        )


def on_side(texts, sides, side):
    return [row for row, row_side in zip(texts, sides) if row_side == side]


def share_of_leaks(train, val, enc, num_tokens=64):
    """The share of validation texts whose first tokens (at most 64) begin a training text too."""
    train_ids = [tokenizer.encode(enc, row["text"]) for row in train]
    val_ids = [tokenizer.encode(enc, row["text"]) for row in val]
    shared = longest_shared_prefix(val_ids, train_ids)
    leaks = [n >= min(num_tokens, len(ids)) for n, ids in zip(shared, val_ids)]
    return sum(leaks) / len(leaks)


if __name__ == "__main__":
    sys.exit(cli.run(main))
