"""Any data set of the Hugging Face hub whose columns are recognised -> ranked rows.

    python -m data.hub.prepare HuggingFaceH4/ultrafeedback_binarized --out=data/uf
    python -m data.hub.prepare UCLA-AGI/SPIN_iter0@main --out=data/spin0
    python -m data.hub.prepare HuggingFaceTB/smoltalk --config=all --out=data/smoltalk
    python -m data.hub.prepare org/name --prompt=query --chosen=good --rejected=bad --out=data/mine

What is recognised, by the names of the columns, is listed in docs/data.md and data/formats.py; it
is printed with the first row and with what of it has a loss. A revision is resolved to a commit,
which meta.json records. Without a validation split, --val_share of the groups are validation; a
group is all rows with the same first prompt. Rows that cannot be used are counted by their reason.

Some sets have a prepare.py of their own, which knows the traps of their schema.
"""

import itertools
import os
import sys
from collections import Counter

from data import cli, formats, hub
from data.files import printable
from data.hub.read import config_names, open_split, source_name, split_names

OWN = {
    "Anthropic/hh-rlhf": "hh_rlhf",
    "HuggingFaceH4/ultrachat_200k": "ultrachat",
    "berkeley-nest/Nectar": "nectar",
    "openai/gsm8k": "gsm8k",
    "openbmb/UltraFeedback": "ultrafeedback",
    "stanfordnlp/SHP": "shp_ranked",
    "trl-lib/tldr": "tldr",
}

# Names of splits: training, and those of which the first one that is there is validation
SPLITS = {
    "train": ("validation", "valid", "val", "dev", "test", "eval"),
    "train_prefs": ("test_prefs",),
    "train_sft": ("test_sft",),
}


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "hub",
        help="id of the data set, with @commit or @branch if needed, or a folder with its files",
    )
    parser.add_argument("--out", required=True, help="data folder to write")
    parser.add_argument("--revision", help="commit or branch (default: main at the first run)")
    parser.add_argument("--config", help="the part of a data set that has several")
    parser.add_argument("--train", help="split for training")
    parser.add_argument("--val", help="split for validation")
    parser.add_argument(
        "--rows",
        type=hub.nonnegative_int,
        default=0,
        help="read only the first N rows of each split, for a trial; 0: all",
    )
    hub.add_val_share(parser, 0.02)
    formats.add_arguments(parser)
    args = parser.parse_args(argv)
    if not os.path.isdir(args.hub) and "@" in args.hub:
        args.hub, _, revision = args.hub.partition("@")
        if args.revision and args.revision != revision:
            raise SystemExit(f"--revision={args.revision} and @{revision}: give one of them")
        args.revision = revision
    if args.hub in OWN and not formats.named_format(args):
        raise SystemExit(
            f"{args.hub} has traps that its own command knows:"
            f" python -m data.{OWN[args.hub]}.prepare --out={args.out}"
        )

    state = hub.load_state(args)
    commit = state["commit"]
    check_config(args, commit)
    splits = choose_splits(args, split_names(args.hub, args.config, commit))
    found = recognise_first(args, splits[0][0], commit)

    ignored = Counter(state.get("ignored", {}))
    state["ignored"] = ignored  # it is saved with the place in the data set

    def convert(row, dropped):
        ignored.update(formats.unused_columns(found, row, args))
        return formats.convert(row, found, dropped, args)

    def merge(rows, side, dropped):
        return formats.merge_rated(rows(), dropped)

    choose = merge if found.score else None
    hub.prepare_rows(args, splits, (), convert, choose, args.config, state)
    if ignored:
        print(printable(formats.describe_ignored(ignored)))


def check_config(args, commit):
    """Exit if the data set has several parts and none is chosen, or another one."""
    names = config_names(args.hub, commit)
    if args.config:
        if args.config not in names:
            raise SystemExit(
                f"{args.hub} has no {args.config}; --config is one of: {listed(names)}"
            )
    elif len(names) > 1 and "default" not in names:
        raise SystemExit(f"{args.hub} has several parts; choose one with --config: {listed(names)}")


def choose_splits(args, names: list[str]) -> list[tuple[str, str | None]]:
    """[(split, side)]: the two splits that are named or known, or one that is divided."""
    for name in (args.train, args.val):
        if name and name not in names:
            raise SystemExit(f"{args.hub} has no split {name}; it has {listed(names)}")
    known = [name for name in SPLITS if name in names]
    train = args.train or (known[0] if known else names[0])
    if not args.train and not known and len(names) > 1:
        raise SystemExit(f"{args.hub}: choose --train and --val of its splits: {listed(names)}")
    candidates = [name for name in SPLITS.get(train, ()) if name in names]
    val = args.val or (candidates[0] if candidates else None)
    if val == train:
        raise SystemExit(f"--train and --val are both {train}")
    chosen = [(train, "train"), (val, "val")] if val else [(train, None)]
    others = [name for name in names if name not in (train, val)]
    text = f"training: split {train}; validation: "
    text += f"split {val}" if val else f"{args.val_share:g} of its groups"
    print(text + (f"; not read: {listed(others)}" if others else ""))
    return chosen


def listed(names) -> str:
    return formats.listing(sorted(names))


def recognise_first(args, split: str, commit) -> formats.Format:
    """The format of a split, by its first row. Prints it with the first row that can be used."""
    _, rows = open_split(args.hub, split, commit, (), args.config)
    first = next(rows, None)
    if first is None:
        raise SystemExit(f"{args.hub}: the split {split} has no row")
    source = source_name(args.hub, commit)
    found = formats.recognise(first, source, args)
    if found.needed == ("text",):
        raise SystemExit(
            f"{source}: whole texts, for pretraining: python -m data.fineweb.prepare"
            f" --hub={args.hub} --out={args.out}"
        )

    def convert(row, dropped):
        return formats.convert(row, found, dropped, args)

    ranked_rows = []
    for row in itertools.chain([first], itertools.islice(rows, 100)):
        ranked_rows += hub.convert_checked(row, convert, {})
    if found.score:
        ranked_rows = list(formats.merge_rated(ranked_rows, {}))
    unused = formats.unused_columns(found, first, args)
    print(formats.describe(found, first, unused, ranked_rows[0] if ranked_rows else None))
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main))
