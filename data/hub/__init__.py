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
import re

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
    listing,
    parse_transcript,
)
from data.progress import ProgressBar
from data.rows import write_rows

# The commits that other projects' code names for these sets. A set that is not listed is read at
# the commit that `main` is at in the first run; meta.json records it.
PINNED = {
    "Anthropic/hh-rlhf": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    "HuggingFaceFW/fineweb": "9bb295ddab0e05d785b879661af7260fed5140fc",
    "HuggingFaceFW/fineweb-edu": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "HuggingFaceH4/ultrachat_200k": "8049631c405ae6576f93f445c6b8166f76f5505a",
    "Skylion007/openwebtext": "b4325f019c648b1641a1784748667e8b74e5e064",
    "berkeley-nest/Nectar": "3c6b4c47fa1cc38869f9f32dce1699f7abad8b06",
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "openbmb/UltraFeedback": "40b436560ca83a8dba36114c22ab3c66e43f6d5e",
    "stanfordnlp/SHP": "e94b5f32602712d78ed494fe79105b1959396686",
    "trl-lib/tldr": "21233da376667088e6eb1ce4ce19ed832c2935d3",
}
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


# ---- reading


def read_error(hub: str, e: Exception) -> SystemExit:
    """One line for whatever `datasets` raises, which is whatever its HTTP client raises."""
    lines = str(e).splitlines()
    reason = f"{type(e).__name__}: {lines[0] if lines else ''}"
    return SystemExit(
        printable(
            f"{hub}: datasets could not read it ({reason});"
            " without a network give a folder with its files in place of the id"
        )
    )


def resolve_commit(hub: str, revision: str | None = None) -> str | None:
    """The commit to read a data set at, so that all runs read the same rows; None for a folder."""
    if os.path.isdir(hub):
        check_folder(hub)
        return None
    revision = revision or PINNED.get(hub, "main")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(hub, revision=revision).sha
    except Exception as e:
        raise read_error(hub, e)


def check_folder(folder: str):
    """Exit with one line if `datasets` would take the path of a folder for a pattern."""
    path = os.path.realpath(folder)
    if set(path) & set("*?[]"):
        raise SystemExit(
            printable(f"{path}: datasets takes * ? [ ] for patterns of names; rename the folder")
        )


def path_or_id(hub: str) -> str:
    """A data set as `datasets` takes it: a folder that is called json would be a type of files."""
    return os.path.abspath(hub) if os.path.isdir(hub) else hub


def config_names(hub: str, commit: str | None) -> list[str]:
    """The parts of a data set, ["default"] if it has no parts."""
    import datasets

    try:
        return datasets.get_dataset_config_names(path_or_id(hub), revision=commit)
    except Exception as e:
        raise read_error(hub, e)


def split_names(hub: str, config: str | None, commit: str | None) -> list[str]:
    import datasets

    try:
        return datasets.get_dataset_split_names(path_or_id(hub), config, revision=commit)
    except Exception as e:
        raise read_error(hub, e)


def unread_files(folder: str) -> list[str]:
    """The files of a folder that are in no split, but for its card. `datasets` reads files of one
    type, and only those that are named after splits if there are any."""
    import datasets

    folder = os.path.realpath(folder)
    card = os.path.join(folder, "README.md")
    read = {os.path.realpath(card)}  # in a snapshot of the hub's cache files are links
    for name in config_names(folder, None):
        try:
            builder = datasets.load_dataset_builder(folder, name if os.path.exists(card) else None)
        except Exception:  # a copy of one part has no files of the others
            continue
        for paths in builder.config.data_files.values():
            read.update(os.path.realpath(path) for path in paths)
    paths = visible_files(folder)
    return [path for path in paths if os.path.realpath(os.path.join(folder, path)) not in read]


