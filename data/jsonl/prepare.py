"""Local .jsonl or .jsonl.gz files -> ranked rows, or a token stream for pretraining.

    python -m data.jsonl.prepare sft.jsonl.gz --out=data/local_sft
    python -m data.jsonl.prepare pretrain.jsonl.gz --out=data/local --tokenizer=gpt2
    python -m data.jsonl.prepare ranked.jsonl.gz --out=data/ranked --where=source=stackexchange
    python -m data.jsonl.prepare ranked.jsonl.gz --out=data/pairs --authors=human,175b_verification

A line is {"text"}, {"prompt", "response"} or {"prompt", "responses"}. Responses are strings, best
first, or objects with "text" and "rank" (1 is best) or "score" (high is best); equal ones tie.
--authors picks one response of each named "author", in that order. "group" (else "url", else the
prompt or text) keeps rows of one origin on one side of the split. The optional fields of a ranked
row (data/__init__.py) are kept; other fields are left out, and named in a line.

Lines of other projects are recognised by the names of their fields: TRL's formats, ShareGPT,
Alpaca and others (docs/data.md), or by --prompt, --chosen and the like. Of these, lines that cannot
be used are counted by their reason. What is recognised is printed with the first row.

Writes train.jsonl and val.jsonl from lines with a prompt, and train.bin and val.bin from lines
with a text.
"""

import gzip
import os
import sys
import zlib
from collections import Counter

from data import cli, formats, tokenizer
from data.files import check_output, parse_json, printable
from data.folder import check_other_data, lock_folder, split_of, write_meta, write_stream
from data.progress import ProgressBar
from data.rows import check_row, is_unicode, prompt_key, write_rows

OUTPUTS = ("train.jsonl", "val.jsonl", "train.bin", "val.bin", "meta.json", "tokenizer.tiktoken")
MAX_LINE = 2**28  # characters
MAX_RATIO = 200  # unpacked size to size of a .gz file; text has 3 to 30


def read_lines(path):
    """Yield (file:line, object) for each line. Exits with the file, the line and what is wrong."""
    is_gzip = path.endswith(".gz")
    open_text = gzip.open if is_gzip else open
    try:
        limit = max(MAX_LINE, MAX_RATIO * os.path.getsize(path))
        with open_text(path, "rt", encoding="utf-8") as f:
            number = 0
            while line := f.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise SystemExit(
                        f"{path}:{number}: a line of more than {MAX_LINE:,} characters"
                    )
                if is_gzip and f.buffer.tell() > limit:
                    raise SystemExit(
                        f"{path}:{number}: unpacked it is more than {MAX_RATIO} times as large;"
                        " unpack it yourself if it is what you expect"
                    )
                if line.strip():
                    yield f"{path}:{number}", parse_line(line, f"{path}:{number}")
    except UnicodeDecodeError as e:
        raise SystemExit(f"{path}: not UTF-8: {e.reason}")
    except (OSError, EOFError, zlib.error) as e:
        raise SystemExit(f"{path}: {getattr(e, 'strerror', None) or e}")


def parse_line(line, where):
    try:
        value = parse_json(line)
    except (ValueError, RecursionError) as e:
        raise SystemExit(f"{where}: not JSON: {e}")
    if not isinstance(value, dict):
        advice = "; of an array make lines: jq -c '.[]' FILE" if isinstance(value, list) else ""
        raise SystemExit(f"{where}: not an object{advice}")
    return value


# Of the fields of a line, what a row keeps beside prompt, responses and group
GIVEN_PER_RESPONSE = ("scores", "ids", "tokenizer", "ended")
FIELDS = ("prompt", "response", "responses", "text", "group", "url", "history")


