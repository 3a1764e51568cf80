"""Data sets of the Hugging Face hub -> data folders. Rows are streamed and written as they arrive.

A data set is read at a fixed commit. A folder with its files (parquet or JSON lines, named as on
the hub) can be given instead of its id.

A preparation that was killed continues where it stopped. OUT/state.json holds the commit, the
number of rows read, and the number of bytes that they made of each OUT/FILE.partial; anything
after those bytes is cut off. At the end the files get their names, meta.json last.
"""

import contextlib
import hashlib
import itertools
import json
import os

from data import cli
from data.files import (
    STATE,
    check_output,
    is_there,
    printable,
    put_in_place,
    read_json,
    require_regular,
    write_json,
)
from data.folder import DATA_FILES, check_other_data, lock_folder, split_of, write_meta
from data.formats import (  # noqa: F401  # parse_transcript is for the prepare.py of a set
    best_answers,
    convert_checked,
    describe_dropped,
    drop,
    parse_transcript,
)
from data.hub.read import (
    compare_with_card,
    describe_folder,
    find_part,
    open_split,
    path_or_id,
    resolve_commit,
    rows_of_card,
    source_name,
)
from data.progress import ProgressBar
from data.rows import write_rows

CHUNK = 1000  # rows between two writes of state.json
START_AGAIN = "remove state.json and the .partial files to start again"


def argument_parser(doc: str, hub: str, script: str) -> cli.ArgumentParser:
    """The options that every prepare.py for a hub data set has.

    script: the prepare.py; its folder is the default of --out.
    """
    out = os.path.dirname(os.path.abspath(script))
    parser = cli.ArgumentParser(description=doc)
    parser.add_argument(
        "--hub",
        default=hub,
        help="id of the data set, or a folder with its files (default %(default)s)",
    )
    parser.add_argument(
        "--revision",
        help="commit or branch (default: the commit in data/hub, or main at the first run)",
    )
    parser.add_argument(
        "--rows",
        type=nonnegative_int,
        default=0,
        help="read only the first N rows of each split, for a trial; 0: all",
    )
    parser.add_argument("--out", default=out, help="data folder to write")
    return parser


def add_val_share(parser: cli.ArgumentParser, default: float):
    """The option for sets that have no validation split of their own."""
    parser.add_argument(
        "--val_share",
        type=cli.number_type(float, 0, 1),
        default=default,
        help="share of the groups that go to validation, by a hash of the group",
    )


nonnegative_int = cli.number_type(int, 0, 2**62)  # an argparse type


# ---- writing


@contextlib.contextmanager
def lock_output(args):
    """`lock_folder` for --out, if data may be written there."""
    if os.path.isdir(args.hub) and is_inside(args.out, args.hub):
        raise SystemExit(f"--out {args.out} is inside of --hub {args.hub}; choose another folder")
    check_output(os.path.join(args.out, "meta.json"), is_data=True)
    with lock_folder(args.out):
        yield


def collect(
    args, splits, fields, convert, config=None, max_bytes: int = 0, state: dict | None = None
) -> dict:
    """Read the splits of a data set and append their converted rows to OUT/FILE.partial, which the
    caller has locked (`lock_output`).

    splits: [(split on the hub, side)], side "train", "val", or None if `convert` decides.
    convert(rows, side, dropped) yields (file name, bytes) and counts what it leaves out in
    `dropped`, {reason: number}. max_bytes: stop when the files have so many bytes together; 0:
    never. state: that of `load_state`, if it is loaded already. Returns the state; state["part"]
    is the index of the current split.
    """
    state = state or load_state(args)
    if state["part"] == len(splits):  # all is read; only `finish` is missing
        return state
    path, _ = find_part(args.hub, config)
    is_part = path != path_or_id(args.hub)
    has_read = state["part"] or state["rows"]
    # A place among the rows of all parts would be another row of this part.
    if has_read and state.get("is_part", False) != is_part:
        raise SystemExit(
            f"{state_path(args)}: older code read all of {args.hub}, not only {config};"
            f" {START_AGAIN}"
        )
    state["is_part"] = is_part
    if not is_there(state_path(args)):
        check_partial(args.out)
        if os.path.isdir(args.hub):
            describe_folder(args.hub, config)
        write_json(state_path(args), state)  # from now on, such files are of this preparation
    files = {name: open_partial(args.out, name, size) for name, size in state["bytes"].items()}
    while state["part"] < len(splits):
        part = state["part"]
        split, side = splits[part]
        dataset, rows = open_split(args.hub, split, state["commit"], fields, config, state["place"])
        with split_progress(args, state, dataset, split) as progress:
            while state["part"] == part:
                size = min(CHUNK, args.rows - state["rows"]) if args.rows else CHUNK
                chunk = list(itertools.islice(rows, size))
                with one_line_errors(args):
                    pieces = convert(chunk, side, state["dropped"])
                    is_full = append_pieces(args.out, pieces, files, state, max_bytes)
                    state["rows"] += len(chunk)
                    state["read"] = state.get("read", 0) + len(chunk)
                    state["place"] = dataset.state_dict()
                    if is_full or len(chunk) < CHUNK:
                        if not is_full and not args.rows:
                            compare_with_card(dataset, split, state["rows"])
                        state["part"] = len(splits) if is_full else part + 1
                        state["rows"] = 0
                        state["place"] = None
                    write_json(state_path(args), state)
                progress.update(len(chunk))
                progress.set_postfix_str(describe_sizes(state["bytes"]))
    for f in files.values():
        f.close()
    return state


