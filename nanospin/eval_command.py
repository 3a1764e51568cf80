"""The command line of eval.py: its arguments, the checkpoints that it measures, and its files."""

import argparse
import os
import re
from dataclasses import dataclass, field

from data import cli
from data.files import check_output, is_there, printable, read_json, sha256, write_json
from data.rows import ended_flags, prompt_fields, read_rows, sampled_row, shared_rows, write_rows
from nanospin import checkpoint

DATA = "data/pydocs"
FILES = "eval_files.json"  # names the players whose samples are in --out
ROWS = 256
ROWS_WITHOUT_LIMITS = 64  # if a checkpoint has no limits of its own
DEFAULT_LIMITS = {"max_prompt": 1024, "max_response": 256}  # in tokens, for such a checkpoint


# ------------------------------------------------------------------------------ arguments


def make_parser(description: str) -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=description)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="[NAME=]CHECKPOINT[@TEMPERATURE]",
        help="name in the table (default: the folder's), a run folder or checkpoint, and the "
        "sampling temperature (1)",
    )
    parser.add_argument(
        "--data",
        help="folder with val.jsonl, or a .jsonl file; default: the data of the first checkpoint, "
        f"else {DATA}",
    )
    parser.add_argument(
        "--rows",
        type=cli.number_type(int, 1),
        help=f"held-out rows; default: {ROWS}, with a checkpoint without limits "
        f"{ROWS_WITHOUT_LIMITS}, with --logps all",
    )
    for name, default in DEFAULT_LIMITS.items():
        parser.add_argument(
            f"--{name}",
            type=cli.number_type(int, 0),
            help="most tokens; 0: block_size; default: the checkpoint's own limit, without one "
            f"{default}",
        )
    parser.add_argument(
        "--logps",
        action="store_true",
        help="only write the log-probability and the tokens of every response of --data, in its "
        "order, as JSON lines",
    )
    parser.add_argument(
        "--judge",
        help="checkpoint; reports the win rate of every checkpoint, and of the data, against the "
        "samples of the first",
    )
    parser.add_argument(
        "--reference",
        help="checkpoint; reports ranking metrics of the data's responses, with implicit rewards "
        "against it",
    )
    parser.add_argument(
        "--beta", type=cli.number_type(float, 0), default=0.1, help="of those implicit rewards"
    )
    parser.add_argument(
        "--samples",
        type=cli.number_type(int, 1, 1024),
        default=1,
        help="samples a prompt, unless greedy: exact match is their mean; also pass_at_N",
    )
    parser.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="a scorer, as in ranked_by; also the samples' mean score, and that of the best of N",
    )
    parser.add_argument(
        "--out",
        help="folder for eval.json and the samples; FILE.json: only the table; with --logps "
        "FILE.jsonl (default: standard output)",
    )
    parser.add_argument(
        "--seed",
        type=cli.number_type(int, 0, cli.MAX_SEED - 1000),
        default=0,
        help="of sampling; the n-th checkpoint takes seed + n",
    )
    cli.add_dtype(parser)
    parser.add_argument(
        "--device", type=cli.device_type, default=cli.default_device(), help="cpu or cuda"
    )
    return parser


def parse_checkpoints(specs: list[str]) -> dict[str, tuple[str, float]]:
    """[NAME=]CHECKPOINT[@TEMPERATURE] arguments -> {name: (checkpoint, temperature)}. Without a
    name it is that of the folder. If there is a folder of the name CHECKPOINT@TEMPERATURE, it is
    that one, at temperature 1."""
    checkpoints = {}
    for spec in specs:
        found = re.fullmatch(r"(?:([\w.@-]+)=)?(.+?)(?:@([0-9.][0-9.e+-]*))?", spec)
        path, temperature = found.group(2, 3) if found else ("", None)
        if temperature and os.path.isdir(f"{path}@{temperature}"):
            path, temperature = f"{path}@{temperature}", None
        name = found and (found[1] or os.path.basename(os.path.abspath(path)))
        if not name or name in checkpoints or name == "data" or not re.fullmatch(r"[\w.@-]+", name):
            raise SystemExit(
                f"{spec!r}: give a checkpoint as NAME=CHECKPOINT or NAME=CHECKPOINT@TEMPERATURE, "
                "each NAME once and none of them data"
            )
        try:
            temperature = cli.temperature_type(temperature or "1")
        except argparse.ArgumentTypeError as e:
            raise SystemExit(f"{spec!r}: the temperature {e}")
        checkpoints[name] = (checkpoint.resolve(path), temperature)
    return checkpoints


