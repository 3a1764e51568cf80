"""Read a data set with `datasets`: from the hub at a fixed commit, or from a folder with its files.

`datasets` decides by names which files of a folder are in which split. What it reads is printed,
and so is what it leaves out.
"""

import os
import re

from data.files import printable
from data.formats import listing

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


def source_name(hub: str, commit: str | None) -> str:
    """The source as meta.json names it."""
    return f"{hub} @ {commit}" if commit else os.path.basename(os.path.abspath(hub))


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


# ---- folders


def path_or_id(hub: str) -> str:
    """A data set as `datasets` takes it: a folder that is called json would be a type of files."""
    return os.path.abspath(hub) if os.path.isdir(hub) else hub


def check_folder(folder: str):
    """Exit with one line if `datasets` would take the path of a folder for a pattern."""
    path = os.path.realpath(folder)
    if set(path) & set("*?[]"):
        raise SystemExit(
            printable(f"{path}: datasets takes * ? [ ] for patterns of names; rename the folder")
        )


def find_part(hub: str, config: str | None) -> tuple[str, str | None]:
    """(path, config) to load one part of a data set. A folder's card defines its parts; without a
    card a part is the sub-folder of its name, or all files if there is none."""
    path = path_or_id(hub)
    if not config or not os.path.isdir(path) or os.path.exists(os.path.join(path, "README.md")):
        return path, config
    part = os.path.join(path, config)
    return (part if os.path.isdir(part) else path), None


def describe_folder(folder: str, config: str | None = None):
    """Print which files of a folder are in which split, are not read, and are missing. `datasets`
    puts all whose names have the word train into one split, train_sft and train_prefs too."""
    import datasets

    path, config = find_part(folder, config)
    try:
        splits = datasets.load_dataset_builder(path, config).config.data_files
    except Exception as e:
        raise read_error(folder, e)
    root = os.path.realpath(folder)
    read = []
    for split, files in splits.items():
        names = sorted(os.path.relpath(name, root) for name in files)
        read += names
        text = f"split {split}: {len(names):,} files, {names[0]} to {names[-1]}"
        print(printable(text if len(names) > 1 else f"split {split}: {names[0]}"))
    unread = [os.path.relpath(name, root) for name in unread_files(path)]
    there = [os.path.relpath(name, root) for name in visible_files(root)]
    for what, names in (
        ("files in no split, not read", unread),
        ("files that are missing", missing_shards(read, read + there)),
    ):
        if names:
            print(printable(f"{what} ({len(names):,}): {listing(names)}"))


def unread_files(folder: str) -> list[str]:
    """The paths of a folder's files that are in no split, but for its card. `datasets` reads files
    of one type, and only those that are named after splits if there are any."""
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
            read.update(os.path.realpath(os.path.dirname(path)) for path in paths)  # may be a link
    return [path for path in visible_files(folder) if os.path.realpath(path) not in read]


def visible_files(folder: str) -> list[str]:
    """The paths of the files below a folder, without hidden ones, as those of git and of downloads.
    A link to a folder is one path, because `datasets` does not follow it."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in names + links:
            if not name.startswith("."):
                found.append(os.path.join(parent, name))
    return sorted(found)


def missing_shards(read: list[str], there: list[str]) -> list[str]:
    """The files, such as NAME-00001-of-00002, that belong to those of `read` and are not there."""
    numbers = {}  # {series: numbers of the files that are there}
    for path in there:
        series, number = shard_of(path)
        numbers.setdefault(series, set()).add(number)
    missing = []
    all_series = [shard_of(path)[0] for path in read]
    for series in dict.fromkeys(all_series):
        if series:
            start, total, end = series
            for number in range(int(total)):
                if number not in numbers.get(series, ()):
                    missing.append(f"{start}{number:05}-of-{total}{end}")
    return missing


def shard_of(path: str) -> tuple[tuple | None, int]:
    """(series, number) of a file that is one of several, as its name says. series: what stands
    before the number, the total, and the ending; None of another file."""
    shard = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(?:-\w+)?(\..*)", path)  # may have a hash
    if not shard:
        return None, 0
    start, number, total, end = shard.groups()
    return (start, total, end), int(number)
