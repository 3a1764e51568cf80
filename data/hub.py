"""The hub's data sets, streamed at a fixed commit, and what becomes of their rows, written as they come.

A preparation that was killed goes on where it stopped: OUT/state.json says how many rows were read, at which commit, and how
many bytes they made of each OUT/FILE.partial; what stands behind those is cut off. Files get their names when all is there,
meta.json last. A folder that holds a set's files (parquet or JSON lines, named as on the hub) serves in place of its id.
"""

import argparse
import functools
import itertools
import json
import os
import re
import sys

from tqdm import tqdm

from data.rows import check_row, write_rows
from data.files import printable, read_json, write_json
from data.folder import split_of, write_meta

# Commits that others' code names for these sets. One that is not here is read at what `main` is at the first run, and says so in meta.json
PINNED = {
    "Anthropic/hh-rlhf": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    "HuggingFaceFW/fineweb": "9bb295ddab0e05d785b879661af7260fed5140fc",
    "HuggingFaceFW/fineweb-edu": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "HuggingFaceH4/ultrachat_200k": "8049631c405ae6576f93f445c6b8166f76f5505a",
    "Skylion007/openwebtext": "b4325f019c648b1641a1784748667e8b74e5e064",
    "berkeley-nest/Nectar": "3c6b4c47fa1cc38869f9f32dce1699f7abad8b06",
    "openbmb/UltraFeedback": "40b436560ca83a8dba36114c22ab3c66e43f6d5e",
    "stanfordnlp/SHP": "e94b5f32602712d78ed494fe79105b1959396686",
    "trl-lib/tldr": "21233da376667088e6eb1ce4ce19ed832c2935d3",
}
CHUNK = 1000  # rows between two states


def arguments(doc, hub, out):
    """The parser that every prepare.py begins with."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(printable(message))  # one line, without the usage
    parser.add_argument(
        "--hub",
        default=hub,
        help="the set's id, or a folder that holds its files (default %(default)s)",
    )
    parser.add_argument(
        "--revision",
        help="of the hub's set (default: the commit in data/hub.py, else that of main at the first run)",
    )
    parser.add_argument(
        "--rows", type=count, default=0, help="read only the first so many of each split, to try it"
    )
    parser.add_argument("--out", default=out, help="the data folder to write")
    return parser


def count(text):
    """An argparse type: a whole number from 0."""
    if not text.replace("_", "").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


# ---------------------------------------------------------------------------------------------- reading


def refused(hub, e):
    """One line of whatever the packages raise, which raise whatever their HTTP client does."""
    return SystemExit(
        printable(
            f"{hub}: datasets could not read it ({type(e).__name__}: {(str(e).splitlines() or [''])[0]}); without a network "
            "give a folder that holds its files: --hub=FOLDER"
        )
    )


def commit_of(hub, revision=None):
    """The commit to read a set at, so that a later run reads the same rows; None of a folder."""
    revision = revision or PINNED.get(hub, "main")
    if os.path.isdir(hub) or re.fullmatch("[0-9a-f]{40}", revision):
        return None if os.path.isdir(hub) else revision
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(hub, revision=revision).sha
    except Exception as e:
        raise refused(hub, e)


def name_of(hub, commit):
    return f"{hub} @ {commit}" if commit else os.path.basename(os.path.abspath(hub))


def stream(hub, split, commit, need, config=None, place=None):
    """(dataset, rows) of a split; dataset.state_dict() is a place to go on from. Exits with one line if it cannot be read, or if
    its first row lacks one of the fields in `need`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it tries for 20 seconds, then there is one line
    if os.path.isdir(hub) and not os.path.exists(os.path.join(hub, "README.md")):
        config = None  # the card is what names configs
    try:
        dataset = datasets.load_dataset(hub, config, split=split, revision=commit, streaming=True)
        if place:
            dataset.load_state_dict(place)
    except Exception as e:
        raise refused(hub, e)
    return dataset, checked(hub, dataset, need)


def checked(hub, dataset, need):
    rows, first = iter(dataset), True
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:
            raise refused(hub, e)
        if first and any(name not in row for name in need):
            raise SystemExit(
                printable(
                    f"{hub}: its rows have no {', '.join(name for name in need if name not in row)}; they have {', '.join(row)}, "
                    f"and {', '.join(need)} are needed"
                )
            )
        first = False
        yield row


# ---------------------------------------------------------------------------------------------- writing