def find_rows(args, metas: list[dict]) -> str:
    """The file of the rows: --data, else the data of the first checkpoint that has held-out rows,
    else DATA."""
    folder = args.data
    if not folder:
        folders = [data_of(meta) for meta in metas]
        there = [path for path in folders if path and is_there(f"{path}/val.jsonl")]
        folder = there[0] if there else DATA
    return folder if folder.endswith(".jsonl") else f"{folder}/val.jsonl"


def data_of(meta: dict) -> str:
    """The data folder of a run, or of the run that an adapter was merged into. "" of an imported
    model: its setting is the default."""
    while meta is not None and meta["step"] == 0 and "base" in meta:
        meta = checkpoint.read_meta_of_init(meta)
    return meta["config"]["data"] if meta is not None and meta["step"] > 0 else ""


# ---------------------------------------------------------------------------- checkpoints


@dataclass
class Entry:
    """A checkpoint to measure."""

    path: str
    temperature: float
    meta: dict
    enc: object
    limits: dict  # how it encodes rows: arguments of `encode_rows`
    counts: dict = field(default_factory=dict)  # of what is cut and not ranked, for eval.json


def read_entry(name: str, path: str, temperature: float, args) -> Entry:
    """Read what a checkpoint says of itself. Limits of the command line come before its own. Where
    it has none, such as an imported model, and a long block_size, DEFAULT_LIMITS keep sampling
    short; log-probabilities alone need no limits."""
    meta = checkpoint.read_meta(path)
    block_size = meta["model"]["block_size"]
    limits = {"template": meta["config"]["template"], "block_size": block_size}
    samples_nothing = args.logps or meta["config"]["stage"] == "reward"
    has_default = False
    for limit, default in DEFAULT_LIMITS.items():
        given = getattr(args, limit)
        limits[limit] = meta["config"][limit] if given is None else given
        if given is None and not limits[limit] and block_size > default and not samples_nothing:
            limits[limit] = default
            has_default = True
    entry = Entry(path, temperature, meta, checkpoint.read_tokenizer(path, meta), limits)
    if has_default:
        args.rows = args.rows or ROWS_WITHOUT_LIMITS
        print(
            f"{name} has no limits of its own: prompts of at most"
            f" {limits['max_prompt'] or block_size} tokens, responses of"
            f" {limits['max_response'] or block_size}, {args.rows} rows; others: --max_prompt,"
            " --max_response, --rows"
        )
    return entry


# ------------------------------------------------------------------- what it was trained on


def say_trained_on(entries: dict[str, Entry], rows: list[dict]):
    """Say how many of the rows a checkpoint was trained on, or what it began with, and note it in
    its counts if that is known. A run knows it of its own held-out rows; those of another run may
    be among its training rows."""
    names_by_files = {}
    for name, entry in entries.items():
        files, unknown = training_files(entry.meta)
        key = tuple(files), tuple(dict.fromkeys(unknown))
        names_by_files.setdefault(key, []).append(name)
    for (files, unknown), names in names_by_files.items():
        train = []
        try:
            for path in files:
                train += read_rows(path, prompt_only=True)
        except SystemExit as e:
            unknown = (*unknown, str(e))
        shared = shared_rows(train, rows)
        if unknown:
            print(
                f"the training rows of {', '.join(names)} are not all known: "
                f"{printable('; '.join(unknown))}"
            )
        elif files:
            for name in names:
                entries[name].counts["rows_trained_on"] = len(shared)
        if shared:
            print(
                f"warning: {len(shared)} of {len(rows)} rows are in the training files of "
                f"{', '.join(names)} too (the same prompt in {printable(', '.join(files))})"
            )


def training_files(meta: dict) -> tuple[list[str], list[str]]:
    """The files of training rows of a checkpoint, and of those that it began with, as they were
    then; and why others are not known. meta: its meta.json."""
    files, unknown, seen = [], [], set()
    while True:
        if meta["step"] > 0 and meta["config"]["stage"] != "pretrain":
            path = os.path.join(meta["config"]["data"], "train.jsonl")
            expected = meta.get("settings", {}).get("data_sha256", {}).get("train.jsonl")
            problem = problem_of(path, expected)
            if problem:
                unknown.append(f"{path} {problem}")
            elif path not in files:
                files.append(path)
        if "adapter" in meta:
            unknown.append(f"{meta['adapter']} was merged into it")
        before = checkpoint.path_of_init(meta)
        if not before or before in seen:  # two runs can have begun with each other
            return files, unknown
        seen.add(before)
        meta = checkpoint.read_meta_of_init(meta)
        if meta is None:
            unknown.append(f"{before} cannot be read, or is another checkpoint now")
            return files, unknown


def problem_of(path: str, expected: str | None) -> str:
    """Why a file is not the one of then; "" if it is. expected: its sha256, None if not known."""
    try:
        if not is_there(path):
            return "is not there"
        if expected and sha256(path) != expected:
            return "was changed since"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    return ""