def to_row(value, where, authors=None):
    """A line with a prompt -> a ranked row, or None if one of the authors has no response."""
    if "response" in value and "responses" in value:
        raise SystemExit(f"{where}: a row has response or responses, not both")
    if "prompt" not in value or not {"response", "responses"} & value.keys():
        return check_row(value, where)  # says what is missing
    responses = value["responses"] if "responses" in value else [value["response"]]
    row = {"prompt": value["prompt"], "responses": responses}
    if value.get("history") is not None:
        row["history"] = value["history"]
    system = system_field(value)
    if value.get(system) is not None:
        row["system"] = value[system]
    given = {name: value[name] for name in GIVEN_PER_RESPONSE if value.get(name) is not None}
    are_objects = isinstance(responses, list) and all(isinstance(r, dict) for r in responses)
    if responses and are_objects:
        if given:
            raise SystemExit(
                f"{where}: {', '.join(given)} cannot stand beside responses that are objects; "
                "make the responses strings, best first"
            )
        if authors:
            responses = responses_of(authors, responses, where)
            if responses is None:
                return None
        else:
            responses, row["scores"] = sort_responses(responses, where)
        row["responses"] = [response.get("text") for response in responses]
        ended = [response.get("ended") for response in responses]
        if any(flag is not None for flag in ended):
            row["ended"] = ended
    elif authors:
        raise SystemExit(f"{where}: --authors needs responses that are objects with an author")
    else:
        check_order(value, responses, where)
        row |= given
    texts = row["responses"]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise SystemExit(f"{where}: a response must be a string, or an object with a text")
    return check_row(row, where)


def check_order(value, responses, where):
    """Exit with one line if a field beside strings, which are best first, may give another order.
    With scores there is no doubt."""
    if value.get("scores") is not None or not isinstance(responses, list) or len(responses) < 2:
        return
    for name in ("score", "rating", "reward", "rank", "ranks", "ranking"):
        numbers = value.get(name)
        if isinstance(numbers, list) and len(numbers) == len(responses):
            raise SystemExit(
                f"{where}: {name} is not read, and the responses are strings, best first. Call it "
                f"scores if high is best; if they are in order, leave {name} out"
            )


def to_document(value, where) -> str:
    """A line with a text -> the text, which ends in end-of-text in a stream."""
    row = check_row(value | {"group": None}, where)  # a number is a group, too, see `group_of`
    if row.get("ended") is False:
        raise SystemExit(f"{where}: ended is false, and every text of a stream ends; drop the line")
    return row["responses"][0]


def group_of(value, where, opening=None) -> str:
    """What keeps lines on one side of the split: group, else url, else the opening of the
    conversation, else the prompt or text."""
    group = value.get("group")
    if group is None:
        group = str(value.get("url") or opening or value.get("prompt") or value.get("text"))
    if isinstance(group, bool) or not isinstance(group, (str, int, float)):
        raise SystemExit(f"{where}: group must be a string or a number")
    group = str(group)
    if not is_unicode(group):
        raise SystemExit(f"{where}: group must be Unicode, without lone surrogates")
    return group


def system_field(value) -> str:
    """The field of a line with the system message, "" if it has none."""
    return formats.present(formats.SYSTEM + "?", value)


def ignored_fields(value) -> list[str]:
    """The names of the fields of a line that no row keeps."""
    kept = FIELDS + GIVEN_PER_RESPONSE + (system_field(value),)
    ignored = [name for name in value if name not in kept]
    responses = value.get("responses")
    objects = responses if isinstance(responses, list) else []
    objects = [response for response in objects if isinstance(response, dict)]
    used = ("text", "author", "ended", ranking_field(objects))
    for response in objects:
        ignored += [f"responses.{name}" for name in response if name not in used]
    return ignored


def training_texts(rows, texts):
    """What a tokenizer is trained on: every text of the training side."""
    yield from texts["train"]
    for row in rows["train"]:
        if row.get("system"):
            yield row["system"]
        for turn in row.get("history", []):
            yield from turn
        yield row["prompt"]
        yield from row.get("responses", [])


def responses_of(authors, responses, where):
    """The first response of each author, or None if one has none."""
    by_author = {}
    for response in responses:
        author = response.get("author")
        if isinstance(author, (list, dict)):
            raise SystemExit(f"{where}: an author must be a string")
        by_author.setdefault(author, response)
    if not all(author in by_author for author in authors):
        return None
    return [by_author[author] for author in authors]


def ranking_field(responses) -> str:
    """The field that response objects are sorted by: their rank if all have one."""
    return "rank" if all("rank" in response for response in responses) else "score"