def visible_files(folder: str) -> list[str]:
    """The paths of the files below a folder, without hidden ones, as those of git and of downloads.
    A link to a folder is one path, because `datasets` does not follow it."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in names + links:
            if not name.startswith("."):
                found.append(os.path.relpath(os.path.join(parent, name), folder))
    return sorted(found)


def missing_shards(folder: str) -> list[str]:
    """The names, as NAME-00001-of-00002, of files that others of a folder say there are."""
    numbers = {}  # {(before the number, total, ending): numbers of the files that are there}
    for path in visible_files(folder):
        shard = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(?:-\w+)?(\..*)", path)  # may have a hash
        if shard:
            start, number, total, end = shard.groups()
            numbers.setdefault((start, total, end), set()).add(int(number))
    missing = []
    for (start, total, end), found in numbers.items():
        for number in range(int(total)):
            if number not in found:
                missing.append(f"{start}{number:05}-of-{total}{end}")
    return missing


def describe_folder(folder: str, config: str | None = None):
    """Print which files of a folder are in which split, are not read, and are missing. `datasets`
    puts all whose names have the word train into one split, train_sft and train_prefs too."""
    import datasets

    path, config = find_part(folder, config)
    try:
        splits = datasets.load_dataset_builder(path, config).config.data_files
    except Exception as e:
        raise read_error(folder, e)
    for split, files in splits.items():
        names = sorted(os.path.relpath(name, os.path.realpath(folder)) for name in files)
        text = f"split {split}: {len(names):,} files, {names[0]} to {names[-1]}"
        print(printable(text if len(names) > 1 else f"split {split}: {names[0]}"))
    for what, names in (
        ("files in no split, not read", unread_files(folder)),
        ("files that are missing", missing_shards(folder)),
    ):
        if names:
            print(printable(f"{what} ({len(names):,}): {listing(names)}"))


def source_name(hub: str, commit: str | None) -> str:
    """The source as meta.json names it."""
    return f"{hub} @ {commit}" if commit else os.path.basename(os.path.abspath(hub))


def open_split(hub: str, split: str, commit, fields, config=None, position=None):
    """Open a split for streaming. Returns (dataset, iterator over its rows).

    fields: names that the first row must have. position: a dataset.state_dict() to continue from.
    Exits with one line if the split cannot be read.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it retries for 20 seconds; we print one line
    path, config = find_part(hub, config)
    try:
        dataset = datasets.load_dataset(path, config, split=split, revision=commit, streaming=True)
        if position:
            dataset.load_state_dict(position)
    except Exception as e:
        raise read_error(hub, e)
    return dataset, iterate(hub, dataset, fields)


def find_part(hub: str, config: str | None) -> tuple[str, str | None]:
    """(path, config) to load one part of a data set. A folder's card defines its parts; without a
    card a part is the sub-folder of its name, or all files if there is none."""
    path = path_or_id(hub)
    if not config or not os.path.isdir(path) or os.path.exists(os.path.join(path, "README.md")):
        return path, config
    part = os.path.join(path, config)
    return (part if os.path.isdir(part) else path), None


def iterate(hub: str, dataset, fields):
    """The rows of a dataset, with errors as one line; the first row must have the fields."""
    rows = iter(dataset)
    is_first = True
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:
            raise read_error(hub, e)
        if is_first:
            check_fields(hub, row, fields)
            is_first = False
        yield row


def check_fields(hub: str, row: dict, fields):
    missing = [name for name in fields if name not in row]
    if missing:
        raise SystemExit(
            printable(
                f"{hub}: its rows have no {', '.join(missing)}; they have {', '.join(row)},"
                f" and {', '.join(fields)} are needed"
            )
        )


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


def rows_of_card(dataset, split: str) -> int:
    """How many rows a split has by the card of the data set; 0 if it does not say."""
    splits = dataset.info.splits or {}
    if split not in splits:
        return 0
    return splits[split].num_examples or 0


def compare_with_card(dataset, split: str, num_rows: int):
    """Print a line if a split that was read to its end has another number of rows than its card
    says: a copy may be incomplete."""
    expected = rows_of_card(dataset, split)
    if expected and num_rows != expected:
        print(f"split {split} has {num_rows:,} rows, and {expected:,} by the data set's card")


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
    named = {"hub_files": "other files in --hub", "tokenizer_sha256": "another --tokenizer"}
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