def collect(args, parts, need, convert, config=None, limit=0):
    """Rows of the splits in `parts`, [(split, side)], through convert(rows, side, dropped) -> (file, bytes), ..., appended to
    OUT/FILE.partial until there are `limit` bytes in all. Returns the state; `dropped` counts what was left out, by reason."""
    path, asked = (
        os.path.join(args.out, "state.json"),
        {name: value for name, value in vars(args).items() if name != "out"},
    )
    if os.path.exists(path):
        state = read_json(
            path,
            ("asked", "commit", "part", "rows", "place", "bytes", "dropped"),
            "; remove it to begin anew",
        )
        if state["asked"] != asked:
            other = ", ".join(
                f"--{k}={state['asked'].get(k)}"
                for k in sorted(asked | state["asked"])
                if asked.get(k) != state["asked"].get(k)
            )
            raise SystemExit(
                f"{path}: this preparation was begun with {other}; go on with that, or remove the file to begin anew"
            )
    else:
        state = {
            "asked": asked,
            "commit": commit_of(args.hub, args.revision),
            "part": 0,
            "rows": 0,
            "place": None,
            "bytes": {},
            "dropped": {},
        }
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise SystemExit(f"{args.out}: {e.strerror}")
    dropped, going_on = state["dropped"], state["part"] < len(parts)
    files = {
        name: partial(args.out, name, size) for name, size in state["bytes"].items() if going_on
    }
    while state["part"] < len(parts):
        split, side = parts[state["part"]]
        dataset, rows = stream(args.hub, split, state["commit"], need, config, state["place"])
        known = (
            dataset.info.splits[split].num_examples
            if split in (dataset.info.splits or {})
            else None
        )
        with tqdm(
            desc=split, unit=" rows", initial=state["rows"], total=args.rows or known, disable=None
        ) as bar:
            while True:
                chunk = list(
                    itertools.islice(
                        rows, min(CHUNK, args.rows - state["rows"]) if args.rows else CHUNK
                    )
                )
                full = False
                try:
                    for name, piece in convert(chunk, side, dropped):
                        if name not in files:
                            files[name] = partial(args.out, name, 0)
                            state["bytes"][name] = 0
                        files[name].write(piece)
                        state["bytes"][name] += len(piece)
                        full = bool(limit) and sum(state["bytes"].values()) >= limit
                        if full:
                            break
                    for f in files.values():
                        f.flush()
                        os.fsync(f.fileno())
                    state |= {"rows": state["rows"] + len(chunk), "place": dataset.state_dict()}
                    if full or len(chunk) < CHUNK:
                        state |= {
                            "part": len(parts) if full else state["part"] + 1,
                            "rows": 0,
                            "place": None,
                        }
                    write_json(path, state)
                except KeyError as e:
                    raise SystemExit(
                        printable(
                            f"{args.hub}: its rows have no {e} inside; the header of the prepare.py says what they should be"
                        )
                    )
                except OSError as e:
                    raise SystemExit(
                        f"{args.out}: {e.strerror}; the same command goes on from here"
                    )
                bar.update(len(chunk))
                bar.set_postfix_str(
                    ", ".join(
                        f"{name} {size / 1e6:,.0f} MB" for name, size in state["bytes"].items()
                    )
                )
                if full or len(chunk) < CHUNK:
                    break
    for f in files.values():
        f.close()
    return state


def partial(out, name, size):
    """OUT/NAME.partial, open to go on behind its first `size` bytes."""
    path = os.path.join(out, name + ".partial")
    if size and (not os.path.exists(path) or os.path.getsize(path) < size):
        raise SystemExit(f"{path} is shorter than {out}/state.json says; remove that to begin anew")
    f = open(path, "r+b" if size else "wb")
    f.truncate(size)
    f.seek(size)
    return f