def sort_responses(responses, where):
    """Sort response objects, best first. Returns (responses, scores); a rank r is the score -r."""
    key = ranking_field(responses)
    if any(type(response.get(key)) not in (int, float) for response in responses):
        raise SystemExit(
            f"{where}: every response object needs a text and a number as rank or score"
        )
    sign = -1 if key == "rank" else 1
    responses = sorted(responses, key=lambda response: -sign * response[key])
    return responses, [sign * response[key] for response in responses]


def main(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help=".jsonl or .jsonl.gz")
    parser.add_argument("--out", required=True, help="data folder to write")
    parser.add_argument("--where", help="KEY=PREFIX: only lines whose KEY starts with PREFIX")
    parser.add_argument(
        "--authors",
        help="comma-separated, best first: one response of each; rows that lack one are dropped",
    )
    parser.add_argument(
        "--tokenizer",
        help="gpt2 (default of a stream; rows need none), bytes, bpe (trained on the training"
        " texts), or a file (a .tiktoken, another model's tokenizer.json)",
    )
    parser.add_argument(
        "--vocab_size", type=cli.vocab_size_type, default=4096, help="vocabulary size of bpe"
    )
    parser.add_argument(
        "--val_share",
        type=cli.number_type(float, 0, 1),
        default=0.1,
        help="share of the groups that go to validation",
    )
    formats.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.where is not None and not args.where.partition("=")[1]:
        raise SystemExit(f"--where={args.where}: give KEY=PREFIX, such as --where=source=gsm8k")

    for name in OUTPUTS:
        check_output(os.path.join(args.out, name), args.files, is_data=True)
    if args.tokenizer and args.tokenizer != "bpe":
        tokenizer.load_for_data(args.tokenizer)  # exits before any work if it cannot
    with lock_folder(args.out):  # if it cannot be made, that is said before reading
        rows, texts, dropped, ignored = read_files(args)
        check_sides(args, rows, texts, dropped)
        written = {".bin": texts, ".jsonl": rows}
        check_other_data(args.out, tuple(kind for kind in written if any(written[kind].values())))
        sizes = {}
        tokenizer_name = args.tokenizer
        if tokenizer_name == "bpe":
            enc = tokenizer.train(training_texts(rows, texts), args.vocab_size)
            tokenizer.save_into(args.out, enc, "tokenizer.tiktoken")
            tokenizer_name = os.path.join(args.out, "tokenizer.tiktoken")
        if tokenizer_name or any(texts.values()):
            enc, tokenizer_name = tokenizer.load_into(args.out, tokenizer_name or "gpt2")
        if any(texts.values()):
            for side in ("train", "val"):
                documents = ProgressBar(texts[side], desc=f"{side}.bin")
                path = os.path.join(args.out, f"{side}.bin")
                sizes[f"{side}_tokens"] = write_stream(path, documents, enc)
        if any(rows.values()):
            for side in ("train", "val"):
                sizes[f"{side}_rows"] = len(rows[side])
                write_rows(os.path.join(args.out, f"{side}.jsonl"), rows[side])
        source = [os.path.basename(f) for f in args.files]
        details = {"dropped": dropped} if dropped else {}
        write_meta(args.out, tokenizer_name, source, **sizes, **details)
    summary = ", ".join(f"{n:,} {what}" for what, n in sizes.items())
    if dropped:
        summary += f"; {formats.describe_dropped(dropped)}"
    print(f"{args.out}: {summary}")
    if ignored:
        print(printable(formats.describe_ignored(ignored)))


def check_sides(args, rows, texts, dropped: dict):
    """Exit if no line is left, or none on one side of the split."""
    files = ", ".join(args.files)
    if not any(rows.values()) and not any(texts.values()):
        if dropped:
            raise SystemExit(f"{files}: no line is left; {formats.describe_dropped(dropped)}")
        if args.where:
            key, _, prefix = args.where.partition("=")
            raise SystemExit(f"{files}: no line has a {key} that starts with {prefix!r} (--where)")
        raise SystemExit(f"{files}: no line")
    for sides in (rows, texts):
        for side, other in (("train", "val"), ("val", "train")):
            if sides[other] and not sides[side]:
                raise SystemExit(
                    f"{files}: no row was assigned to {side} at --val_share={args.val_share}: the "
                    "split is by a hash of the group, and there are few groups; "
                    f"use a {'larger' if side == 'val' else 'smaller'} --val_share"
                )