# ---------------------------------------------------------------------------------- files


def is_table(out: str) -> bool:
    """Whether --out is the file of the table, rather than a folder."""
    return out.endswith(".json") and not os.path.isdir(out)


def settings_of(args) -> dict:
    """The options that change what is measured, as eval.json has them."""
    left_out = ("checkpoints", "data", "out", "logps", "device")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return settings | {"dtype": str(args.dtype).removeprefix("torch.")}


def check_table(path: str, rows_path: str, entries: dict[str, Entry], settings: dict):
    """Exit with one line if eval.py must not write its table to `path`: an earlier one there has
    metrics that this command does not measure again, under the same settings. Makes the folder."""
    make_folder(os.path.dirname(path))
    check_output(path, [rows_path])
    if not is_there(path):
        return
    for name, row in read_table(path).items():
        if row.get("against", next(iter(entries))) != next(iter(entries)):
            raise SystemExit(
                f"{path} has win rates against {row['against']}, which is not this command's first "
                "checkpoint: move it away, or give another --out"
            )
        if name == "data":
            continue
        measured = None
        if name in entries:
            measured = (entries[name].path, entries[name].temperature, rows_path)
        if (row.get("checkpoint"), row.get("temperature"), row.get("data")) != measured:
            raise SystemExit(
                f"{path} has metrics of {name}, {row.get('checkpoint')} on {row.get('data')}, "
                "which this command does not measure: move it away, or give another --out"
            )
        if row.get("settings", settings) != settings:
            raise SystemExit(
                f"{path} has metrics of {name} under other settings than those of this command: "
                "move it away, or give another --out"
            )


def check_folder(out: str, rows_path: str, entries: dict[str, Entry], settings: dict):
    """Exit with one line if eval.py must not write to a folder. Makes the folder."""
    players = ["data", *entries]
    make_folder(out)
    for name in ("config.json", "collect.json", "manifest.json", "meta.json"):
        if is_there(os.path.join(out, name)):
            raise SystemExit(
                f"--out {out} has a {name}: it is a run's or a data folder; give another"
            )
    samples = [f"{player}.jsonl" for player in players]
    for name in (FILES, *samples):
        check_output(os.path.join(out, name), [rows_path])
    check_replaced(out, players)
    check_table(os.path.join(out, "eval.json"), rows_path, entries, settings)


def make_folder(folder: str):
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as e:
        raise SystemExit(f"--out {folder}: {e.strerror}")


def check_replaced(out: str, players: list[str]):
    """Exit with one line if a file would be replaced that an earlier eval.py did not write."""
    earlier = earlier_players(out)
    for player in players:
        path = os.path.join(out, f"{player}.jsonl")
        if is_there(path) and player not in earlier:
            raise SystemExit(
                f"{path} is there, and is not of an earlier eval.py in that folder: move it, or "
                "give another --out"
            )


def earlier_players(out: str) -> list[str]:
    """The players whose samples earlier commands wrote, or began to write, to a folder."""
    table, files = os.path.join(out, "eval.json"), os.path.join(out, FILES)
    earlier = ["data", *read_table(table)] if is_there(table) else []
    if is_there(files):
        players = read_json(files).get("players")
        if not isinstance(players, list):
            raise SystemExit(f"{files}: eval.py did not write it; give another --out")
        earlier += players
    return earlier


def name_players(out: str, players: list[str]):
    """Note whose samples are in a folder, before they are written: the same command can be run
    again after an interruption, or after others."""
    players = sorted({*earlier_players(out), *players})
    write_json(os.path.join(out, FILES), {"players": players})


def read_table(path: str) -> dict[str, dict]:
    """{name: metrics} of a table. Exits with one line if eval.py did not write the file."""
    advice = ": eval.py did not write it; give another --out"
    table = read_json(path, advice=advice)
    rows = [row for row in table.values() if isinstance(row, dict)]
    if len(rows) < len(table) or not any("checkpoint" in row for row in rows):
        raise SystemExit(f"{path} names no checkpoint{advice}")
    return table


def write_samples(path: str, rows: list[dict], answers: dict, enc, template: str):
    """A player's answers as a ranked file. answers: {number of the row: (text, ids)}. enc: the
    tokenizer of the ids; None: the data, whose texts have none. template: of the samples."""
    answered = []
    for i, (text, ids) in answers.items():
        row = rows[i]
        if enc is None:
            its_end = {"ended": False} if ended_flags(row)[0] is False else {}
            answered.append(prompt_fields(row) | {"responses": [text]} | its_end)
        else:
            answered.append(sampled_row(row, text, ids, enc, template))
    write_rows(path, answered)