def finish(args, state, choose=None, tokenizer=None, itemsize=1):
    """Give a data folder's files their names, meta.json last. choose(rows, side, dropped): what is made of the rows that rows() reads;
    of streams the tokenizer, and the bytes of a token."""
    out, dropped, sizes, groups = args.out, dict(state["dropped"]), {"train": 0, "val": 0}, set()
    kind = next(iter(state["bytes"]), "train.jsonl").rpartition(".")[2]

    def must(sides):
        if not all(sides):
            os.remove(os.path.join(out, "state.json"))
            raise SystemExit(
                f"{name_of(args.hub, state['commit'])}: too few rows, one side of the split is empty; {said(dropped)}"
            )

    must(state["bytes"].get(f"{side}.{kind}") for side in sizes)
    if os.path.exists(os.path.join(out, "meta.json")):
        os.remove(os.path.join(out, "meta.json"))  # it speaks of what stood here before
    for side in sizes:
        path = os.path.join(out, f"{side}.{kind}")
        if kind == "jsonl":
            rows = functools.partial(read_lines, path + ".partial")
            write_rows(
                path,
                apart(
                    choose(rows, side, dropped) if choose else rows(), side, groups, sizes, dropped
                ),
            )
        elif os.path.exists(path + ".partial"):  # else a run before this one was killed right here
            os.replace(path + ".partial", path)
        if kind == "bin":
            sizes[side] = os.path.getsize(path) // itemsize
    must(sizes.values())
    unit = "rows" if kind == "jsonl" else "tokens"
    write_meta(
        out,
        tokenizer,
        name_of(args.hub, state["commit"]),
        **{f"{side}_{unit}": n for side, n in sizes.items()},
        dropped=dropped,
    )
    os.remove(os.path.join(out, "state.json"))
    for side in sizes:
        if kind == "jsonl":
            os.remove(os.path.join(out, f"{side}.jsonl.partial"))
    print(
        f"{out}: "
        + ", ".join(f"{n:,} {side} {unit}" for side, n in sizes.items())
        + f"; {said(dropped)}"
    )


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


def apart(rows, side, groups, sizes, dropped):
    """Rows as they come, counted; validation rows whose group is a training row's are left out: a published split need not be by group."""
    for row in rows:
        if side == "train":
            groups.add(row["group"])
        elif row["group"] in groups:
            drop(dropped, "validation rows whose group is in training too")
            continue
        sizes[side] += 1
        yield row


def said(dropped):
    return "dropped: " + (
        ", ".join(f"{n:,} {why}" for why, n in sorted(dropped.items())) or "nothing"
    )


# ---------------------------------------------------------------------------------------------- rows


def prepare_rows(args, parts, need, convert, choose=None):
    """A data folder of ranked rows. convert(row, dropped) -> the rows that one of the set's makes; a side of None is split by group."""

    def lines(chunk, side, dropped):
        for row in chunk:
            try:
                made = [check_row(m, "malformed rows") for m in convert(row, dropped)]
            except SystemExit as e:  # what check_row says is the reason
                made = drop(dropped, str(e))
            except (
                TypeError,
                ValueError,
                AttributeError,
                IndexError,
            ) as e:  # a null where a text should be
                made = drop(dropped, f"malformed rows: {type(e).__name__}")
            for m in made:
                yield (
                    f"{side or split_of(m['group'], args.val_share)}.jsonl",
                    (json.dumps(m, ensure_ascii=False) + "\n").encode(),
                )

    finish(args, collect(args, parts, need, lines), choose)


def drop(dropped, why, n=1):
    """Counts in place; returns the rows that are left: none."""
    dropped[why] = dropped.get(why, 0) + n
    return []


def ranked(prompt, answers, group, dropped, history=()):
    """[the ranked row] of [(response, score)] in any order, equal scores a tie; [] if fewer than two different responses are left.
    Texts lose the space around them; of equal responses the best stays."""
    best = {}
    for text, score in sorted(
        (a for a in answers if a[1] is not None and a[1] == a[1]), key=lambda a: -a[1]
    ):
        text = (text or "").strip()
        if not text:
            drop(dropped, "empty responses")
        elif text in best:
            drop(dropped, "responses that repeat a better one")
        else:
            best[text] = score
    if len(best) < 2:
        return drop(dropped, "rows without two different responses")
    return [
        {
            "prompt": prompt.strip(),
            "responses": list(best),
            "scores": list(best.values()),
            "group": group,
        }
        | ({"history": history} if history else {})
    ]


def transcript(text):
    """ "\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c" -> ([["a", "b"]], "c"): the history and the last prompt. None if the turns do not
    alternate from a human to a human, or one is empty."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    said = [part.strip() for part in parts[1::2]]
    if (
        before.strip()
        or parts[::2] != [("Human", "Assistant")[i % 2] for i in range(len(said))]
        or len(said) % 2 == 0
        or not all(said)
    ):
        return None
    return [list(pair) for pair in zip(said[:-1:2], said[1::2])], said[-1]