def read_files(args):
    """Returns ({side: rows}, {side: texts}, {reason: how many were dropped}, {field that was
    ignored: how often})."""
    rows = {"train": [], "val": []}
    rated = []  # rows with one response and its score, to be merged
    texts = {"train": [], "val": []}
    dropped = {}
    ignored = Counter()
    known = {}  # columns: format
    first = {}  # format: (a line of it, its unused fields, the first row that it makes)
    num_lines = 0
    key, _, prefix = (args.where or "").partition("=")
    for path in args.files:
        for where, value in ProgressBar(read_lines(path), desc=os.path.basename(path)):
            if args.where and not str(value.get(key, "")).startswith(prefix):
                continue
            num_lines += 1
            columns = tuple(value)
            if columns not in known:
                known[columns] = formats.recognise(value, where, args)
            found = known[columns]
            is_text = found.is_ours and "text" in value
            is_ours = found.is_ours and (is_text or is_our_row(value) and not args.system)
            if is_ours:
                items, unused = (
                    our_items(value, where, is_text, args, dropped),
                    ignored_fields(value),
                )
            else:
                items = foreign_rows(value, where, found, args, dropped)
                unused = formats.unused_columns(found, value, args)
                # they decide the side; answers to one prompt may each have their own url
                groups = ("group",) if found.score else ("group", "url")
                unused = [name for name in unused if name not in groups]
            if items and found not in first:
                row = {"prompt": "", "responses": items} if is_text else items[0]
                first[found] = (value, unused, row)
            if found.score:
                rated += items
            elif is_text:
                texts[split_of(group_of(value, where), args.val_share)] += items
            else:
                for row in items:
                    rows[split_of(row["group"], args.val_share)].append(row)
            ignored.update(name for name in unused if name != key)
    for row in formats.merge_rated(rated, dropped):
        rows[split_of(row["group"], args.val_share)].append(row)
    print_recognised(first, rows["train"] + rows["val"])
    print(f"{num_lines:,} lines")
    return rows, texts, dropped, ignored


def is_our_row(value) -> bool:
    """Whether a line with prompt and response(s) has them in our form: not as messages, and not
    with the texts of objects under another name. What is wrong with our own form stops the
    command."""
    if formats.is_messages(value["prompt"]) or formats.is_messages(value.get("response")):
        return False
    responses = value.get("responses")
    first = responses[0] if isinstance(responses, list) and responses else None
    if not isinstance(first, dict) or "text" in first:
        return True
    return not first.keys() & set(formats.TEXT_KEYS)


def print_recognised(first: dict, rows: list[dict]):
    """Print each format with its first row, of rated responses with the row that they became."""
    for found, (line, unused, row) in first.items():
        if found.score:
            merged = (other for other in rows if prompt_key(other) == prompt_key(row))
            row = next(merged, row)
        print(formats.describe(found, line, unused, row))


def our_items(value, where, is_text: bool, args, dropped: dict) -> list:
    """The text or the row of a line of our own form. Exits with what is wrong with it."""
    if is_text:
        return [to_document(value, where)]
    row = to_row(value, where, args.authors.split(",") if args.authors else None)
    if row is None:
        return formats.drop(dropped, "rows that lack one of --authors")
    opening = row["history"][0][0] if row.get("history") else None
    return [row | {"group": group_of(value, where, opening)}]


def foreign_rows(value, where, found: formats.Format, args, dropped: dict) -> list[dict]:
    """The rows of a line of another project's form. What cannot be used is counted."""
    if args.authors:
        raise SystemExit(f"{where}: --authors needs responses that are objects with an author")

    def convert(line, counts):
        return formats.convert(line, found, counts, args)

    rows = formats.convert_checked(value, convert, dropped)
    if value.get("group") is not None or (value.get("url") and not found.score):
        rows = [row | {"group": group_of(value, where)} for row in rows]
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(main))