def is_inside(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def split_progress(args, state: dict, dataset, split: str) -> ProgressBar:
    """A progress bar over the rows of a split. The hub knows the total of some splits."""
    total = args.rows or rows_of_card(dataset, split)
    return ProgressBar(desc=split, unit=" rows", initial=state["rows"], total=total or None)


@contextlib.contextmanager
def one_line_errors(args):
    """What can go wrong with a chunk of rows, as one line."""
    try:
        yield
    except KeyError as e:
        raise SystemExit(
            printable(
                f"{args.hub}: its rows have no {e} inside;"
                " the header of the prepare.py describes what is expected"
            )
        )
    except OSError as e:
        raise SystemExit(f"{args.out}: {e.strerror}; the same command continues from here")


def state_path(args) -> str:
    return os.path.join(args.out, STATE)


def load_state(args) -> dict:
    """The state of a preparation that was begun with the same options, or a new one, also where
    `remove_state` was killed."""
    path = state_path(args)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    if os.path.isdir(args.hub):
        options["hub_files"] = describe_files(args.hub)
    if is_there(path):
        keys = ("asked", "commit", "part", "rows", "place", "bytes", "dropped")
        state = read_json(path, keys, f"; {START_AGAIN}")
        if state["asked"] is not None:
            check_options(path, state["asked"], options)
            return state
    return {
        "asked": options,
        "commit": resolve_commit(args.hub, args.revision),
        "part": 0,
        "rows": 0,
        "place": None,
        "bytes": {},
        "dropped": {},
    }


def check_options(path: str, begun: dict, options: dict):
    """Exit with one line if a preparation was begun with other options than those of now."""
    if begun == options:
        return
    named = {
        "hub_files": "other files in --hub",
        "tokenizer_sha256": "another --tokenizer",
        "document_begin": "a version that puts no beginning-of-text token before a document",
    }
    different = []
    for name in sorted(options | begun):
        if options.get(name) != begun.get(name):
            different.append(named.get(name, f"--{name}={begun.get(name)}"))
    raise SystemExit(
        f"{path}: this preparation was begun with {', '.join(different)};"
        f" continue with that, or {START_AGAIN}"
    )


def describe_files(folder: str) -> str:
    """A checksum of the names, sizes and times of a folder's files: other files are other rows."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            info = os.stat(os.path.join(parent, name))
            found.append((os.path.join(parent, name), info.st_size, info.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]


def check_partial(out: str):
    """Exit with one line if a file is there to which a new preparation would write, for example the
    unfinished samples of `sample.py`."""
    for path in partial_files(out):
        raise SystemExit(printable(f"{path} is not of this preparation: move it away"))


def partial_files(out: str) -> list[str]:
    """The .partial files in a folder."""
    paths = [os.path.join(out, f"{name}.partial") for name in DATA_FILES]
    return [path for path in paths if os.path.lexists(path)]


def open_partial(out: str, name: str, size: int):
    """Open OUT/NAME.partial to append after its first `size` bytes."""
    path = os.path.join(out, name + ".partial")
    if size and (not is_there(path) or os.path.getsize(path) < size):
        raise SystemExit(f"{path} is shorter than {out}/state.json says; {START_AGAIN}")
    require_regular(path)
    f = open(path, "r+b" if size else "wb")
    f.truncate(size)
    f.seek(size)
    return f


def append_pieces(out: str, pieces, files: dict, state: dict, max_bytes: int) -> bool:
    """Append (file name, bytes) pieces up to max_bytes, and sync. Returns whether it is reached."""
    is_full = False
    for name, piece in pieces:
        if name not in files:
            files[name] = open_partial(out, name, 0)
            state["bytes"][name] = 0
        files[name].write(piece)
        state["bytes"][name] += len(piece)
        if max_bytes and sum(state["bytes"].values()) >= max_bytes:
            is_full = True
            break
    for f in files.values():
        f.flush()
        os.fsync(f.fileno())
    return is_full


def describe_sizes(sizes: dict) -> str:
    return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items())


# ---- finishing


def finish_rows(args, state: dict, choose=None):
    """Write train.jsonl and val.jsonl from the .partial files, then meta.json.

    choose(rows, side, dropped) -> rows; rows() reads the rows of the side. It can select or merge
    rows. Validation rows whose group is also in training are dropped: a published split need not
    be by group.
    """
    dropped = dict(state["dropped"])
    sizes = {"train": 0, "val": 0}
    require_both_sides(args, state, "jsonl")
    train_groups = set()

    def kept_rows(side):
        def read_side():
            return read_partial(os.path.join(args.out, f"{side}.jsonl.partial"))

        for row in choose(read_side, side, dropped) if choose else read_side():
            if side == "train":
                train_groups.add(row["group"])
            elif row["group"] in train_groups:
                drop(dropped, "validation rows whose group is in training too")
                continue
            sizes[side] += 1
            yield row

    for side in sizes:
        write_rows(os.path.join(args.out, f"{side}.jsonl"), kept_rows(side))
    if not all(sizes.values()):
        too_few_rows(args, state, dropped)
    finish(args, state, None, "rows", sizes, dropped)


def finish_streams(args, state: dict, tokenizer_name: str, itemsize: int):
    """Rename the .partial token streams to train.bin and val.bin, then write meta.json."""
    sizes = {}
    require_both_sides(args, state, "bin")
    for side in ("train", "val"):
        path = os.path.join(args.out, f"{side}.bin")
        if is_there(path + ".partial"):  # else a run was killed after this line
            put_in_place(path + ".partial", path)
        sizes[side] = os.path.getsize(path) // itemsize
    if not all(sizes.values()):
        too_few_rows(args, state, state["dropped"])
    finish(args, state, tokenizer_name, "tokens", sizes, state["dropped"])


def finish(args, state: dict, tokenizer_name, unit: str, sizes: dict, dropped: dict):
    """Write meta.json, remove what the preparation continues from, and print the sizes."""
    details = {f"{side}_{unit}": n for side, n in sizes.items()}
    source = source_name(args.hub, state["commit"])
    write_meta(args.out, tokenizer_name, source, **details, dropped=dropped)
    remove_state(args, state)
    counts = ", ".join(f"{n:,} {side} {unit}" for side, n in sizes.items())
    read = f" of {state['read']:,} rows read" if "read" in state else ""
    print(f"{args.out}: {counts}{read}; {describe_dropped(dropped)}")


def require_both_sides(args, state: dict, extension: str):
    """Exit if a side of the split got nothing."""
    for side in ("train", "val"):
        if not state["bytes"].get(f"{side}.{extension}"):
            too_few_rows(args, state, state["dropped"])


def too_few_rows(args, state: dict, dropped: dict):
    remove_state(args, state)
    raise SystemExit(
        f"{source_name(args.hub, state['commit'])}: too few rows, one side of the split is empty;"
        f" {describe_dropped(dropped)}"
    )


def remove_state(args, state: dict):
    """Remove the .partial files, then state.json, without which they would be someone else's.

    Before that state.json gets no options: after a kill in between the next preparation, of
    whatever options, starts again.
    """
    paths = partial_files(args.out)
    if paths:
        write_json(state_path(args), state | {"asked": None})
    for path in [*paths, state_path(args)]:
        os.remove(path)


def read_partial(path: str):
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


# ---- rows


def prepare_rows(args, splits, fields, convert, choose=None, config=None, state=None):
    """Make a data folder of ranked rows. config: the part of a data set that has several. state:
    that of `load_state`, if it is loaded already.

    convert(row, dropped) -> the list of ranked rows that a row of the data set makes. A split
    with side None is divided by a hash of the group. choose: see `finish_rows`.
    """

    def to_json_lines(chunk, side, dropped):
        for row in chunk:
            for ranked_row in convert_checked(row, convert, dropped):
                target = side or split_of(ranked_row["group"], args.val_share)
                line = json.dumps(ranked_row, ensure_ascii=False) + "\n"
                yield f"{target}.jsonl", line.encode()

    check_other_data(args.out, (".jsonl",))
    with lock_output(args):
        state = collect(args, splits, fields, to_json_lines, config, state=state)
        finish_rows(args, state, choose)


def rank_responses(prompt: str, answers, group: str, dropped: dict, history=()) -> list[dict]:
    """Make a ranked row of [(response, score)] in any order; equal scores tie.

    Returns [row], or [] if fewer than two different responses are left. Responses without a score
    are dropped and counted. White space around texts is removed. Of equal responses the best is
    kept.
    """
    stripped = [((text or "").strip(), score) for text, score in answers]
    best = best_answers(stripped, dropped)
    if len(best) < 2:
        return drop(dropped, "rows without two different responses")
    row = {
        "prompt": prompt.strip(),
        "responses": list(best),
        "scores": list(best.values()),
        "group": group,
    }
    if history:
        row["history"] = history
    return [row]
